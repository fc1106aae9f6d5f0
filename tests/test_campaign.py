"""A small draw of every figure of the campaign; ``make campaign`` plays them in full."""

import random
import signal
from collections import Counter

import pytest

from benchmarks.campaign import damage, inputs, kills, same, writes
from benchmarks.campaign.contest import stages
from benchmarks.campaign.corpus import CORPUS
from benchmarks.campaign.figures import play
from benchmarks.campaign.tables import case

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The stages, with what they leave undisturbed; made once."""
    made = stages(tmp_path_factory.mktemp("campaign"))
    made["stack"].window, made["decoder"].window = 1.0, 6.0  # seconds; to measure them takes a run
    return made


def passes(*cases):
    figure = play("drawn", [(f"case {i}", case) for i, case in enumerate(cases)])
    assert figure["met"], figure["failures"]


@pytest.mark.parametrize(
    "bad", [bad for bad in CORPUS if "10 MB" not in bad.name], ids=lambda bad: bad.name
)
def test_bad_tables(bad, tmp_path):
    assert case(bad, tmp_path)() is None


def test_the_corpus_is_large_and_its_names_are_unique():
    assert len(CORPUS) >= 60
    assert len({bad.name for bad in CORPUS}) == len(CORPUS)


def test_mutated_inputs(tmp_path):
    for figure in inputs.figures(tmp_path, 1):
        assert figure["met"], figure["failures"]
        assert figure["cases"] >= 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_stack(known, number):
    passes(kills.struck(known["stack"], number, random.Random(number)))


def test_killed_again_during_the_resume(known):
    passes(kills.struck(known["stack"], signal.SIGKILL, random.Random(1), times=2))


@pytest.mark.parametrize("kind", ["kill", "tear", *writes.ERRORS])
def test_every_write_of_optim(known, kind):
    count = writes.count_writes(known["optim"], kind)
    assert count > 5
    step = 1 if kind == "kill" else 5
    passes(*(writes.faulty_write(known["optim"], kind, at) for at in range(0, count, step)))


@pytest.mark.parametrize(
    ("kind", "step"), [("kill", 20), ("tear", 40), ("ENOSPC", 40), ("EMFILE", 80)]
)
def test_writes_of_the_stack(known, kind, step):
    count = writes.count_writes(known["stack"], kind)
    assert count > 200
    passes(*(writes.faulty_write(known["stack"], kind, at) for at in range(7, count, step)))


@pytest.mark.parametrize("n_bytes", [1_000, 4_000])
def test_a_system_that_takes_no_more_bytes(known, n_bytes):
    passes(writes.too_large(known["features"], n_bytes))


@pytest.mark.parametrize(("name", "how"), [("stack", "flipped bit"), ("llm", "truncation")])
def test_damage_to_every_unit(known, name, how):
    often = ("decoder", "adapter_config", "config", "tokenizer", "tokenizer_config", "manifest")
    struck = Counter({"*.jsonl": 9, **{f"{name}.json": 9 for name in often}})
    passes(damage.damaged_units(known[name], how, random.Random(0), struck))
    assert sum(struck.values()) >= 36 + 10
    assert name == "stack" or {"*.safetensors", "trunk *.npy", "encoder *.npy"} <= set(struck)


def test_models_that_nobody_wrote_are_not_loaded(known):
    figure = play("models", damage.mutated_models(known["stack"], 10, random.Random(0)))
    assert figure["met"], figure["failures"]


def test_three_processes_want_one_run(known):
    passes(same.race(known["stack"], 3))


@pytest.mark.parametrize("name", ["stack", "optim"])
def test_no_pickles_no_sockets_no_shells(known, name):
    passes(same.watched_command(known["stack"], name))


def test_a_decoder_is_the_same_under_another_hash_seed_and_after_a_kill(known, monkeypatch):
    stage = known["decoder"]
    assert any(name.endswith("adapter_model.safetensors") for name in stage.expected)
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    passes(kills.struck(stage, signal.SIGKILL, random.Random(0)))
