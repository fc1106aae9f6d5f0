"""Which errors are about memory, what a failed pass leaves behind, and what is said where a model does not fit."""

import errno
import weakref

import numpy as np
import pytest
import torch
from machines import T4

from stackllm.errors import StorageError, UsageError
from stackllm.llm import memory
from stackllm.llm.backbone import frozen_model, load_model
from stackllm.llm.memory import is_out_of_memory, within_memory
from stackllm.llm.resident import release

ABOUT_MEMORY = [
    torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in …"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    RuntimeError("Error out of memory at line 90 in file /src/csrc/ops.cu"),
    RuntimeError("cudaErrorMemoryAllocation"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you …"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ValueError("Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM"),
    MemoryError(),
]  # fmt: skip


@pytest.mark.parametrize("error", ABOUT_MEMORY, ids=lambda it: str(it)[:30])
def test_whoever_says_so_is_understood(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        StorageError("out of memory with one text at a time"),  # nothing is to be tried again
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
    ],
    ids=lambda it: str(it)[:30],
)
def test_other_errors_are_other_errors(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(("free", "meant"), [(2**26, True), (2**33, False)])
@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "cublasLt ran into an error!\n\tshapeA=…",
    ],
)
def test_words_of_many_meanings_mean_memory_where_it_is_short(monkeypatch, words, free, meant):
    monkeypatch.setattr(memory, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    assert is_out_of_memory(RuntimeError(words)) == meant


def test_a_failed_pass_is_freed_before_the_next_and_from_the_sentence():
    passes = []

    def read(most):
        assert all(it() is None for it in passes)
        tensor = torch.ones(most)
        passes.append(weakref.ref(tensor))
        try:
            raise RuntimeError("something else first")
        except RuntimeError:
            raise torch.OutOfMemoryError("this device is small")  # noqa: B904

    with pytest.raises(StorageError, match="one text at a time") as caught:
        within_memory(9, 4, read)
    assert len(passes) == 3
    assert all(it() is None for it in passes)
    assert caught.value.__cause__ is not None


def test_what_fitted_once_is_where_the_next_shard_begins():
    model, other, tried = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), []

    def read(most):
        tried.append(most)
        if most > 30:
            raise torch.OutOfMemoryError("this device is small")
        return most

    assert within_memory(9, 100, read, model) == within_memory(9, 100, read, model) == 25
    assert tried == [100, 50, 25, 25]
    assert within_memory(9, 64, read, other) == 16
    assert within_memory(9, 100, read) == 25
    assert tried[4:] == [64, 32, 16, 100, 50, 25]


@pytest.mark.parametrize("devices", [(), (T4,), (T4, T4)], ids=len)
@pytest.mark.parametrize("error", ABOUT_MEMORY[:4], ids=lambda it: str(it)[:30])
def test_memory_that_runs_out_while_loading_is_a_sentence(
    make_backbone, monkeypatch, pretend_gpus, devices, error
):
    from transformers import PreTrainedModel

    name = make_backbone("llama", 2)
    release()
    pretend_gpus(*devices)
    held = []

    def load(cls, *args, **options):
        weights = torch.ones(9)
        held.append(weakref.ref(weights))
        raise error

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))
    with pytest.raises(StorageError, match="out of memory while it was loaded") as caught:
        frozen_model(name, "float32")
    said = str(caught.value)
    assert f'backbone "{name}"' in said
    assert "In float32 its weights take 0.0 GiB" in said
    assert ("Tesla T4 has 15.0 GiB" in said) == bool(devices)
    assert 'precision "nf4" (0.0 GiB)' in said
    assert ('devices = "all"' in said) == (len(devices) > 1)
    assert held[0]() is None
    monkeypatch.undo()
    assert frozen_model(name, "float32")  # and nothing is left of it
    release()


def test_weights_that_changed_in_their_folder_are_loaded_anew(make_backbone, make_model, tmp_path):
    name = make_backbone("llama", 2)
    before = frozen_model(name, "float32")[0]
    assert frozen_model(name, "float32")[0] is before
    other = make_model("llama", 2)
    other.lm_head.weight.zero_()
    other.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").replace(f"{name}/model.safetensors")
    assert not frozen_model(name, "float32")[0].lm_head.weight.any()
    release()


def test_other_troubles_of_loading_stay_what_they_are(make_backbone, monkeypatch):
    from transformers import PreTrainedModel

    def load(cls, *args, **options):
        raise ValueError("no such model")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))
    with pytest.raises(UsageError, match="is no decoder that transformers can load"):
        load_model("AutoModelForCausalLM", make_backbone("llama", 2), "float32", lambda _: None)
    assert np.isfinite(memory.free_memory())
