"""Sending a prompt to a chat server: limited, retried within bounds, with nothing leaked.

What is never followed is a redirect; what is never read is a compressed body or more bytes than
allowed. Every wait counts on the monotonic clock. No message holds a header or a body.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from stackllm.errors import ServerError
from stackllm.rating.replies import BadReplyError, Reply, read_reply
from stackllm.rating.requests import ServerParams, estimate_tokens

_LONGEST_BACKOFF = 30.0


class UnansweredError(Exception):
    """One prompt got no answer and another may; the message is a short reason."""


class BudgetSpentError(Exception):
    """``max_requests`` have been sent."""


class _RetryError(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


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
    """

    client: Any
    url: str
    headers: dict[str, str] = field(repr=False)
    params: ServerParams
    secret: str = field(default="", repr=False)
    sent: int = 0
    stopped: bool = False
    _takes_logprobs: bool | None = None  # until the server has shown it
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
            If no request can ever succeed: wrong key, wrong address, a redirect.
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
                return await retrying(self._attempt, body, clock, keep)
        except TimeoutError:
            raise UnansweredError("deadline") from None
        except _RetryError as error:
            raise UnansweredError(str(error)) from None

    def _wait(self, state: Any) -> float:
        from tenacity import wait_random_exponential

        jitter = wait_random_exponential(self.params.backoff_seconds, _LONGEST_BACKOFF)(state)
        return float(state.outcome.exception().wait + jitter)

    async def _attempt(self, body: Mapping[str, Any], clock: asyncio.Timeout, keep: int) -> Reply:
        plain = {key: value for key, value in body.items() if "logprobs" not in key}
        whole = body if self._takes_logprobs is not False else plain
        status, headers, content = await self._post(whole, clock)
        if status == 200 and whole is body:
            self._takes_logprobs = True
        if status in (400, 422) and whole is body:
            # Some servers reject what they do not know. Only an answer without it shows that it
            # was that, and only if nobody has been answered with it.
            status, headers, content = await self._post(plain, clock)
            if status == 200 and self._takes_logprobs is None:
                self._takes_logprobs = False
        if 300 <= status < 400:
            raise ServerError(
                f"{self.url} redirects elsewhere, which is not followed. Set [rater] url to where it really is."
            )
        if status in (401, 403):
            raise ServerError(
                f"{self.url} refuses the API key (HTTP {status}). Check the environment variable STACKLLM_API_KEY."
            )
        if status == 404:
            raise ServerError(
                f"{self.url}: the server knows no such address or model (HTTP 404). Check [rater] url and model."
            )
        if status in (408, 409, 425, 429) or status >= 500:
            wait = retry_after(headers, self.params.deadline_seconds)
            if wait > _time_left(clock):
                raise UnansweredError("deadline")  # to wait for it makes no sense
            if wait:
                self._requests.hold(wait)  # the server's wish is for everybody
            raise _RetryError(f"HTTP {status}", wait)
        if status != 200:
            raise UnansweredError(f"HTTP {status}")
        try:
            return read_reply(content, self.secret, keep)
        except BadReplyError as error:
            raise _RetryError(str(error)) from None

    async def _post(
        self, body: Mapping[str, Any], clock: asyncio.Timeout
    ) -> tuple[int, Mapping[str, str], bytes]:
        """One request: status, headers and body."""
        import httpx2

        if self.stopped:
            raise UnansweredError("stopped")
        left = _time_left(clock)
        clock.reschedule(None)  # our own limits are no fault of the server
        await self._tokens.take(estimate_tokens(body))
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
                return await self._stream(json.dumps(body).encode())
        except TimeoutError:
            raise _RetryError("time-out") from None
        except httpx2.TimeoutException:
            raise _RetryError("time-out") from None
        except httpx2.TransportError:
            raise _RetryError("connection") from None

    async def _stream(self, content: bytes) -> tuple[int, Mapping[str, str], bytes]:
        async with self.client.stream(
            "POST", self.url, content=content, headers=self.headers
        ) as response:
            if response.status_code != 200:
                return response.status_code, response.headers, b""
            if response.headers.get("content-encoding", "identity") != "identity":
                raise _RetryError("compressed body")
            received = bytearray()
            async for chunk in response.aiter_raw():
                received += chunk
                if len(received) > self.params.max_bytes:
                    raise _RetryError("body too large")
            return 200, response.headers, bytes(received)


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
