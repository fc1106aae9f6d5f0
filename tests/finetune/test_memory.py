"""How much memory a training takes: counted against what torch keeps, and what follows from it."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from machines import T4
from small_decoders import LORA, N_CLASSES, make_inputs, make_params, make_rows, make_targets
from small_encoders import write_encoder

from stackllm.engine.local import Engine, Task
from stackllm.engine.progress import Reporter
from stackllm.errors import StorageError, UsageError
from stackllm.finetune import memory
from stackllm.finetune.dataset import Examples, TrainingParams
from stackllm.finetune.memory import Needs, plan_training, training_needs
from stackllm.finetune.model import LoraParams, logits, new_classifier, trained
from stackllm.finetune.train import set_checkpointing, train
from stackllm.llm.estimate import RESERVE, room, sizes_of_skeleton
from stackllm.llm.layers import plain
from stackllm.members import decoder
from stackllm.store.units import make_unit

GIB = 2**30
SOME = ("q_proj", "v_proj")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def skeleton(hidden, ffn, heads, keys, layers, vocabulary=100, dtype=None):
    """A Llama-like classifier; without ``dtype`` it has no weights."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    if dtype:
        return LlamaForSequenceClassification(config).to(dtype)
    with torch.device("meta"):
        return LlamaForSequenceClassification(config)


def kept_for_gradients(model, n_rows, n_tokens):
    """Bytes that torch saves in a pass, weights not counted."""
    weights = itertools.chain(model.parameters(), model.buffers())
    own = {value.untyped_storage().data_ptr() for value in weights}
    seen = {}

    def pack(value):
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage  # alive, or another would get its place
        return value

    ids = torch.randint(1, 100, (n_rows, n_tokens))
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        body = plain(model).base_model
        result = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert result.requires_grad
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize(
    ("shape", "targets"),
    [((64, 192, 4, 2), EVERY), ((128, 256, 4, 4), SOME), ((96, 384, 6, 2), EVERY)],
)
def test_what_is_counted_is_what_torch_keeps(dtype, dropout, shape, targets):
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraParams(r=4, dropout=dropout, target_modules=targets)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=4, lora_dropout=dropout, target_modules=list(targets)
    )
    found = {}
    for n_layers, checkpointing in ((2, False), (6, False), (2, True), (6, True)):
        model = get_peft_model(skeleton(*shape, n_layers, dtype=dtype), config)
        for value in trained(model).values():
            value.data = value.data.float()
        set_checkpointing(model, checkpointing)
        found[n_layers, checkpointing] = kept_for_gradients(model.train(), 2, 96) / (2 * 96)
    sizes = sizes_of_skeleton(skeleton(*shape, 2))
    number = 4 if dtype is torch.float32 else 2
    layer = memory.saved_by_layer(sizes.layers[0], sizes, number, lora, mask=4)
    assert layer == pytest.approx((found[6, False] - found[2, False]) / 4, rel=0.25)
    assert number * shape[0] == pytest.approx((found[6, True] - found[2, True]) / 4, rel=0.05)


MISTRAL = (4096, 14336, 32, 8, 32, 32_000)
QLORA = TrainingParams(batch_size=16, accumulation=2)


def mistral(precision, training=QLORA, longest=1024):
    return training_needs(
        sizes_of_skeleton(skeleton(*MISTRAL)), precision, LoraParams(r=16), training, longest
    )


@pytest.fixture
def card(pretend_gpus):
    pretend_gpus(T4)
    return memory.gpu_room("one")


def test_seven_billion_weights_in_four_bits_train_on_sixteen_gigabytes(card):
    needs = mistral("nf4")
    assert 3.7 * GIB < needs.fixed < 6 * GIB
    plan = plan_training("mistral-7b", "nf4", needs, QLORA, 1024, card)
    assert plan.checkpointing
    assert 2 <= plan.batch_size <= 16
    assert needs.of(plan.batch_size, True) <= room(T4)
    assert f"of 15.0 GiB with {plan.batch_size} rows per pass and checkpointing" in plan.told
    assert plan.told.startswith("fine-tuning mistral-7b in nf4: about ")
    # without it what a layer keeps of a token is as much as the issue measured: 392 KiB
    layer = (needs.row - needs.checkpointed) / 1024 / 31
    assert 250 * 1024 < layer < 400 * 1024
    off = dataclasses.replace(QLORA, checkpointing=False)
    with pytest.raises(
        StorageError, match=r"needs about .* for one row of 1024 .*checkpointing = tr"
    ):
        plan_training("mistral-7b", "nf4", needs, off, 1024, card)
    with pytest.raises(
        StorageError, match=r'in float16 needs about .* 15.0 GiB. Take precision "nf4"'
    ):
        plan_training("mistral-7b", "float16", mistral("float16"), QLORA, 1024, card)
    eight = mistral("nf4", dataclasses.replace(QLORA, optimizer="adamw_8bit"))
    assert 0.1 * GIB < needs.fixed - eight.fixed < 0.4 * GIB


@pytest.mark.parametrize(
    ("row", "checkpointed", "rows", "checkpointing"),
    [
        (0.5, 0.1, 16, False),  # all rows fit as they are
        (1.0, 0.1, 9, False),  # not all, but a pass is large enough
        (5.0, 0.5, 16, True),
        (5.0, 2.0, 4, True),
        (12.0, 9.7, 1, True),  # just so
    ],
)
def test_rows_and_checkpointing_that_suit_the_memory(row, checkpointed, rows, checkpointing):
    needs = Needs(0, int(row * GIB), int(checkpointed * GIB))
    plan = plan_training("a", "nf4", needs, QLORA, 512, (10 * GIB, 11 * GIB))
    assert (plan.batch_size, plan.checkpointing) == (rows, checkpointing)
    two = plan_training("a", "nf4", needs, QLORA, 512, (10 * GIB, 11 * GIB), n_ranks=2)
    assert two.batch_size == 2 * min(rows, 8)


@pytest.mark.parametrize("precision", ["float32", "nf4"])
@pytest.mark.parametrize("layers", [2, "all"])
def test_layers_that_are_computed_twice_give_the_same_model(
    make_backbone, tmp_path, precision, layers
):
    rows, found = make_rows(), []
    backbone = make_backbone("llama")
    for checkpointing in (False, True):
        params = make_params(
            backbone, layers, precision, lora=LoraParams(r=2, dropout=0.3),
            training=TrainingParams(batch_size=6, learning_rate=1e-2, checkpointing=checkpointing),
        )  # fmt: skip
        folder = tmp_path / str(checkpointing)
        folder.mkdir()
        inputs = make_inputs(tmp_path, params, rows)
        decoder.fit(inputs, make_targets(rows), params, 0, folder)
        found.append(decoder.predict(inputs, np.arange(len(rows)), folder))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


@pytest.mark.parametrize("family", ["bert", "t5", "modernbert"])
def test_encoders_give_the_same_gradients_however_they_are_kept(tmp_path, family):
    backbone = write_encoder(tmp_path, family)
    model, _ = new_classifier(backbone, "float32", N_CLASSES, LORA, 1, seed=0)
    model.double().train()  # or the order in which T5's cross-attentions add up would show
    ids = torch.tensor([[2, 11, 12, 13, 3], [2, 14, 15, 3, 0]])
    found = []
    for wanted in (False, True, False):
        set_checkpointing(model, wanted)
        model.zero_grad()
        batch = decoder.Batch(ids, None, (ids != 0).long())
        torch.nn.functional.cross_entropy(logits(model, batch), torch.tensor([0, 1])).backward()
        found.append({name: value.grad.clone() for name, value in trained(model).items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-8)
        assert (found[2][name] == value).all()
    plain(model).supports_gradient_checkpointing = False
    set_checkpointing(model, True)  # as "auto" would
    with pytest.raises(UsageError, match="checkpointing: transformers has none for "):
        set_checkpointing(model, True, asked=True)


def test_what_fitted_is_where_the_next_begins(make_backbone, tmp_path, monkeypatch):
    params = make_params(make_backbone("llama"))
    rows = make_rows()
    inputs = make_inputs(tmp_path, params, rows)
    most = [99]
    sequences = decoder.sequences

    def small(*args):
        lengths, collate = sequences(*args)

        def refusing(chosen):
            if len(chosen) > most[0]:
                refused.append(len(chosen))
                raise torch.OutOfMemoryError("this device is small")
            return collate(chosen)

        return lengths, refusing

    monkeypatch.setattr(decoder, "sequences", small)
    engine = Engine(tmp_path / "run", 1, Reporter(quiet=True))
    params = dataclasses.replace(
        params, warm_head=False, training=TrainingParams(epochs=1, batch_size=8)
    )
    sizes = []
    for number, forgotten in enumerate((True, False, True)):
        refused = []
        most[0] = 2
        if forgotten:  # as another process knows nothing of it
            monkeypatch.setattr(memory, "_fitted", {})
        unit = make_unit(f"members/own/fold{number}", 1)
        engine.ensure("fit", [Task(unit, _fit, (inputs, make_targets(rows), params))])
        steps = (engine.folder(unit.path) / "metrics.jsonl").open()
        sizes.append(({json.loads(line)["batch_size"] for line in steps}, sorted(set(refused))))
    assert sizes == [({2}, [4, 8]), ({2}, []), ({2}, [])]
    (stored,) = (tmp_path / "run/fitted").iterdir()
    assert json.loads(stored.read_text()) == 2


def _fit(folder, inputs, targets, params):
    decoder.fit(inputs, targets, params, 0, folder)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_moments_in_eight_bits_learn_about_the_same(make_backbone, tmp_path, optimizer):
    found = {}
    for name in ("adamw", optimizer):
        model, _ = new_classifier(
            make_backbone("llama", 2), "float32", N_CLASSES, LoraParams(r=64, dropout=0.0), None, 0
        )
        training = TrainingParams(
            epochs=4, batch_size=6, learning_rate=1e-3, head_learning_rate=1e-2, optimizer=name
        )
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 200, (18, 7), generator=draw)

        def collate(rows, ids=ids):
            return decoder.Batch(ids[rows], None, torch.ones_like(ids[rows]))

        labels = np.eye(3)[np.arange(18) % 3]
        examples = Examples(np.arange(18), labels, np.ones(18), np.full(18, 7), collate)
        train(model, examples, training, 0, tmp_path / f"{name}.jsonl")
        steps = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
        found[name] = [step["loss"] for step in steps]
    np.testing.assert_allclose(found[optimizer], found["adamw"], rtol=0.05)
    assert found[optimizer] != found["adamw"]
    assert found[optimizer][-1] < found[optimizer][0]


def test_what_changes_no_number_is_in_no_key():
    paged = TrainingParams(checkpointing=True, optimizer="paged_adamw_8bit", report_to=("none",))
    assert paged.numbers == TrainingParams(optimizer="adamw_8bit")


def test_a_grid_on_a_card_says_what_it_takes_before_a_model_is_loaded(
    make_backbone, tmp_path, pretend_gpus, copies
):
    pretend_gpus(T4)
    params = make_params(make_backbone("llama"), "all", "nf4")
    inputs = make_inputs(tmp_path, params, make_rows())
    (line,) = decoder.told_before(inputs, params)
    assert (
        f"fine-tuning {params.backbone} in nf4-float16: about 0.0 GiB of 15.0 GiB with 4 rows"
        in line
    )
    pretend_gpus(dataclasses.replace(T4, memory=RESERVE + 1000))
    with pytest.raises(StorageError, match=r"needs about .* for one row of"):
        decoder.told_before(inputs, params)
    pretend_gpus()
    assert decoder.told_before(inputs, params) == ()
    assert copies == []


def test_packed_weights_need_the_same_whether_or_not_it_is_said_what_they_compute_in(pretend_gpus):
    pretend_gpus(T4)  # which a run says of them: it computes in float16
    sizes = sizes_of_skeleton(skeleton(64, 128, 4, 2, 2))
    for packed in ("nf4", "int8"):
        short, whole = (
            training_needs(sizes, it, LORA, TrainingParams(), 32)
            for it in (packed, f"{packed}-float16")
        )
        assert short == whole
