"""Sending many prompts side by side, each answer into the journal first, and when to stop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from stackllm.engine.progress import Reporter
from stackllm.errors import BudgetError, ServerError, StackllmError
from stackllm.rating.address import read_key
from stackllm.rating.journal import Journal
from stackllm.rating.replies import judge_all
from stackllm.rating.requests import Job, ServerParams
from stackllm.rating.rubric import reply_tokens
from stackllm.rating.transport import BudgetSpentError, Transport, UnansweredError

_GIVE_UP = 5
"""After so many prompts without an answer in a row, the server counts as out of reach."""

_NEVER_VALID = 20
"""After so many replies in a row that are no valid answer, no more are paid for."""


@dataclass
class Session:
    """What one run knows of a server from call to call.

    Parameters
    ----------
    sent
        Requests so far, retries included.
    """

    sent: int = 0


@dataclass
class _Asking:
    """What happens while prompts are being sent."""

    unanswered_in_a_row: int = 0
    invalid_in_a_row: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    fatal: StackllmError | None = None
    spent: bool = False

    @property
    def over(self) -> bool:
        return self.fatal is not None or self.spent


def send(
    url: str,
    missing: dict[str, Job],
    server: ServerParams,
    journal: Journal,
    reporter: Reporter,
    session: Session | None = None,
) -> dict[str, str]:
    """Send what is missing, side by side.

    Parameters
    ----------
    url
        Of the chat completions.
    missing
        By the digest of the request.
    server
        How it may be used.
    journal
        Gets each answer before it is used.
    reporter
        Told how far it is.
    session
        What is known of the server already, and gets what is learnt; None if nothing is.

    Returns
    -------
    dict
        The reason of each request that got no answer.

    Raises
    ------
    BudgetError
        If ``max_requests`` is used up.
    ServerError
        If the server is out of reach, turns us away or gives no valid answers.
    """
    state, session = _Asking(), session or Session()
    with reporter.bar("rater", len(missing)) as advance:
        _run(_send_all(url, iter(missing.items()), server, journal, state, session, advance))
    if state.fatal:
        raise state.fatal
    if state.spent:
        raise BudgetError(
            f"stopped after {server.max_requests} requests; every answer is kept. "
            "The same command goes on from here."
        )
    if state.failures and len(state.failures) == len(missing):
        raise _out_of_reach(url, state)
    return state.failures


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, also inside a running event loop such as a notebook's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


async def _send_all(
    url: str,
    jobs: Iterator[tuple[str, Job]],
    server: ServerParams,
    journal: Journal,
    state: _Asking,
    session: Session,
    advance: Any,
) -> None:
    import httpx2

    key = read_key()
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    limits = httpx2.Limits(max_connections=server.concurrency)
    async with httpx2.AsyncClient(
        timeout=server.timeout_seconds, limits=limits, follow_redirects=False, trust_env=False
    ) as client:
        transport = Transport(client, url, headers, server, key, session.sent)

        async def work() -> None:
            for request, job in jobs:  # one iterator for all workers
                await _ask_one(transport, request, job, journal, state)
                advance()
                if state.over:
                    transport.stopped = True  # what is under way still ends and is kept
                    return

        try:
            await asyncio.gather(*(work() for _ in range(server.concurrency)))
        finally:
            session.sent = transport.sent


async def _ask_one(
    transport: Transport, request: str, job: Job, journal: Journal, state: _Asking
) -> None:
    recipe, body = job
    try:
        reply = await transport.ask(body, reply_tokens(recipe))
    except UnansweredError as error:
        if transport.stopped:
            return
        state.failures[request] = str(error)
        state.unanswered_in_a_row += 1
        if state.unanswered_in_a_row >= _GIVE_UP:
            state.fatal = state.fatal or _out_of_reach(transport.url, state)
    except BudgetSpentError:
        state.spent = True
    except ServerError as error:
        state.fatal = state.fatal or error
    else:
        journal.put(request, body["model"], reply)
        judged = judge_all(reply, recipe, body["model"], transport.params.any_model)
        status = judged[0].status
        state.unanswered_in_a_row = 0
        valid = any(it.status == "ok" for it in judged)
        state.invalid_in_a_row = 0 if valid else state.invalid_in_a_row + 1
        if state.invalid_in_a_row >= _NEVER_VALID:
            state.fatal = state.fatal or ServerError(
                f"{transport.url}: {_NEVER_VALID} replies in a row were not valid (the last one: {status}). "
                "They are kept. Ask another model, or change the recipe's instruction."
            )


def _out_of_reach(url: str, state: _Asking) -> ServerError:
    reasons = Counter(state.failures.values())
    shown = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return ServerError(
        f"{url} gives no answers ({shown}). Answers so far are kept; run the same command again when it does."
    )
