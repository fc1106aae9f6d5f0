"""A study: one table, its folds and parts, and the label-free matrices of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from stackllm.crossfit.design import Design
from stackllm.crossfit.folds import assign_folds, check_folds
from stackllm.engine.local import Engine, Task
from stackllm.llm.trunk import TrunkParams
from stackllm.members.build import Keys, build_inputs, index_trunk
from stackllm.members.registry import check_tables
from stackllm.rating.ask import ask
from stackllm.recipes.loader import find_recipes
from stackllm.settings import Settings, check_llms
from stackllm.store.digest import digest
from stackllm.store.units import make_unit
from stackllm.tables.contest import Table, read_training

VERSION = 1

_INPUTS = "table"
"""What the unit of the table's matrices is called."""


@dataclass(frozen=True)
class Study:
    """What every stage works on.

    Parameters
    ----------
    settings
        What the user asked for.
    table
        The checked table.
    design
        Folds, parts, groups, labels.
    inputs
        Folder of the label-free matrices, training rows first.
    keys
        Digests of what members read there.
    cache, engine
        Run units below the folder that runs share and below the run's.
    """

    settings: Settings
    table: Table
    design: Design
    inputs: Path
    keys: Keys
    cache: Engine
    engine: Engine

    def cache_trunk(self, params: TrunkParams) -> None:
        """Cache what decoders train from; not before one has to train, for it is dear and large."""
        index_trunk(_INPUTS, self.table.rows(), params, self.cache, self.engine)


def open_study(settings: Settings, cache: Engine, engine: Engine) -> Study:
    """Read and check the table, deal folds and parts once, and build the matrices.

    Raises
    ------
    MissingInputError, DataError, UsageError, StorageError
        With a sentence for the user.
    """
    check_tables(settings.members, [params.name for params in settings.external])
    check_llms(settings)
    table = read_training(settings.data)
    for note in table.notes:
        engine.reporter.say(note)
    for warning in table.warnings:
        engine.reporter.warn(warning)
    rows = table.rows()
    if engine.dry_run and settings.rater.ask:  # what may cost money is counted before all else
        recipes = find_recipes(settings.recipes, (), settings.rater.ask)
        asked = [recipe.path for recipe in recipes if recipe.is_asked]
        ask(asked, rows, settings.rater, settings.server, cache)
    design = _design(table, settings, engine)
    inputs, keys = build_inputs(
        _INPUTS, rows, settings.encoder, settings.recipes, cache, engine,
        rater=settings.rater, server=settings.server,
    )  # fmt: skip
    return Study(settings, table, design, inputs, keys, cache, engine)


def _design(table: Table, settings: Settings, engine: Engine) -> Design:
    """Folds and parts as they were dealt the first time, read from where they are stored."""
    run = settings.run
    unit = make_unit("folds", VERSION, digest(table.train, table.test, table.classes), params=run)

    def fill(folder: Path) -> None:
        train, test = table.train["group_id"].to_numpy(), table.test["group_id"].to_numpy()
        folds = assign_folds(train, run.folds, run.seed)
        check_folds(folds, train, table.train["label"].to_numpy(), len(table.classes))
        parts = assign_folds(test, run.parts, run.seed)
        _key_table(table.train, "fold", folds).write_parquet(folder / "folds.parquet")
        _key_table(table.test, "part", parts).write_parquet(folder / "parts.parquet")

    folder = engine.ensure("folds", [Task(unit, fill, here=True)])[0]
    groups = pl.concat([table.train["group_id"], table.test["group_id"]])
    codes = np.unique(groups.to_numpy(), return_inverse=True)[1]
    return Design(
        table.train["label"].to_numpy().astype(np.int64),
        pl.read_parquet(folder / "folds.parquet")["fold"].to_numpy(),
        pl.read_parquet(folder / "parts.parquet")["part"].to_numpy(),
        codes,
        len(table.classes),
    )


def _key_table(rows: pl.DataFrame, name: str, values: np.ndarray) -> pl.DataFrame:
    return rows.select("row_id", "group_id").with_columns(pl.Series(name, values))
