"""The benchmark of GPUs runs on a CPU, as small as it can be; what it says of speed there means nothing."""

import dataclasses
import gc
import json

import pytest

from benchmarks.gpu import sections
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.measure import Watch
from benchmarks.gpu.sections import SECTIONS, Section, figures, play_sections


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("gpu"), tiny=True)


@pytest.fixture(scope="module")
def results(bench):
    import peft  # noqa: F401
    import transformers  # noqa: F401

    gc.freeze()  # half the time would go into looking for garbage among what libraries hold
    try:
        yield play_sections(bench, out=bench.folder / "lines.jsonl")
    finally:
        gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=lambda it: it.name)
def test_every_section_gives_what_it_promises(results, section):
    result = results[section.name]
    assert "failed" not in result, result["failed"]
    if "skipped" in result:  # a package of choice
        assert result["skipped"] == "bitsandbytes is not installed"
    else:
        assert set(section.gives) <= set(result)


@pytest.mark.slow
def test_every_goal_that_a_cpu_can_tell_of_has_its_figure(results):
    of_gpu_only = {"float16_small_gradient_error", "estimate_error"}
    assert {*figures(results), *of_gpu_only} == {*sections.GOALS}


@pytest.mark.slow
def test_lines_come_as_sections_end(bench, results):
    lines = (bench.folder / "lines.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).pop("section") for line in lines] == list(results)


@pytest.mark.slow
def test_what_is_read_is_right(results):
    assert results["encoder 1b"]["relative_error"] < 0.02  # two roundings to bfloat16


def test_a_section_that_fails_stands_alone(monkeypatch, tmp_path):
    def fails(bench):
        raise ValueError("no")

    short = Section("short", lambda bench: {"a": 1}, ("a", "b"))
    whole = dataclasses.replace(short, name="whole", gives=("a",))
    monkeypatch.setattr(sections, "SECTIONS", (Section("bad", fails, ()), short, whole))
    results = play_sections(Bench(tmp_path))
    assert results["bad"]["failed"] == "ValueError: no"
    assert results["short"]["failed"] == "it does not give b"
    assert results["whole"]["a"] == 1
    assert sections.incomplete(results) == ["bad", "short"]


def test_no_section_begins_after_the_limit(tmp_path):
    results = play_sections(Bench(tmp_path, tiny=True), limit=-1)
    assert [*results.values()] == [{"skipped": "time"}] * len(SECTIONS)
    assert figures(results) == {}


def test_copies_are_counted_as_long_as_they_live(bench):
    from transformers import AutoModelForCausalLM

    folder = bench.backbone("1b")
    with Watch().watching() as watch:
        first = AutoModelForCausalLM.from_pretrained(folder)
        second = AutoModelForCausalLM.from_pretrained(folder)
        layers = first.model.layers[:1]  # a part that stays
        size = sum(it.nbytes for it in layers.parameters()) / sum(
            it.nbytes for it in first.parameters()
        )
        del first, second
        AutoModelForCausalLM.from_pretrained(folder)
    assert watch.copies[:2] == [1, 2]
    assert watch.copies[2] == pytest.approx(1 + size, abs=0.01)
    assert watch.seconds["loading"] > 0


def test_a_make_believe_card_has_room_for_one(bench):
    import torch
    from transformers import AutoModelForCausalLM

    folder = bench.backbone("1b")
    with Watch(room=1).watching():
        model = AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(torch.OutOfMemoryError, match="make-believe"):
            AutoModelForCausalLM.from_pretrained(folder)
        del model
        AutoModelForCausalLM.from_pretrained(folder)
