"""Stored adapters load elsewhere: base and its commit, class names and tokenizer stand beside them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from small_decoders import make_inputs, make_params, make_rows, make_targets
from small_encoders import write_encoder

from stackllm.crossfit.design import Design, join
from stackllm.llm.locate import pinned
from stackllm.members import decoder

CLASSES = ("GPT-4", "Élise", "7")


def fitted(folder, backbone):
    rows = make_rows()
    params = make_params(backbone, "all")
    inputs = make_inputs(folder, params, rows)
    targets = dataclasses.replace(make_targets(rows), classes=CLASSES)
    (folder / "model").mkdir()
    decoder.fit(inputs, targets, params, 0, folder / "model")
    expected = decoder.predict(inputs, np.arange(len(rows)), folder / "model")
    elsewhere = shutil.move(folder / "model", folder / "elsewhere")
    return elsewhere, params, inputs, expected


def load(folder):
    """As docs/settings.md says."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        folder, id2label=config.id2label, label2id=config.label2id, pad_token_id=config.pad_token_id
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def check(folder, params, inputs, expected):
    model, tokenizer = load(folder)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id["Élise"] == 1
    lengths, collate = decoder.sequences(inputs, params, tokenizer)
    batch = collate(np.arange(len(lengths)))
    with torch.inference_mode():
        scores = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    np.testing.assert_allclose(scores.softmax(-1).numpy(), expected, atol=1e-5)
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_model_of_a_folder_loads_wherever_it_is_moved(make_backbone, tmp_path, monkeypatch, kind):
    made = make_backbone("llama", 2) if kind == "decoder" else write_encoder(tmp_path, "bert")
    backbone = shutil.copytree(made, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    folder, params, *others = fitted(tmp_path, "./base")
    monkeypatch.chdir("/")
    adapter = check(folder, dataclasses.replace(params, backbone=str(backbone)), *others)
    assert adapter["base_model_name_or_path"] == str(backbone.resolve())
    assert adapter["revision"] is None


def test_a_model_of_the_hub_names_it_with_its_commit(make_backbone, hub, tmp_path):
    first = shutil.copytree(make_backbone("llama", 2), tmp_path / "first")
    commit = hub.commit("org/name", first)
    folder, *others = fitted(tmp_path, pinned("org/name"))
    other = shutil.copytree(make_backbone("llama", 3), tmp_path / "second")
    hub.commit("org/name", other)  # what the name means by now is another model
    adapter = check(folder, *others)
    assert adapter["base_model_name_or_path"] == "org/name"
    assert adapter["revision"] == commit


def test_names_of_classes_reach_every_model():
    design = Design(
        np.tile([0, 1, 2], 4),
        np.repeat([0, 1], 6),
        np.zeros(3, int),
        np.arange(15) // 3,
        3,
        CLASSES,
    )
    first = design.first_fits()[0].targets
    later = design.next_fits(1, lambda fold, part: design.true_targets(fold))[0].targets
    for targets in (first, later, design.full_fit().targets, join(first, first)):
        assert targets.classes == targets.only(targets.labels == 0).classes == CLASSES
