"""A chat server on loopback that takes batches too, as OpenAI's does, and counts what it is paid for."""

from __future__ import annotations

import email
import email.policy
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

from chat_server import Behave, ChatServer, Handler, completion

Fault = Callable[["BatchHandler", Callable[[], Any]], None]
"""Gets the connection and what would do the work and give the body; sends whatever it likes."""

DONE = ("validating", "in_progress", "finalizing", "completed")


def line(custom_id: str, body: Any, status: int = 200) -> dict[str, Any]:
    """A line of results."""
    response = {"status_code": status, "request_id": "r", "body": body}
    return {"id": "b", "custom_id": custom_id, "response": response, "error": None}


def error_line(custom_id: str, code: str) -> dict[str, Any]:
    """A line that the server did not get round to."""
    error = {"code": code, "message": f"This request was not executed: {code}."}
    return {"id": "b", "custom_id": custom_id, "response": None, "error": error}


def refused(status: int, reason: str = "", **headers: str) -> Fault:
    """The request is refused, and nothing is done."""
    return lambda handler, act: handler.send(
        json.dumps({"error": {"message": reason}}), status, **headers
    )


def done_and_lost(handler: BatchHandler, act: Callable[[], Any]) -> None:
    """The request is done, and the connection is lost before its answer."""
    act()
    handler.reset()


class BatchHandler(Handler):
    """One connection."""

    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgement

    def do_POST(self):
        """A prompt, a file, a batch or its end."""
        if self.path.endswith("/chat/completions"):
            super().do_POST()
        else:
            self._route("POST", self.rfile.read(int(self.headers.get("content-length", 0))))

    def do_GET(self):
        """A batch, all batches or a file."""
        self._route("GET", b"")

    def _route(self, method: str, content: bytes) -> None:
        parts = urlsplit(self.path)
        path = parts.path.removeprefix("/v1")
        name = re.sub(r"(?<=/)(file|batch)-\d+", "ID", f"{method} {path}")
        server = self.server
        with server.changed:
            server.seen[name] += 1
            server.last_headers = dict(self.headers)
            fault = server.faults[name].pop(0) if server.faults[name] else None
            server.changed.notify_all()
        work = {
            "POST /files": lambda: server.take_file(content, self.headers),
            "POST /batches": lambda: server.make_batch(json.loads(content)),
            "GET /batches": lambda: server.list_batches(parse_qs(parts.query)),
            "GET /batches/ID": lambda: server.look(path.split("/")[2]),
            "GET /files/ID/content": lambda: server.files[path.split("/")[2]],
        }.get(name)
        if work is None:
            self.send("", 404)
        elif fault:
            fault(self, work)
        else:
            self.send(work())


class BatchServer(ChatServer):
    """Answers batches when they are made, and tells of it as each batch's plan has it."""

    def __init__(self, behave: Behave) -> None:
        super().__init__(behave)
        self.RequestHandlerClass = BatchHandler
        self._usual = behave
        self.forget()

    def forget(self) -> None:
        """Be as new."""
        self.behave = self._usual
        self.seen: Counter[str] = Counter()
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.plans: list[tuple[str, ...]] = []  # of batches to come; all others are DONE
        self.paid: Counter[str] = Counter()
        self.page = 100
        self.counts.clear()
        self.bodies.clear()
        self.answer: Callable[[dict[str, Any], int, int], Any] = lambda order, place, batch: line(
            order["custom_id"], self.say(order["body"])
        )
        self.shape: Callable[[dict[str, Any]], Any] = lambda batch: batch

    @staticmethod
    def say(body: dict[str, Any]) -> dict[str, Any]:
        """What the LLM says to a prompt."""
        return completion("7")

    def orders(self, batch: str) -> list[dict[str, Any]]:
        """The lines of a batch's file."""
        content = self.files[self.batches[batch]["input_file_id"]]
        return [json.loads(text) for text in content.splitlines()]

    def take_file(self, content: bytes, headers: Any) -> dict[str, Any]:
        """Keep an uploaded file."""
        head = f"content-type: {headers['content-type']}\r\n\r\n".encode()
        form = email.message_from_bytes(head + content, policy=email.policy.HTTP)
        fields = {
            it.get_param("name", header="content-disposition"): it for it in form.iter_parts()
        }
        assert fields["purpose"].get_payload(decode=True) == b"batch"
        return self.keep(fields["file"].get_payload(decode=True))

    def keep(self, content: bytes) -> dict[str, Any]:
        """Keep a file under a new name."""
        with self.changed:
            name = f"file-{len(self.files) + 1}"
            self.files[name] = content
        return {"id": name, "object": "file", "purpose": "batch"}

    def make_batch(self, order: dict[str, Any]) -> dict[str, Any]:
        """Make a batch and answer it."""
        assert order["endpoint"] == "/v1/chat/completions"
        assert order["completion_window"] == "24h"
        with self.changed:
            number = len(self.batches) + 1
            plan = self.plans.pop(0) if self.plans else DONE
            batch = {"id": f"batch-{number}", "object": "batch", "plan": [*plan], **order}
            self.batches[batch["id"]] = batch
        if plan[-1] != "failed":
            self._answer(batch, number)
        return self.shape(self._told(batch, "validating"))

    def _answer(self, batch: dict[str, Any], number: int) -> None:
        orders = self.orders(batch["id"])
        output, errors = b"", b""
        done = 0
        for place, order in enumerate(orders):
            entry = self.answer(order, place, number)
            if entry is None and batch["plan"][-1] in ("expired", "cancelled"):
                entry = error_line(order["custom_id"], f"batch_{batch['plan'][-1]}")
            if entry is None:
                continue
            is_bytes = isinstance(entry, bytes)
            text = entry if is_bytes else json.dumps(entry).encode() + b"\n"
            if is_bytes or (entry["response"] or {}).get("status_code") == 200:
                output += text
                done += 1
                self.paid[order["body"]["messages"][0]["content"]] += 1
            else:
                errors += text
        batch["counts"] = {"total": len(orders), "completed": done, "failed": len(orders) - done}
        batch["output_file_id"] = self.keep(output)["id"] if output else None
        batch["error_file_id"] = self.keep(errors)["id"] if errors else ""

    def look(self, name: str) -> dict[str, Any]:
        """How far a batch is: one step further at each look."""
        with self.changed:
            batch = self.batches[name]
            status = batch["plan"].pop(0) if len(batch["plan"]) > 1 else batch["plan"][0]
        return self.shape(self._told(batch, status))

    @staticmethod
    def _told(batch: dict[str, Any], status: str) -> dict[str, Any]:
        is_over = status in ("completed", "failed", "expired", "cancelled")
        told = {name: value for name, value in batch.items() if name not in ("plan", "counts")}
        if not is_over:
            told |= {"output_file_id": None, "error_file_id": None}
        counts = batch.get("counts", {"total": 0, "completed": 0, "failed": 0})
        half = {**counts, "completed": counts["completed"] // 2, "failed": 0}
        return {**told, "status": status, "request_counts": counts if is_over else half}

    def list_batches(self, query: dict[str, list[str]]) -> dict[str, Any]:
        """A page of the list, the newest first."""
        names = [*self.batches][::-1]
        start = names.index(query["after"][0]) + 1 if "after" in query else 0
        some = names[start : start + self.page]
        listed = [self.shape(self._told(self.batches[name], "in_progress")) for name in some]
        return {"object": "list", "data": listed, "has_more": start + self.page < len(names)}


@contextmanager
def batch_server() -> Iterator[BatchServer]:
    """Serve in a thread until done."""
    server = BatchServer(lambda handler, body, number: handler.send(handler.server.say(body)))
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
