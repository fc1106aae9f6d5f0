"""Rank and z-score of every feature among the responses to the same question."""

import polars as pl

from stackllm.recipes.within import standing

NEEDS = ("text", "likelihood", "overlap", "asked")


def build(frame: pl.DataFrame) -> pl.DataFrame:
    prefixes = tuple(f"{block}_" for block in NEEDS)
    return standing(frame, [name for name in frame.columns if name.startswith(prefixes)])
