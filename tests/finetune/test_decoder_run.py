"""A decoder as a member of a run: seeds times folds, re-use, and new groups, typed as a user would."""

import functools
import json
import shutil
import time

import numpy as np
import polars as pl
import pytest
from conftest import write_table
from helpers import digests, stackllm
from safetensors.numpy import load_file, save_file

from stackllm.crossfit.design import Design
from stackllm.engine import progress
from stackllm.engine.local import Engine, Task
from stackllm.errors import StorageError, UsageError
from stackllm.members.decoder import DecoderParams
from stackllm.members.lexical import LexicalParams
from stackllm.members.registry import Member, check_tables
from stackllm.metrics import log_loss
from stackllm.probabilities import log_blend
from stackllm.report.logbook import read_logbook
from stackllm.stack.round import final_rows
from stackllm.store.units import make_unit

CONFIG = """
[encoder]
backbone = "none"
[run]
folds = 2
[[member]]
kind = "lexical"
c = 1e-6
"""
DECODER = """
[[member]]
kind = "decoder"
backbone = "{backbone}"
precision = "float32"
trainable_layers = {layers}
seeds = {seeds}
refit = "{refit}"
[member.prompt]
max_length_prompt = 4
max_length_answer = 64
[member.training]
epochs = {epochs}
batch_size = 8
learning_rate = {rate}
[member.lora]
alpha = {alpha}
"""


@pytest.fixture(scope="module")
def backbone(make_backbone):
    return make_backbone("llama", 3)


@pytest.fixture
def contest(tmp_path):
    return write_table(tmp_path, 8, 4)


def configure(
    folder, backbone, seeds=(0, 1), layers='"all"', refit="folds", epochs=1, rate=1e-4, alpha=16
):
    text = DECODER.format(
        backbone=backbone,
        layers=layers,
        seeds=list(seeds),
        refit=refit,
        epochs=epochs,
        rate=rate,
        alpha=alpha,
    )
    (folder / "stackllm.toml").write_text(CONFIG + text)


def times(folder):
    """When each unit's manifest was written."""
    root = folder / "artifacts/run"
    return {
        str(path.parent.relative_to(root)): path.stat().st_mtime_ns
        for path in root.glob("members/**/manifest.json")
    }


def test_seeds_times_folds_are_units_and_only_new_ones_are_run(contest, backbone):
    (contest / "stackllm.toml").write_text(CONFIG)
    assert stackllm("features", "--quiet", "--jobs", "1", cwd=contest).returncode == 0
    alone = times(contest)
    configure(contest, backbone, layers=2)
    told = stackllm("features", "--json", "--jobs", "1", cwd=contest)
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
    assert stackllm("features", "--quiet", "--jobs", "1", cwd=contest).returncode == 0
    second = times(contest)
    assert {path: second[path] for path in first} == first
    assert len(set(second) - set(first)) == 2
    check_logbook(contest)


def check_logbook(contest):
    """Three runs of one name; of the newest each seed's score, and what its model stands on."""
    runs = read_logbook(contest / "artifacts").runs
    assert [run["members"] for run in runs] == [["lexical", "decoder"]] * 2 + [["lexical"]]
    assert not read_logbook(contest / "artifacts").damaged
    for run, n_seeds in zip(runs[:2], (3, 2), strict=True):
        (model,) = [it for it in run["models"] if it["model"] == "decoder"]
        assert len(model["by_seed"]) == n_seeds == len(model["seeds"])
        assert model["posterior_spread"] > 0
        assert model["parameters"] > 0
        assert model["epochs"] == 1
        assert len(model["lengths"]) == 3
    old, new = ([it for it in run["models"] if it["model"] == "decoder"] for run in runs[1::-1])
    seed = ("by_seed", "0", "raw")
    assert functools.reduce(dict.get, seed, old[0]) == functools.reduce(dict.get, seed, new[0])


def predictions(folder, name):
    frame = pl.read_parquet(folder / f"artifacts/run/predictions/round0/decoder{name}.parquet")
    return frame.select(pl.exclude("row_id")).to_numpy()


def submissions(*paths):
    return [pl.read_csv(path).sort("id").select(pl.exclude("id")).to_numpy() for path in paths]


def test_rounds_refitting_and_new_groups(contest, backbone):
    root = contest / "artifacts/run"
    backbone = shutil.copytree(backbone, contest / "own")
    run = ("run", "--jobs", "1", "--rounds", "1", "--json", "--truth", "solution.csv")
    learning = {"rate": 1e-2, "epochs": 2}  # so that the blend takes some of it
    configure(contest, backbone, layers=2, **learning)
    told = stackllm(*run, cwd=contest)
    assert told.returncode == 0, told.stderr
    board = pl.DataFrame(json.loads(told.stdout)["leaderboard"])
    own = board.filter(pl.col("model") == "decoder")
    assert own["raw"].n_unique() == 1  # later rounds go on with the first models
    assert own.height == 2
    check_single_seeds(contest)
    check_new_groups(contest)
    before, units = digests(root), times(contest)

    shutil.rmtree(contest / "artifacts/cache/trunk")
    assert stackllm(*run, cwd=contest).returncode == 0
    assert not (contest / "artifacts/cache/trunk").exists()  # nobody trains
    assert digests(root) == before

    configure(contest, backbone, layers=2, refit="full", **learning)
    told = stackllm(*run, cwd=contest)
    assert told.returncode == 0, told.stderr
    assert (contest / "artifacts/cache/trunk").exists()
    after = digests(root)
    assert {path: times(contest)[path] for path in units} == units
    assert set(times(contest)) - set(units) == {
        f"members/decoder/round0_full_seed{seed}" for seed in (0, 1)
    }
    changed = {path for path in before if before[path] != after[path]}
    assert changed <= {
        "model/model.json", "model/manifest.json", "run.json", "test.parquet", "submission.csv",
        "submission_raw.csv", "submission_round0.csv", "submission_round1.csv",
    }  # fmt: skip
    record = json.loads((root / "run.json").read_text())
    assert record["best_round"] == 0  # or check_new_groups would compare nothing
    assert record["blend_weights"]["round 0"]["decoder"] > 0
    assert before["submission.csv"] != after["submission.csv"]
    assert np.abs(predictions(contest, "_full_test") - predictions(contest, "_test")).max() > 1e-6
    check_new_groups(contest)

    weights = load_file(backbone / "model.safetensors")
    save_file(
        {name: value + 0.1 for name, value in weights.items()}, backbone / "model.safetensors"
    )
    told = stackllm("predict", "test.csv", "-o", "other.csv", cwd=contest)
    assert told.returncode == 65
    assert "is not the one that this run was trained on" in told.stderr
    assert not (contest / "other.csv").exists()


def check_single_seeds(contest):
    """Each seed's own table is there, and the member is what they give together."""
    assert np.abs(predictions(contest, "_seed0_oof") - predictions(contest, "_seed1_oof")).max() > 0
    train = pl.read_csv(contest / "train.csv")
    for rows in ("_oof", "_test"):
        together = predictions(contest, rows)
        singles = [predictions(contest, f"_seed{seed}{rows}") for seed in (0, 1)]
        assert all(single.shape == together.shape for single in singles)
        assert all(single.sum(axis=1) == pytest.approx(1) for single in singles)
    loss = log_loss(predictions(contest, "_seed1_oof"), train["target"].to_numpy())
    assert loss < 2 * np.log(3)


def check_new_groups(contest):
    """The stored models say of the test rows what was submitted."""
    told = stackllm("predict", "test.csv", "-o", "again.csv", cwd=contest)
    assert told.returncode == 0, told.stderr
    first, again = submissions(contest / "artifacts/run/submission.csv", contest / "again.csv")
    assert again.sum(axis=1) == pytest.approx(1)
    assert first.shape == again.shape
    best = json.loads((contest / "artifacts/run/run.json").read_text())["best_round"]
    if best == 0:  # later rounds leave out a model that trained on the row's own pseudo-label
        np.testing.assert_allclose(again, first, atol=1e-4)


def test_the_model_on_all_rows_has_every_true_label_and_no_other():
    folds = np.repeat([0, 1, 2, 0], 3)
    labels = np.tile([0, 1, 2], 4)
    design = Design(labels, folds, np.repeat([0, 1], 3), np.repeat(np.arange(6), 3), 3)
    full = design.full_fit()
    assert full.targets.rows.tolist() == list(range(12))
    assert (full.targets.labels == labels).all()
    assert full.targets.given.all()
    assert full.predict.tolist() == list(range(12, 18))


def test_a_refitted_model_stands_in_for_those_of_every_fold():
    draw = np.random.default_rng(0)
    views = dict(zip("abcd", draw.dirichlet(np.full(3, 0.05), (4, 2, 30)), strict=True))
    views["a"][0, 0] = [1.0, 0.0, 0.0]
    weights = draw.uniform(0, 3, (2, 4))
    weights[1, 2] = 0.0
    new = draw.dirichlet(np.ones(3), 30)
    for name in views:
        exchanged = {**views, name: np.stack([new, new])}
        blended = [
            log_blend(np.stack([view[fold] for view in exchanged.values()]), weights[fold])
            for fold in range(2)
        ]
        np.testing.assert_allclose(final_rows(views, {name: new}, weights), blended, rtol=1e-12)
        assert np.abs(final_rows(views, {}, weights) - blended).max() > 0.1


def test_a_loss_that_is_no_number_names_its_unit_and_keeps_its_steps(contest, backbone):
    configure(contest, backbone, seeds=[3], layers=2, epochs=6, rate=10, alpha=1_000_000)
    told = stackllm("features", "--quiet", "--jobs", "2", cwd=contest)
    assert told.returncode == 65
    assert "Traceback" not in told.stderr
    assert "members/decoder/round0_fold" in told.stderr
    assert "_seed3: the loss is nan at step " in told.stderr
    step = int(told.stderr.split("at step ")[1].split(".")[0])
    path = contest / told.stderr.split("until then are in ")[1].split(".jsonl")[0]
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").open()]
    assert [entry["step"] for entry in lines] == list(range(1, step))
    assert all(entry["tokens_per_second"] > 0 for entry in lines)
    assert not times(contest)
    configure(contest, backbone, seeds=[3], layers=2)
    assert stackllm("features", "--quiet", "--jobs", "1", cwd=contest).returncode == 0
    assert not list((contest / "artifacts").rglob("live/*"))  # all is in the units' metrics.jsonl


def test_what_a_unit_notes_is_shown_while_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.1)
    entry = {"of": 30, "loss": 0.25, "tokens_per_second": 5213.2, "seconds_left": 75.0}

    def work(folder):
        for step in range(30):
            progress.note({"step": step + 1, **entry})
            time.sleep(0.02)
        (folder / "done").touch()

    progress.note({"step": 1})  # outside of any unit: nobody asked
    started = time.monotonic()
    Engine(tmp_path, 1).ensure("work", [Task(make_unit("stage/a", 1), work)])
    seconds = time.monotonic() - started
    lines = [line for line in capsys.readouterr().err.splitlines() if "stage-a" in line]
    assert 2 <= len(lines) <= seconds / 0.1
    assert "/30, loss 0.2500, 5,213 tokens/s, about 75 s left" in lines[0]
    assert lines[0].startswith("work: stage-a: step ")
    assert not list((tmp_path / "live").iterdir())


def test_where_notes_cannot_stand_is_named(tmp_path):
    (tmp_path / "live").write_text("")
    path = progress.notes_path(tmp_path, "members/own")
    with pytest.raises(StorageError, match="live"), progress.taking_notes(path):
        progress.note({"step": 1, "of": 2})


def test_notes_that_are_torn_or_old_are_passed_by(tmp_path):
    whole, torn, old = (tmp_path / f"{name}.jsonl" for name in ("whole", "torn", "old"))
    old.write_text('{"step": 9, "of": 9}\n')
    since = old.stat().st_mtime + 0.001
    time.sleep(0.02)
    torn.write_text('{"step": 1, "of": 2}\n{"epoch": 1, "held_loss": 0.5}\n{"st')
    time.sleep(0.02)
    whole.write_text('{"step": 2, "of": 2}\n')
    found = progress.newest_notes([whole, torn, old, tmp_path / "none.jsonl"], since)
    assert list(found.items()) == [("torn", {"step": 1, "of": 2}), ("whole", {"step": 2, "of": 2})]


def test_names_and_settings_that_do_not_go_together_are_refused():
    with pytest.raises(UsageError, match='refit must be "folds" or "full", not "all"'):
        DecoderParams(refit="all")
    with pytest.raises(UsageError, match="does not go with every_round = true"):
        DecoderParams(refit="full", every_round=True)
    several = Member("a", "decoder", DecoderParams(seeds=(0, 1), refit="full"))
    for name in ("a_seed1", "a_full"):
        with pytest.raises(UsageError, match=f'"{name}" is the name of a member and of what one'):
            check_tables([several, Member(name, "lexical", LexicalParams())], [])
        with pytest.raises(UsageError, match=f'"{name}"'):
            check_tables([several], [name])
    check_tables([several, Member("a_seed2", "lexical", LexicalParams())], ["b"])


def test_what_makes_no_sense_is_one_sentence(contest, backbone):
    for layers, sentence in {
        "3": 'has 3 layers; trainable_layers must be 1 to 2, or "all"',
        '"some"': 'trainable_layers must be a whole number from 1 to 10000 or "all", not "some"',
    }.items():
        configure(contest, backbone, layers=layers)
        told = stackllm("features", "--quiet", "--jobs", "1", cwd=contest)
        assert told.returncode in (2, 65)
        assert sentence in told.stderr
        assert "Traceback" not in told.stderr
    configure(contest, "/no/such/folder")
    told = stackllm("features", "--quiet", "--jobs", "1", cwd=contest)
    assert told.returncode == 66
    assert "there is no such folder" in told.stderr
