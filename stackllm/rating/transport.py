"""Sending a prompt to a chat server: limited, retried within bounds, with nothing leaked.

What is never followed is a redirect; what is never read is a compressed body or more bytes than
allowed. Every wait counts on the monotonic clock. No message holds a header, a body or the key: of
what a server says to a refusal, one line at most.

What a server does not take of a request is found out by asking the same prompt again with less,
one prompt at a time, and then known to all (:mod:`~stackllm.rating.dialect`).
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from stackllm.errors import ServerError
from stackllm.rating.address import nearest_base
from stackllm.rating.advice import (
    TOO_LONG_A_WAIT,
    UnansweredError,
    named_fields,
    not_there,
    turned_away,
)  # fmt: skip
from stackllm.rating.dialect import (
    Dialect,
    blind,
    guided,
    losses,
    without_logprobs,
)  # fmt: skip
from stackllm.rating.refusal import Refusal, names_logprobs, one_line, read_reason
from stackllm.rating.replies import BadReplyError, Reply, ToldError, read_reply
from stackllm.rating.requests import ServerParams, estimate_tokens

_LONGEST_BACKOFF = 30.0

_REASON_BYTES = 65_536
_REASON_SECONDS = 5.0
"""So much of the body of an error is read, and for so long."""

_BLIND_SEARCHES = 2
"""So many prompts that are refused without a reason are asked in every dialect; it may be the prompt."""

_MOST_STEPS = 16
"""Requests of one search, whatever the server says to each."""


class BudgetSpentError(Exception):
    """``max_requests`` have been sent."""


class _RetryError(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, reason: str, wait: float = 0.0, refusal: Refusal | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        self.refusal = refusal


class _RefusedError(Exception):
    """The server said no, or that it can't."""

    def __init__(self, refusal: Refusal, headers: Mapping[str, str]) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
        self.headers = headers


@dataclass
class _Prompt:
    """A request under way.

    Parameters
    ----------
    body
        What is meant to be sent.
    keep
        Tokens of the reply to keep, as :func:`read_reply` is told.
    broken
        Its attempts with log-probabilities that ended in a failure of the server.
    """

    body: Mapping[str, Any]
    keep: int
    broken: int = 0


class Pace:
    """Starts things no faster than so many a minute, evenly.

    Parameters
    ----------
    per_minute
        The limit; 0 is none.
    """

    def __init__(self, per_minute: float) -> None:
        self._seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._free = 0.0
        self._held_until = 0.0

    async def take(self, amount: float = 1.0) -> None:
        """Wait for the turn of ``amount`` units."""
        now = asyncio.get_running_loop().time
        while True:
            start = max(now(), self._free)
            self._free = start + amount * self._seconds_each
            await asyncio.sleep(start - now())
            if start >= self._held_until:  # else everything was held while this one slept
                return

    def hold(self, seconds: float) -> None:
        """Let nothing start for so long, not even what waits for its turn already."""
        self._held_until = max(self._held_until, asyncio.get_running_loop().time() + seconds)
        self._free = max(self._free, self._held_until)


@dataclass
class Transport:
    """Sends prompts to one endpoint.

    Parameters
    ----------
    client
        An ``httpx2.AsyncClient`` that follows no redirects.
    url
        Of the chat completions.
    headers
        Sent with each request.
    params
        Limits.
    secret
        Taken out of everything that comes back: a server may echo the key.
    sent
        Requests so far.
    dialect
        What the server takes, as far as is known.
    tell
        Gets each sentence about what was found out, and whether something is lost by it.
    """

    client: Any
    url: str
    headers: dict[str, str] = field(repr=False)
    params: ServerParams
    secret: str = field(default="", repr=False)
    sent: int = 0
    dialect: Dialect = field(default_factory=Dialect)
    tell: Callable[[str, bool], None] = lambda _text, _lost: None
    stopped: bool = False
    _spoken: set[Dialect] = field(default_factory=set)  # dialects in which somebody was answered
    _searches: int = 0
    _without: int = 0  # prompts that failed with log-probabilities, and were answered without
    _models: list[str] | None = None
    _learning: asyncio.Lock = field(default_factory=asyncio.Lock)
    _listing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _requests: Pace = field(init=False)
    _tokens: Pace = field(init=False)

    def __post_init__(self) -> None:
        self._requests = Pace(self.params.requests_per_minute)
        self._tokens = Pace(self.params.tokens_per_minute)

    async def ask(self, body: Mapping[str, Any], keep: int = 0) -> Reply:
        """The reply to one request, with as many tokens kept as :func:`read_reply` is told.

        Raises
        ------
        UnansweredError
            If it got none within its attempts and its deadline, or the server rejects it.
        BudgetSpentError
            If the next attempt would be one too many.
        ServerError
            If no request can ever succeed: wrong key, wrong address, no credits, a redirect.
        """
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.params.attempts),
            retry=retry_if_exception_type(_RetryError),
            wait=self._wait,
            reraise=True,
        )
        try:
            async with asyncio.timeout(self.params.deadline_seconds) as clock:
                return await retrying(self._attempt, _Prompt(body, keep), clock)
        except TimeoutError:
            raise UnansweredError("deadline") from None
        except _RetryError as error:
            raise UnansweredError(str(error), error.refusal) from None

    def _wait(self, state: Any) -> float:
        from tenacity import wait_random_exponential

        jitter = wait_random_exponential(self.params.backoff_seconds, _LONGEST_BACKOFF)(state)
        return float(state.outcome.exception().wait + jitter)

    async def _attempt(self, prompt: _Prompt, clock: asyncio.Timeout) -> Reply:
        used, without = self.dialect, self._without
        enough = min(2, self.params.attempts - 1)  # the last attempt is without, if not the third
        if 0 < enough <= prompt.broken and self._without < 2 and not self._is_proven(used):
            return await self._try_without(prompt, clock)
        try:
            reply = await self._exchange(used, prompt, clock)
        except _RefusedError as error:
            # One that tells when to come again, or loads its model, is busy rather than broken.
            busy = error.refusal.kind == "loading" or "retry-after" in error.headers
            broken = error.refusal.status >= 500 and not busy
            suspect = broken and without and self._without > 1 and not self._is_proven(used)
            if suspect or self._is_dialect(error.refusal):
                return await self._search(used, error, prompt, clock)
            prompt.broken += broken and bool(used.apply(prompt.body).get("logprobs"))
            raise await self._failure(error, prompt, clock) from None
        self._spoken.add(used)
        return reply

    async def _try_without(self, prompt: _Prompt, clock: asyncio.Timeout) -> Reply:
        """Ask for no log-probabilities where asking for them failed twice: it may be they that break the server.

        One such success may as well be a hiccup that is over. Two, and a third prompt that fails with
        them after that, are none: then its search begins.
        """
        async with self._learning:
            used = self.dialect
            *_, plain = [used, *without_logprobs(used, self.params.extra)]
            if self._without < 2 and plain != used and not self._is_proven(used):
                try:
                    reply = await self._exchange(plain, prompt, clock)
                except _RefusedError as error:
                    raise await self._failure(error, prompt, clock) from None
                self._without += 1
                return reply
        return await self._attempt(replace(prompt, broken=0), clock)

    async def _search(
        self, used: Dialect, error: _RefusedError, prompt: _Prompt, clock: asyncio.Timeout
    ) -> Reply:
        """Find the dialect in which a prompt is answered that was refused."""
        if self._is_proven(
            used
        ):  # others are answered so: it is this prompt, and nobody waits for it
            return await self._step(used, error, prompt, clock)
        async with self._learning:
            if self.dialect == used:
                return await self._step(used, error, prompt, clock)
        return await self._attempt(
            replace(prompt, broken=0), clock
        )  # another prompt has found it meanwhile

    async def _step(
        self, used: Dialect, error: _RefusedError, prompt: _Prompt, clock: asyncio.Timeout
    ) -> Reply:
        fixed, step = self.params.extra, used
        tried: dict[Dialect, Refusal] = {used: error.refusal}  # each with what led to it
        guesses: Iterator[Dialect] | None = None
        while len(tried) < _MOST_STEPS:
            better = guided(step, error.refusal.reason, fixed)
            if better is None or better in tried:
                if guesses is None:
                    guesses = iter(self._guesses(step, error.refusal))
                better = next((guess for guess in guesses if guess not in tried), None)
            else:
                guesses = None
            if better is None:
                break
            tried[better] = error.refusal
            step = better
            try:
                reply = await self._exchange(better, prompt, clock)
            except _RefusedError as again:
                first = error.refusal.status >= 500 and again.refusal.status >= 500
                if not (self._is_dialect(again.refusal) or first):
                    raise await self._failure(again, prompt, clock) from None
                error = again
            else:
                self._adopt(used, better, tried)
                return reply
        raise await self._failure(error, prompt, clock) from None

    def _guesses(self, step: Dialect, refusal: Refusal) -> Iterable[Dialect]:
        """What to try where the server names nothing of ours."""
        fixed = self.params.extra
        if refusal.status >= 500 and refusal.status != 501:
            return without_logprobs(step, fixed)
        if refusal.kind not in ("prompt", "busy") or named_fields(refusal.reason, fixed):
            return ()
        if self._is_proven(self.dialect):  # once without, for this prompt alone
            return [*without_logprobs(step, fixed)][-1:]
        if self._searches == _BLIND_SEARCHES:
            return ()
        self._searches += 1
        return blind(step, fixed)

    def _is_proven(self, dialect: Dialect) -> bool:
        """Whether somebody was answered in it."""
        return dialect in self._spoken

    def _is_dialect(self, refusal: Refusal) -> bool:
        """Whether the server may refuse how it is asked, rather than what."""
        if refusal.kind in ("key", "quota", "loading", "context", "tokens", "flagged"):
            return False
        if refusal.status in (400, 403, 404, 422, 501):
            return True
        named = guided(self.dialect, refusal.reason, self.params.extra) is not None
        return (
            named
            and (refusal.status == 0 or refusal.status >= 500)
            and names_logprobs(refusal.reason)
        )

    def _adopt(self, before: Dialect, after: Dialect, tried: Mapping[Dialect, Refusal]) -> None:
        """Ask everybody so from now on, unless somebody has been answered as it was."""
        if self._is_proven(before) or self.dialect != before:
            return
        self.dialect = after
        self._spoken.add(after)
        for name, value in vars(after).items():
            for loss, harm in losses(before, replace(before, **{name: value})):
                why = next(tried[it] for it in tried if it != before and vars(it)[name] == value)
                self.tell(f"rater: the server takes {loss} ({why}).", harm)

    async def _exchange(self, dialect: Dialect, prompt: _Prompt, clock: asyncio.Timeout) -> Reply:
        """One request in a dialect, and the reply to it."""
        status, headers, content = await self._post(
            dialect.apply(prompt.body), estimate_tokens(prompt.body), clock
        )
        wait = retry_after(headers, self.params.deadline_seconds)
        if 300 <= status < 400:
            raise ServerError(
                f"{self.url} redirects elsewhere, which is not followed. Set [rater] url to where it really is."
            )
        if status != 200:
            reason = read_reason(content, self.secret)
            raise _RefusedError(Refusal(status, reason, wait), headers)
        try:
            return read_reply(content, self.secret, prompt.keep)
        except ToldError as error:
            refusal = Refusal(error.code, one_line(error.reason), wait)
            raise _RefusedError(refusal, headers) from None
        except BadReplyError as error:
            raise _RetryError(str(error)) from None

    async def _failure(
        self, error: _RefusedError, prompt: _Prompt, clock: asyncio.Timeout
    ) -> Exception:
        """What a refusal means: for this attempt, for this prompt, or for all."""
        refusal, kind, wait = error.refusal, error.refusal.kind, error.refusal.wait
        answered = bool(self._spoken or self._without)
        if kind == "quota" or (kind == "key" and not (answered and refusal.status == 403)):
            return turned_away(self.url, refusal, bool(self.secret))
        if kind in ("path", "model") and not answered:
            models = await self._list_models()
            base = nearest_base(self.url)
            return not_there(self.url, str(prompt.body["model"]), refusal, base, models)
        if kind not in ("busy", "loading"):
            return UnansweredError(str(refusal), refusal)
        if wait > _time_left(clock):
            # To wait for it makes no sense.
            return UnansweredError(f"{refusal}{TOO_LONG_A_WAIT}", refusal)
        if wait:
            self._requests.hold(wait)  # the server's wish is for everybody
        return _RetryError(str(refusal), wait, refusal)

    async def _list_models(self) -> list[str]:
        """Names of the server's models; empty if it does not tell. It is asked once."""
        import httpx2

        async with self._listing:
            if self._models is None:
                self._models = []
                url = f"{nearest_base(self.url)}/models"
                # It is a try to help: whatever goes wrong, no name is known.
                wrong = (_RetryError, httpx2.HTTPError, LookupError, RecursionError, TypeError)
                with suppress(TimeoutError, AttributeError, ValueError, *wrong):
                    async with asyncio.timeout(_REASON_SECONDS):
                        _, _, content = await self._stream("GET", url, b"", 0)
                    told = json.loads(content)
                    entries = told.get("data") or told.get("models")
                    names = [entry.get("id") or entry.get("name") for entry in entries[:500]]
                    self._models = [one_line(str(it), self.secret, 80) for it in names if it]
            return self._models

    async def _post(
        self, body: Mapping[str, Any], tokens: int, clock: asyncio.Timeout
    ) -> tuple[int, Mapping[str, str], bytes]:
        """One request, its prompt and reply of about so many tokens: status, headers and body."""
        import httpx2

        if self.stopped:
            raise UnansweredError("stopped")
        left = _time_left(clock)
        clock.reschedule(None)  # our own limits are no fault of the server
        await self._tokens.take(tokens)
        await self._requests.take()
        clock.reschedule(asyncio.get_running_loop().time() + left)
        if self.stopped:
            raise UnansweredError("stopped")
        limit = self.params.max_requests
        if limit is not None and self.sent >= limit:
            raise BudgetSpentError
        self.sent += 1
        try:
            async with asyncio.timeout(self.params.timeout_seconds):
                return await self._stream("POST", self.url, json.dumps(body).encode(), tokens)
        except TimeoutError:
            raise _RetryError("time-out") from None
        except httpx2.TimeoutException:
            raise _RetryError("time-out") from None
        except httpx2.TransportError:
            raise _RetryError("connection") from None

    async def _stream(
        self, method: str, url: str, content: bytes, tokens: int
    ) -> tuple[int, Mapping[str, str], bytes]:
        async with self.client.stream(
            method, url, content=content, headers=self.headers
        ) as response:
            status, headers = response.status_code, response.headers
            plain = headers.get("content-encoding", "identity") == "identity"
            if status != 200:
                return status, headers, await self._read_error(response) if plain else b""
            if not plain:
                raise _RetryError("compressed body")
            received = bytearray()
            async for chunk in response.aiter_raw():
                received += chunk
                if len(received) > self.params.most_bytes(tokens):
                    raise _RetryError("body too large")
            return 200, headers, bytes(received)

    async def _read_error(self, response: Any) -> bytes:
        """As much of the body of an error as comes soon; what the status says is known already."""
        import httpx2

        received = bytearray()
        with suppress(TimeoutError, httpx2.HTTPError):
            async with asyncio.timeout(min(_REASON_SECONDS, self.params.timeout_seconds / 2)):
                async for chunk in response.aiter_raw():
                    received += chunk
                    if len(received) >= _REASON_BYTES:
                        break
        return bytes(received[:_REASON_BYTES])


def _time_left(clock: asyncio.Timeout) -> float:
    when = clock.when()
    return math.inf if when is None else when - asyncio.get_running_loop().time()


def retry_after(headers: Mapping[str, str], most: float) -> float:
    """Seconds that a server asks to wait, from 0 to ``most``; 0 if it does not ask.

    A date counts from the server's own ``Date``, so no clock here or there has to be right; only
    where the server tells none, it counts from ours.
    """
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(text)
            told = headers.get("date")
            now = email.utils.parsedate_to_datetime(told) if told else datetime.now(UTC)
            seconds = (until - now).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), most)
