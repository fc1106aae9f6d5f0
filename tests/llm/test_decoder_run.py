"""A decoder as a member of a run: seeds times folds, re-use, and new groups, typed as a user would."""

import json

import numpy as np
import polars as pl
import pytest
from conftest import write_table
from helpers import stackllm

CONFIG = """
[encoder]
backbone = "none"
[run]
folds = 2
[[member]]
kind = "lexical"
"""
DECODER = """
[[member]]
kind = "decoder"
backbone = "{backbone}"
precision = "float32"
trainable_layers = {layers}
seeds = {seeds}
[member.prompt]
max_length_prompt = 4
max_length_answer = 8
[member.training]
epochs = 1
batch_size = 8
"""


@pytest.fixture(scope="module")
def backbone(make_backbone):
    return make_backbone("llama", 3)


@pytest.fixture
def contest(tmp_path):
    return write_table(tmp_path, 8, 4)


def configure(folder, backbone, seeds=(0, 1), layers='"all"'):
    text = CONFIG + DECODER.format(backbone=backbone, layers=layers, seeds=list(seeds))
    (folder / "stackllm.toml").write_text(text)


def times(folder):
    """When each unit's manifest was written."""
    root = folder / "artifacts/run"
    return {
        str(path.parent.relative_to(root)): path.stat().st_mtime_ns
        for path in root.glob("members/**/manifest.json")
    }


def test_seeds_times_folds_are_units_and_only_new_ones_are_run(contest, backbone):
    (contest / "stackllm.toml").write_text(CONFIG)
    assert stackllm("features", "--quiet", cwd=contest).returncode == 0
    alone = times(contest)
    configure(contest, backbone, layers=2)
    told = stackllm("features", "--json", cwd=contest)
    assert told.returncode == 0, told.stderr
    names = {entry["model"] for entry in json.loads(told.stdout)["leaderboard"]}
    assert names == {"lexical", "decoder"}
    first = times(contest)
    assert {path: first[path] for path in alone} == alone  # the other member is left as it was
    decoders = {path for path in first if "decoder" in path}
    assert decoders == {
        f"members/decoder/round0_fold{fold}_seed{seed}" for seed in (0, 1) for fold in (0, 1)
    }
    configure(contest, backbone, seeds=(0, 1, 2), layers=2)
    assert stackllm("features", "--quiet", cwd=contest).returncode == 0
    second = times(contest)
    assert {path: second[path] for path in first} == first
    assert len(set(second) - set(first)) == 2


def test_later_rounds_go_on_with_the_first_models_and_new_groups_get_the_same(contest, backbone):
    configure(contest, backbone, layers=2)
    told = stackllm("run", "--rounds", "1", "--json", "--truth", "solution.csv", cwd=contest)
    assert told.returncode == 0, told.stderr
    board = pl.DataFrame(json.loads(told.stdout)["leaderboard"])
    own = board.filter(pl.col("model") == "decoder")
    assert own["raw"].n_unique() == 1
    assert own.height == 2
    told = stackllm("predict", "test.csv", "-o", "again.csv", cwd=contest)
    assert told.returncode == 0, told.stderr
    first, again = (
        pl.read_csv(contest / name).sort("id").select(pl.exclude("id")).to_numpy()
        for name in ("artifacts/run/submission.csv", "again.csv")
    )
    assert again.sum(axis=1) == pytest.approx(1)
    assert first.shape == again.shape
    best = json.loads((contest / "artifacts/run/run.json").read_text())["best_round"]
    if best == 0:  # later rounds leave out a model that trained on the row's own pseudo-label
        np.testing.assert_allclose(again, first, atol=1e-4)


def test_what_makes_no_sense_is_one_sentence(contest, backbone):
    for layers, sentence in {
        "3": 'has 3 layers; trainable_layers must be 1 to 2, or "all"',
        '"some"': "trainable_layers must be 1 or more, or \"all\", not 'some'",
    }.items():
        configure(contest, backbone, layers=layers)
        told = stackllm("features", "--quiet", cwd=contest)
        assert told.returncode in (2, 65)
        assert sentence in told.stderr
        assert "Traceback" not in told.stderr
    configure(contest, "/no/such/folder")
    told = stackllm("features", "--quiet", cwd=contest)
    assert told.returncode == 66
    assert "there is no such folder" in told.stderr
