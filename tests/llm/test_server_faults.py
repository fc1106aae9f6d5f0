"""Everything a server can do wrong: what is recorded, and how often it is asked, as it counts itself."""

from __future__ import annotations

import gzip
import json
import socket
import time
from dataclasses import dataclass

import numpy as np
import pytest
from chat_server import chat_server, completion

from stackllm.engine.progress import Reporter
from stackllm.errors import ServerError
from stackllm.llm.rater import RaterParams
from stackllm.llm.server import ask_server
from stackllm.llm.transport import ServerParams
from stackllm.recipes.asked import Asked, Case

ASKED = Asked("gpt_rating", "rating", "Rate it.", tuple(map(str, range(1, 11))))
SERVER = ServerParams(
    attempts=3, timeout_seconds=1.0, deadline_seconds=6.0, backoff_seconds=0.01,
    requests_per_minute=0, concurrency=2,
)  # fmt: skip
GOOD = completion("7")


def ask(server, responses, path, params=SERVER, **rater):
    """Status and probabilities of each response."""
    cases = [Case("What?", (text,)) for text in responses]
    settings = RaterParams(url=server.url, model="tiny", **rater)
    quiet = Reporter(quiet=True)
    (found,), (failures,) = ask_server([(ASKED, cases)], settings, params, path, quiet, False)
    return found, failures


def first_then_good(fault):
    """A fault at the first request of a prompt, a good answer later."""

    def behave(handler, body, number):
        if number == 1:
            fault(handler)
        else:
            handler.send(GOOD)

    return behave


def always(fault):
    return lambda handler, body, number: fault(handler)


def says(text, **more):
    return always(lambda handler: handler.send(completion(text, **more)))


def hangs(handler):
    time.sleep(1.6)


def drips_body(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
    for _ in range(80):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.03)


def drips_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(80):
        handler.wfile.write(f"x-{i}: y\r\n".encode())
        handler.wfile.flush()
        time.sleep(0.03)


def resets_in_the_body(handler):
    handler.wfile.write(b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"choices": [')
    handler.reset()


def ends_early(handler):
    handler.send(json.dumps(GOOD), content_length="5000")
    handler.close_connection = True


def talks_nonsense(handler):
    handler.wfile.write(b"\x00\x01 this is not HTTP \r\n\r\n")
    handler.reset()


def rejects_logprobs(handler, body, number):
    if "logprobs" in body:
        handler.send({"error": "unknown field"}, 400)
    else:
        handler.send(GOOD)


def chunks_without_end(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(300):
        handler.wfile.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")


BOMB = gzip.compress(b" " * 30_000_000)
NESTED = b"[" * 100_000
JUMP = {"date": "Thu, 01 Jan 1970 00:00:00 GMT", "retry_after": "Thu, 01 Jan 1970 00:00:00 GMT"}
SOON = {"date": "Mon, 23 Nov 2026 10:00:00 GMT", "retry_after": "Mon, 23 Nov 2026 10:00:00 GMT"}
ONE = [("10", {"10": 0.6, "1": 0.3, "9": 0.1})]
TWO = [("1", {"1": 0.8, "9": 0.2}), ("0", {"0": 0.75, "<|im_end|>": 0.25})]
ENDS = [("1", {"1": 0.8, "9": 0.2}), ("<|im_end|>", {"0": 0.25, "<|im_end|>": 0.75})]
NAN = completion("7")
NAN["choices"][0]["logprobs"] = {
    "content": [{"token": "3", "logprob": float("nan"), "top_logprobs": []}]
}
MORE_THAN_ALL = completion("7", [("3", {"3": 0.9, "4": 0.9})])
TWICE = {**GOOD, "choices": GOOD["choices"] * 2}
SEVERAL = {**GOOD, "choices": [*GOOD["choices"], *completion("3")["choices"]]}
CUT = json.loads(json.dumps(completion("1")))
CUT["choices"][0]["finish_reason"] = "length"
FILTERED = json.loads(json.dumps(GOOD))
FILTERED["choices"][0]["finish_reason"] = "content_filter"


def sends(content, status=200, **headers):
    return lambda handler: handler.send(content, status, **headers)


@dataclass(frozen=True)
class Fault:
    """What the server does to one prompt, what is recorded, and requests it may cost."""

    name: str
    behave: object
    record: str
    requests: int
    rating: int | None = None


FAULTS = [
    Fault("429 with Retry-After", first_then_good(sends("", 429, retry_after="0.05")), "ok", 2, 7),
    Fault("429 without", first_then_good(sends("", 429)), "ok", 2, 7),
    Fault("429 for ever", always(sends("", 429)), "HTTP 429", 3),
    Fault("429 come back tomorrow", always(sends("", 429, retry_after="86400")), "deadline", 1),
    Fault(
        "Retry-After is nonsense", first_then_good(sends("", 429, retry_after="soon")), "ok", 2, 7
    ),
    Fault("Retry-After is negative", first_then_good(sends("", 503, retry_after="-9")), "ok", 2, 7),
    Fault(
        "Retry-After is infinite", first_then_good(sends("", 503, retry_after="inf")), "ok", 2, 7
    ),
    Fault("Retry-After is a date", first_then_good(sends("", 503, **SOON)), "ok", 2, 7),
    Fault("the server's clock jumps", first_then_good(sends("", 503, **JUMP)), "ok", 2, 7),
    Fault("500 once", first_then_good(sends("", 500)), "ok", 2, 7),
    Fault("502 for ever", always(sends("", 502)), "HTTP 502", 3),
    Fault("503 once", first_then_good(sends("", 503)), "ok", 2, 7),
    Fault("408 once", first_then_good(sends("", 408)), "ok", 2, 7),
    Fault("409 once", first_then_good(sends("", 409)), "ok", 2, 7),
    Fault("time-out once", first_then_good(hangs), "ok", 2, 7),
    Fault("time-out for ever", always(hangs), "time-out", 3),
    Fault("reset at once", first_then_good(lambda handler: handler.reset()), "ok", 2, 7),
    Fault("reset in mid-body", always(resets_in_the_body), "connection", 3),
    Fault("body shorter than told", always(ends_early), "connection", 3),
    Fault("no HTTP at all", always(talks_nonsense), "connection", 3),
    Fault("slow body", always(drips_body), "time-out", 3),
    Fault("slow headers", always(drips_headers), "time-out", 3),
    Fault("bad JSON once", first_then_good(sends("{'a': 1}")), "ok", 2, 7),
    Fault("half a JSON", always(sends(json.dumps(GOOD)[:60])), "bad JSON", 3),
    Fault("JSON twice", always(sends(json.dumps(GOOD) * 2)), "bad JSON", 3),
    Fault("no UTF-8", always(sends(b'{"choices": "\xff\xfe"}')), "bad JSON", 3),
    Fault("nested without end", always(sends(NESTED)), "bad JSON", 3),
    Fault(
        "HTML page", always(sends("<html>sign in</html>", content_type="text/html")), "bad JSON", 3
    ),
    Fault("empty body", always(sends("")), "bad JSON", 3),
    Fault("a list", always(sends("[1, 2]")), "wrong schema", 3),
    Fault("choices is text", always(sends({"choices": "7"})), "wrong schema", 3),
    Fault("content is null", says(None), "wrong schema", 3),
    Fault("content is a number", says(7), "wrong schema", 3),
    Fault("no choices", always(sends({"choices": []})), "no choices", 3),
    Fault("204", always(sends("", 204)), "HTTP 204", 1),
    Fault("413", always(sends("", 413)), "HTTP 413", 1),
    Fault("400 for logprobs", rejects_logprobs, "ok", 2, 7),
    Fault("400 for ever", always(sends("", 400)), "HTTP 400", 2),
    Fault("10 MB body", always(sends(b" " * 10_000_000)), "body too large", 3),
    Fault("chunks without end", always(chunks_without_end), "body too large", 3),
    Fault("compressed bomb", always(sends(BOMB, content_encoding="gzip")), "compressed body", 3),
    Fault("refusal", says(None, refusal="I can't."), "refusal", 1),
    Fault("content filter", always(sends(FILTERED)), "refusal", 1),
    Fault("refusal in words", says("I'm sorry, I can't rate that."), "unknown answer", 1),
    Fault("unknown label", says("excellent"), "unknown answer", 1),
    Fault("two ratings", says("7 or 8"), "unknown answer", 1),
    Fault("rating above the scale", says("11"), "out of scale", 1),
    Fault("rating below the scale", says("0"), "out of scale", 1),
    Fault("rating between", says("7.5"), "out of scale", 1),
    Fault("nothing said", says(""), "empty", 1),
    Fault("cut off", always(sends(CUT)), "cut off", 1),
    Fault("10 as one token", says("10", tokens=ONE), "ok", 1, 10),
    Fault("10 as two tokens", says("10", tokens=TWO), "ok", 1, 10),
    Fault("1 and then the end", says("1", tokens=ENDS), "ok", 1, 1),
    Fault("log-probabilities that are no numbers", always(sends(NAN)), "ok", 1, 7),
    Fault("more than all probability", always(sends(MORE_THAN_ALL)), "ok", 1, 7),
    Fault("wrong model echoed", says("7", model="huge"), "wrong model", 1),
    Fault("duplicate answer", always(sends(TWICE)), "ok", 1, 7),
    Fault("several answers", always(sends(SEVERAL)), "several answers", 3),
]


def test_there_are_enough_faults():
    assert len(FAULTS) >= 25
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault, tmp_path):
    def behave(handler, body, number):
        if "poison" in body["messages"][0]["content"]:
            fault.behave(handler, body, number)
        else:
            handler.send(GOOD)

    with chat_server(behave) as server:
        found, failures = ask(server, ["fine", "poison"], tmp_path / "answers.sqlite")
    sent = {("poison" in prompt): count for prompt, count in server.counts.items()}
    assert sent[True] == fault.requests
    assert found[0].argmax() == 6  # the healthy prompt is answered whatever happens to the other
    assert dict(failures) == ({} if fault.record == "ok" else {fault.record: 1})
    if fault.record == "ok":
        assert found[1].sum() == pytest.approx(1)
        assert found[1].argmax() == fault.rating - 1
    else:
        assert np.isnan(found[1]).all()


def test_probabilities_come_from_tokens_where_the_server_gives_them(tmp_path):
    for name, tokens, expected in (
        ("one", ONE, {10: 0.6, 1: 0.3, 9: 0.1}),
        ("two", TWO, {10: 0.6, 1: 0.2, 9: 0.2}),
        ("ends", ENDS, {10: 0.2, 1: 0.6, 9: 0.2}),
    ):
        with chat_server(says("9", tokens=tokens)) as server:
            found, _ = ask(server, ["x"], tmp_path / f"{name}.sqlite")
        assert {i + 1: p for i, p in enumerate(found[0]) if p > 0} == pytest.approx(expected)


FATAL = [
    ("401", sends("", 401), "refuses the API key"),
    ("403", sends("", 403), "refuses the API key"),
    ("404", sends("", 404), "no such address or model"),
    ("redirect to another host", sends("", 307, location="http://127.0.0.9:1/v1"), "redirects"),
    ("redirect to itself", sends("", 302, location="/v1/chat/completions"), "redirects"),
]


@pytest.mark.parametrize(("name", "fault", "said"), FATAL, ids=[name for name, *_ in FATAL])
def test_what_can_never_succeed_stops_at_once(name, fault, said, tmp_path):
    with chat_server(always(fault)) as server, pytest.raises(ServerError, match=said) as caught:
        ask(server, [f"text {i}" for i in range(50)], tmp_path / "answers.sqlite")
    assert caught.value.exit_code == 69
    assert len(server.bodies) <= SERVER.concurrency


def test_a_server_that_is_down_costs_few_requests(tmp_path):
    with (
        chat_server(always(sends("", 503))) as server,
        pytest.raises(ServerError, match="gives no answers"),
    ):
        ask(server, [f"text {i}" for i in range(50)], tmp_path / "answers.sqlite")
    assert len(server.bodies) <= (5 + SERVER.concurrency) * SERVER.attempts


def test_nobody_listens(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused

        class Server:
            url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"

        with pytest.raises(ServerError, match="gives no answers"):
            ask(Server, ["a"], tmp_path / "answers.sqlite")


def test_a_model_that_never_answers_validly_is_not_paid_on_and_on(tmp_path):
    with chat_server(says("great!")) as server, pytest.raises(ServerError, match="not valid"):
        ask(server, [f"text {i}" for i in range(100)], tmp_path / "answers.sqlite")
    assert len(server.bodies) <= 20 + SERVER.concurrency
