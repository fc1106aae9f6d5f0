"""Asked recipes answered by any OpenAI-compatible chat server, through a journal.

Each prompt is a request of its own, known by the digest of everything that is sent. What the
journal holds is never asked again; what comes back is in the journal before it is used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from stackllm.engine.local import PendingError
from stackllm.engine.progress import Reporter
from stackllm.errors import BudgetError, ServerError, StackllmError, UsageError
from stackllm.rating.journal import Journal, open_journal, read_replies
from stackllm.rating.local import RaterParams, prompt_text
from stackllm.rating.question import Asked, Case
from stackllm.rating.replies import Reply, judge
from stackllm.rating.transport import (
    BudgetSpentError,
    ServerParams,
    Transport,
    UnansweredError,
    estimate_tokens,
)
from stackllm.store.digest import digest

KEY = "STACKLLM_API_KEY"
"""Environment variable of the API key; there is no other place for it."""

_GIVE_UP = 5
"""After so many prompts without an answer in a row, the server counts as out of reach."""

_NEVER_VALID = 20
"""After so many replies in a row that are no valid answer, no more are paid for."""

_Job = tuple[Asked, dict[str, Any]]


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


def ask_server(
    asked: Sequence[tuple[Asked, list[Case]]],
    rater: RaterParams,
    server: ServerParams,
    path: Path,
    reporter: Reporter,
    dry_run: bool,
) -> tuple[list[np.ndarray], list[Counter[str]]]:
    """Probabilities of the allowed answers to every case of every recipe.

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
    probabilities
        For each recipe ``(n_cases, n_answers)``; a row of NaN where there is no valid answer.
    failures
        For each recipe the reasons of such rows, counted.

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
    wanted: dict[str, _Job] = {}
    for recipe, cases in asked:
        bodies = [make_body(recipe, case, rater) for case in cases]
        requests.append([digest(url, body) for body in bodies])
        wanted |= {key: (recipe, body) for key, body in zip(requests[-1], bodies, strict=True)}
    replies = read_replies(path, wanted, dry_run)
    missing = {key: job for key, job in wanted.items() if key not in replies}
    failed: dict[str, str] = {}
    if missing:
        tokens = sum(estimate_tokens(body) for _, body in missing.values())
        told = (
            f"rater {rater.model}: {sum(map(len, requests))} prompts, {len(replies)} answers in the journal, "
            f"{len(missing)} requests and about {tokens:,} tokens to send"
        )
        if dry_run:
            pending = [sum(key in missing for key in keys) for keys in requests]
            raise PendingError(f"{told}.", pending_units(asked, pending))
        reporter.say(told)
        with open_journal(path) as journal:
            replies |= journal.get(missing)  # another process may have asked since
            missing = {key: job for key, job in missing.items() if key not in replies}
            failed = _send(url, missing, server, journal, reporter) if missing else {}
            replies |= journal.get(missing)
    results = []
    failures = []
    for (recipe, _), keys in zip(asked, requests, strict=True):
        judged = [
            _judged(recipe, rater.model, replies.get(request), failed.get(request))
            for request in keys
        ]
        results.append(np.array([p for _, p in judged]).reshape(len(keys), len(recipe.answers)))
        failures.append(Counter(status for status, _ in judged if status != "ok"))
    return results, failures


def pending_units(asked: Sequence[tuple[Asked, list[Case]]], pending: list[int]) -> dict[str, str]:
    """How many prompts of each recipe would be asked."""
    return {
        recipe.block: f"{count} of {len(cases)} prompts to ask"
        for (recipe, cases), count in zip(asked, pending, strict=True)
    }


def make_body(asked: Asked, case: Case, rater: RaterParams) -> dict[str, Any]:
    """The request for one case: greedy, short, with token log-probabilities if there are any."""
    return {
        "model": rater.model,
        "messages": [{"role": "user", "content": prompt_text(asked, case, rater)}],
        "temperature": 0,
        "max_tokens": 16,
        "logprobs": True,
        "top_logprobs": 20,
        "stream": False,
    }


def check_url(url: str, allow_http: bool) -> str:
    """The address of the chat completions below a base URL.

    Raises
    ------
    UsageError
        If it is no http(s) URL, carries a password, or would send texts and key unencrypted to
        another machine.
    """
    import httpx2

    whole = f"{url.rstrip('/')}/chat/completions"
    try:
        httpx2.URL(whole)
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except (ValueError, httpx2.InvalidURL):
        parts, host = urlsplit(""), None
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"[rater] url must not hold a password. Put the key into {KEY}.")
    odd = parts.query or parts.fragment or " " in url or not url.isprintable()
    if parts.scheme not in ("http", "https") or not host or odd:
        raise UsageError(  # without the address, which may hold a key
            '[rater] url must be such as "https://host/v1" or "http://127.0.0.1:8000/v1": with https or http, '
            f"and with no password, query or space. A key belongs into {KEY}."
        )
    if parts.scheme == "http" and not allow_http and not _is_loopback(host):
        raise UsageError(
            f"[rater] url would send texts and key to {host} unencrypted. "
            "Use https, or set [server] allow_http = true."
        )
    return whole


def read_key() -> str:
    """The API key out of the environment; empty if there is none.

    Raises
    ------
    UsageError
        If it can't be part of a header. The message does not show it.
    """
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(f"{KEY} holds characters that no API key has. Set it again.")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _judged(
    asked: Asked, model: str, reply: Reply | None, why: str | None
) -> tuple[str, np.ndarray]:
    if reply is None:
        return why or "not asked", np.full(len(asked.answers), np.nan)
    return judge(reply, asked, model)


def _send(
    url: str,
    missing: dict[str, _Job],
    server: ServerParams,
    journal: Journal,
    reporter: Reporter,
) -> dict[str, str]:
    """Send what is missing; the reason of each request that got no answer."""
    state = _Asking()
    with reporter.bar("rater", len(missing)) as advance:
        _run(_send_all(url, iter(missing.items()), server, journal, state, advance))
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
    jobs: Iterator[tuple[str, _Job]],
    server: ServerParams,
    journal: Journal,
    state: _Asking,
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
        transport = Transport(client, url, headers, server, key)

        async def work() -> None:
            for request, job in jobs:  # one iterator for all workers
                await _ask_one(transport, request, job, journal, state)
                advance()
                if state.over:
                    transport.stopped = True  # what is under way still ends and is kept
                    return

        await asyncio.gather(*(work() for _ in range(server.concurrency)))


async def _ask_one(
    transport: Transport, request: str, job: _Job, journal: Journal, state: _Asking
) -> None:
    recipe, body = job
    try:
        reply = await transport.ask(body)
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
        status, _ = judge(reply, recipe, body["model"])
        state.unanswered_in_a_row = 0
        state.invalid_in_a_row = 0 if status == "ok" else state.invalid_in_a_row + 1
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
