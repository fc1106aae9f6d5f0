"""A chat server on loopback that does what a test tells it, and counts what it was sent."""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behave = Callable[["Handler", dict[str, Any], int], None]


class Handler(BaseHTTPRequestHandler):
    """One connection; ``behave`` decides what is sent back."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        """Count the request and behave."""
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.loads(content)
        prompt = body["messages"][0]["content"]
        with self.server.changed:
            self.server.times.append(time.monotonic())
            if self.path != "/v1/chat/completions":
                self.server.strays.append(self.path)
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.counts[prompt] = self.server.counts.get(prompt, 0) + 1
            number = self.server.counts[prompt]
            self.server.changed.notify_all()
        self.server.behave(self, body, number)

    def do_GET(self):
        """The names of models, if there are any; a redirect that was followed ends here too."""
        listing = self.path == "/v1/models"
        with self.server.changed:
            self.server.listings += listing
            if not listing:
                self.server.strays.append(self.path)
        names = self.server.models if listing else []
        self.send(
            {"data": [{"id": name} for name in names]} if names else "", 200 if names else 404
        )

    def send(self, content: bytes | dict | str, status: int = 200, **headers: str) -> None:
        """A whole response; underscores in header names become dashes."""
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        if isinstance(content, str):
            content = content.encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.send_response_only(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def reset(self) -> None:
        """Drop the connection hard."""
        self.wfile.flush()
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def gone(self, seconds: float) -> bool:
        """Does the client, whose request has been read, hang up within so many seconds?"""
        return bool(select.select([self.connection], [], [], seconds)[0])

    def handle(self):
        """A client that hangs up is no news."""
        try:
            super().handle()
        except (OSError, ValueError):
            self.close_connection = True

    def finish(self):
        """Likewise."""
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_):
        """Say nothing."""


class ChatServer(ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, behave: Behave) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.changed = threading.Condition()
        self.open: set[Any] = set()
        self.closed: set[Any] = set()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.counts: dict[str, int] = {}
        self.strays: list[str] = []
        self.models: list[str] = []
        self.listings = 0

    def process_request(self, request, client_address):
        """Note the connection, in the order in which they come."""
        with self.changed:
            self.open.add(client_address)
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        """Note the connection's end."""
        super().process_request_thread(request, client_address)
        with self.changed:
            self.open.remove(client_address)
            self.closed.add(client_address)
            self.changed.notify_all()

    def wait_for(self, happened: Callable[[], bool], seconds: float = 30.0) -> bool:
        """Wait until something of what is counted here has happened."""
        with self.changed:
            return self.changed.wait_for(happened, seconds)

    def read_all(self) -> None:
        """Wait until whatever clients that are gone had sent has been read and counted."""
        with socket.create_connection(self.server_address) as last:  # is accepted after theirs
            address = last.getsockname()
        assert self.wait_for(lambda: address in self.closed and not self.open)

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def chat_server(behave: Behave) -> Iterator[ChatServer]:
    """Serve in a thread until done."""
    server = ChatServer(behave)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def completion(
    text: str | None, tokens=None, model: str = "tiny", **message: Any
) -> dict[str, Any]:
    """A chat completion; ``tokens`` are pairs of a token and its alternatives' probabilities."""
    import math

    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text, **message},
    }
    if tokens:
        choice["logprobs"] = {
            "content": [
                {
                    "token": token,
                    "logprob": math.log(top[token]),
                    "top_logprobs": [
                        {"token": other, "logprob": math.log(p)} for other, p in top.items()
                    ],
                }
                for token, top in tokens
            ]
        }
    return {"object": "chat.completion", "model": model, "choices": [choice]}
