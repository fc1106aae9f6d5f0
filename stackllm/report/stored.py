"""What finished runs predict, as it stands on disk: found by name, read without a model and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from stackllm.errors import DataError, MissingInputError, UsageError, did_you_mean
from stackllm.probabilities import Floats
from stackllm.store.records import RECORD, read_json
from stackllm.tables.files import read_frame

PREDICTIONS, POSTERIORS, ROWS = "predictions", "posteriors", "rows_{}.parquet"
"""Folder of a run's predictions, that of the posteriors in a round's, and the table of groups, labels and folds."""

RAW = ":raw"
"""Behind a run or model: its row probabilities, before stage three."""

Which = Literal["oof", "test"]

_BLEND = "blend"


@dataclass(frozen=True)
class StoredModel:
    """A model of a run, or what the run hands out.

    Parameters
    ----------
    name
        As it was asked for.
    run
        Folder of the run.
    classes
        Label texts, in the order of the columns.
    quota
        How often a class stands in a group.
    number
        The round.
    model
        A member, ``stack`` or ``blend``. None for what the run hands out.
    raw
        Are its row probabilities meant, and not the posteriors?
    """

    name: str
    run: Path
    classes: tuple[str, ...]
    quota: int
    number: int
    model: str | None
    raw: bool

    def key(self, which: Which) -> pl.DataFrame:
        """``row_id, group_id`` of each row, with ``label`` and ``fold`` of the training rows.

        Raises
        ------
        DataError
            If the run is of an older version, which left none.
        """
        path = self.run / PREDICTIONS / ROWS.format(which)
        if not path.is_file():
            raise DataError(
                f"{self.run}: this run was stored by an older stackllm, which left no labels beside its predictions. "
                "Run the command that made it once more: what is there is not computed again."
            )
        return pl.read_parquet(path)

    def rows(self, which: Which) -> Floats:
        """Row probabilities before stage three, float64 ``(n_rows, n_classes)``."""
        folder = self._round
        if self.model is None:
            return self._read(folder / f"{_BLEND}_{which}.parquet")
        return self._read(folder / f"{self.model}_{which}.parquet")

    def posterior(self, which: Which) -> Floats:
        """Group posteriors, float64 ``(n_rows, n_classes)``."""
        if self.model is None:
            return self._read(self.run / f"{which}.parquet")
        return self._read(self._round / POSTERIORS / f"{self.model}_{which}.parquet")

    @property
    def _round(self) -> Path:
        return self.run / PREDICTIONS / f"round{self.number}"

    def _read(self, path: Path) -> Floats:
        if not path.is_file():
            raise MissingInputError(
                f"{path}: there is no such file, so nothing of {self.name} can be compared on these rows. "
                "Name another model of the run, or other rows with the setting truth."
            )
        frame = read_frame(path, lambda header: [*self.classes])
        return np.ascontiguousarray(frame.select(self.classes).to_numpy(), dtype=np.float64)


def find_model(name: str, artifacts: Path) -> StoredModel | None:
    """The run or model of that name: ``RUN``, ``RUN/MODEL``, ``RUN/round1``, ``RUN/round1/MODEL``, each with ``:raw``.

    Parameters
    ----------
    name
        A run is called as below ``artifacts``, or by the path of its folder. A model is a member,
        ``stack`` or ``blend``, of the best round where no round is named.
    artifacts
        Folder of runs.

    Returns
    -------
    StoredModel or None
        None if there is no such run.

    Raises
    ------
    MissingInputError
        If the run has no such round or model, or no file that tells how it was made.
    DataError
        If that file can't be read.
    """
    parts = Path(name.removesuffix(RAW)).parts
    for base in (artifacts, Path()):
        for n_parts in range(len(parts), 0, -1):
            run = base.joinpath(*parts[:n_parts])
            if (run / RECORD).is_file():
                return _open(name, run, parts[n_parts:])
    return None


def run_names(artifacts: Path) -> list[str]:
    """Names of the runs that handed something out, for messages."""
    return sorted(path.parent.name for path in artifacts.glob(f"*/{RECORD}"))


def _open(name: str, run: Path, rest: Sequence[str]) -> StoredModel:
    try:
        record = read_json(run / RECORD)
        best, classes = record["best_round"], tuple(record["classes"])
        quota = int(record["settings"]["data"]["quota"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{run / RECORD}: it cannot be read. Run the command that made the run once more."
        ) from error
    rounds = sorted(path.name for path in (run / PREDICTIONS).glob("round*/"))
    number, model = best or 0, None
    left = list(rest)
    if left and left[0].startswith("round") and left[0][5:].isdecimal():
        if left[0] not in rounds:
            raise MissingInputError(
                f"{name}: {run} has no {left[0]}. {did_you_mean(left[0], rounds)}"
            )
        number, model = int(left.pop(0)[5:]), _BLEND
    if left:
        model = "/".join(left)
        number = _number_of(name, run, number, model, named=len(left) < len(rest))
    elif model is None and best is None:
        models = _models(run / PREDICTIONS / "round0")
        raise UsageError(
            f"{name}: this run ends with stage one and hands out no predictions of its own. Name one of its models: "
            + ", ".join(f"{name.removesuffix(RAW)}/{it}" for it in models[:5])
            + "."
        )
    return StoredModel(name, run, classes, quota, number, model, name.endswith(RAW))


def _number_of(name: str, run: Path, number: int, model: str, named: bool) -> int:
    """The round to read a model in: single seeds and refitted models stand in round 0 only."""
    for candidate in (number,) if named else (number, 0):
        if model in _models(run / PREDICTIONS / f"round{candidate}"):
            return candidate
    known = _models(run / PREDICTIONS / f"round{number}")
    raise MissingInputError(
        f'{name}: {run} has no model "{model}" in round {number}. {did_you_mean(model, known)}'
    )


def _models(folder: Path) -> list[str]:
    paths = (path.stem for which in ("oof", "test") for path in folder.glob(f"*_{which}.parquet"))
    names = {stem.removesuffix("_oof").removesuffix("_test") for stem in paths}
    return sorted(names)
