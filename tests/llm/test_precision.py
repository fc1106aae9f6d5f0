"""Reading in every precision: near to float32, kept apart from one another, and refused where it overflows."""

import numpy as np
import polars as pl
import pytest

from stackllm.engine.local import Engine
from stackllm.engine.progress import Reporter
from stackllm.errors import DataError, TrainingError
from stackllm.llm.encode import EncoderParams, encode
from stackllm.llm.prompts import PromptParams
from stackllm.llm.resident import release
from stackllm.llm.trunk import TrunkParams, cache_trunk
from stackllm.rating.local import RaterParams, rate
from stackllm.rating.question import Asked, Case

VOICE = Asked("voice", "category", "w1 w2 w3", ("w5", "w7", "w9"))


@pytest.fixture(scope="module")
def backbone(make_backbone):
    return make_backbone("llama", 2)


@pytest.fixture(scope="module")
def overflowing(backbone, tmp_path_factory):
    """A backbone whose states are numbers in float32, bfloat16 too, and none in float16."""
    import shutil

    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(backbone, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.mul_(3e8)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def engine(tmp_path):
    release()
    return Engine(tmp_path, 1, Reporter(quiet=True))


def make_rows():
    draw = np.random.default_rng(0)
    text = lambda n: " ".join(f"w{i}" for i in draw.integers(0, 200, n))  # noqa: E731
    rows = [(f"g{g}", q, text(9)) for g in range(4) for q in [text(6)] for _ in range(3)]
    rows.append(("g0", rows[0][1], ""))
    return pl.DataFrame(rows, schema=["group_id", "question", "response"], orient="row")


def read(backbone, engine, dtype):
    rows, likelihood, identity = encode(make_rows(), EncoderParams(backbone, dtype), engine)
    return rows.take("pooled").astype(float), likelihood["logprob_mean"].to_numpy(), identity


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("bfloat16", 0.05), ("float16", 0.01), ("int8", 0.05), ("nf4", 0.4), ("nf4-float32", 0.4)],
)
def test_every_precision_reads_about_the_same(backbone, engine, precision, tolerance):
    exact, likelihood, identity = read(backbone, engine, "float32")
    pooled, logprob, other = read(backbone, engine, precision)
    assert identity != other
    error = np.abs(pooled - exact).mean() / np.abs(exact).mean()
    assert error < tolerance
    assert np.isnan(logprob).tolist() == [False] * 12 + [True]
    error = np.nanmean(np.abs(logprob - likelihood))
    broken = np.nanmean(np.abs(np.roll(likelihood[:12], 1) - likelihood[:12]))
    assert error < min(2 * tolerance, broken)


def test_packed_weights_are_kept_apart_by_what_they_are_computed_in(backbone, engine, monkeypatch):
    from stackllm.llm import machine

    found = set()
    for computed in ("float32", "bfloat16"):
        monkeypatch.setattr(machine, "_cpu_has_bfloat16", lambda it=computed: it == "bfloat16")
        release()
        found.add(read(backbone, engine, "nf4")[2])
    release()
    assert len(found) == 2


def test_the_rater_answers_in_every_precision(backbone, engine):
    cases = [Case("w4 w5", (f"w{i} w{i + 1}",)) for i in range(6)]
    exact, packed = (
        rate(VOICE, cases, RaterParams(backbone=backbone, dtype=it), engine)
        for it in ("float32", "nf4")
    )
    assert np.allclose(packed.sum(axis=1), 1)
    assert 0 < np.abs(packed - exact).max() < 0.3


def encoder(backbone, dtype, engine):
    return encode(make_rows(), EncoderParams(backbone, dtype), engine)[0].take("pooled")


def trunk(backbone, dtype, engine):
    shards = cache_trunk(make_rows(), TrunkParams(backbone, dtype, 1, PromptParams()), engine)
    states = np.load(f"{shards['shard'][0]}/states.npy")
    return states if states.dtype.kind == "f" else np.zeros(1)


def rater(backbone, dtype, engine):
    cases = [Case("w4 w5", ("w6 w7",))]
    return rate(VOICE, cases, RaterParams(backbone=backbone, dtype=dtype), engine)


def test_one_model_at_a_time_from_the_encoder_to_the_fine_tuning(backbone, engine, copies):
    from stackllm.finetune.model import LoraParams, new_classifier

    for reader in (encoder, trunk, rater, encoder):
        reader(backbone, "float32", engine)
    release()
    new_classifier(backbone, "float32", 3, LoraParams(), 1, 0)
    encoder(backbone, "int8", engine)
    assert copies
    assert set(copies) == {1}
    release()


@pytest.mark.parametrize("reader", [encoder, trunk, rater])
def test_numbers_that_overflow_are_refused_and_not_stored(overflowing, engine, reader):
    with pytest.raises(
        DataError, match=r'in float16: the states .* Set dtype .* "float32"'
    ) as caught:
        reader(overflowing, "float16", engine)
    assert caught.value.exit_code == 65
    assert '"nf4-float32"' in str(caught.value)
    assert overflowing in str(caught.value)
    assert not list(engine.root.rglob("manifest.json"))
    for dtype in ("float32", "bfloat16", "nf4-float32"):  # the ways out work
        assert np.isfinite(reader(overflowing, dtype, engine)).all()
    release()


def test_no_head_is_fitted_on_states_that_overflow(overflowing):
    import torch

    from stackllm.finetune.model import Batch, bare_classifier, last_states
    from stackllm.finetune.train import read

    def collate(rows):
        ids = torch.arange(6).repeat(len(rows), 1)
        return Batch(ids, None, torch.ones_like(ids))

    def states(precision):
        model, _ = bare_classifier(overflowing, precision, 3)
        return read(last_states, model, np.arange(2), np.full(2, 6), collate)

    with pytest.raises(TrainingError, match="are no finite numbers"):
        states("float16")
    assert states("float32").shape == (2, 32)
    release()
