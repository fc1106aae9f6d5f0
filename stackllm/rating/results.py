"""Reading the results of a batch, a line for each prompt: unordered, and trusted in nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from stackllm.rating.journal import Batch, Journal
from stackllm.rating.refusal import Refusal, read_reason
from stackllm.rating.replies import BadReplyError, Reply, ToldError, read_reply

_AT_ONCE = 500
"""Replies committed with one sync; a file of results can be read again."""

_UNANSWERED = {"batch_expired", "batch_cancelled", "request_cancelled"}
"""Codes of lines that the server did not get round to, and did not charge for."""


class Results:
    """The lines of a batch's results, committed as they come.

    Parameters
    ----------
    batch
        Whose results.
    journal
        Gets the replies.
    secret
        The API key.
    """

    def __init__(self, batch: Batch, journal: Journal, secret: str) -> None:
        self.failed: dict[str, str | Refusal] = {}
        self.settled: set[str] = set()
        self.odd: Counter[str] = Counter()
        self._batch, self._journal, self._secret = batch, journal, secret
        self._requests = {*batch.requests}

    def read(self, lines: Iterator[bytes | None]) -> None:
        """Commit what the lines of one file tell; called again where reading it failed midway."""
        seen: set[str] = set()
        odd: Counter[str] = Counter()
        replies: list[tuple[str, Reply]] = []
        for line in lines:
            if line is not None and not line.strip():
                continue
            entry = _read_json(line)
            request = str(entry.get("custom_id"))
            if problem := self._problem(line, entry, request, seen):
                odd[problem] += 1
                continue
            seen.add(request)
            outcome = _read_entry(entry, self._secret, self._batch.keep)
            if isinstance(outcome, Reply):
                replies.append((request, outcome))
                self.failed.pop(request, None)
            elif outcome and request not in self.settled:
                self.failed[request] = outcome
            if outcome:
                self.settled.add(request)
            if len(replies) >= _AT_ONCE:
                self._journal.put_all(replies, self._batch.model)
                replies = []
        self._journal.put_all(replies, self._batch.model)
        self.odd += odd

    def _problem(
        self, line: bytes | None, entry: Mapping[str, Any], request: str, seen: set[str]
    ) -> str:
        """Why a line tells nothing; empty if it does."""
        if line is None:
            return "are longer than [server] max_bytes"
        if not entry:
            return "are no JSON objects"
        if request not in self._requests:
            return "answer no prompt of ours"
        return "answer a prompt a second time" if request in seen else ""


def _read_json(line: bytes | None) -> dict[str, Any]:
    """A line's object; empty if it is none."""
    try:
        entry = json.loads(line or b"")
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _read_entry(entry: Mapping[str, Any], secret: str, keep: int) -> Reply | Refusal | str:
    """A line's reply, or why it has none; empty if the server did not get round to it."""
    response, error = entry.get("response"), entry.get("error")
    response = response if isinstance(response, dict) else {}
    body, status = response.get("body"), response.get("status_code")
    if body and status in (None, 200):
        try:
            return read_reply(json.dumps(body).encode(), secret, keep)
        except ToldError as problem:
            return Refusal(problem.code, problem.reason)
        except BadReplyError as problem:
            return str(problem)
    if isinstance(error, dict) and error.get("code") in _UNANSWERED:
        return ""
    words = body or error
    said = read_reason(json.dumps(words).encode(), secret) if words else ""
    return Refusal(status, said) if type(status) is int else said or "no answer"
