"""Asked recipes answered by any OpenAI-compatible chat server, through a journal.

Each prompt is a request of its own, known by the digest of everything that is sent. What the
journal holds is never asked again; what comes back is in the journal before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stackllm.engine.local import PendingError
from stackllm.engine.progress import Reporter
from stackllm.rating.address import check_url
from stackllm.rating.answers import Answered, Answers
from stackllm.rating.batch import ask_in_batches, describe_work
from stackllm.rating.cost import count_cost, told_of_work
from stackllm.rating.journal import open_journal, read_batches, read_replies
from stackllm.rating.local import RaterParams
from stackllm.rating.question import AskedRecipe, Case
from stackllm.rating.replies import Judged, Reply, judge_all
from stackllm.rating.requests import Job, ServerParams, make_body
from stackllm.rating.sending import send
from stackllm.store.digest import digest


@dataclass(frozen=True)
class _Heard:
    """What is known of requests, by their digest: replies, why others have none, and which were sent now."""

    replies: Mapping[str, Reply]
    failed: Mapping[str, str]
    sent: frozenset[str] | set[str]


def ask_server(
    asked: Sequence[tuple[AskedRecipe, list[Case]]],
    rater: RaterParams,
    server: ServerParams,
    path: Path,
    reporter: Reporter,
    dry_run: bool,
) -> list[Answered]:
    """The answers to every case of every recipe.

    Parameters
    ----------
    asked
        Recipes, each with what to ask.
    rater, server
        Settings.
    path
        The journal.
    reporter
        Told what is cached and what is to be sent.
    dry_run
        Count, and send and write nothing.

    Returns
    -------
    list
        For each recipe its answers, a row of probabilities per case.

    Raises
    ------
    PendingError
        In a dry run, if anything has still to be sent.
    BudgetError
        If ``max_requests`` is used up.
    ServerError
        If the server is out of reach or turns us away.
    """
    url = check_url(rater.url, server.allow_http)
    requests: list[list[str]] = []
    wanted: dict[str, Job] = {}
    for recipe, cases in asked:
        bodies = [make_body(recipe, case, rater, server) for case in cases]
        requests.append([digest(url, body) for body in bodies])
        wanted |= {key: (recipe, body) for key, body in zip(requests[-1], bodies, strict=True)}
    replies = read_replies(path, wanted, dry_run)
    missing = {key: job for key, job in wanted.items() if key not in replies}
    failed: dict[str, str] = {}
    if missing:
        told = (
            f"rater {rater.model}: {sum(map(len, requests))} prompts, {len(replies)} answers in the journal, "
            + describe_work(missing, read_batches(path, url, missing, dry_run), server)
            + _work_of_each(asked, requests, missing, server)
        )
        if dry_run:
            pending = [sum(key in missing for key in keys) for keys in requests]
            raise PendingError(told, pending_units(asked, pending))
        reporter.say(told)
        with open_journal(path) as journal:
            replies |= journal.get(missing)  # another process may have asked since
            missing = {key: job for key, job in missing.items() if key not in replies}
            by_file = server.batch or journal.under_way(url, missing)
            ask = ask_in_batches if by_file else send
            failed = ask(url, missing, server, journal, reporter) if missing else {}
            replies |= journal.get(missing)
    heard = _Heard(replies, failed, {*missing})
    return [
        _answered(recipe, keys, wanted, heard, rater, server)
        for (recipe, _), keys in zip(asked, requests, strict=True)
    ]


def _work_of_each(
    asked: Sequence[tuple[AskedRecipe, list[Case]]],
    requests: Sequence[Sequence[str]],
    missing: Mapping[str, Job],
    server: ServerParams,
) -> str:
    """What is still to be sent of each recipe, on a line each."""
    pending = [[missing[key] for key in {*keys} if key in missing] for keys in requests]
    return "".join(
        f"\n  {recipe.block}: {len(jobs)} of {len(cases)} prompts, {told_of_work(jobs, server)}"
        for (recipe, cases), jobs in zip(asked, pending, strict=True)
    )


def pending_units(
    asked: Sequence[tuple[AskedRecipe, list[Case]]], pending: list[int]
) -> dict[str, str]:
    """How many prompts of each recipe would be asked."""
    return {
        recipe.block: f"{count} of {len(cases)} prompts to ask"
        for (recipe, cases), count in zip(asked, pending, strict=True)
    }


def _answered(
    recipe: AskedRecipe,
    keys: Sequence[str],
    wanted: Mapping[str, Job],
    heard: _Heard,
    rater: RaterParams,
    server: ServerParams,
) -> Answered:
    replies = [heard.replies.get(key) for key in keys]
    nothing = [np.full(len(asked.answers), np.nan) for asked in recipe.questions]
    judged = [
        judge_all(reply, recipe, rater.model, server.any_model)
        if reply
        else tuple(Judged(heard.failed.get(key, "not asked"), row) for row in nothing)
        for key, reply in zip(keys, replies, strict=True)
    ]
    models = tuple(reply.model or rater.model if reply else "" for reply in replies)
    prompts = tuple(digest(wanted[key][1]["messages"]) for key in keys)
    questions = []
    for number, asked in enumerate(recipe.questions):
        of_question = [it[number] for it in judged]
        answers = Answers(
            np.array([it.probabilities for it in of_question]).reshape(
                len(keys), len(asked.answers)
            ),
            tuple(it.status for it in of_question),
            tuple(it.said for it in of_question),
            models,
            prompts,
            tuple(it.measured for it in of_question),
        )
        questions.append(answers)
    cost = count_cost(keys, heard.replies, heard.sent, wanted, server)
    return Answered(tuple(questions), cost)
