"""Asking an LLM, here or on a server, and making feature columns of its answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from stackllm.engine.local import Engine, PendingError
from stackllm.rating.answers import Answered, Answers, Cost
from stackllm.rating.local import RaterParams, count_missing, count_tokens, prompt_digests, rate
from stackllm.rating.question import (
    AskedRecipe,
    Case,
    list_cases,
    make_columns,
    read_asked,
    split_answers,
)
from stackllm.rating.requests import ServerParams
from stackllm.rating.server import ask_server, pending_units
from stackllm.rating.table import Rated, said_of

JOURNAL = "answers.sqlite"
"""Name of the journal of server answers in the folder that runs share."""


def ask(
    paths: Sequence[Path],
    rows: pl.DataFrame,
    rater: RaterParams,
    server: ServerParams,
    cache: Engine,
) -> list[Rated]:
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
    list
        Each question with its answers and the columns that they become, in the order of the recipes.

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
        return []
    todo = list(zip(recipes, (cases for cases, _ in listed), strict=True))
    try:
        if rater.url:
            answered = ask_server(
                todo, rater, server, cache.root / JOURNAL, cache.reporter, cache.dry_run
            )
        else:
            answered = _ask_here(todo, rater, cache)
    except PendingError as error:
        said = f"{rows.height:,} rows; {error}"
        raise PendingError(said, error.units, note=said) from None
    rated = []
    for recipe, (cases, places), it in zip(recipes, listed, answered, strict=True):
        if cache.dry_run:
            cache.reporter.say(f"{recipe.block}: {len(cases)} of {len(cases)} prompts answered")
        for asked, answers in zip(recipe.questions, it.questions, strict=True):
            if answers.failures:
                cache.reporter.warn(
                    f"{asked.block}: {answers.failures.total()} of {len(cases)} prompts have no valid answer "
                    f"({said_of(answers.failures)}); their features are missing values."
                )
            columns = make_columns(asked, places, answers.probabilities, rows.height)
            rated.append(Rated(asked, places, answers, columns, recipe.block, it.cost))
    return rated


def _ask_here(
    todo: list[tuple[AskedRecipe, list[Case]]], rater: RaterParams, cache: Engine
) -> list[Answered]:
    """Answers of the LLM on this machine; see :func:`~stackllm.rating.server.ask_server`."""
    if cache.dry_run:  # all recipes at once, where each would stop at its own units
        counts = [count_missing(asked, cases, rater, cache.root) for asked, cases in todo]
        if any(missing for missing, _ in counts):
            units = pending_units(todo, [missing for missing, _ in counts])
            told = ", ".join(f"{block}: {said}" for block, said in units.items())
            tokens = sum(tokens for _, tokens in counts)
            each = zip(todo, counts, strict=True)
            of_each = ", ".join(f"{asked.block} {n_tokens:,}" for (asked, _), (_, n_tokens) in each)
            raise PendingError(
                f"{told}, about {tokens:,} tokens ({of_each}) for {rater.backbone}.", units
            )
    return [_answered_here(asked, cases, rater, cache) for asked, cases in todo]


def _answered_here(
    recipe: AskedRecipe, cases: list[Case], rater: RaterParams, cache: Engine
) -> Answered:
    missing, _ = count_missing(recipe, cases, rater, cache.root)
    started = time.perf_counter()
    every = rate(recipe, cases, rater, cache)
    seconds = time.perf_counter() - started if missing else 0.0
    prompts = prompt_digests(recipe, cases, rater)
    questions = []
    for asked, probabilities in zip(recipe.questions, split_answers(recipe, every), strict=True):
        ok = np.isfinite(probabilities).all(axis=1)
        best = np.where(ok[:, None], probabilities, 0.0).argmax(axis=1)
        answers = Answers(
            probabilities,
            tuple("ok" if is_ok else "no number" for is_ok in ok),
            tuple(asked.answers[i] if is_ok else "" for i, is_ok in zip(best, ok, strict=True)),
            (rater.backbone,) * len(cases),
            prompts,
            (True,) * len(cases),
        )
        questions.append(answers)
    tokens = count_tokens(recipe, cases, rater)
    return Answered(
        tuple(questions), Cost(len(cases), missing, tokens, replies=len(cases), seconds=seconds)
    )
