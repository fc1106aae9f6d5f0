"""Files and batches of a server that takes prompts as files: one method per request.

As with single prompts, no redirect is followed, nothing compressed or endless is read, and what may
pass is tried again within bounds. The shape is OpenAI's, which others copy with small deviations:
names of states in capitals, a batch inside ``{"job": …}``, a list without ``{"data": …}``.
https://developers.openai.com/api/reference/resources/batches
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from stackllm.errors import ServerError
from stackllm.rating.address import read_key
from stackllm.rating.advice import turned_away
from stackllm.rating.refusal import Refusal, read_reason
from stackllm.rating.requests import ServerParams
from stackllm.rating.transport import retry_after

_LONGEST_BACKOFF = 30.0
_MOST_PAGES = 100
"""Of the list of batches, 100 on each; the newest come first, and ours is of today."""
_NAME = re.compile(r"[\w.:=-]{1,512}", re.ASCII)
MARK = "stackllm"
"""Under this word a batch's metadata hold the name that we gave it."""


@dataclass(frozen=True)
class Told:
    """What a server answered.

    Parameters
    ----------
    status
        Of HTTP.
    data
        The body's JSON; None for an error.
    reason
        The server's words, if it refuses.
    wait
        Seconds that it asks to wait.
    """

    status: int
    data: Any
    reason: str
    wait: float

    @property
    def refusal(self) -> str:
        """Status and reason, for a sentence."""
        return str(Refusal(self.status, self.reason))


class RefusedError(ServerError):
    """The server takes no batch, and certainly has made none."""


class LostError(ServerError):
    """The server knows nothing of a batch that was handed over; the message has no next step yet."""


class PassingError(Exception):
    """A request failed in a way that may pass; the message is a short reason."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass
class Endpoint:
    """Requests to the files and batches beside a chat endpoint.

    Parameters
    ----------
    client
        An ``httpx2.Client`` that follows no redirects and sends the key.
    base
        Base URL.
    params
        Limits.
    secret
        Taken out of everything that comes back.
    """

    client: Any
    base: str
    params: ServerParams
    secret: str = field(default="", repr=False)

    def upload(self, lines: bytes) -> str:
        """The server's name for a new file of requests.

        Raises
        ------
        RefusedError
            If the server takes none.
        """
        file = {"file": ("stackllm.jsonl", lines, "application/jsonl")}
        told = self._call("POST", "/files", data={"purpose": "batch"}, files=file)
        return self._name(told, "/files")

    def create(self, file: str, name: str) -> str:
        """The server's name for a new batch of an uploaded file.

        Whether a batch was made although no answer came is looked up before it is tried again.

        Parameters
        ----------
        file
            From :meth:`upload`.
        name
            Ours, kept in the metadata.

        Raises
        ------
        RefusedError
            If the server takes none.
        LostError
            If it may have made one, and does not list its batches.
        """
        order = {
            "input_file_id": file,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "metadata": {MARK: name},
        }

        def attempt() -> str:
            try:
                return self._name(self._request("POST", "/batches", json=order), "/batches")
            except PassingError:
                made = self.find(file, name)
                if made:
                    return made
                raise

        return str(self._retry(attempt, "/batches"))

    def find(self, file: str, name: str) -> str:
        """The server's name for a batch that it may have made; empty if it lists none.

        Raises
        ------
        LostError
            If the server does not list its batches: then nobody knows.
        """
        after: dict[str, str] = {}
        for _ in range(_MOST_PAGES):
            told = self._call("GET", "/batches", params={"limit": "100", **after})
            listed = told.data.get("data") if isinstance(told.data, dict) else told.data
            if told.status != 200 or not isinstance(listed, list):
                raise LostError(
                    f"{self.base} does not list its batches ({told.refusal}), so nobody can tell whether it works on "
                    f"file {file} already."
                )
            batches = [batch for batch in listed if isinstance(batch, dict)]
            for batch in batches:
                marks = batch.get("metadata")
                is_marked = isinstance(marks, dict) and marks.get(MARK) == name
                if is_marked or batch.get("input_file_id") == file:
                    return self._checked(batch)
            if not batches or not (isinstance(told.data, dict) and told.data.get("has_more")):
                break
            after = {"after": self._checked(batches[-1])}
        return ""

    def poll(self, batch: str) -> Told:
        """How far a batch is.

        Raises
        ------
        LostError
            If the server does not know it.
        """
        told = self._call("GET", f"/batches/{batch}")
        if told.status != 200 or not isinstance(told.data, dict):
            raise LostError(f"{self.base} knows no batch {batch} ({told.refusal}).")
        return told

    def read(
        self, file: str, limits: tuple[int, int], use: Callable[[Iterator[bytes | None]], None]
    ) -> None:
        """Read a file of results line by line, from its beginning again where the connection fails.

        Parameters
        ----------
        file
            The server's name for it.
        limits
            Lines that it may have, and bytes that each of these may.
        use
            Gets the lines; None for one that is too long.

        Raises
        ------
        LostError
            If the server has no such file any more.
        """
        told = self._call("GET", f"/files/{file}/content", use=use, limits=limits)
        if told.status != 200:
            raise LostError(f"{self.base} gives no file of results {file} ({told.refusal}).")

    def _call(self, method: str, path: str, **sent: Any) -> Told:
        told: Told = self._retry(lambda: self._request(method, path, **sent), path)
        return told

    def _retry(self, attempt: Callable[[], Any], path: str) -> Any:
        from tenacity import (
            RetryCallState,
            Retrying,
            retry_if_exception_type,
            stop_after_attempt,
            stop_after_delay,
            wait_random_exponential,
        )

        backoff = wait_random_exponential(self.params.backoff_seconds, _LONGEST_BACKOFF)

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.wait if isinstance(error, PassingError) else 0.0
            return asked + float(backoff(state))

        retrying = Retrying(
            stop=stop_after_attempt(self.params.attempts)
            | stop_after_delay(self.params.deadline_seconds),
            retry=retry_if_exception_type(PassingError),
            wait=wait,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except PassingError as error:
            raise ServerError(
                f"{self.base}{path} gives no answer ({error}). What was handed over goes on at the server, and the same "
                "command picks it up."
            ) from None

    def _request(
        self,
        method: str,
        path: str,
        use: Callable[[Iterator[bytes | None]], None] | None = None,
        limits: tuple[int, int] = (1, 0),
        **sent: Any,
    ) -> Told:
        import httpx2

        try:
            with self.client.stream(method, self.base + path, **sent) as response:
                status, wait = response.status_code, self._asked_wait(response)
                is_fine = status in (200, 201)
                if is_fine and use:
                    lines, most = limits
                    longer = ServerError(
                        f"{self.base}{path} holds more than {lines:,} times {most:,} bytes. What came first is kept. "
                        "Raise [server] max_bytes and run the same command again."
                    )
                    use(_split_lines(self._chunks(response, lines * most, longer), most))
                    return Told(200, None, "", wait)
                content = self._read_short(response) if is_fine else b""
                reason = "" if is_fine else self._read_reason(response)
                if 300 <= status < 400:
                    reason = "it redirects elsewhere, which is not followed"
        except httpx2.TimeoutException:
            raise PassingError("time-out") from None
        except httpx2.TransportError:
            raise PassingError("connection") from None
        told = Told(status, None, reason, wait)
        refusal = Refusal(status, reason, wait)
        if not is_fine and refusal.kind in ("key", "quota"):
            unless = (
                " A key that may ask but hand over no files needs [server] batch = false."
                if refusal.kind == "key"
                else ""
            )
            raise ServerError(
                f"{turned_away(self.base + path, refusal, bool(self.secret))}{unless}"
            )
        if status in (408, 409, 425, 429) or (status >= 500 and status != 501):
            raise PassingError(told.refusal, wait)
        if not is_fine:
            return told
        try:
            return Told(200, json.loads(content), "", wait)
        except (ValueError, RecursionError):
            raise PassingError("bad JSON") from None

    def _chunks(self, response: Any, most: int, longer: Exception) -> Iterator[bytes]:
        """The body as it comes, neither compressed nor endless."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise PassingError("compressed body")
        received = 0
        for chunk in response.iter_raw():
            received += len(chunk)
            if received > most:
                raise longer
            yield chunk

    def _read_short(self, response: Any) -> bytes:
        """A body that comes at once."""
        content, started = bytearray(), time.monotonic()
        longer = PassingError("body too large")
        for chunk in self._chunks(response, self.params.max_bytes, longer):
            content += chunk
            if time.monotonic() - started > self.params.timeout_seconds:
                raise PassingError("time-out")
        return bytes(content)

    def _read_reason(self, response: Any) -> str:
        """The server's words out of an error's body, if that can be read."""
        try:
            return read_reason(self._read_short(response), self.secret)
        except PassingError:
            return ""

    def _asked_wait(self, response: Any) -> float:
        return retry_after(response.headers, self.params.deadline_seconds)

    def _name(self, told: Told, path: str) -> str:
        """The name of what was made."""
        if told.status in (404, 405, 501) or not (told.reason or isinstance(told.data, dict)):
            raise RefusedError(
                f"{self.base} takes no batches ({path}: {told.refusal}). Set [server] batch = false."
            )
        if told.data is None:
            raise RefusedError(
                f"{self.base}{path} refuses a batch ({told.refusal}). Change what it names, or set [server] batch = false."
            )
        job = told.data.get("job")
        return self._checked(job if isinstance(job, dict) else told.data)

    def _checked(self, made: dict[str, Any]) -> str:
        name = made.get("id", made.get("batch_id"))
        if not isinstance(name, str) or not is_name(name) or (self.secret and self.secret in name):
            reason = (
                read_reason(json.dumps(made).encode(), self.secret) or "an answer without an id"
            )
            raise ServerError(
                f"{self.base} takes no batches ({reason}). Set [server] batch = false."
            )
        return name


@contextmanager
def open_endpoint(url: str, server: ServerParams) -> Iterator[Endpoint]:
    """The files and batches beside the chat completions at ``url``."""
    import httpx2

    key = read_key()
    headers = {"accept-encoding": "identity"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    with httpx2.Client(
        headers=headers, timeout=server.timeout_seconds, follow_redirects=False, trust_env=False
    ) as client:
        yield Endpoint(client, url.removesuffix("/chat/completions"), server, key)


def is_name(text: str) -> bool:
    """Whether a server may call a file or a batch so: it becomes part of an address."""
    return bool(_NAME.fullmatch(text)) and bool(text.strip("."))


def _split_lines(chunks: Iterator[bytes], most: int) -> Iterator[bytes | None]:
    """Lines of a stream; None for each that has more than ``most`` bytes, which is not held.

    Examples
    --------
    >>> [*_split_lines(iter([b"ab", b"c\\nlong", b"er\\n", b"d"]), 4)]
    [b'abc', None, b'd']
    """
    held, is_long = b"", False
    for chunk in chunks:
        *whole, held = (held + chunk).split(b"\n")
        for line in whole:
            yield None if is_long or len(line) > most else line
            is_long = False
        if len(held) > most:
            held, is_long = b"", True
    if held or is_long:
        yield None if is_long else held
