"""Making the label-free matrices that every model reads: encoder, recipes, n-grams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from stackllm.engine.local import Task
from stackllm.llm.encode import EncoderParams, encode
from stackllm.llm.trunk import TrunkParams, cache_trunk
from stackllm.members.inputs import (
    EMBEDDING,
    VIEWS,
    save_blocks,
    save_counts,
    save_texts,
    save_trunk,
    trunk_folder,
)
from stackllm.members.lexical import count_ngrams
from stackllm.rating.ask import ask
from stackllm.rating.local import RaterParams
from stackllm.rating.requests import ServerParams
from stackllm.rating.table import Rated
from stackllm.recipes.loader import Recipe, recipes_digest, run_recipes
from stackllm.store.digest import digest
from stackllm.store.units import make_unit
from stackllm.workspace import Workspace

VERSION = 3

Keys = dict[Literal["inputs", "texts"], str]
"""Digests of what a member may read: all matrices, or nothing but the texts."""


@dataclass(frozen=True)
class StoredInputs:
    """Where the label-free matrices of some rows stand, and what they are.

    Parameters
    ----------
    folder
        Where :func:`~stackllm.members.inputs.load_inputs` finds them.
    keys
        Digests of what a member may read there.
    rated
        What an LLM answered about the rows, for people: members read the features that it became.
    """

    folder: Path
    keys: Keys
    rated: tuple[Rated, ...] = ()


def build_inputs(
    name: str,
    rows: pl.DataFrame,
    encoder: EncoderParams | None,
    recipes: Sequence[Recipe],
    workspace: Workspace,
    *,
    trunks: Sequence[TrunkParams] = (),
    rater: RaterParams | None = None,
    server: ServerParams | None = None,
) -> StoredInputs:
    """Read rows with the frozen LLM, run the recipes, count n-grams; or take all that as it is stored.

    Parameters
    ----------
    name
        What the unit is called below ``inputs/``.
    rows
        ``row_id, group_id, question, response``; nothing else, so no label can leak in.
    encoder
        Settings of the encoder. None leaves it out.
    recipes
        From :func:`~stackllm.recipes.loader.find_recipes`.
    workspace
        Where the matrices are to stand, and who computes them.
    trunks
        What decoders that are to predict want cached.
    rater, server
        Whom to ask what. None takes the defaults.
    """
    # Asked first, for a dry run ends at the first stage that would run, and these may cost money.
    paths = [recipe.path for recipe in recipes if recipe.is_asked]
    rated = ask(paths, rows, rater or RaterParams(), server or ServerParams(), workspace.cache)
    asked = {it.asked.block: it.columns for it in rated}
    if encoder:
        read, likelihood, identity = encode(rows, encoder, workspace.cache)
    else:
        read, likelihood, identity = None, pl.DataFrame(), ""
    answers = [(block, digest(columns)) for block, columns in sorted(asked.items())]
    unit = make_unit(
        f"inputs/{name}", VERSION, digest(rows), identity, recipes_digest(recipes), *answers
    )

    def fill(folder: Path) -> None:
        groups = np.unique(rows["group_id"].to_numpy(), return_inverse=True)[1]
        save_blocks(folder, groups, run_recipes(recipes, rows, likelihood, asked))
        if read:  # as large as all the rest: never in memory as a whole
            read.take("pooled", folder / EMBEDDING)
        else:
            np.save(folder / EMBEDDING, np.zeros((rows.height, 0), np.float32))
        for view in VIEWS:  # one at a time: each is as large as all the rest
            save_counts(folder, view, count_ngrams(rows["response"], view))
        save_texts(folder, rows)

    folder = workspace.run.ensure("inputs", [Task(unit, fill, here=True)])[0]
    for params in trunks:
        index_trunk(name, rows, params, workspace)
    return StoredInputs(folder, {"inputs": unit.key, "texts": digest(rows)}, tuple(rated))


def index_trunk(name: str, rows: pl.DataFrame, params: TrunkParams, workspace: Workspace) -> None:
    """Cache a trunk's output of every row and write down where each stands.

    Parameters
    ----------
    name, rows, workspace
        As for :func:`build_inputs`, which has made those inputs.
    params
        Which trunk.
    """
    table = cache_trunk(rows, params, workspace.cache)
    path = trunk_folder(f"inputs/{name}", params)
    shards = [Path(shard).name for shard in table["shard"]]  # wherever the cache stands
    unit = make_unit(path, VERSION, digest(rows), params.identity, shards, table.drop("shard"))
    task = Task(unit, lambda folder: save_trunk(folder, table), here=True)
    workspace.run.ensure("trunk's index", [task])
