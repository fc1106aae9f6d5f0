"""``devices = "all"``: the layers of one model on several GPUs, which are only make-believe here."""

import numpy as np
import polars as pl
import pytest
import torch
from machines import T4
from small_decoders import make_inputs, make_params, make_rows, make_targets
from small_encoders import write_encoder
from two_devices import two_devices  # noqa: F401

from stackllm.engine.local import Engine
from stackllm.engine.progress import Reporter
from stackllm.llm import resident
from stackllm.llm.backbone import frozen_model
from stackllm.llm.encode import EncoderParams, encode
from stackllm.llm.prompts import Prompt
from stackllm.llm.scoring import score_answers
from stackllm.members.decoder import fit, predict

ANSWERS = [[7], [8], [8, 9], [10, 11, 12]]
PROMPTS = [Prompt([5, 6, 7], [[20], [21, 22, 23]]), Prompt([5, 6, 9, 4], [[30, 31], [32]])]


@pytest.fixture
def on(two_devices, tmp_path):  # noqa: F811
    """``on(work)``: what it gives on one device and on all, and how many tensors went from one to another."""

    def compare(work):
        given = []
        for devices in ("one", "all"):
            resident.release()
            (tmp_path / devices).mkdir()
            before = two_devices.moved
            given.append(work(devices, tmp_path / devices))
        assert two_devices.moved > before
        resident.release()
        return given

    return compare


def test_what_is_on_different_devices_may_not_meet(two_devices):  # noqa: F811
    here = torch.ones(3)
    first, second = here.to("cpu:0"), here.to("cpu:1")
    for meet in (
        lambda: first + second,
        lambda: here @ first,
        lambda: second[torch.tensor([1, 2], device="cpu:0")],
        lambda: torch.cat([first, second]),
        lambda: torch.zeros(3, device=first.device) * second.view(3),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            meet()
    with pytest.raises(TypeError, match="to numpy"):
        first.numpy()
    assert (first.to(second) + second).sum() == 6


@pytest.mark.parametrize("seen", [(), (T4,)], ids=["none", "one"])
def test_all_of_one_or_none_is_one(two_devices, pretend_gpus, make_backbone, seen):  # noqa: F811
    pretend_gpus(*seen)
    resident.release()
    model, _ = frozen_model(make_backbone("llama"), "float32", "auto", "all")
    assert not hasattr(model, "hf_device_map")
    assert not two_devices.moved


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_encoder(on, make_backbone, family):
    """Gemma's head is its embedding, which stands on the first device, and its layers end on the second."""
    backbone = make_backbone(family)
    rows = make_rows(4).with_columns(group_id=pl.col("question"))

    def work(devices, folder):
        params = EncoderParams(backbone, "float32", devices=devices)
        stored, likelihood, _ = encode(rows, params, Engine(folder, 1, Reporter(quiet=True)))
        return stored.take("pooled"), likelihood.to_numpy()

    for plain, spread in zip(*on(work), strict=True):
        np.testing.assert_array_equal(plain, spread)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rater(on, make_backbone, precision):
    backbone = make_backbone("gemma2")

    def work(devices, folder):
        model, _ = frozen_model(backbone, precision, "auto", devices)
        return score_answers(model, PROMPTS, ANSWERS)

    np.testing.assert_array_equal(*on(work))


@pytest.mark.parametrize("layers", [2, "all"])
def test_trunk_and_fine_tuning(on, make_backbone, layers):
    """From the trunk, which is read on all devices too, and with all layers trained."""
    backbone, rows = make_backbone("llama"), make_rows()

    def work(devices, folder):
        params = make_params(backbone, layers, devices=devices)
        inputs = make_inputs(folder, params, rows)
        model = folder / "model"
        model.mkdir()
        fit(inputs, make_targets(rows), params, 0, model)
        return predict(inputs, np.arange(len(rows)), model)

    np.testing.assert_array_equal(*on(work))


def test_fine_tuning_of_an_encoder(on, tmp_path):
    (tmp_path / "bert").mkdir()
    backbone, rows = write_encoder(tmp_path / "bert", "bert"), make_rows()

    def work(devices, folder):
        params = make_params(backbone, "all", devices=devices)
        inputs = make_inputs(folder, params, rows)
        model = folder / "model"
        model.mkdir()
        fit(inputs, make_targets(rows), params, 0, model)
        return predict(inputs, np.arange(len(rows)), model)

    np.testing.assert_array_equal(*on(work))
