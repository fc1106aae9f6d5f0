"""Asking an LLM, here or on a server, and making feature columns of its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from stackllm.engine.local import Engine
from stackllm.llm.rater import RaterParams, rate
from stackllm.llm.server import ask_server
from stackllm.llm.transport import ServerParams
from stackllm.recipes.asked import list_cases, make_columns, read_asked

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
        For each block its columns, one row a row; see
        :func:`~stackllm.recipes.asked.make_columns`.

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
    if rater.url:
        answers, failures = ask_server(
            list(zip(recipes, (cases for cases, _ in listed), strict=True)),
            rater,
            server,
            cache.root / JOURNAL,
            cache.reporter,
            cache.dry_run,
        )
    else:
        failures = [Counter[str]() for _ in recipes]
        answers = []
        for asked, (cases, _) in zip(recipes, listed, strict=True):
            answers.append(rate(asked, cases, rater, cache))
            missing = int(np.isnan(answers[-1]).any(axis=1).sum())
            failures[len(answers) - 1].update({"no number": missing} if missing else {})
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
