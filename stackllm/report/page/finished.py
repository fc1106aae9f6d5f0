"""A finished run as its report reads it: what it predicted of the training rows, and what it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stackllm.crossfit.design import Design
from stackllm.engine.local import read_timings
from stackllm.errors import DataError, MissingInputError, StackllmError, did_you_mean
from stackllm.predict import Model, read_model
from stackllm.probabilities import Floats
from stackllm.report.logbook import STATE
from stackllm.report.stored import POSTERIORS, PREDICTIONS, StoredModel, find_model, run_names
from stackllm.settings import build
from stackllm.store.digest import file_digest
from stackllm.store.records import RECORD, read_json
from stackllm.tables.contest import Table, TableParams, read_training


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Parameters
    ----------
    root
        Its folder.
    record
        What ``run.json`` holds.
    board
        The leaderboard, scores out of fold.
    timings
        Seconds of each unit.
    shown
        The model that the report is about: what is submitted, or the best member of a run that ends there.
    design
        Folds, groups and labels.
    ids, groups
        Id and group id of each training row, text ``(n_train,)``.
    raw, posterior
        Row probabilities and group posteriors of that model, float64 ``(n_train, n_classes)``.
    table
        The run's tables; None where they are not what they were, as ``lacks`` says.
    model
        Which units make it up; None for a run that ends with stage one.
    lacks
        Sentences about what cannot be shown.
    """

    root: Path
    record: dict[str, Any]
    board: pl.DataFrame
    timings: dict[str, float]
    shown: StoredModel
    design: Design
    ids: pl.Series
    groups: pl.Series
    raw: Floats
    posterior: Floats
    table: Table | None
    model: Model | None
    lacks: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Label texts, in the order of the columns."""
        return self.shown.classes

    @property
    def best_round(self) -> int | None:
        """The round that is submitted; None for a run that ends with stage one."""
        best: int | None = self.record["best_round"]
        return best

    @property
    def name_shown(self) -> str:
        """What the model that the report is about is called on the leaderboard."""
        return self.shown.model or "blend"

    def rows(self, number: int, model: str) -> Floats:
        """Row probabilities of a model out of fold, ``(n_train, n_classes)``."""
        return self._stored(Path(f"round{number}") / f"{model}_oof.parquet")

    def posteriors(self, number: int, model: str) -> Floats:
        """Group posteriors of a model out of fold, ``(n_train, n_classes)``."""
        return self._stored(Path(f"round{number}") / POSTERIORS / f"{model}_oof.parquet")

    def _stored(self, path: Path) -> Floats:
        frame = pl.read_parquet(self.root / PREDICTIONS / path)
        return np.ascontiguousarray(frame.select(self.classes).to_numpy(), dtype=np.float64)


def read_finished(name: str | Path, artifacts: Path) -> Finished:
    """Read a finished run; nothing is computed and nothing written.

    Parameters
    ----------
    name
        As below ``artifacts``, or the path of its folder.
    artifacts
        Folder of runs.

    Raises
    ------
    MissingInputError
        If there is no such run, or it has not finished.
    DataError, StorageError
        If what it left can't be read.
    """
    root = _find(name, artifacts)
    try:
        record = read_json(root / RECORD)
        best = record["best_round"]
        member = "" if best is not None else f"/{next(iter(record['oof_log_loss']))}"
        board = pl.read_csv(root / "leaderboard.csv", schema_overrides={"model": pl.String})
    except (
        ValueError,
        KeyError,
        TypeError,
        StopIteration,
        OSError,
        pl.exceptions.PolarsError,
    ) as error:
        raise DataError(
            f"{root}: what this run left cannot be read. Run the command that made it once more: what is there "
            "is not computed again."
        ) from error
    shown = find_model(f"{root}{member}", artifacts)
    if shown is None:  # another process took it away meanwhile
        raise MissingInputError(f"{root}: there is no run any more.")
    oof, test = shown.key("oof"), shown.key("test")
    names = pl.concat([oof["group_id"], test["group_id"]])
    design = Design(
        oof["label"].replace_strict(shown.classes, range(len(shown.classes)), return_dtype=pl.Int64).to_numpy(),
        oof["fold"].to_numpy(),
        test["part"].to_numpy(),
        np.unique(names.to_numpy(), return_inverse=True)[1],
        len(shown.classes),
        shown.classes,
    )  # fmt: skip
    table, lacks = _table(record, oof["row_id"])
    model = read_model(root) if best is not None else None
    return Finished(
        root, record, board, read_timings(root), shown, design, oof["row_id"], oof["group_id"],
        shown.rows("oof"), shown.posterior("oof"), table, model, lacks,
    )  # fmt: skip


def _find(name: str | Path, artifacts: Path) -> Path:
    for root in (artifacts / name, Path(name)):
        if (root / STATE).is_file():
            state = read_json(root / STATE)
            if state.get("state") == "finished" and (root / RECORD).is_file():
                return root
            reason = "failed" if state.get("state") == "failed" else "has not finished"
            raise MissingInputError(
                f"{root}: this run {reason}. Run the command that made it once more: it goes on where it stopped."
            )
        if (root / RECORD).is_file():  # of a version that noted no state
            return root
    raise MissingInputError(
        f'there is no run "{name}" in {artifacts}. '
        + (did_you_mean(str(name), run_names(artifacts)) if run_names(artifacts) else "Make one with stackllm run.")
    )  # fmt: skip


def _table(record: dict[str, Any], ids: pl.Series) -> tuple[Table | None, tuple[str, ...]]:
    """The run's tables, if they are still those that it read."""
    for path, wanted in record["inputs"].items():
        if not Path(path).is_file():
            return None, (
                f"Texts are left out: {path} is not there any more, or not seen from here.",
            )
        if file_digest(Path(path)) != wanted:
            return None, (f"Texts are left out: {path} is not what it was when the run read it.",)
    try:
        table = read_training(build("run.json", TableParams, record["settings"]["data"]))
    except StackllmError as error:
        return None, (f"Texts are left out: {error}",)
    if table.train["row_id"].to_list() != ids.to_list():
        return None, ("Texts are left out: the tables' rows are not those of the run.",)
    return table, ()
