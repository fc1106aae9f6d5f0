"""What a machine is taken to compute with, and that a process holds one model."""

import weakref

import pytest
from machines import A10, H100, P100, T4, V100

from stackllm.llm import machine
from stackllm.llm.backbone import frozen_model
from stackllm.llm.machine import choose_dtype, compute_dtype, gpus, matrix_products
from stackllm.llm.resident import release, resident


@pytest.mark.parametrize(
    ("seen", "dtype", "because"),
    [
        ((T4,), "float16", "Tesla T4 has no bfloat16"),
        ((T4, T4), "float16", "Tesla T4"),
        ((P100,), "float16", "P100"),
        ((V100,), "float16", "V100"),
        ((A10,), "bfloat16", "A10G computes"),
        ((H100,), "bfloat16", "H100"),
        ((H100, T4), "float16", "Tesla T4"),  # units go to either, and their numbers must not tell
    ],
)
def test_halves_are_what_every_gpu_computes_in(pretend_gpus, seen, dtype, because):
    pretend_gpus(*seen)
    assert gpus() == seen
    chosen, reason = choose_dtype("auto")
    assert chosen == dtype
    assert because in reason
    assert compute_dtype("nf4") == compute_dtype("int8") == dtype
    assert compute_dtype("float32") == "float32"


@pytest.mark.parametrize(
    "silent",
    [(), ("get_device_properties",), ("device_count", "get_device_properties", "get_device_name")],
)
@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_a_gpu_that_does_not_tell_all_is_used_for_what_it_tells(
    monkeypatch, silent, capability, dtype
):
    import torch

    answers = {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "a card",
        "get_device_capability": capability,
        "get_device_properties": type("Properties", (), {"total_memory": 15}),
    }
    for name, answer in answers.items():
        if name not in silent:
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert [gpu.capability for gpu in gpus()] == [capability]
    assert choose_dtype("auto")[0] == dtype
    assert machine.free_memories() == (None,)


def test_a_gpu_that_does_not_answer_gets_no_bfloat16(monkeypatch):
    import torch

    def busy():
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", busy)
    assert choose_dtype("auto") == ("float16", "GPU 0 has no bfloat16 in hardware")
    assert machine.free_memories() == (None,)


def test_gpus_that_are_pretended_hold_no_tensors(pretend_gpus):
    pretend_gpus(H100)
    assert machine.device().type == "cpu"


@pytest.mark.parametrize(
    ("precision", "rounding"),
    [("float16", "high"), ("bfloat16", "high"), ("float32", "highest"), ("nf4", "high")],
)
def test_float32_products_are_rounded_where_weights_are_halves(
    monkeypatch, pretend_gpus, precision, rounding
):
    import torch

    pretend_gpus(T4)
    before = torch.get_float32_matmul_precision()
    with matrix_products(precision):
        assert torch.get_float32_matmul_precision() == before  # on a CPU nothing changes
    monkeypatch.setattr(machine, "device", lambda: torch.device("cuda", 0))
    torch.set_float32_matmul_precision("medium")
    try:
        with matrix_products(precision):
            assert torch.get_float32_matmul_precision() == rounding
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


class Model:
    """A model that holds itself, as those of transformers do."""

    def __init__(self):
        self.itself = self


def test_a_process_holds_one_model_and_none_while_another_is_loaded():
    alive = []

    def load():
        assert all(model() is None for model in alive)
        model = Model()
        alive.append(weakref.ref(model))
        return model

    assert resident("a", load) is resident("a", load)
    resident("b", load)
    resident("a", load)
    assert len(alive) == 3
    release()
    assert all(model() is None for model in alive)


def test_a_load_that_fails_leaves_nothing_and_may_be_tried_again():
    alive = []

    def fail():
        model = Model()
        alive.append(weakref.ref(model))
        raise MemoryError("while loading")

    resident("a", Model)
    for _ in range(2):
        with pytest.raises(MemoryError, match="while loading"):
            resident("b", fail)
    assert isinstance(resident("b", Model), Model)
    assert all(model() is None for model in alive)
    release()


def test_backbones_take_the_place_of_one_another(make_backbone, copies):
    one, other = make_backbone("llama", 2), make_backbone("qwen2", 2)
    release()
    for name, precision in (
        (one, "float32"),
        (one, "float32"),
        (other, "float32"),
        (one, "bfloat16"),
    ):
        frozen_model(name, precision)
    assert copies == [1, 1, 1]
    release()
