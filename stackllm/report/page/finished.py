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
from stackllm.report.logbook import STATE, state_of
from stackllm.report.page.telltales import lexical_models
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
        Which units make it up; None for a run that ends with stage one, or whose model is gone.
    lexical
        Folders of lexical models that saw no row of a fold, by fold; see
        :func:`~stackllm.report.page.telltales.lexical_models`.
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
    lexical: dict[int, list[Path]]
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
        return _matrix(self.root, f"round{number}/{model}", self.classes)

    def posteriors(self, number: int, model: str) -> Floats:
        """Group posteriors of a model out of fold, ``(n_train, n_classes)``."""
        return _matrix(self.root, f"round{number}/{POSTERIORS}/{model}", self.classes)


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
    model, lexical, more = _model(root, best, table)
    number, name_shown = shown.number, shown.model or "blend"
    return Finished(
        root, record, board, read_timings(root), shown, design, oof["row_id"], oof["group_id"],
        _matrix(root, f"round{number}/{name_shown}", shown.classes),
        _matrix(root, f"round{number}/{POSTERIORS}/{name_shown}", shown.classes),
        table, model, lexical, (*lacks, *more),
    )  # fmt: skip


def _find(name: str | Path, artifacts: Path) -> Path:
    for root in (artifacts / name, Path(name)):
        if not any((root / it).is_file() for it in (RECORD, STATE)):
            continue
        state = state_of(root).get("state", "")
        if state == "finished" and (root / RECORD).is_file():
            return root
        said = {"failed": "failed", "running": "has not finished", "interrupted": "was interrupted"}
        raise MissingInputError(
            f"{root}: this run {said.get(state, 'left no result')}. Run the command that made it once more: it goes on "
            "where it stopped."
        )
    known = run_names(artifacts)
    advice = did_you_mean(str(name), known) if known else "Make one with stackllm run."
    raise MissingInputError(f'there is no run "{name}" in {artifacts}. {advice}')


def _matrix(root: Path, name: str, classes: tuple[str, ...]) -> Floats:
    """Stored out-of-fold probabilities, float64 ``(n_train, n_classes)``."""
    path = root / PREDICTIONS / f"{name}_oof.parquet"
    try:
        frame = pl.read_parquet(path).select(classes)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{path}: it cannot be read. Run the command that made the run once more: what is there is not computed "
            "again."
        ) from error
    return np.ascontiguousarray(frame.to_numpy(), dtype=np.float64)


def _model(
    root: Path, best: int | None, table: Table | None
) -> tuple[Model | None, dict[int, list[Path]], list[str]]:
    """The run's model and its lexical models, as far as they are there, and what is not."""
    if best is None:
        return (
            None,
            {},
            ["No words are marked: a run that ends with stage one keeps no list of its models."],
        )
    model = None
    try:
        model = read_model(root)
        lexical = lexical_models(model) if table is not None else {}
    except StackllmError as error:  # stackllm clean may have made room
        return model, {}, [f"No words are marked: {error}"]
    if table is not None and not lexical:
        return (
            model,
            {},
            ["No words are marked: the run has no lexical member that reads the text as it is."],
        )
    return model, lexical, []


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
