"""Backbones that pool in a way of their own: BERT's kin, and what has an encoder and a decoder."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from small_decoders import LORA, N_CLASSES, make_inputs, make_params, make_rows, make_targets
from small_encoders import FAMILIES, write_encoder

from stackllm.errors import UsageError
from stackllm.finetune import train as training
from stackllm.finetune.dataset import TrainingParams
from stackllm.finetune.model import LoraParams, load_classifier, new_classifier
from stackllm.finetune.structure import head_names, plain, structure_of
from stackllm.llm.backbone import check_length
from stackllm.llm.layers import positions
from stackllm.members import decoder

FAST = TrainingParams(epochs=6, batch_size=6, learning_rate=5e-3, head_learning_rate=1e-3)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A random backbone of a family, written once."""
    written = {}

    def of(family):
        if family not in written:
            written[family] = write_encoder(tmp_path_factory.mktemp(family), family)
        return written[family]

    return of


def fitted(folder, backbone, layers="all", rows=None, **changes):
    rows = make_rows(16) if rows is None else rows
    params = make_params(backbone, layers, **{"training": FAST, **changes})
    inputs = make_inputs(folder, params, rows)
    (folder / "model").mkdir()
    decoder.fit(inputs, make_targets(rows), params, 0, folder / "model")
    return params, inputs, folder / "model"


@pytest.mark.parametrize("family", FAMILIES)
def test_any_classifier_learns_and_is_what_peft_loads(backbone, tmp_path, family):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoConfig

    params, inputs, folder = fitted(tmp_path, backbone(family))
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    assert np.mean(losses[-8:]) < 0.85 * np.mean(losses[:8])
    assert json.loads((folder / "decoder.json").read_text())["warm_head"]
    assert losses[0] < np.log(N_CLASSES)  # a warm head knows more than nothing
    ours = decoder.predict(inputs, np.arange(48), folder)
    assert ours.sum(axis=1) == pytest.approx(1)

    model, tokenizer = load_classifier(folder, params.backbone, "float32", N_CLASSES)
    lengths, collate = decoder.sequences(inputs, params, tokenizer)
    alone = [training.predict(model, np.array([row]), lengths[[row]], collate) for row in range(9)]
    assert np.concatenate(alone) == pytest.approx(ours[:9], abs=1e-4)

    config = AutoConfig.from_pretrained(folder)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=config.num_labels, pad_token_id=config.pad_token_id
    ).eval()
    batch = collate(np.arange(48))
    with torch.inference_mode():
        scores = theirs(input_ids=batch.ids, attention_mask=batch.mask).logits
    assert scores.softmax(-1).numpy() == pytest.approx(ours, abs=1e-4)


@pytest.mark.parametrize("family", ["deberta-v2", "bert", "modernbert", "distilbert"])
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "nf4"])
def test_a_head_keeps_its_own_precision(backbone, tmp_path, family, precision):
    brief = TrainingParams(epochs=1, batch_size=24, learning_rate=1e-3)
    params, inputs, folder = fitted(tmp_path, backbone(family), precision=precision, training=brief)
    assert np.isfinite(decoder.predict(inputs, np.arange(48), folder)).all()
    model, _ = new_classifier(params.backbone, precision, N_CLASSES, LORA, None, seed=0)
    kept = {p.dtype for name, p in model.named_parameters() if "modules_to_save" in name}
    assert kept == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_stand_in_the_layers_asked_for_and_never_in_the_head(backbone, family):
    name = backbone(family)
    layers = structure_of(name).layers
    for n_trained in (None, 1):
        model, _ = new_classifier(name, "float32", N_CLASSES, LORA, n_trained, seed=0)
        adapted = {
            key.split(".lora_A")[0].removeprefix("base_model.model.")
            for key, _ in model.named_parameters()
            if ".lora_A." in key
        }
        heads = tuple(head_names(plain(model)))
        assert adapted
        assert not any(key.startswith(heads) for key in adapted)
        if layers and n_trained:
            assert all(key.startswith(f"{layers[-1]}.") for key in adapted)
        elif layers:
            assert all(any(key.startswith(f"{each}.") for key in adapted) for each in layers)


def test_what_a_checkpoint_lacks_is_trained_and_stored(backbone, tmp_path):
    """BERT's pooler is not in a masked language model's checkpoint: it starts at random."""
    stored = write_encoder(tmp_path, "bert", headless=False)
    for name, expected in ((backbone("bert"), True), (stored, False)):
        model, _ = new_classifier(name, "float32", N_CLASSES, LORA, 1, seed=0)
        found = {n for n, p in model.named_parameters() if p.requires_grad and "pooler" in n}
        assert bool(found) == expected


def test_a_checkpoint_of_another_model_is_refused(backbone, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "half"
    folder.mkdir()
    write_encoder(folder, "bert")
    weights = load_file(folder / "model.safetensors")
    half = {name: value for name, value in weights.items() if "layer.1." not in name}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="weights of its layers are not stored, such as bert"):
        new_classifier(str(folder), "float32", N_CLASSES, LORA, None, seed=0)


@pytest.mark.parametrize("family", ["bart", "t5", "deberta-v2"])
def test_a_text_that_spells_out_a_control_token_does_not_end_there(backbone, tmp_path, family):
    rows = make_rows(4)
    rows = rows.with_columns(response="w5 [SEP] " + rows["response"])
    params = make_params(backbone(family), "all")
    inputs = make_inputs(tmp_path, params, rows)
    model, tokenizer = new_classifier(params.backbone, "float32", N_CLASSES, LORA, None, seed=0)
    lengths, collate = decoder.sequences(inputs, params, tokenizer)
    assert ((collate(np.arange(12)).ids == tokenizer.sep_token_id).sum(1) == 1).all()
    assert training.predict(model, np.arange(12), lengths, collate).shape == (12, N_CLASSES)


def test_lengths_count_what_closes_a_text(backbone, tmp_path):
    rows = make_rows(4).with_columns(response=pl.lit("w7 " * 60))
    params = make_params(
        backbone("bert"), "all", prompt=decoder.PromptParams(max_length_answer=64, max_length=32)
    )
    inputs = make_inputs(tmp_path, params, rows)
    _, tokenizer = new_classifier(params.backbone, "float32", N_CLASSES, LORA, None, seed=0)
    lengths, collate = decoder.sequences(inputs, params, tokenizer)
    assert set(lengths.tolist()) == {32}
    assert (collate(np.arange(12)).ids[:, [0, -1]] == torch.tensor([2, 3])).all()


def test_how_long_a_text_may_be(backbone):
    rooms = {}
    for family in ("bert", "roberta", "deberta-v2", "xlnet", "t5", "modernbert"):
        model, _ = new_classifier(backbone(family), "float32", N_CLASSES, LORA, None, seed=0)
        rooms[family] = positions(model)
    assert rooms == {
        "bert": 64, "roberta": 63, "deberta-v2": None, "xlnet": None, "t5": None, "modernbert": 64
    }  # fmt: skip
    with pytest.raises(UsageError, match="reads at most 63 tokens, and the longest text has 64"):
        check_length("a", rooms["roberta"], 64)


def test_what_cannot_start_from_a_trunk_says_so(backbone, make_backbone):
    said = make_params(backbone("deberta-v2"), 2).remark
    assert "its top 2 layers are trained without a cached trunk" in said
    assert "all of its layers are trained" in make_params(backbone("albert"), 2).remark
    assert "all of its layers are trained" in make_params(backbone("bert"), 4).remark
    assert make_params(backbone("bert"), 2).trunk is None
    for layers in (2, "all"):
        assert make_params(make_backbone("llama"), layers).remark == ""


def test_names_of_modules_that_fit_nothing_are_refused(backbone):
    lora = LoraParams(r=2, target_modules=("query_proj", "quary_proj"))
    with pytest.raises(UsageError, match=r'"quary_proj" fits none.*Did you mean "query_proj"'):
        new_classifier(backbone("deberta-v2"), "float32", N_CLASSES, lora, None, seed=0)


@pytest.mark.parametrize("layers", [2, "all"])
def test_a_pad_token_without_an_embedding_gives_way(make_backbone, tmp_path, layers, monkeypatch):
    """Many fine-tuned LLMs add a [PAD] that their embedding has no row for."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoConfig, AutoTokenizer

    source = make_backbone("llama")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"filler{i}" for i in range(300 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 300
    tokenizer.save_pretrained(source)
    config = AutoConfig.from_pretrained(source)
    config.pad_token_id = 300
    config.save_pretrained(source)
    monkeypatch.chdir(f"{source}/..")
    relative = f"./{source.rsplit('/')[-1]}"
    _, inputs, folder = fitted(tmp_path, relative, layers, make_rows(6))
    ours = decoder.predict(inputs, np.arange(18), folder)
    monkeypatch.chdir("/")  # the adapter knows its base model wherever it is loaded
    config = AutoConfig.from_pretrained(folder)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=config.num_labels, pad_token_id=config.pad_token_id
    )
    assert config.pad_token_id == config.eos_token_id  # no word of a text
    assert theirs.get_base_model().num_labels == ours.shape[1]
