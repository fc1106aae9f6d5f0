"""The pipeline as a library: what a run hands out, sets aside, promises before it starts, and says of itself."""

import json

import numpy as np
import polars as pl
import pytest
from conftest import write_table

from stackllm import pipeline
from stackllm.crossfit.design import CrossFit, Design
from stackllm.crossfit.pseudo import PseudoParams, audit, pseudo_targets
from stackllm.engine.trackers import TrackingParams
from stackllm.errors import DataError, MissingInputError
from stackllm.members.boosting import BoostingParams
from stackllm.members.lexical import LexicalParams
from stackllm.members.registry import Member
from stackllm.metrics import bootstrap_error, row_losses
from stackllm.report.logbook import read_logbook
from stackllm.settings import RunParams, Settings
from stackllm.stack.posteriors import cross_posteriors
from stackllm.tables.contest import TableParams
from stackllm.workspace import open_workspace


def settings_for(folder, **changes):
    given = {
        "data": TableParams(train=str(folder / "train.csv"), test=str(folder / "test.csv")),
        "run": RunParams(folds=2),
        "encoder": None,
        "members": (Member("lexical", "lexical", LexicalParams(views=("words",))),),
        "stack": BoostingParams(n_trees=5, n_seeds=1, min_leaf_rows=3),
        **changes,
    }
    return Settings(**given)


def play(folder, settings, until="stack", name="run", **more):
    with open_workspace(name, folder / "artifacts", n_jobs=1, quiet=True) as workspace:
        return pipeline.run(settings, workspace, until=until, **more)


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("pipeline"), 12, 6)


def test_stage_one_leaves_its_scores(contest):
    told = play(contest, settings_for(contest), "features", "features")
    assert told.submission is None
    root = contest / "artifacts" / "features"
    assert pl.read_csv(root / "leaderboard.csv")["model"].to_list() == ["lexical"]
    (entry,) = [
        run for run in read_logbook(contest / "artifacts").runs if run["name"] == "features"
    ]
    assert entry["state"] == "finished"
    assert entry["oof"] == [pytest.approx(told.board["posterior"][0])]


def test_another_seed_under_the_same_name_sets_aside_what_was_there(contest, capsys):
    play(contest, settings_for(contest), name="twice")
    root = contest / "artifacts" / "twice"
    before = (root / "submission.csv").read_bytes()
    capsys.readouterr()
    play(contest, settings_for(contest), name="twice")
    assert "made before" not in capsys.readouterr().err
    assert not (root / "earlier").exists()
    play(contest, settings_for(contest, run=RunParams(folds=2, seed=1)), name="twice")
    assert "made before with run.seed = 0" in capsys.readouterr().err
    assert (root / "earlier" / "001" / "submission.csv").read_bytes() == before
    assert (root / "submission.csv").read_bytes() != before
    record = json.loads((root / "run.json").read_text())
    del record["settings"]["data"]["same_question"]  # as an older version leaves it
    (root / "run.json").write_text(json.dumps(record))
    play(contest, settings_for(contest, run=RunParams(folds=2, seed=1)), name="twice")
    assert "made before" not in capsys.readouterr().err
    record["settings"]["encoder"] = {"backbone": "smollm2"}
    (root / "run.json").write_text(json.dumps(record))
    play(contest, settings_for(contest, run=RunParams(folds=2, seed=1)), name="twice")
    assert "made before with encoder left out = False" in capsys.readouterr().err
    lines = [run for run in read_logbook(contest / "artifacts").runs if run["name"] == "twice"]
    assert [run["seed"] for run in lines] == [1, 0]


def test_a_run_that_fails_says_so_in_the_logbook(contest, monkeypatch):
    def broken(*_):
        raise DataError("the disk is made of cheese.")

    monkeypatch.setattr(pipeline, "hand_out", broken)
    with pytest.raises(DataError, match="cheese"):
        play(contest, settings_for(contest), name="failing")
    (entry,) = [run for run in read_logbook(contest / "artifacts").runs if run["name"] == "failing"]
    assert entry["state"] == "failed"
    assert "cheese" in entry["error"]


def test_trackers_get_the_final_scores_and_change_nothing(contest, watcher, capsys):
    tracked = settings_for(contest, tracking=TrackingParams(report_to=("json",)))
    for _ in range(2):  # the same run again is no news
        told = play(contest, tracked, name="tracked")
    scores = watcher(contest / "artifacts/tracked/trackers/scores")
    assert [it["at"] for it in scores] == [0]
    for row in told.board.iter_rows(named=True):
        assert scores[0][f"{row['model']}/posterior"] == row["posterior"]
    capsys.readouterr()
    assert play(contest, settings_for(contest), name="tracked").loss == told.loss
    assert "made before" not in capsys.readouterr().err


def test_a_run_that_was_killed_is_interrupted(contest):
    root = contest / "artifacts" / "killed"
    root.mkdir(parents=True)
    (root / "state.json").write_text('{"state": "running"}')
    (entry,) = [run for run in read_logbook(contest / "artifacts").runs if run["name"] == "killed"]
    assert entry["state"] == "interrupted"


@pytest.mark.parametrize("rounds", [0, 2])
def test_two_groups_in_each_fold_are_enough(tmp_path, rounds):
    """Of every stage but the heads of frozen LLMs, whose penalty is tried in tests/members."""
    folder = write_table(tmp_path, 4, 6)
    members = [
        Member("lexical", "lexical", LexicalParams(views=("words",))),
        Member("features", "features", BoostingParams(n_trees=5)),
    ]
    told = play(folder, settings_for(folder, members=tuple(members)), "pseudo")
    assert np.isfinite(told.board["posterior"].to_numpy()).all()


def test_what_is_needed_last_is_missed_first(contest):
    sample = contest / "sample.csv"
    sample.write_text("id,target_0,target_1\n0,0.5,0.5\n")
    data = TableParams(
        train=str(contest / "train.csv"), test=str(contest / "test.csv"), sample=str(sample)
    )
    with pytest.raises(DataError, match=r"sample\.csv"):
        play(contest, settings_for(contest, data=data), name="early")
    with pytest.raises(MissingInputError, match=r"no\.csv"):
        play(contest, settings_for(contest), name="early", truth=contest / "no.csv")
    assert not list((contest / "artifacts" / "early").rglob("manifest.json"))


def test_a_dry_run_of_a_fresh_project_lists_what_the_run_then_does(tmp_path):
    folder = write_table(tmp_path, 12, 6)
    settings = settings_for(folder)
    with open_workspace("run", folder / "artifacts", dry_run=True, quiet=True) as workspace:
        plan = pipeline.plan(settings, workspace)
    assert not (folder / "artifacts").exists()
    assert json.loads(json.dumps(plan.summary()))["stages"]
    play(folder, settings, "pseudo")
    ran = [
        json.loads(line)["unit"]
        for line in (folder / "artifacts/run/timings.jsonl").read_text().splitlines()
    ]
    assert sum(stage.to_run for stage in plan.stages) == len(ran)
    trainings = sum(stage.units for stage in plan.stages if stage.name.startswith("members"))
    assert trainings == sum(unit.startswith("members/") for unit in ran) == 2 + 2 * 4
    with open_workspace("run", folder / "artifacts", dry_run=True, quiet=True) as workspace:
        again = pipeline.plan(settings, workspace)
    assert {stage.to_run for stage in again.stages} == {0}
    assert str(again) == "all units are done; nothing would run"


def test_folds_that_are_stored_are_those_that_were_used(contest):
    play(contest, settings_for(contest), "features", "features")
    root = contest / "artifacts" / "features"
    with open_workspace("features", contest / "artifacts", dry_run=True, quiet=True) as workspace:
        study = pipeline.open_study(settings_for(contest), workspace)
    stored = pl.read_parquet(root / "folds" / "folds.parquet")
    assert stored["fold"].to_list() == study.design.folds.tolist()
    assert stored["row_id"].to_list() == study.table.train["row_id"].to_list()


def make_design(n_groups=10, n_classes=3, size=None):
    size = size or n_classes
    labels = np.tile(np.arange(n_classes), n_groups)
    groups = np.repeat(np.arange(2 * len(labels) // size), size)
    return Design(
        labels,
        np.arange(len(labels)) // size % 2,
        np.arange(len(labels)) // size % 2,
        groups,
        n_classes,
    )


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_where_no_group_has_a_second_row_the_group_gains_nothing(temperature):
    design = make_design(size=1)
    draw = np.random.default_rng(0)
    oof = draw.dirichlet(np.ones(3), len(design.labels))
    oof[np.arange(len(oof)), design.labels] += 0.5
    oof /= oof.sum(axis=1, keepdims=True)
    predictions = CrossFit(oof, np.stack([oof, oof]))
    calibrated = cross_posteriors(predictions, design, 1, temperature)
    np.testing.assert_allclose(calibrated.rows.oof, calibrated.oof, rtol=2e-2)
    if temperature == 1.0:  # as the blend, whose weights are its temperature
        np.testing.assert_allclose(calibrated.rows.oof, oof, rtol=1e-7)


@pytest.mark.parametrize("labels", ["soft", "hard"])
@pytest.mark.parametrize("floor", [0.0, 0.6])
def test_the_audit_lists_the_labels_that_were_used_and_no_others(labels, floor):
    design = make_design()
    draw = np.random.default_rng(1)
    posteriors = CrossFit(np.empty((0, 3)), draw.dirichlet(np.full(3, 0.4), (2, len(design.parts))))
    params = PseudoParams(labels=labels, min_confidence=floor, weight=0.5)
    ids = pl.Series([f"row{i}" for i in range(len(design.parts))])
    fits = design.next_fits(
        1, lambda fold, part: pseudo_targets(posteriors, design, params, fold, part)
    )
    listed = pl.concat(audit(fit, design, params, ids, ("a", "b", "c")) for fit in fits)
    expected = set()
    for fold in range(2):
        for row, probabilities in enumerate(posteriors.test[fold]):
            if probabilities.max() >= floor:
                kept = probabilities >= (0.02 if labels == "soft" else probabilities.max())
                expected |= {(f"row{row}", fold, "abc"[j]) for j in np.flatnonzero(kept)}
    assert set(listed.select("row_id", "fold", "label").iter_rows()) == expected
    assert len(expected) == listed.height
    used = sum(int((~fit.targets.given).sum()) for fit in fits)
    assert used == listed.height
    if labels == "soft":
        totals = listed.group_by("row_id", "fold").agg(pl.col("confidence").sum())
        assert np.allclose(totals["confidence"], 1)


def test_verdicts_are_paired_and_in_words_that_fit():
    from stackllm.report.leaderboard import verdict

    design = make_design(40)
    draw = np.random.default_rng(2)
    noise = draw.dirichlet(np.ones(3), len(design.labels))
    sure = noise.copy()
    sure[np.arange(len(sure)), design.labels] += 3
    sure /= sure.sum(axis=1, keepdims=True)
    other = np.abs(sure + draw.normal(0, 1e-3, sure.shape))
    other /= other.sum(axis=1, keepdims=True)
    assert verdict(noise, sure, design).endswith(": better")
    assert verdict(sure, noise, design).endswith(": worse")
    assert verdict(sure, other, design).endswith(": no difference beyond its error")
    gains = row_losses(noise, design.labels) - row_losses(sure, design.labels)
    error = bootstrap_error(gains, design.train_groups)
    assert f"gain {gains.mean():+.4f} ± {error:.4f}, paired over groups" in verdict(
        noise, sure, design
    )
