"""Weights in float16: the loss is scaled, so that gradients do not round to zero on their way through them."""

import json

import numpy as np
import pytest
import torch
from helpers import digests
from machines import T4
from safetensors.torch import load_file
from small_decoders import LORA, N_CLASSES, make_inputs, make_params, make_rows, make_targets

from stackllm.errors import TrainingError
from stackllm.finetune import trainer
from stackllm.finetune.dataset import Examples, TrainingParams
from stackllm.finetune.model import LoraParams, new_classifier, trained
from stackllm.finetune.structure import last_linear
from stackllm.finetune.train import train
from stackllm.finetune.trainer import WeightedTrainer
from stackllm.members import decoder

N_ROWS = 18
ONE_STEP = TrainingParams(epochs=1, batch_size=6, accumulation=3, max_grad_norm=0.0)


@pytest.fixture
def classifier(make_backbone, tmp_path):
    """A classifier in a precision, adapters away from zero, and examples of what it learns."""
    backbone = make_backbone("llama")

    def build(precision, weight=1.0):
        params = make_params(backbone, "all", precision)
        model, tokenizer = new_classifier(backbone, precision, N_CLASSES, LORA, None, seed=1)
        for name, value in trained(model).items():
            drawn = torch.Generator().manual_seed(len(name))
            value.data.normal_(0, 0.1, generator=drawn)
        inputs = make_inputs(tmp_path, params, make_rows())
        lengths, collate = decoder.sequences(inputs, params, tokenizer)
        labels = np.eye(N_CLASSES)[np.arange(N_ROWS) % N_CLASSES]
        rows = np.arange(N_ROWS)
        return model, Examples(rows, labels, np.full(N_ROWS, weight), lengths, collate)

    return build


def gradients_of_a_step(monkeypatch, model, examples, folder, scaled=True):
    """What the optimiser is given, by the loss's own trainer."""
    seen = {}

    class Watching(WeightedTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if not scaled:
                self.accelerator.scaler = None

        def _clip_grad_norm(self, network):
            length = super()._clip_grad_norm(network)
            seen.update({name: value.grad.clone() for name, value in trained(network).items()})
            return length

    monkeypatch.setattr(trainer, "WeightedTrainer", Watching)
    train(model, examples, ONE_STEP, 0, folder / "metrics.jsonl")
    return seen


def errors(found, expected):
    """Relative error of the gradient of each trained tensor."""
    return [float((found[name] - value).norm() / value.norm()) for name, value in expected.items()]


def test_gradients_of_a_small_loss_are_as_good_as_those_of_a_large_one(
    classifier, tmp_path, monkeypatch
):
    def of_step(precision, weight=1.0, scaled=True):
        model, examples = classifier(precision, weight)
        found = gradients_of_a_step(monkeypatch, model, examples, tmp_path, scaled)
        return {name: value / weight for name, value in found.items()}  # a power of two: exact

    expected = of_step("float32")
    large = errors(of_step("float16"), expected)
    assert np.median(large) < 0.01
    for power in (-6, -10):
        small = errors(of_step("float16", 2.0**power), expected)
        assert np.median(small) < 1.1 * np.median(large)
        assert max(small) < 1.1 * max(large)
    unscaled = errors(of_step("float16", 2.0**-10, scaled=False), expected)
    assert np.median(unscaled) > 10 * np.median(large)  # what there was to be gained


def steps_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def overflow(model, n_times):
    """Let the gradient that leaves the head overflow, in as many passes."""
    left = [n_times]

    def burst(gradient):
        left[0] -= 1
        return gradient * float("inf") if left[0] >= 0 else gradient

    last_linear(model).weight.register_hook(burst)


def test_a_step_that_overflows_is_computed_again_and_none_is_left_out(classifier, tmp_path):
    params = TrainingParams(epochs=4, batch_size=6, learning_rate=1e-3, warmup=0.5)
    told = {}
    for n_times in (0, 2):
        model, examples = classifier("float16")
        before = {name: value.clone() for name, value in trained(model).items()}
        overflow(model, n_times)
        folder = tmp_path / str(n_times)
        folder.mkdir()
        train(model, examples, params, 0, folder / "metrics.jsonl")
        told[n_times] = steps_of(folder)
        assert all((value != before[name]).any() for name, value in trained(model).items())
    assert {step["loss_scale"] for step in told[2]} == {2.0**14}
    for name in ("loss", "learning_rate", "step"):
        assert [step[name] for step in told[2]] == pytest.approx(
            [step[name] for step in told[0]], rel=0.02
        )
    assert all(step["grad_norm"] > 0 for step in told[2])


def test_what_float16_cannot_learn_is_a_sentence_that_names_ways_out(classifier, tmp_path):
    params = TrainingParams(epochs=1, batch_size=6)
    model, examples = classifier("float16")
    overflow(model, 1000)
    sentence = "gradients overflow float16 at step 1. Lower learning_rate, or set"
    with pytest.raises(TrainingError, match=sentence):
        train(model, examples, params, 0, tmp_path / "metrics.jsonl")
    model, examples = classifier("float16")
    next(iter(trained(model).values())).data.fill_(60_000)
    sentence = 'the loss is nan at step 1. Lower learning_rate, or take precision = "bfloat16"'
    with pytest.raises(TrainingError, match=sentence):
        train(model, examples, params, 0, tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("precision", ["auto", "nf4"])
def test_a_card_without_bfloat16_trains_in_float16_to_the_same_bytes(
    make_backbone, tmp_path, pretend_gpus, precision
):
    pretend_gpus(T4)
    rows, found = make_rows(), []
    params = make_params(make_backbone("llama"), 2, precision, lora=LoraParams(r=2, dropout=0.3))
    inputs = make_inputs(tmp_path, params, rows)
    for run in ("first", "again"):
        folder = tmp_path / run
        folder.mkdir()
        decoder.fit(inputs, make_targets(rows), params, 0, folder)
        found.append(digests(folder))
    assert found[0] == found[1]
    assert all(2.0**8 <= step["loss_scale"] <= 2.0**16 for step in steps_of(folder))
    stored = load_file(folder / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert decoder.predict(inputs, np.arange(N_ROWS), folder).sum(axis=1) == pytest.approx(1)
