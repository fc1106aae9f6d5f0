"""Asking an LLM, here or on a server, and making feature columns of its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from stackllm.engine.local import Engine, PendingError
from stackllm.rating.local import RaterParams, count_missing, rate
from stackllm.rating.question import Asked, Case, list_cases, make_columns, read_asked
from stackllm.rating.server import ask_server, pending_units
from stackllm.rating.transport import ServerParams

JOURNAL = "answers.sqlite"
"""Name of the journal of server answers in the folder that runs share."""


def ask(
    paths: Sequence[Path],
    rows: pl.DataFrame,
    rater: RaterParams,
    server: ServerParams,
    cache: Engine,
) -> dict[str, pl.DataFrame]:
    """Answer asked recipes about every row.

    Parameters
    ----------
    paths
        The recipe files that are turned on.
    rows
        ``group_id, question, response``; order counts.
    rater, server
        Settings.
    cache
        Engine over the folder that runs share.

    Returns
    -------
    dict
        For each block its columns, a row per row; see
        :func:`~stackllm.rating.question.make_columns`.

    Raises
    ------
    PendingError
        In a dry run, if anything has still to be asked.
    ServerError, BudgetError
        If the server is out of reach, or ``max_requests`` is used up; what was answered is kept.
    """
    recipes = [read_asked(path) for path in paths]
    listed = [list_cases(asked, rows) for asked in recipes]
    if not recipes:
        return {}
    todo = list(zip(recipes, (cases for cases, _ in listed), strict=True))
    try:
        if rater.url:
            answers, failures = ask_server(
                todo, rater, server, cache.root / JOURNAL, cache.reporter, cache.dry_run
            )
        else:
            answers, failures = _ask_here(todo, rater, cache)
    except PendingError as error:
        said = f"{rows.height:,} rows; {error}"
        raise PendingError(said, error.units, note=said) from None
    for asked, (cases, _), why in zip(recipes, listed, failures, strict=True):
        if why:
            reasons = ", ".join(f"{count} {name}" for name, count in sorted(why.items()))
            cache.reporter.warn(
                f"{asked.block}: {why.total()} of {len(cases)} prompts have no valid answer ({reasons}); "
                "their features are missing values."
            )
    return {
        asked.block: make_columns(asked, places, probabilities, rows.height)
        for asked, (_, places), probabilities in zip(recipes, listed, answers, strict=True)
    }


def _ask_here(
    todo: list[tuple[Asked, list[Case]]], rater: RaterParams, cache: Engine
) -> tuple[list[np.ndarray], list[Counter[str]]]:
    """Answers of the LLM on this machine; see :func:`~stackllm.rating.server.ask_server`."""
    if cache.dry_run:  # all recipes at once, where each would stop at its own units
        counts = [count_missing(asked, cases, rater, cache.root) for asked, cases in todo]
        if any(missing for missing, _ in counts):
            units = pending_units(todo, [missing for missing, _ in counts])
            told = ", ".join(f"{block}: {said}" for block, said in units.items())
            tokens = sum(tokens for _, tokens in counts)
            raise PendingError(f"{told}, about {tokens:,} tokens for {rater.backbone}.", units)
    answers = [rate(asked, cases, rater, cache) for asked, cases in todo]
    missing = [int(np.isnan(rows).any(axis=1).sum()) for rows in answers]
    return answers, [Counter({"no number": count} if count else {}) for count in missing]
