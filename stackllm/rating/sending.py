"""Sending many prompts side by side, each answer into the journal first, and when to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from stackllm.engine.progress import Reporter
from stackllm.errors import BudgetError, ServerError, StackllmError
from stackllm.rating.address import read_key
from stackllm.rating.advice import (
    UnansweredError,
    cut_prompt,
    lasting_refusals,
    misnamed,
    never_done_thinking,
    never_valid,
    unreachable,
)  # fmt: skip
from stackllm.rating.dialect import Dialect
from stackllm.rating.journal import Journal
from stackllm.rating.refusal import Refusal
from stackllm.rating.replies import Reply, judge_all
from stackllm.rating.requests import Job, ServerParams, prompt_length, prompt_tokens
from stackllm.rating.rubric import reply_tokens
from stackllm.rating.transport import BudgetSpentError, Transport

_GIVE_UP = 5
"""After so many prompts without an answer in a row, the server counts as out of reach."""

_NEVER_VALID = 20
"""After so many replies in a row that are no valid answer, no more are paid for; and so many prompts in a row may
be refused for what they are, such as long, where another is not."""

_THINKING = 5
"""So many replies that were cut while the LLM thought, before any is valid, show that its tokens do not suffice."""

_MISNAMED = 3
"""So many answers in a row under another name are no slip of a server that has answered under the right one."""


@dataclass
class Session:
    """What one run knows of a server from call to call.

    Parameters
    ----------
    sent
        Requests so far, retries included.
    dialect
        What the server was found to take.
    """

    sent: int = 0
    dialect: Dialect = field(default_factory=Dialect)


@dataclass
class _Asking:
    """What happens while prompts are being sent."""

    server: ServerParams
    reporter: Reporter
    unanswered_in_a_row: int = 0
    invalid_in_a_row: int = 0
    thinking_in_a_row: int = 0
    misnamed_in_a_row: int = 0
    named: bool = False  # whether an answer came under the right name
    valid: int = 0
    measured: int = 0  # valid ones whose probabilities were read from token scores
    meant: int = 0  # valid ones that were to have such
    told_of_cut: bool = False
    failures: dict[str, str] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    fatal: StackllmError | None = None
    spent: bool = False

    @property
    def over(self) -> bool:
        return self.fatal is not None or self.spent

    def stop(self, error: StackllmError) -> None:
        """Ask no more; the first reason counts."""
        self.fatal = self.fatal or error


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
    state, session = _Asking(server, reporter), session or Session()
    with reporter.bar("rater", len(missing)) as advance:
        _run(_send_all(url, iter(missing.items()), server, journal, state, session, advance))
    if state.fatal:
        raise state.fatal
    if state.spent:
        raise budget_spent(server)
    if state.failures and len(state.failures) == len(missing):
        raise unreachable(url, state.failures.values(), state.refusals, server)
    _tell_of_gaps(state, session.dialect)
    return state.failures


def _tell_of_gaps(state: _Asking, dialect: Dialect) -> None:
    """What was refused and why it will be again, and how many answers have no probabilities."""
    if told := lasting_refusals(state.refusals, state.server):
        state.reporter.warn(told)
    if state.measured < state.meant and (state.measured or dialect.alternatives):
        state.reporter.warn(
            f"rater: {state.measured or 'none'} of {state.meant} answers came with probabilities of tokens; "
            f"each {'of the others ' if state.measured else ''}counts as certain, and its entropy is 0."
        )


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
        timeout=server.timeout_seconds,
        limits=limits,
        follow_redirects=False,
        trust_env=False,
        verify=url.startswith("https"),  # reading all certificates takes longer than a small run
    ) as client:
        transport = Transport(
            client, url, headers, server, key, session.sent, session.dialect,
            lambda text, lost: (state.reporter.warn if lost else state.reporter.say)(text),
        )  # fmt: skip

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
            session.sent, session.dialect = transport.sent, transport.dialect


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
        most = _GIVE_UP
        if error.refusal:
            state.refusals.append(error.refusal)
            apart = state.valid and error.refusal.kind not in ("busy", "loading")
            most = (
                _NEVER_VALID if apart or error.refusal.kind in ("context", "flagged") else _GIVE_UP
            )
        if state.unanswered_in_a_row >= most:
            reasons = state.failures.values()
            state.stop(unreachable(transport.url, reasons, state.refusals, state.server))
    except BudgetSpentError:
        state.spent = True
    except ServerError as error:
        state.stop(error)
    else:
        journal.put(request, body["model"], reply)
        _weigh(transport.url, job, reply, state)


def _weigh(url: str, job: Job, reply: Reply, state: _Asking) -> None:
    """Count what a reply is worth, and stop where more like it would be paid for in vain."""
    recipe, body = job
    server = state.server
    judged = judge_all(reply, recipe, body["model"], server.any_model)
    statuses = [it.status for it in judged]
    status = "ok" if "ok" in statuses else statuses[0]
    state.unanswered_in_a_row = 0
    if status == "ok":
        state.invalid_in_a_row = state.thinking_in_a_row = 0
        state.valid += 1
        if body.get("logprobs"):
            state.meant += 1
            state.measured += any(it.measured for it in judged)
    else:
        state.invalid_in_a_row += 1
        unsaid = status == "cut off" and not reply.text.strip()  # thought that is not shown
        state.thinking_in_a_row += unsaid or status == "still thinking"
    if status == "wrong model":
        state.misnamed_in_a_row += 1
        if not state.named or state.misnamed_in_a_row >= _MISNAMED:
            state.stop(misnamed(url, reply.model, body["model"]))
    else:
        state.named, state.misnamed_in_a_row = True, 0
    if state.thinking_in_a_row >= _THINKING and not state.valid:
        state.stop(never_done_thinking(url, reply, state.thinking_in_a_row, server))
    if state.invalid_in_a_row >= _NEVER_VALID:
        state.stop(never_valid(url, status, reply, state.invalid_in_a_row, server))
    cut = cut_prompt(reply.n_prompt, prompt_length(body), prompt_tokens(body))
    if cut and not state.told_of_cut:
        state.told_of_cut = True
        state.reporter.warn(cut)


def budget_spent(server: ServerParams) -> BudgetError:
    """What to say when ``max_requests`` is used up."""
    return BudgetError(
        f"stopped after {server.max_requests} requests; every answer is kept. "
        "The same command goes on from here."
    )
