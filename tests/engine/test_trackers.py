"""Trackers: what is not installed is said before any work, and what fails costs nobody a training."""

import importlib
import json
from pathlib import Path

import pytest

from stackllm.engine import trackers
from stackllm.engine.trackers import TrackingParams, check_trackers, tracking
from stackllm.errors import MissingInputError, UsageError

FOLDER = Path("run/trackers/members-llm")


def test_a_package_that_is_not_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trackers._TRACKERS, "nowhere_to_be_found", None)
    (tmp_path / "nowhere_to_be_found").mkdir()  # as wandb leaves a folder of its name
    with pytest.raises(MissingInputError, match="pip install nowhere_to_be_found"):
        TrackingParams(report_to=("nowhere_to_be_found",))
    with pytest.raises(UsageError, match='Did you mean "wandb"'):
        TrackingParams(report_to=("wandbd",))
    check_trackers(("none",))


@pytest.mark.parametrize("fails", ["__init__", "log", "close"])
def test_one_that_fails_is_told_of_once_and_the_others_go_on(watcher, monkeypatch, capsys, tmp_path, fails):  # fmt: skip
    class Broken:
        def __init__(self, folder, settings):
            print("hello from a package")
            self.act("__init__")

        def act(self, name):
            if name == fails:
                raise RuntimeError("the server is made of cheese\nand more")

        def log(self, scores, step):
            self.act("log")

        def close(self):
            self.act("close")

    monkeypatch.setitem(trackers._TRACKERS, "broken", Broken)
    with tracking(("broken", "json"), tmp_path / FOLDER, {"run.seed": 1}) as track:
        for step in range(3):
            track({"loss": 0.5, "not one": float("nan"), "text": "x"}, step)
    assert watcher(tmp_path / FOLDER) == [{"loss": 0.5, "at": step} for step in range(3)]
    out, err = capsys.readouterr()
    assert not out
    assert err.count("broken is told no more: the server is made of cheese") == 1


def test_the_training_s_own_error_comes_through(watcher, tmp_path):
    with (
        pytest.raises(ZeroDivisionError, match="division by zero"),
        tracking(("json",), tmp_path / FOLDER, {}),
    ):
        _ = 1 / 0


def test_nobody_is_told_outside_of_a_run():
    with tracking(("json", "none"), None, {}) as track:
        track({"loss": 1.0}, 0)


def play(name, folder):
    check_trackers((name,))
    with tracking((name,), folder, {"run.seed": 1, "members": ["a"]}) as track:
        for step in range(3):
            track({"loss": 1.0 / (step + 1), "a/posterior": 0.5}, step)


def test_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    play("tensorboard", tmp_path / FOLDER)
    read = events.EventAccumulator(str(tmp_path / FOLDER))
    read.Reload()
    assert [it.value for it in read.Scalars("loss")] == pytest.approx([1, 1 / 2, 1 / 3])
    assert [it.step for it in read.Scalars("a/posterior")] == [0, 1, 2]


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    play("mlflow", tmp_path / FOLDER)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / FOLDER.parent / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("stackllm").experiment_id])
    assert run.data.params["run.seed"] == "1"
    assert run.info.run_name == "run/members-llm"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [it.value for it in losses] == pytest.approx([1, 1 / 2, 1 / 3])


def test_trackio(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    import sqlite3

    monkeypatch.setattr(importlib.import_module("trackio.utils"), "TRACKIO_DIR", tmp_path / "there")
    monkeypatch.setattr(importlib.import_module("trackio.sqlite_storage"), "TRACKIO_DIR", tmp_path / "there")  # fmt: skip
    play("trackio", tmp_path / FOLDER)
    play("trackio", tmp_path / FOLDER)  # again, in the same second or later
    with sqlite3.connect(tmp_path / "there/stackllm.db") as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    assert [step for step, _ in rows] == [0, 1, 2] * 2
    assert json.loads(rows[1][1])["loss"] == pytest.approx(0.5)


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    play("wandb", tmp_path / FOLDER)
    assert list((tmp_path / FOLDER).glob("wandb/offline-run-*/*.wandb"))
