"""The recipe as one object: what the command line does, from frames, and the same bytes."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from conftest import write_table
from helpers import digests, stackllm
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import stackllm as sl
from stackllm.tables.frames import from_native, like_native

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "encoder": {"backbone": "none"},
    "stack": {"n_trees": 20},
    "member": [{"kind": "lexical"}, {"kind": "features", "n_trees": 20}],
}
TOML = '[encoder]\nbackbone = "none"\n[stack]\nn_trees = 20\n[[member]]\nkind = "lexical"\n[[member]]\nkind = "features"\nn_trees = 20\n'
HANDED_OUT = ("oof.parquet", "test.parquet", "submission.csv", "pseudo_labels.parquet")


def model(path, **more):
    return sl.StackLLM(settings=SETTINGS, folds=2, rounds=1, path=path, n_jobs=1, **more)


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    """A contest, what the command line makes of it, and what Python makes of it out of pandas."""
    folder = write_table(tmp_path_factory.mktemp("face"), 24, 10)
    (folder / "stackllm.toml").write_text(TOML)
    words = ("--folds", "2", "--rounds", "1", "--jobs", "1", "--quiet", "--truth", "solution.csv")
    done = stackllm("run", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    frames = {name: pd.read_csv(folder / f"{name}.csv") for name in ("train", "test", "solution")}
    fitted = model(folder / "artifacts" / "py").fit(
        frames["train"], unlabelled=frames["test"], truth=frames["solution"]
    )
    return folder, frames, fitted


def test_python_and_the_command_line_make_the_same_bytes(contest):
    folder, _, _ = contest
    for name in HANDED_OUT:
        of_python, of_command = (folder / "artifacts" / run / name for run in ("py", "run"))
        assert of_python.read_bytes() == of_command.read_bytes(), name
    records = [
        json.loads((folder / f"artifacts/{run}/run.json").read_text()) for run in ("py", "run")
    ]
    assert records[0]["oof_log_loss"] == records[1]["oof_log_loss"]


def test_fitted_again_it_finds_all_that_is_there_and_polars_is_pandas(contest, capfd):
    folder, frames, fitted = contest
    before, units = (look(folder / "artifacts" / "py") for look in (digests, manifests))
    again = clone(fitted).set_params(verbose=True)
    again.fit(
        *(pl.read_csv(folder / "train.csv"),),
        unlabelled=pl.read_csv(folder / "test.csv"),
        truth=frames["solution"]["target"],
    )
    told = capfd.readouterr().err
    assert "members" not in told
    assert "stack" not in told.replace("stackllm", "")
    after = digests(folder / "artifacts" / "py")
    assert manifests(folder / "artifacts" / "py") == units
    tables = {name for name in before if "tables/" in str(name)}
    assert {k: v for k, v in before.items() if k not in tables} == {
        k: v for k, v in after.items() if k not in tables
    }


def manifests(root):
    """When each unit below a run was written: bytes alone would be the same if it were made again."""
    return {path: path.stat().st_mtime_ns for path in root.rglob("manifest.json")}


def test_an_opened_run_goes_on_with_its_own_settings(contest, tmp_path):
    folder, frames, _ = contest
    shutil.copytree(folder / "artifacts", tmp_path / "artifacts")
    root = tmp_path / "artifacts/run"
    units, oof = manifests(root), (root / "oof.parquet").read_bytes()
    opened = sl.open(root, n_jobs=1)
    opened.fit(frames["train"], unlabelled=frames["test"], truth=frames["solution"])
    now = manifests(root)
    model_unit = (
        root / "model/manifest.json"
    )  # says in which files the tables stand: now in those of fit
    assert now.pop(model_unit) > units.pop(model_unit)
    assert now == units
    assert (root / "oof.parquet").read_bytes() == oof


def test_an_opened_run_predicts_as_the_command_does(contest):
    folder, frames, fitted = contest
    done = stackllm("predict", "test.csv", "-o", "told.csv", "--quiet", cwd=folder)
    assert done.returncode == 0, done.stderr
    told = pl.read_csv(folder / "told.csv").drop("id").to_numpy()
    opened = sl.open(folder / "artifacts" / "run")
    for it in (opened, fitted, pickle.loads(pickle.dumps(fitted))):
        probabilities = it.predict_proba(frames["test"])
        assert isinstance(probabilities, pd.DataFrame)
        assert probabilities.columns.tolist() == it.classes_.tolist()
        np.testing.assert_array_equal(probabilities.to_numpy(), told)
        assert it.predict(frames["test"]).tolist() == it.classes_[told.argmax(axis=1)].tolist()
    assert isinstance(opened.predict_proba(pl.read_csv(folder / "test.csv")), pl.DataFrame)
    assert opened.get_params()["folds"] == 2


def test_what_it_tells_is_what_the_run_handed_out(contest):
    folder, frames, fitted = contest
    oof = fitted.oof_
    assert oof["label"].to_list() == frames["train"]["target"].astype(str).tolist()
    classes = fitted.classes_.tolist()
    stored = pl.read_parquet(folder / "artifacts/py/oof.parquet")
    assert oof.select("row_id", *classes).equals(stored.select("row_id", *classes))
    assert oof.group_by("group").len()["len"].unique().to_list() == [len(classes)]
    assert fitted.leaderboard()["model"].unique().sort().to_list() == [
        "blend",
        "features",
        "lexical",
        "stack",
    ]
    assert "blend" in fitted._repr_html_()
    submission = fitted.to_submission(frames["test"])
    assert submission.write_csv() == (folder / "artifacts/py/submission.csv").read_text()
    mixed = pl.read_csv(folder / "artifacts/py/submission.csv").reverse()
    mixed.select(mixed.columns[::-1]).write_csv(folder / "like.csv")
    like = fitted.to_submission(frames["test"], like=folder / "like.csv")
    assert like.columns == mixed.columns[::-1]
    assert like.select(mixed.columns).sort("id").equals(submission.sort("id"))


def test_scores_are_of_the_labels_however_they_come(contest):
    _, frames, fitted = contest
    test, solution = frames["test"], frames["solution"]
    by_id = fitted.score(test, solution.sample(frac=1.0, random_state=0))
    with_labels = test.assign(target=solution["target"])
    for score in (fitted.score(test, solution["target"]), fitted.score(with_labels)):
        assert score == by_id
    losses = -np.log(
        fitted.predict_proba(test).to_numpy()[range(len(test)), solution["target"].astype(int)]
    )
    assert by_id.log_loss == pytest.approx(losses.mean(), abs=1e-9)
    with pytest.raises(sl.UsageError, match="there are no labels: pass y"):
        fitted.score(test)
    with pytest.raises(sl.DataError, match="3 labels for 30 rows"):
        fitted.score(test, [0, 1, 2])


def test_without_unlabelled_rows_there_is_no_submission(contest, tmp_path):
    folder, frames, _ = contest
    train = frames["train"]
    fitted = model(tmp_path / "alone").fit(train.drop(columns="target"), train["target"])
    assert not (tmp_path / "alone" / "submission.csv").exists()
    raw = pl.read_csv(folder / "artifacts/py/leaderboard.csv").filter(pl.col("round") == 0)
    alone = fitted.leaderboard().drop("behind", "behind_se")  # that of which is submitted
    assert alone.equals(raw.select(alone.columns))  # test rows take no part in round 0
    assert fitted.score(frames["test"], frames["solution"]).log_loss < 0.9


def test_bad_frames_and_what_is_not_fitted_are_one_sentence(contest, tmp_path):
    _, frames, _ = contest
    train = frames["train"]
    with pytest.raises(NotFittedError, match="there is no finished model here"):
        model(tmp_path / "none").predict_proba(train)
    assert not hasattr(model(tmp_path / "none"), "classes_")
    assert "not fitted" in model(tmp_path / "none")._repr_html_()
    with pytest.raises(sl.MissingInputError, match="no finished model"):
        sl.open(tmp_path / "none")
    with pytest.raises(sl.UsageError, match="must be a frame of polars or pandas, not list"):
        model(tmp_path / "a").fit([["x"]])
    with pytest.raises(sl.DataError, match='no column "Response"'):
        model(tmp_path / "a").fit(train.drop(columns="Response"))
    with pytest.raises(sl.DataError, match="the column 3 is not named by text"):
        model(tmp_path / "a").fit(train.assign(**{"x": 1}).rename(columns={"x": 3}))
    with pytest.raises(sl.UsageError, match="the setting folds must be a whole number"):
        model(tmp_path / "a").set_params(folds=1).fit(train)
    with pytest.raises(sl.DataError, match=r"settings: there is no section \[rum\]"):
        model(tmp_path / "a").set_params(settings={"rum": {}}).fit(train)


def test_rows_are_explained_by_models_that_did_not_see_them(contest):
    folder, frames, fitted = contest
    root, classes = folder / "artifacts/py", fitted.classes_.tolist()
    best = json.loads((root / "run.json").read_text())["best_round"]
    for name, which, row in (("train", "oof", 7), ("test", "test", 11)):
        frame = frames[name]
        told = fitted.explain(frame.iloc[[row]])
        assert (told.where, told.row_id) == (name, str(row))
        assert told.label == (str(frame["target"][row]) if name == "train" else None)
        stored = pl.read_parquet(root / f"predictions/round{best}/lexical_{which}.parquet")
        opinions = {model: values for model, *values in told.opinions.iter_rows()}
        assert opinions["lexical"] == list(stored.select(classes).row(row))
        posterior = pl.read_parquet(root / f"{which}.parquet").select(classes).row(row)
        assert opinions["posterior"] == list(posterior)
        assert told.likeliest == classes[int(np.argmax(posterior))]
        for_it, against = told.strongest(told.likeliest)
        assert (for_it["adds"] > 0).all()
        assert (against["adds"] < 0).all()
        assert f"for {told.likeliest}: " in str(told)
    new = (
        frames["test"]
        .assign(Question="never asked", id=range(500, 500 + len(frames["test"])))
        .head(3)
    )
    told = fitted.explain(new, row=2)
    assert (told.where, told.label) == ("new", None)
    expected = fitted.predict_proba(new).to_numpy()[2]
    np.testing.assert_allclose(
        told.opinions.filter(model="posterior").drop("model").row(0), expected
    )
    hostile = new.assign(Response="<script>alert(1)</script> & more")
    assert "<script>" not in fitted.explain(hostile)._repr_html_()
    with pytest.raises(sl.UsageError, match="row must be from 0 to 2, not 3"):
        fitted.explain(new, row=3)


def test_a_table_that_is_another_now_is_no_row_of_the_run(contest):
    folder, frames, fitted = contest
    tables = folder / "artifacts/py/tables"
    before = {name: (tables / f"{name}.parquet").read_bytes() for name in ("train", "test")}
    other = frames["test"].iloc[::-1]
    try:
        from_native(other, "it").write_parquet(tables / "test.parquet")
        submission = fitted.to_submission(other)  # what the run handed out has another order
        expected = fitted.predict_proba(other).to_numpy()
        np.testing.assert_array_equal(submission.drop("id").to_numpy(), expected)
        with pytest.raises(sl.DataError, match=r"test\.parquet: this is not the table any more"):
            fitted.explain(other)
        with pytest.raises(sl.DataError, match="Put that back, or run the command"):
            fitted.oof_  # noqa: B018
    finally:
        for name, content in before.items():
            (tables / f"{name}.parquet").write_bytes(content)


def test_the_readme_shows_what_runs(contest, tmp_path, monkeypatch):
    _, frames, _ = contest
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = (it for it in re.findall(r"```python\n(.*?)```", readme, re.S) if "StackLLM" in it)
    given = {"train": frames["train"], "test": frames["test"], "new": frames["test"]}
    given["labels"] = frames["solution"]
    exec(
        block.replace("StackLLM(", "StackLLM(settings=SETTINGS, folds=2, n_jobs=1, "),
        {**given, "SETTINGS": SETTINGS},
    )
    assert pl.read_csv("submission.csv").height == len(frames["test"])


CELLS = st.one_of(st.none(), st.text(max_size=5))


@given(
    texts=st.lists(CELLS, min_size=1, max_size=6),
    number=st.integers(-(2**40), 2**40),
)
def test_frames_of_pandas_come_as_those_of_polars(texts, number):
    columns = {"t": texts, "n": [number] * len(texts)}
    ours = pl.DataFrame(columns, schema={"t": pl.String, "n": pl.Int64})
    theirs = from_native(
        pd.DataFrame({"t": pd.array(texts, dtype=object), "n": columns["n"]}), "it"
    )
    assert theirs.with_columns(pl.col("t").cast(pl.String)).equals(ours)
    nullable = from_native(
        pd.DataFrame({"t": pd.array(texts, "string"), "n": pd.array([None] * len(texts), "Int64")}),
        "it",
    )
    assert nullable["t"].to_list() == texts
    assert nullable["n"].is_null().all()
    assert np.isnan(from_native(pd.DataFrame({"x": [1.0, np.nan]}), "it")["x"][1])
    numbers = pl.DataFrame({"a": np.arange(3.0)})
    assert like_native(numbers, pd.DataFrame({"z": [1]}))["a"].tolist() == [0.0, 1.0, 2.0]
    assert from_native(ours, "it") is ours
