"""Members of the user's own: any class with ``predict_proba``, and classes that speak our protocol."""

import json
import zipfile

import numpy as np
import polars as pl
import pytest
from conftest import write_table
from helpers import digests, stackllm

from stackllm.errors import DataError, MissingInputError, StackllmError, StorageError, UsageError
from stackllm.members.own import OwnParams, own_kind, predict

SOURCE = """
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline


class Linear(LogisticRegression):
    pass


class Nearest(KNeighborsClassifier):
    gpu = True


class Texts:
    def __init__(self, c=1.0):
        self.c = c

    def fit(self, X, y):
        self.model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=self.c)).fit(X, y)
        return self

    def predict_proba(self, X):
        return self.model.predict_proba(X)


class Prior:
    def fit(self, inputs, targets, seed, folder):
        counts = np.bincount(targets.labels, targets.weights, minlength=targets.n_classes)
        np.save(folder / "prior.npy", counts / counts.sum())

    def predict(self, inputs, rows, folder):
        return np.tile(np.load(folder / "prior.npy"), (len(rows), 1))


class Neither:
    pass
"""

SETTINGS = """
encoder = {backbone = "none"}
run = {folds = 2}
stack = {n_trees = 10, n_seeds = 1}
[[member]]
kind = "mine.py:Linear"
params = {max_iter = 1000}
[[member]]
kind = "mine.py:Nearest"
name = "nearest"
[[member]]
kind = "mine.py:Texts"
reads = "texts"
params = {c = 3.0}
[[member]]
kind = "mine.py:Prior"
"""


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    folder = write_table(tmp_path_factory.mktemp("own"), 16, 8)
    (folder / "mine.py").write_text(SOURCE)
    (folder / "stackllm.toml").write_text(SETTINGS)
    done = stackllm("pseudo", "--rounds", "1", "--json", "--jobs", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_they_go_through_every_stage(contest):
    folder, told = contest
    scores = {(row["round"], row["model"]): row for row in told["leaderboard"]}
    for number in (0, 1):
        assert scores[number, "prior"]["raw"] == pytest.approx(np.log(3), abs=1e-6)
        for name in ("linear", "nearest", "texts"):
            assert scores[number, name]["auc"] > 0.6
    models = sorted(path.name for path in (folder / "artifacts/run/members/texts").iterdir())
    assert len(models) == 2 + 2 * 2
    again = stackllm("pseudo", "--rounds", "1", "--json", cwd=folder)
    assert not [line for line in again.stderr.splitlines() if line.startswith("members")]


def test_predict_needs_neither_their_file_nor_the_settings(contest, tmp_path):
    folder, _ = contest
    pl.read_csv(folder / "test.csv").write_csv(tmp_path / "new.csv")
    place = ["--artifacts", str(folder / "artifacts")]
    done = stackllm(
        "predict", "new.csv", "--truth", str(folder / "solution.csv"), *place, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    new = pl.read_csv(tmp_path / "new.predictions.csv").drop("id").to_numpy()
    assert np.allclose(new.sum(axis=1), 1)
    assert "log loss" in done.stdout


def test_no_pickle_is_stored_and_the_same_seed_gives_the_same_bytes(contest, tmp_path):
    folder, _ = contest
    for path in (folder / "artifacts/run/members").rglob("model.skops"):
        with zipfile.ZipFile(path) as stored:
            assert {name.rpartition(".")[2] for name in stored.namelist()} <= {"json", "npy", "npz"}
    other = write_table(tmp_path, 16, 8)
    (other / "mine.py").write_text(SOURCE)
    (other / "stackllm.toml").write_text(SETTINGS)
    assert stackllm("pseudo", "--rounds", "1", "--quiet", cwd=other).returncode == 0
    places = [place / "artifacts/run/members" for place in (folder, other)]
    assert digests(places[0]) == digests(places[1])


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("nowhere.py:Linear", MissingInputError, "there is no such file"),
        ("mine.py:Linaer", UsageError, 'Did you mean "Linear"'),
        ("mine.py:Neither", UsageError, "Give it fit"),
        ("broken.py:Linear", UsageError, "loading it failed .SyntaxError"),
    ],
)
def test_what_is_no_member_is_said(tmp_path, monkeypatch, kind, error, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("class Linear(")
    with pytest.raises(error, match=said):
        own_kind(kind)


def test_weights_and_missing_classes(contest, tmp_path, monkeypatch):
    """A class that takes no weights learns each row's likeliest label; one never seen gets probability 0."""
    from stackllm.crossfit.targets import Targets
    from stackllm.members.inputs import load_inputs

    folder, _ = contest
    monkeypatch.chdir(folder)
    inputs = load_inputs(folder / "artifacts/run/inputs/table")
    rows = np.repeat(np.arange(20), 2)
    labels = np.tile([0, 1], 20)
    weights = np.where(labels == rows % 2, 0.9, 0.1)
    targets = Targets(rows, labels, weights, np.ones(40, bool), 3)
    kind = own_kind("mine.py:Nearest")
    kind.fit(inputs, targets, OwnParams(params={"n_neighbors": 1}), 0, tmp_path)
    probabilities = predict(inputs, np.arange(20), tmp_path)
    assert probabilities.argmax(axis=1).tolist() == [row % 2 for row in range(20)]
    assert (probabilities[:, 2] == 0).all()
    with pytest.raises(StackllmError, match="making one with params"):
        kind.fit(inputs, targets, OwnParams(params={"neighbours": 1}), 0, tmp_path)


def test_a_class_that_computes_on_a_gpu_says_so(contest, monkeypatch):
    monkeypatch.chdir(contest[0])
    wanted = [
        own_kind(f"mine.py:{name}").traits(OwnParams()).devices for name in ("Nearest", "Linear")
    ]
    assert wanted == ["one", None]


BAD = """
import sys, threading
import numpy as np
from sklearn.base import BaseEstimator

class Good(BaseEstimator):  # nothing ends in _: scikit-learn does not see that it is fitted
    def fit(self, X, y):
        print("printed by the user's class")
        self.n = len(set(y))
        return self
    def predict_proba(self, X):
        return np.full((len(X), self.n), 1 / self.n)

class Saves(Good):
    def save(self, folder): (folder / "n.txt").write_text(str(self.n))
    @classmethod
    def load(cls, folder):
        loaded = cls()
        loaded.n = int((folder / "n.txt").read_text())
        return loaded

class Making(Good):
    def __init__(self): raise RuntimeError("no luck")
class Fitting(Good):
    def fit(self, X, y): raise RuntimeError("no luck")
class Leaving(Good):
    def fit(self, X, y): sys.exit(3)
class Predicting(Good):
    def predict_proba(self, X): return {}["key"]
class Negative(Good):
    def predict_proba(self, X): return super().predict_proba(X) - [1, 0, 0]
class Doubled(Good):
    def predict_proba(self, X): return super().predict_proba(X) * 2
class Void(Good):
    def predict_proba(self, X): return super().predict_proba(X) * np.nan
class Short(Good):
    def predict_proba(self, X): return super().predict_proba(X)[1:]
class Anonymous(Good):
    def fit(self, X, y): super().fit(X, y).rule = lambda: 1
class Locked(Good):
    def fit(self, X, y): super().fit(X, y).lock = threading.Lock()
class Protocol:
    def fit(self, inputs, targets, seed, folder): pass
    def predict(self, inputs, rows, folder): return np.full((len(rows), 2), 1 / 2)
class Failing(Protocol):
    def fit(self, inputs, targets, seed, folder): raise RuntimeError("no luck")
"""


@pytest.fixture(scope="module")
def trial(contest, tmp_path_factory):
    """Fits a class of BAD on the contest's first rows, and predicts as many."""
    from stackllm.crossfit.targets import Targets
    from stackllm.members.inputs import load_inputs

    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad.py").write_text(BAD)
    inputs = load_inputs(contest[0] / "artifacts/run/inputs/table")
    labels = np.arange(30) % 3
    targets = Targets(np.arange(30), labels, np.ones(30), np.ones(30, bool), 3)

    def run(name, place):
        own_kind(f"{folder / 'bad.py'}:{name}").fit(inputs, targets, OwnParams(), 0, place)
        return predict(inputs, np.arange(30), place)

    return run


@pytest.mark.parametrize("name", ["Good", "Saves"])
def test_a_class_needs_no_more_than_fit_and_predict_proba(trial, tmp_path, name):
    assert np.allclose(trial(name, tmp_path), 1 / 3)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("Making", UsageError, r"Making: making one .* failed \(RuntimeError: no luck, line 23"),
        ("Fitting", DataError, r"Fitting.fit .* failed \(RuntimeError: no luck, line 25"),
        ("Leaving", DataError, r"Leaving.fit .* failed \(SystemExit: 3, line 27"),
        ("Predicting", DataError, r"Predicting.predict_proba failed \(KeyError: 'key', line 29"),
        ("Negative", DataError, "30 of 30 rows that are no probabilities"),
        ("Doubled", DataError, "30 of 30 rows that are no probabilities"),
        ("Void", DataError, "30 of 30 rows that are no probabilities"),
        ("Short", DataError, r"gave shape \(29, 3\) for 30 rows"),
        ("Anonymous", StorageError, r"Give your class save\(folder\)"),
        ("Locked", StorageError, r"Give your class save\(folder\)"),
        ("Protocol", DataError, r"gave shape \(30, 2\) for 30 rows and 3 classes"),
        ("Failing", DataError, r"Failing.fit failed \(RuntimeError: no luck, line 46"),
    ],
)
def test_whatever_a_class_does_wrong_is_one_sentence(trial, tmp_path, name, error, said):
    with pytest.raises(error, match=said):
        trial(name, tmp_path)


def test_what_a_class_prints_goes_to_the_file_of_libraries(trial, tmp_path, capfd):
    from stackllm.engine.libraries import LOG, overheard

    with overheard(tmp_path / LOG, "unit"):
        trial("Good", tmp_path)
    assert capfd.readouterr().out == ""
    assert (tmp_path / LOG).read_text() == "unit: printed by the user's class\n"
