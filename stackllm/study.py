"""A study: one table, its folds and parts, and all that its run is going to need, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stackllm.crossfit.design import CrossFit, Design
from stackllm.crossfit.folds import check_folds, group_folds
from stackllm.engine.local import Task
from stackllm.errors import DataError
from stackllm.finetune.dataset import TrainingParams
from stackllm.llm.choices import Choices, choose
from stackllm.members.external import read_external
from stackllm.members.registry import check_tables
from stackllm.recipes.loader import ENCODER_BLOCK, Recipe, find_recipes
from stackllm.settings import Settings, check_llms
from stackllm.store.digest import digest
from stackllm.store.units import make_unit
from stackllm.tables.contest import Table, TableParams, read_training
from stackllm.tables.ids import Rows
from stackllm.tables.labels import LABEL_NAMES, read_truth
from stackllm.tables.sample import SampleLayout, plain_layout, read_sample
from stackllm.workspace import Workspace

VERSION = 1


@dataclass(frozen=True)
class Study:
    """What every stage works on.

    Parameters
    ----------
    settings
        What the user asked for, with what the run has chosen in place of every ``"auto"``.
    table
        The checked table.
    layout
        Ids and columns of the submission.
    recipes
        The recipes that run, in their order.
    design
        Folds, parts, groups, labels.
    external
        Predictions of members made elsewhere, by name.
    truth
        Class index of each test row, int ``(n_test,)``, where it is known: for scores only.
    workspace
        Where results stand, and who computes them.
    """

    settings: Settings
    table: Table
    layout: SampleLayout
    recipes: list[Recipe]
    design: Design
    external: dict[str, CrossFit]
    truth: np.ndarray | None
    workspace: Workspace


def open_study(
    settings: Settings, workspace: Workspace, truth: Path | None = None, rounds: int = 0
) -> Study:
    """Read and check everything that the run is going to need, and deal folds and parts; no unit runs.

    Parameters
    ----------
    settings
        What the user asked for.
    workspace
        Where results are going to stand.
    truth
        Labels of the test rows, for scores only.
    rounds
        Rounds of pseudo-labels that are going to be played; they need a group for each part.

    Raises
    ------
    MissingInputError, DataError, UsageError, StorageError
        With a sentence for the user.
    """
    settings, choices = settle(settings, workspace)
    check_tables(settings.members, [params.name for params in settings.external])
    without = () if settings.encoder else (ENCODER_BLOCK,)
    recipes = find_recipes(settings.recipes, without, settings.rater.ask)
    check_llms(settings, workspace.dry_run)
    table = read_training(settings.data)
    workspace.reporter.tell((*settings.notes, *table.notes), table.warnings)
    sample = settings.data.sample
    rows, classes = table.test_rows(), table.classes
    layout = read_sample(Path(sample), rows, classes) if sample else plain_layout(rows, classes)
    labels = None
    if truth is not None:
        labels = read_scored(truth, table.test_rows(), table.classes, settings.data, workspace)
    design = _deal(table, settings, rounds)
    external = _external(settings, table, design, workspace)
    if not workspace.dry_run:
        choices.write(workspace.root)
    return Study(settings, table, layout, recipes, design, external, labels, workspace)


def settle(settings: Settings, workspace: Workspace) -> tuple[Settings, Choices]:
    """The settings with what the run has chosen in place of ``"auto"`` and of branches; see :func:`~stackllm.llm.choices.choose`."""
    readers = [*(member.params for member in settings.members), settings.encoder, settings.rater]
    if not settings.asks:
        readers.pop()  # an LLM that nobody asks is not even looked for
    made, choices = choose(readers, workspace)
    n_members = len(settings.members)
    members = zip(settings.members, made[:n_members], strict=True)
    return replace(
        settings,
        members=tuple(
            replace(member, params=_tracked(params, settings.tracking.report_to))
            for member, params in members
        ),
        encoder=made[n_members],
        rater=made[-1] if settings.asks else settings.rater,
    ), choices


def _tracked(params: Any, trackers: tuple[str, ...]) -> Any:
    """A member's settings, with the run's trackers beside its own; no key depends on them."""
    training = getattr(params, "training", None)
    if not isinstance(training, TrainingParams):
        return params
    told = tuple(dict.fromkeys((*training.report_to, *trackers)))
    return replace(params, training=replace(training, report_to=told))


def read_scored(
    path: Path, rows: Rows, classes: Sequence[str], data: TableParams, workspace: Workspace
) -> np.ndarray:
    """Class index of each row, int64 ``(n_rows,)``, of a table of labels that predictions are scored on.

    Raises
    ------
    MissingInputError, DataError, StorageError
        With the file, column and first row that is wrong.
    """
    # the setting target is the training table's first: no advice to change it for this table
    truth = read_truth(path, rows, classes, usual=(data.target, *LABEL_NAMES), named="")
    if truth.by_number:
        workspace.reporter.warn(f"{path}: no id column, so its rows are matched by number, from 0.")
    return truth.labels


def store_folds(study: Study) -> None:
    """Write down who is in which fold and part, for people: stages are handed the design itself."""
    table, design = study.table, study.design
    unit = make_unit(
        "folds", VERSION, digest(table.train, table.test, table.classes), params=study.settings.run
    )

    def fill(folder: Path) -> None:
        _key_table(table.train, "fold", design.folds).write_parquet(folder / "folds.parquet")
        _key_table(table.test, "part", design.parts).write_parquet(folder / "parts.parquet")

    study.workspace.run.ensure("folds", [Task(unit, fill, here=True)])


def _deal(table: Table, settings: Settings, rounds: int) -> Design:
    run = settings.run
    train, test = table.train["group_id"].to_numpy(), table.test["group_id"].to_numpy()
    labels = table.train["label"].to_numpy().astype(np.int64)
    folds = group_folds(train, run.folds, run.seed)
    check_folds(folds, train, labels, len(table.classes))
    n_groups = len(np.unique(test))
    if n_groups >= run.parts:
        parts = group_folds(test, run.parts, run.seed)
    elif rounds:
        raise DataError(
            f"{settings.data.test}: too few groups ({n_groups}) for {run.parts} parts, which pseudo-labels need. "
            "Lower the setting parts (2 at least), or leave pseudo-labels out: set the setting rounds to 0."
        )
    else:  # nobody asks which part a row is in
        parts = np.zeros(len(test), dtype=np.int32)
    codes = np.unique(np.concatenate([train, test]), return_inverse=True)[1]
    return Design(labels, folds, parts, codes, len(table.classes), table.classes)


def _external(
    settings: Settings, table: Table, design: Design, workspace: Workspace
) -> dict[str, CrossFit]:
    predictions = {}
    for params in settings.external:
        predictions[params.name], warnings = read_external(
            params, design, table.train_rows(), table.test_rows(), table.classes
        )
        for warning in warnings:
            workspace.reporter.warn(warning)
    return predictions


def _key_table(rows: pl.DataFrame, name: str, values: np.ndarray) -> pl.DataFrame:
    return rows.select("row_id", "group_id").with_columns(pl.Series(name, values))
