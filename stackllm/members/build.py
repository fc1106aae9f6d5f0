"""Making the label-free matrices that every model reads: encoder, recipes, n-grams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from stackllm.engine.local import Engine, Task
from stackllm.llm.encode import EncoderParams, encode
from stackllm.members.inputs import VIEWS, Inputs, save_inputs
from stackllm.members.lexical import count_ngrams
from stackllm.recipes.loader import ENCODER_BLOCK, find_recipes, recipes_digest, run_recipes
from stackllm.store.digest import digest
from stackllm.store.units import make_unit

VERSION = 1


def build_inputs(
    name: str,
    rows: pl.DataFrame,
    encoder: EncoderParams | None,
    recipes: tuple[str, ...],
    cache: Engine,
    engine: Engine,
) -> tuple[Path, str]:
    """Read rows with the frozen LLM, run the recipes, count n-grams; or find all that done.

    Parameters
    ----------
    name
        What the unit is called below ``inputs/``.
    rows
        ``row_id, group_id, question, response``; nothing else, so no label can leak in.
    encoder
        Settings of the encoder. None leaves it and the recipes that need it out.
    recipes
        Further recipe files.
    cache
        Engine over the folder that runs share.
    engine
        Engine over the run's folder.

    Returns
    -------
    folder, key
        Where :func:`~stackllm.members.inputs.load_inputs` finds the matrices, and their key.
    """
    found = find_recipes(recipes, without=() if encoder else (ENCODER_BLOCK,))
    if encoder:
        embedding, likelihood, identity = encode(rows, encoder, cache)
    else:
        embedding, likelihood, identity = np.zeros((rows.height, 0), np.float32), pl.DataFrame(), ""
    unit = make_unit(f"inputs/{name}", VERSION, digest(rows), identity, recipes_digest(found))

    def fill(folder: Path) -> None:
        blocks = run_recipes(found, rows, likelihood)
        groups = np.unique(rows["group_id"].to_numpy(), return_inverse=True)[1]
        counts = {view: count_ngrams(rows["response"], view) for view in VIEWS}
        save_inputs(
            folder, Inputs(groups, embedding, blocks.to_numpy(), tuple(blocks.columns), counts)
        )

    return engine.ensure("inputs", [Task(unit, fill)])[0], unit.key
