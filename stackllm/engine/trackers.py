"""Trackers of experiments: one small hook, which gets the steps of trainings and a run's final scores.

What a tracker does with them is its own: where it keeps them, and whom it tells, is said by the environment variables
that it knows (``WANDB_MODE``, ``MLFLOW_TRACKING_URI``, ``TRACKIO_DIR`` …). A tracker that fails costs no training: it
is told once, and left out from then on.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click

from stackllm.errors import MissingInputError, UsageError, did_you_mean, first_line
from stackllm.parameters import Name, check
from stackllm.store.lock import acquire

PROJECT = "stackllm"
"""What a tracker files runs under, unless its own environment variable says otherwise."""

Track = Callable[[Mapping[str, Any], int], None]
"""Gets scores by name, of which those that are finite numbers count, and the step that they are of."""


class Tracker(Protocol):
    """What a package for tracking has to do."""

    def log(self, scores: dict[str, float], step: int) -> None:
        """Take scores of a step."""

    def close(self) -> None:
        """All is told."""


@dataclass(frozen=True)
class TrackingParams:
    """Who is told of a run while it goes on and when it is done.

    Parameters
    ----------
    report_to
        Trackers: ``"trackio"``, ``"wandb"``, ``"tensorboard"``, ``"mlflow"``, each a package of its own. They get the
        steps of every fine-tuning, and the run's final scores. None by default; no number depends on them.
    """

    report_to: tuple[Name, ...] = ()

    def __post_init__(self) -> None:
        check(self)
        check_trackers(self.report_to)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not known or not installed, before any work; ``"none"`` is none.

    Raises
    ------
    UsageError
        If there is no such tracker.
    MissingInputError
        If its package is not installed.
    """
    for name in names:
        if name not in (*_TRACKERS, "none"):
            raise UsageError(
                f'report_to: there is no tracker "{name}". {did_you_mean(name, _TRACKERS)}'
            )
        if name != "none" and not is_installed(name):
            raise MissingInputError(
                f'report_to: the package of "{name}" is not installed. Install it (pip install {name}), or leave '
                "it out."
            )


def is_installed(name: str) -> bool:
    """Is there a package of that name? A mere folder in the working directory, as trackers leave them, is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


@contextmanager
def tracking(
    names: Sequence[str], folder: Path | None, settings: Mapping[str, Any]
) -> Iterator[Track]:
    """Tell trackers of one training, or of a run's final scores.

    Parameters
    ----------
    names
        Trackers.
    folder
        Where those write that keep files, ``…/<run>/trackers/<what>``; its names are what they call it. None: no
        tracker is told.
    settings
        What they are to keep beside the scores.
    """
    opened: dict[str, Tracker] = {}

    def attempt(name: str, act: Callable[[], Any]) -> Any:
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results
                return act()
        except Exception as error:  # of a package, its server or its files
            opened.pop(name, None)
            click.echo(f"warning: {name} is told no more: {first_line(error)}", err=True)
            return None

    def track(scores: Mapping[str, Any], step: int) -> None:
        told = {
            name: float(value)
            for name, value in scores.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        for name, tracker in list(opened.items()):
            attempt(name, functools.partial(tracker.log, told, step))

    for name in dict.fromkeys(names):
        if name != "none" and folder is not None:
            made = attempt(name, functools.partial(_TRACKERS[name], folder, dict(settings)))
            opened |= {name: made} if made else {}
    try:
        yield track
    finally:
        for name, tracker in list(opened.items()):
            attempt(name, tracker.close)


def _names(folder: Path) -> tuple[str, str]:
    """The run's name and that of what is tracked, out of ``…/<run>/trackers/<what>``."""
    run = folder.parents[1].name
    return run, f"{run}/{folder.name}"


class _Tensorboard:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter
        self._writer = writer(str(folder))
        self._writer.add_text(
            "settings", f"```\n{json.dumps(settings, indent=1, default=str)}\n```"
        )

    def log(self, scores: dict[str, float], step: int) -> None:
        for name, value in scores.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        run, name = _names(folder)
        self._run = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), group=run, name=name, dir=str(folder),
            config=settings, reinit="create_new",
        )  # fmt: skip

    def log(self, scores: dict[str, float], step: int) -> None:
        self._run.log(scores, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        run, name = _names(folder)
        self._run = importlib.import_module("trackio").init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), group=run, config=settings,
            name=f"{name} {time.strftime('%Y-%m-%d %H:%M:%S')}",  # a name that is there already is refused
            embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, scores: dict[str, float], step: int) -> None:
        self._run.log(scores, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        mlflow = importlib.import_module("mlflow")
        run, name = _names(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = f"sqlite:///{(folder.parent / 'mlflow.db').resolve().as_posix()}"
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        lock = acquire(folder.parent / ".mlflow.lock", 60.0)  # trainings side by side make it once
        try:
            self._client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or beside)
            known = self._client.get_experiment_by_name(project)
            number = known.experiment_id if known else self._client.create_experiment(project)
        finally:
            lock.release()
        self._id = self._client.create_run(number, run_name=name, tags={"run": run}).info.run_id
        for setting, value in settings.items():
            self._client.log_param(self._id, _plain(setting), str(value)[:500])

    def log(self, scores: dict[str, float], step: int) -> None:
        for name, value in scores.items():
            self._client.log_metric(self._id, _plain(name), value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _plain(name: str) -> str:
    """A name of the few characters that mlflow takes."""
    return "".join(it if it.isascii() and (it.isalnum() or it in "_-. /") else "_" for it in name)


_TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "trackio": _Trackio,
    "wandb": _Wandb,
    "tensorboard": _Tensorboard,
    "mlflow": _Mlflow,
}
