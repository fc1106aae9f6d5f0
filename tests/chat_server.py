"""A chat server on loopback that does what a test tells it, and counts what it was sent."""

from __future__ import annotations

import json
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
        with self.server.lock:
            self.server.times.append(time.monotonic())
            if self.path != "/v1/chat/completions":
                self.server.strays.append(self.path)
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.counts[prompt] = self.server.counts.get(prompt, 0) + 1
            number = self.server.counts[prompt]
        self.server.behave(self, body, number)

    def do_GET(self):
        """A redirect that was followed ends here."""
        with self.server.lock:
            self.server.strays.append(self.path)
        self.send("", 404)

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
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.counts: dict[str, int] = {}
        self.strays: list[str] = []

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
