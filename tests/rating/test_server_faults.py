"""Everything a server can do wrong: what is recorded, and how often it is asked, as it counts itself."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import socket
import threading
import time
from dataclasses import dataclass, replace
from datetime import date

import numpy as np
import pytest
from chat_server import chat_server, completion

from stackllm.engine.progress import Reporter
from stackllm.errors import ServerError, UsageError
from stackllm.rating.address import KEY, check_url
from stackllm.rating.local import RaterParams
from stackllm.rating.names import same_model
from stackllm.rating.question import Asked, Case
from stackllm.rating.replies import judge, read_reply
from stackllm.rating.requests import ServerParams, estimate_tokens, make_body
from stackllm.rating.server import ask_server
from stackllm.rating.transport import retry_after

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
    (answered,) = ask_server([(ASKED, cases)], settings, params, path, quiet, False)
    (answers,) = answered.questions
    return answers.probabilities, answers.failures


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
    assert handler.gone(30)


def drips(handler, head, drop):
    """Every drop comes well before the client would give up on it, and the last never comes."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + head)
    while not handler.gone(0.03):
        handler.wfile.write(drop)
        handler.wfile.flush()


def drips_body(handler):
    drips(handler, b"content-length: 100000\r\n\r\n", b" ")


def drips_headers(handler):
    drips(handler, b"", b"x: y\r\n")


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
# Each asks for a second, whatever the time is here.
JUMP = {"date": "Thu, 01 Jan 1970 00:00:00 GMT", "retry_after": "Thu, 01 Jan 1970 00:00:01 GMT"}
SOON = {"date": "Mon, 23 Nov 2076 10:00:00 GMT", "retry_after": "Mon, 23 Nov 2076 10:00:01 GMT"}
FAR = {"retry_after": "Mon, 23 Nov 2076 10:00:01 +9999999999999"}
ONE = [("10", {"10": 0.6, "1": 0.3, "9": 0.1})]
TWO = [("1", {"1": 0.8, "9": 0.2}), ("0", {"0": 0.75, "<|im_end|>": 0.25})]
ON = [(token, {token: 1.0}) for token in (".", "\n\n", "For")]
ENDS = [("1", {"1": 0.8, "9": 0.2}), ("<|im_end|>", {"0": 0.25, "<|im_end|>": 0.75})]
SEVENTY = [("7", {"7": 1.0}), ("0", {"0": 1.0})]
HUNDRED = [("10", {"10": 1.0}), ("0", {"0": 1.0})]
BETWEEN = [("7", {"7": 1.0}), (".", {".": 1.0}), ("5", {"5": 1.0})]
NAN = completion("7")
NAN["choices"][0]["logprobs"] = {
    "content": [{"token": "3", "logprob": float("nan"), "top_logprobs": []}]
}
HUGE = json.dumps(completion("7", [("3", {"3": 1.0})])).replace("0.0", f"-{10**400}")
MORE_THAN_ALL = completion("7", [("3", {"3": 0.9, "4": 0.9})])
TWICE = {**GOOD, "choices": GOOD["choices"] * 2}
SEVERAL = {**GOOD, "choices": [*GOOD["choices"], *completion("3")["choices"]]}
CUT = json.loads(json.dumps(completion("1")))
CUT["choices"][0]["finish_reason"] = "length"
FILTERED = json.loads(json.dumps(GOOD))
FILTERED["choices"][0]["finish_reason"] = "content_filter"


def ended(finish):
    reply = completion(None)
    reply["choices"][0]["finish_reason"] = finish
    return reply


def sends(content, status=200, **headers):
    return lambda handler: handler.send(content, status, **headers)


@dataclass(frozen=True)
class Fault:
    """What the server does to one prompt, what is recorded, and requests it costs."""

    name: str
    behave: object
    record: str
    requests: int
    rating: int | None = None
    seconds: float = 0.0
    first: bool = False  # whether nothing has been answered before


def picky(names=("max_tokens",), temperature=lambda told: True, most=20, status=400, says=True):
    """A server that takes some of what is sent only, and says which, or nothing."""

    def behave(handler, body, number):
        limits = {"max_tokens", "max_completion_tokens"} & body.keys()
        why = ""
        if limits - {*names}:
            why = f"Unsupported parameter: '{limits.pop()}'."
        elif not temperature(body.get("temperature")):
            why = "'temperature' has an unsupported value; only 1 is taken."
        elif "logprobs" in body and not most:
            why = "logprobs are not supported."
        elif body.get("top_logprobs", 0) > most:
            why = f"top_logprobs must be between 0 and {most}."
        if why:
            handler.send({"error": {"message": why}} if says else "", status)
        else:
            handler.send(SPREAD if "logprobs" in body else GOOD)

    return behave


def breaks_with_logprobs(handler, body, number):
    """As servers whose code for them is broken: 500, and no word why."""
    handler.send(
        {"error": "list index out of range"} if "logprobs" in body else GOOD,
        500 if "logprobs" in body else 200,
    )


def says_no(status, message, then=GOOD, **more):
    return always(sends({"error": {"message": message, **more}}, status))


def error_in_200(message, **more):
    return sends({"error": {"message": message, **more}})


def drips_an_error(handler):
    handler.wfile.write(b'HTTP/1.1 413 No\r\ncontent-length: 100000\r\n\r\n{"error": "too long')
    while not handler.gone(0.03):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def other(told):
    """A temperature that is left out, or 1."""
    return told in (None, 1)


SPREAD = completion("7", [("7", {"7": 0.6, "8": 0.4})])
RENAMED = ("max_completion_tokens",)
PAGE = "<html><head><title>Bad\n gateway</title></head>"

LATER = ", to be asked again after the deadline"
FAULTS = [
    Fault(
        "429 with Retry-After", first_then_good(sends("", 429, retry_after="0.5")), "ok", 2, 7, 0.5
    ),
    Fault("429 without", first_then_good(sends("", 429)), "ok", 2, 7),
    Fault("429 for ever", always(sends("", 429)), "HTTP 429", 3),
    Fault(
        "429 come back tomorrow", always(sends("", 429, retry_after="86400")), f"HTTP 429{LATER}", 1
    ),
    Fault(
        "Retry-After is nonsense", first_then_good(sends("", 429, retry_after="soon")), "ok", 2, 7
    ),
    Fault("Retry-After is negative", first_then_good(sends("", 503, retry_after="-9")), "ok", 2, 7),
    Fault(
        "Retry-After is infinite",
        first_then_good(sends("", 503, retry_after="inf")),
        f"HTTP 503{LATER}",
        1,
    ),
    Fault(
        "Retry-After is huge",
        first_then_good(sends("", 503, retry_after="9" * 400)),
        f"HTTP 503{LATER}",
        1,
    ),
    Fault("Retry-After is a date", first_then_good(sends("", 503, **SOON)), "ok", 2, 7, 1.0),
    Fault("the server's clock jumps", first_then_good(sends("", 503, **JUMP)), "ok", 2, 7, 1.0),
    Fault("Retry-After in no zone on Earth", first_then_good(sends("", 503, **FAR)), "ok", 2, 7),
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
    *(
        Fault(f"nothing said, ended by {finish}", always(sends(ended(finish))), status, 1)
        for finish, status in (
            ("content_filter", "refusal"),
            ("SAFETY", "refusal"),
            ("content_filter: PROHIBITED_CONTENT", "refusal"),
            ("refusal", "refusal"),
            ("max_output_tokens", "cut off"),
            ("Max_Tokens", "cut off"),
        )
    ),
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
    Fault("70 in two tokens", says("70", tokens=SEVENTY), "out of scale", 1),
    Fault("100 in two tokens", says("100", tokens=HUNDRED), "out of scale", 1),
    Fault("7.5 in three tokens", says("7.5", tokens=BETWEEN), "out of scale", 1),
    Fault("-3 and a 3", says("-3", tokens=[("3", {"3": 1.0})]), "out of scale", 1),
    Fault("words and a 7", says("I refuse", tokens=[("7", {"7": 1.0})]), "unknown answer", 1),
    Fault("a 9 and another's tokens", says("9", tokens=[("7", {"7": 1.0})]), "ok", 1, 9),
    Fault("log-probabilities that are no numbers", always(sends(NAN)), "ok", 1, 7),
    Fault("a log-probability of 400 figures", always(sends(HUGE)), "ok", 1, 7),
    Fault("more than all probability", always(sends(MORE_THAN_ALL)), "ok", 1, 7),
    Fault("wrong model echoed", says("7", model="huge"), "wrong model", 1),
    Fault("duplicate answer", always(sends(TWICE)), "ok", 1, 7),
    Fault("several answers", always(sends(SEVERAL)), "several answers", 3),
    # What the server takes, asked of one that has answered nobody yet.
    Fault("max_completion_tokens", picky(RENAMED), "ok", 2, 7, first=True),
    Fault("the same, unsaid", picky(RENAMED, says=False), "ok", 4, 7, first=True),
    Fault("no limit of tokens", picky(()), "ok", 3, 7, first=True),
    Fault("no temperature", picky(temperature=other), "ok", 2, 7, first=True),
    Fault("the same, unsaid ", picky(temperature=other, says=False), "ok", 5, 7, first=True),
    Fault("a temperature of 1", picky(temperature=lambda t: t == 1), "ok", 3, 7, first=True),
    Fault("both, and no logprobs", picky(RENAMED, other, 0), "ok", 5, 7, first=True),
    Fault("all of that, unsaid", picky(RENAMED, other, 0, says=False), "ok", 7, 7, first=True),
    Fault("5 likely tokens", picky(most=5), "ok", 2, 7, first=True),
    Fault("8 likely tokens", picky(most=8), "ok", 2, 7, first=True),
    Fault("5 likely tokens, unsaid", picky(most=5, says=False), "ok", 2, 7, first=True),
    Fault("3 likely tokens, unsaid", picky(most=3, says=False), "ok", 3, 7, first=True),
    Fault("no logprobs", picky(most=0), "ok", 3, 7, first=True),
    Fault("422 for 5 likely tokens", picky(most=5, status=422), "ok", 2, 7, first=True),
    Fault("501 for logprobs", picky(most=0, status=501), "ok", 3, 7, first=True),
    Fault(
        "501 for logprobs, unsaid", picky(most=0, status=501, says=False), "ok", 3, 7, first=True
    ),
    Fault("500 that names logprobs", picky(most=0, status=500), "ok", 3, 7, first=True),
    Fault("500 with logprobs", breaks_with_logprobs, "ok", 3, 7, first=True),
    Fault("403 for logprobs", picky(most=0, status=403), "ok", 3, 7, first=True),
    Fault("404 for logprobs", picky(most=0, status=404), "ok", 3, 7, first=True),
    Fault("503 with logprobs", picky(most=0, status=503, says=False), "ok", 3, 7, first=True),
    Fault("400 for everything", always(sends("", 400)), "HTTP 400", 8, first=True),
    Fault("400 for one in a dialect of its own", picky(most=5), "ok", 2, 7),
    Fault(
        'no answer to "max_tokens" whatever is sent',
        says_no(400, "max_tokens"),
        "HTTP 400: max_tokens",
        7,
        first=True,
    ),
    # What it says of one prompt.
    Fault(
        "context too long",
        says_no(400, "the request exceeds the available context size"),
        "HTTP 400: the request exceeds the available context size",
        1,
        first=True,
    ),
    Fault(
        "flagged by moderation",
        says_no(403, "Your input was flagged. No credits were charged."),
        "HTTP 403: Your input was flagged. No credits were charged.",
        1,
        first=True,
    ),
    Fault("413 with a reason", says_no(413, "9000 > 4096"), "HTTP 413: 9000 > 4096", 1),
    Fault(
        "max_tokens too large",
        says_no(400, "max_tokens is too large: 16"),
        "HTTP 400: max_tokens is too large: 16",
        1,
        first=True,
    ),
    Fault(
        "streams only",
        says_no(400, "This model only supports stream mode"),
        "HTTP 400: This model only supports stream mode",
        1,
        first=True,
    ),
    Fault("403 for one prompt", says_no(403, "flagged"), "HTTP 403: flagged", 1),
    Fault("404 for one prompt", says_no(404, "no endpoint"), "HTTP 404: no endpoint", 1),
    Fault(
        "429 with soon",
        first_then_good(sends({"error": "Quota exceeded your current quota, retry in 1s"}, 429)),
        "ok",
        2,
        7,
    ),
    Fault(
        "429 of a quota that is there again soon",
        first_then_good(sends({"error": "exceeded your current quota"}, 429, retry_after="0.01")),
        "ok",
        2,
        7,
    ),
    Fault(
        "loading",
        first_then_good(sends({"error": {"message": "Loading model"}}, 503)),
        "ok",
        2,
        7,
        first=True,
    ),
    Fault("a page", always(sends(PAGE, 502)), 'HTTP 502: an HTML page ("Bad gateway")', 3),
    Fault(
        "an error of 10 MB",
        always(sends(b"no " * 3_000_000, 413)),
        "HTTP 413: " + ("no " * 67)[:200] + "…",
        1,
    ),
    Fault("an error that never ends", always(drips_an_error), "HTTP 413: too long", 1),
    Fault("a compressed error", always(sends(BOMB, 413, content_encoding="gzip")), "HTTP 413", 1),
    Fault(
        "an error in a 200 once",
        first_then_good(error_in_200("Provider returned error", code=429)),
        "ok",
        2,
        7,
    ),
    Fault(
        "an error in a 200 for ever", always(error_in_200("busy", code=502)), "HTTP 502: busy", 3
    ),
    Fault(
        "an error in a 200 without a code",
        always(error_in_200("oops")),
        "an error in a 200: oops",
        3,
    ),
    Fault(
        "a rejection in a 200", always(error_in_200("flagged", code=403)), "HTTP 403: flagged", 1
    ),
]


def test_there_are_enough_faults():
    assert len(FAULTS) >= 100
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault, tmp_path):
    def behave(handler, body, number):
        if "poison" in body["messages"][0]["content"]:
            fault.behave(handler, body, number)
        else:
            handler.send(GOOD)

    with chat_server(behave) as server:
        texts = ["poison", "fine"] if fault.first else ["fine", "poison"]
        path = tmp_path / "answers.sqlite"
        hasty = 0.4 if fault.record == "time-out" else SERVER.timeout_seconds
        params = replace(SERVER, concurrency=1, timeout_seconds=hasty)
        found, failures = ask(server, texts, path, params)
        found = found[[texts.index("fine"), texts.index("poison")]]
    sent = {("poison" in prompt): count for prompt, count in server.counts.items()}
    assert sent[True] == fault.requests
    poisoned = [
        at
        for body, at in zip(server.bodies, server.times, strict=True)
        if "poison" in body["messages"][0]["content"]
    ]
    assert poisoned[-1] - poisoned[0] >= fault.seconds  # the server is given the time it asked for
    assert found[0].argmax() == 6  # the healthy prompt is answered whatever happens to the other
    assert dict(failures) == ({} if fault.record == "ok" else {fault.record: 1})
    if fault.record == "ok":
        assert found[1].sum() == pytest.approx(1)
        assert found[1].argmax() == fault.rating - 1
    else:
        assert np.isnan(found[1]).all()


def test_probabilities_come_from_tokens_where_the_server_gives_them(tmp_path):
    cases = (
        ("10", ONE, {10: 0.6, 1: 0.3, 9: 0.1}),
        ("10", TWO, {10: 0.6, 1: 0.2, 9: 0.2}),
        ("1", ENDS, {10: 0.2, 1: 0.6, 9: 0.2}),
        (" 9.\n\nFor", [(" 9", {" 9": 0.75, " 8": 0.25}), *ON], {9: 0.75, 8: 0.25}),
        ("9", [("9", {"9": 0.6, "1": 0.3, "8": 0.1})], {9: 6 / 7, 8: 1 / 7}),  # 1, or 10?
        ("9", [("9", {"9": 0.5, "1": 0.3, "10": 0.2})], {9: 0.5, 1: 0.3, 10: 0.2}),
        ("1", [("1", {"1": 0.75, "9": 0.25})], {1: 0.75, 9: 0.25}),  # what came was 1
        ("9", [("9", {"9": 0.4, "1": 0.6})], {9: 1.0}),  # too little is left: the text counts
    )
    for i, (text, tokens, expected) in enumerate(cases):
        with chat_server(says(text, tokens=tokens)) as server:
            found, _ = ask(server, ["x"], tmp_path / f"{i}.sqlite")
        assert {i + 1: p for i, p in enumerate(found[0]) if p > 0} == pytest.approx(expected)


def prompt_of(body):
    return body["messages"][0]["content"]


@pytest.mark.parametrize("concurrency", [1, 4, 8])
def test_a_server_that_takes_no_logprobs_answers_everybody(concurrency, tmp_path):
    together = threading.Barrier(concurrency)

    def behave(handler, body, number):
        if len(handler.server.counts) <= concurrency and number == 1:
            together.wait(30)  # as many as may be are turned away before one is answered
        rejects_logprobs(handler, body, number)

    params = replace(SERVER, concurrency=concurrency, timeout_seconds=40.0, deadline_seconds=90.0)
    with chat_server(behave) as server:
        found, failures = ask(server, map(str, range(12)), tmp_path / "a.sqlite", params)
    assert not failures
    assert (found.argmax(axis=1) == 6).all()
    assert (
        len(server.bodies) <= 12 + concurrency + 1
    )  # one asks for 5; once it is known, nobody for any


@pytest.mark.parametrize("then", [429, 400, 200])
def test_one_rejected_prompt_takes_the_logprobs_from_nobody_else(then, tmp_path):
    def behave(handler, body, number):
        if "bad" not in prompt_of(body):
            answer = completion("9", [("9", {"9": 0.75, "8": 0.25})])
            handler.send(answer if "logprobs" in body else completion("9"))
        elif "logprobs" in body:
            handler.send("", 400)
        else:
            handler.send(GOOD, then)

    texts = ["first", "bad", *map(str, range(20))]
    with chat_server(behave) as server:
        found, failures = ask(server, texts, tmp_path / "a.sqlite", replace(SERVER, concurrency=1))
    assert failures == ({} if then == 200 else {f"HTTP {then}": 1})
    others = found[[i for i, text in enumerate(texts) if text != "bad"]]
    np.testing.assert_allclose(others[:, [7, 8]], [[0.25, 0.75]] * 21)


def test_waiting_for_our_own_pace_is_no_fault_of_the_server(tmp_path):
    params = replace(SERVER, requests_per_minute=300, deadline_seconds=0.5, concurrency=8)
    started = time.monotonic()
    with chat_server(says("7")) as server:
        found, failures = ask(server, map(str, range(8)), tmp_path / "a.sqlite", params)
    assert not failures
    assert np.isfinite(found).all()
    assert server.times[-1] - started >= 0.2 * 7


def test_tokens_a_minute_are_kept(tmp_path):
    started = time.monotonic()
    with chat_server(says("7")) as server:
        rater = RaterParams(url=server.url, model="tiny")
        case = Case("What?", ("0",))
        tokens = estimate_tokens(make_body(ASKED, case, rater, SERVER))
        params = replace(SERVER, tokens_per_minute=tokens * 600, concurrency=8)
        ask(server, map(str, range(8)), tmp_path / "a.sqlite", params)
    assert server.times[-1] - started >= 0.1 * 7


def test_what_the_server_asks_for_holds_those_that_wait_for_their_turn_too(tmp_path):
    def behave(handler, body, number):
        if len(server.bodies) == 1:
            handler.send("", 429, retry_after="1.5")
        else:
            handler.send(GOOD)

    params = replace(SERVER, requests_per_minute=240, concurrency=4)
    with chat_server(behave) as server:
        _, failures = ask(server, map(str, range(4)), tmp_path / "a.sqlite", params)
    assert not failures
    first, *others = sorted(server.times)
    assert min(others) - first >= 1.5
    assert max(others) - first >= 1.5 + 2 * 0.25  # and then at our pace again


def test_a_wait_past_the_deadline_is_not_waited_for(tmp_path):
    started = time.monotonic()
    with chat_server(always(sends("", 429, retry_after="86400"))) as server:
        with pytest.raises(ServerError, match="deadline"):
            ask(server, ["a", "b"], tmp_path / "a.sqlite", replace(SERVER, deadline_seconds=60.0))
        assert len(server.bodies) == 2
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "inf"}, 60),
        ({"retry-after": "9" * 400}, 60),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": "-7"}, 0),
        ({"retry-after": "soon"}, 0),
        ({}, 0),
        ({"retry-after": "Mon, 23 Nov 2076 10:00:00 GMT"}, 60),  # no Date: from the clock here
        ({"retry-after": "Mon, 23 Nov 2016 10:00:00 GMT"}, 0),
        ({"retry-after": "Mon, 23 Nov 2076 10:00:00 +9999999999999"}, 0),
        (
            {
                "retry-after": "Mon, 23 Nov 2026 10:00:05 GMT",
                "date": "Mon, 23 Nov 2026 10:00:00 GMT",
            },
            5,
        ),
        ({"retry-after": "Mon, 23 Nov 2076 10:00:05 GMT", "date": "yesterday"}, 0),
    ],
)
def test_retry_after(headers, seconds):
    assert retry_after(headers, 60.0) == seconds


def test_a_running_event_loop_is_no_hindrance(tmp_path):
    async def cell():
        with chat_server(says("7")) as server:
            return ask(server, ["a"], tmp_path / "a.sqlite")

    found, failures = asyncio.run(cell())
    assert not failures
    assert found[0].argmax() == 6


LABELLED = Asked("c", "category", "Sort.", ("U.S.", '"90s', "other"), ("question",))


def judged(text, asked=ASKED, **more):
    return judge(read_reply(json.dumps(completion(text, **more)).encode()), asked, "tiny")


def test_labels_with_marks_around_them_are_found():
    for text, place in (("U.S.", 0), ("u.s", 0), ('"90s', 1), ("90s.", 1), ("*other*", 2)):
        status, found, *_ = judged(text, LABELLED)
        assert (status, found.argmax()) == ("ok", place)
    spelled = [("U", {"U": 0.75, "other": 0.25}), (".S", {".S": 1.0}), (".", {".": 1.0})]
    np.testing.assert_allclose(judged("U.S.", LABELLED, tokens=spelled)[1], [0.75, 0, 0.25])


@pytest.mark.parametrize(
    ("told", "same"),
    [
        ("claude-3", True),
        ("claude-3-20240229", True),
        ("org/claude-3-2024-02-29", True),
        ("claude-3-0613", True),
        ("claude-3:latest", True),
        ("claude-3-5", False),
        ("claude-3-70", False),
        ("claude-3.5", False),
        ("claude", False),
    ],
)
def test_a_model_may_differ_by_a_date_only(told, same):
    assert same_model(told, "claude-3") == same


HTML = "<html><title>Just a moment...</title>"
FATAL = [
    ("401", sends("", 401), "refuses the API key"),
    ("403", sends("", 403), "refuses the API key"),
    ("401 with a reason", sends({"error": "expired"}, 401), r"API key \(HTTP 401: expired\)"),
    (
        "a page for people",
        sends(HTML, 403),
        'page \\("Just a moment..."\\)\\).*and not that of a page',
    ),
    ("402", sends({"error": "insufficient credits"}, 402), "quota are used up .*: insufficient cr"),
    ("429 for good", sends({"error": {"code": "insufficient_quota"}}, 429), "add credits"),
    ("402 in a 200", error_in_200("insufficient credits", code=402), "add credits"),
    ("404", sends("", 404), "no such address or model"),
    ("405", sends({"detail": "Method Not Allowed"}, 405), "no such address.*Method Not Allowed"),
    ("no such model", sends({"error": "model 'tiny' not found"}, 404), 'mean "Tiny-1B"'),
    ("not a model", sends({"message": "tiny is not a valid model ID"}, 400), 'mean "Tiny-1B"'),
    ("a wrong path", error_in_200("Unexpected endpoint or method. (POST /x)"), "no such address"),
    ("redirect to another host", sends("", 307, location="http://127.0.0.9:1/v1"), "redirects"),
    ("redirect to itself", sends("", 302, location="/v1/chat/completions"), "redirects"),
]


@pytest.mark.parametrize(("name", "fault", "said"), FATAL, ids=[name for name, *_ in FATAL])
def test_what_can_never_succeed_stops_at_once(name, fault, said, tmp_path):
    with chat_server(always(fault)) as server:
        server.models = ["huge", "Tiny-1B"]
        with pytest.raises(ServerError, match=said) as caught:
            ask(server, [f"text {i}" for i in range(50)], tmp_path / "answers.sqlite")
    assert caught.value.exit_code == 69
    assert "when it does" not in str(caught.value)
    assert len(server.bodies) <= SERVER.concurrency
    assert server.listings <= 1
    assert server.strays == []


def test_no_redirect_reaches_its_target(tmp_path):
    with chat_server(says("7")) as target:
        for status in (301, 302, 303, 307, 308):
            there = target.url.replace("127.0.0.1", "localhost")
            for where in (f"{target.url}/chat/completions", f"{there}/elsewhere"):
                turn = always(sends("", status, location=where))
                with chat_server(turn) as server, pytest.raises(ServerError, match="redirects"):
                    ask(server, ["a"], tmp_path / "answers.sqlite")
    assert target.bodies == target.strays == []


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


NEVER = {
    "the context": (
        says_no(400, "maximum context length is 512 tokens"),
        "max_question_tokens",
        20,
    ),
    "the request": (says_no(400, "bad request"), "Asked again it would refuse the same", 19),
    "tokens": (says_no(400, "max_tokens must be at least 32"), r"max_tokens, now 16, to", 5),
    "a stream": (says_no(400, "only streaming is supported: stream must be true"), "as a whole", 5),
    "loading": (says_no(503, "Loading model"), "loading its model; run the same command again", 18),
    "too fast": (always(sends("", 429)), "Lower .*requests_per_minute", 18),
    "no completions": (always(sends("[]")), "OpenAI-compatible", 18),
}


@pytest.mark.parametrize("name", NEVER)
def test_the_step_that_is_advised_fits_what_the_server_says(name, tmp_path):
    behave, said, requests = NEVER[name]
    texts = [f"text {i}" for i in range(50)]
    with chat_server(behave) as server, pytest.raises(ServerError, match=said) as caught:
        ask(server, texts, tmp_path / "answers.sqlite", replace(SERVER, backoff_seconds=0.001))
    again = name in ("loading", "too fast")
    assert ("run the same command again" in str(caught.value)) == again
    assert len(server.bodies) <= requests + SERVER.concurrency


def test_a_field_of_ones_own_is_named_and_never_dropped(tmp_path, capsys):
    def behave(handler, body, number):
        handler.send({"detail": [{"loc": ["body", "thinking"], "msg": "extra"}]}, 422)

    extra = {"chat_template_kwargs": {"thinking": False}, "temperature": 0.5}
    params = replace(SERVER, extra=extra)
    with (
        chat_server(behave) as server,
        pytest.raises(ServerError, match='refuses "thinking" of') as _,
    ):
        ask(server, map(str, range(9)), tmp_path / "a.sqlite", params)
    assert all(body["temperature"] == 0.5 for body in server.bodies)
    assert all(body["chat_template_kwargs"] == {"thinking": False} for body in server.bodies)
    assert len(server.bodies) <= 5 + SERVER.concurrency


def test_what_a_user_sets_is_sent_as_it_is(tmp_path):
    extra = {"temperature": 0.5, "top_logprobs": 3, "seed": 1}
    params, said = replace(SERVER, extra=extra), 'refuses "temperature" of'
    with (
        chat_server(picky(temperature=other, most=2)) as server,
        pytest.raises(ServerError, match=said),
    ):
        ask(server, map(str, range(9)), tmp_path / "a.sqlite", params)
    assert all(extra.items() <= body.items() for body in server.bodies)
    with chat_server(says("7")) as server:
        ask(server, ["a"], tmp_path / "b.sqlite", replace(SERVER, extra={"logprobs": False}))
    assert server.bodies[0]["logprobs"] is False
    assert "top_logprobs" not in server.bodies[0]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"model": "x"}, r"may not hold \"model\": \[rater\] model"),
        ({"stream": True}, "may not hold"),
        ({"api_key": "sk-1"}, "belongs into STACKLLM_API_KEY alone"),
        ({"max_completion_tokens": 9}, r"\[server\] max_tokens is its setting"),
        ({"day": date(2026, 1, 1)}, "must be what JSON can say"),
        ({"deep": {"list": [float("nan")]}}, "must be what JSON can say"),
    ],
)
def test_what_extra_may_not_hold(extra, said):
    with pytest.raises(UsageError, match=said):
        ServerParams(extra=extra)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:1/v1/chat/completions", "http://localhost:1/v1"),
        ("https://host/chat/completions/", "https://host"),
        ("http://localhost:1/api/chat", "http://localhost:1/v1"),
        ("https://host/api/v1/responses", "https://host/api/v1"),
        ("https://host/v1/models", "https://host/v1"),
    ],
)
def test_an_endpoint_in_place_of_the_base_is_refused_with_the_base(url, base):
    with pytest.raises(UsageError, match=f'set it to "{base}"'):
        check_url(url, allow_http=False)
    assert check_url(base, allow_http=False) == f"{base}/chat/completions"


def test_an_address_without_v1_is_named(tmp_path):
    def behave(handler, body, number):
        handler.send({"error": f"Unexpected endpoint or method. (POST {handler.path})"})

    class Short:
        url = ""

    with chat_server(behave) as server:
        server.models, Short.url = ["tiny"], server.url.removesuffix("/v1")
        with pytest.raises(ServerError, match=f'Set it to "{server.url}", where a server answers'):
            ask(Short, map(str, range(9)), tmp_path / "a.sqlite")
    assert (len(server.bodies), server.listings) == (2, 1)


def written(server, texts, path, capsys, params=SERVER, **rater):
    """Probabilities, failures, and what a user is told."""
    cases = [Case("What?", (text,)) for text in texts]
    settings = RaterParams(url=server.url, model="tiny", **rater)
    (answered,) = ask_server([(ASKED, cases)], settings, params, path, Reporter(), False)
    (answers,) = answered.questions
    return answers, capsys.readouterr().err


def test_any_dialect_is_learnt_and_told_once(tmp_path, capsys):
    temperatures = (lambda told: True, other)
    dialects = itertools.product([("max_tokens",), RENAMED, ()], temperatures, [20, 8, 0])
    for i, (names, temperature, most) in enumerate(dialects):
        says, concurrency = i % 3 != 1, 1 + 3 * (i % 2)
        params = replace(SERVER, concurrency=concurrency)
        path = tmp_path / f"{i}.sqlite"
        with chat_server(picky(names, temperature, most, says=says)) as server:
            answers, told = written(server, map(str, range(6)), path, capsys, params)
        assert {*answers.status} == {"ok"}
        assert len(server.bodies) <= 6 + (5 if says else 7) + (concurrency - 1)
        lines = [line for line in told.splitlines() if "the server takes" in line]
        assert len({*lines}) == len(lines)
        last = server.bodies[-1]
        limits = {"max_tokens", "max_completion_tokens"} & last.keys()
        assert limits <= {*names}
        if says:  # nothing is lost that the server takes
            assert limits == {*names}
            assert last.get("top_logprobs", 0) == most
            assert ("temperature" in last) == (temperature is not other)
            assert all(answers.measured) == bool(most)
            differ = (names != ("max_tokens",), temperature is other, most < 20)
            assert len(lines) == sum(differ)
            for line in lines:  # each with the server's word for this loss
                lost, _, said = line.partition("HTTP 400: ")
                word = next(it for it in ("temperature", "logprobs", "max_") if it in said)
                lost = lost.replace("limit on", "max_").replace("likely tokens", "logprobs")
                assert word in lost.partition("takes")[2].partition(":")[0]


def test_a_server_that_breaks_with_logprobs_is_asked_without(tmp_path, capsys):
    for concurrency, attempts in ((1, 2), (4, 3)):
        params = replace(SERVER, concurrency=concurrency, attempts=attempts)
        with chat_server(breaks_with_logprobs) as server:
            path = tmp_path / f"{concurrency}.sqlite"
            answers, told = written(server, map(str, range(20)), path, capsys, params)
        assert {*answers.status} == {"ok"}
        assert len(server.bodies) <= 20 + 2 * 2 + 2 * concurrency + 2
        assert told.count("the server takes no logprobs") == 1
        assert "HTTP 500: list index out of range" in told


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("broken", [1, 2, 4, 7])
def test_a_hiccup_costs_few_answers_their_probabilities(broken, concurrency, tmp_path):
    def behave(handler, body, number):
        if len(handler.server.bodies) <= broken:
            handler.send("", 500)
        else:
            handler.send(SPREAD if "logprobs" in body else GOOD)

    params = replace(SERVER, concurrency=concurrency, attempts=9)
    with chat_server(behave) as server:
        found, failures = ask(server, map(str, range(20)), tmp_path / "a.sqlite", params)
    assert not failures
    assert (found.max(axis=1) == 1).sum() <= 2


def test_a_server_that_starts_to_refuse_is_still_asked_as_it_answered(tmp_path):
    def behave(handler, body, number):
        if int(prompt_of(body).split("number ")[1][:2]) % 3:
            handler.send(SPREAD)
        else:  # a host that passes prompts on to several others
            picky(RENAMED, other, 5)(handler, body, number)

    texts = [f"number {i:02}" for i in range(10, 30)]
    with chat_server(behave) as server:
        answers = ask(server, texts, tmp_path / "a.sqlite", replace(SERVER, concurrency=1))
    assert not answers[1]
    assert (answers[0].max(axis=1) < 1).all()
    assert server.bodies[-1]["max_tokens"] == 16
    assert server.bodies[-1]["top_logprobs"] == 20


SECRET = "sk-0123456789abcdef"


@pytest.mark.parametrize("status", [400, 401, 402, 404, 429, 500, 200])
def test_the_key_is_in_no_reason(status, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(KEY, SECRET)
    escaped = "".join(f"\\u{ord(c):04x}" for c in SECRET)
    for i, text in enumerate((f"{SECRET} is no key", "x" * 190 + SECRET, escaped)):
        body = json.dumps({"error": {"message": text}}).replace("\\\\u", "\\u")
        path = tmp_path / f"{i}.sqlite"
        with chat_server(always(sends(body, status))) as server:
            server.models = [SECRET]
            with pytest.raises(
                ServerError, match=f"{status}" if status != 200 else "an error"
            ) as caught:
                ask(server, "ab", path, replace(SERVER, backoff_seconds=0.001))
        assert server.headers[0]["authorization"].endswith(SECRET)
        told = f"{caught.value}{capsys.readouterr()}"
        assert SECRET not in told
        assert SECRET[:8] not in told
        assert SECRET.encode() not in path.read_bytes()


def test_answers_under_another_name_stop_at_the_first(tmp_path):
    said = 'answers as "org/big.gguf", not as "tiny": set .rater. model to "org/big.gguf", or'
    path = tmp_path / "a.sqlite"
    with chat_server(says("7", model="org/big.gguf")) as server:
        with pytest.raises(ServerError, match=said):
            ask(server, map(str, range(50)), path)
        sent = len(server.bodies)
        assert sent <= SERVER.concurrency
        found, failures = ask(server, map(str, range(50)), path, replace(SERVER, any_model=True))
        assert not failures
        assert len(server.bodies) == 50  # what was paid for counts now
    assert np.isfinite(found).all()


def test_three_answers_in_a_row_under_another_name_are_no_slip(tmp_path):
    def behave(handler, body, number):
        place = len(handler.server.bodies)
        handler.send(completion("7", model="tiny" if place in (1, 4) else "big\x1b[31m"))

    with chat_server(behave) as server, pytest.raises(ServerError, match=r'answers as "big\[31m"'):
        ask(server, map(str, range(50)), tmp_path / "a.sqlite", replace(SERVER, concurrency=1))
    assert len(server.bodies) == 7


def test_prompts_that_the_server_refuses_take_nothing_from_the_others(tmp_path, capsys):
    def behave(handler, body, number):
        if "long" in prompt_of(body):
            tokens = len(handler.server.bodies) + 4096
            handler.send({"error": f"{tokens} tokens exceed the context size of 4096"}, 400)
        else:
            handler.send(GOOD)

    texts = ["a", *(f"long {i}" for i in range(15)), "b"]
    with chat_server(behave) as server:
        answers, told = written(server, texts, tmp_path / "a.sqlite", capsys)
    assert [status == "ok" for status in answers.status] == [True] + [False] * 15 + [True]
    assert len(server.bodies) == 17
    assert "the server refuses 15 prompts (15 HTTP 400: 40" in told
    assert "lower [rater] max_question_tokens" in told


def test_an_llm_that_thinks_till_its_tokens_are_used_up_is_told_how_not_to(tmp_path):
    cut = completion("<think>The user wants")
    cut["choices"][0]["finish_reason"] = "length"
    with (
        chat_server(always(sends(cut))) as server,
        pytest.raises(
            ServerError,
            match=r'finish_reason "length".*max_tokens = 2000 or so \(now 16\).*enable_thinking',
        ),
    ):
        ask(server, map(str, range(50)), tmp_path / "a.sqlite", replace(SERVER, concurrency=1))
    assert len(server.bodies) == 5


def test_an_llm_that_thinks_too_long_on_some_prompts_answers_the_others(tmp_path):
    cut = completion("", reasoning_content="Hm")
    cut["choices"][0]["finish_reason"] = "length"

    def behave(handler, body, number):
        place = len(handler.server.bodies)
        handler.send(GOOD if place == 1 or place > 12 else cut)

    with chat_server(behave) as server:
        found, failures = ask(
            server, map(str, range(20)), tmp_path / "a.sqlite", replace(SERVER, concurrency=1)
        )
    assert np.isfinite(found).all(axis=1).sum() == 9
    assert sum(failures.values()) == 11


INVALID = [
    ("great!", "stop", "change the recipe"),
    ("", "stop", "Raise .server. max_tokens"),
    ("1", "length", "Raise .server. max_tokens"),
]


@pytest.mark.parametrize(("text", "finish", "step"), INVALID)
def test_the_step_after_replies_that_are_not_valid_fits_the_last(text, finish, step, tmp_path):
    reply = completion(text)
    reply["choices"][0]["finish_reason"] = finish
    with chat_server(always(sends(reply))) as server, pytest.raises(ServerError, match=step):
        ask(server, map(str, range(50)), tmp_path / "a.sqlite")
    assert len(server.bodies) <= 20 + SERVER.concurrency


@pytest.mark.parametrize(
    ("text", "told", "cut"),
    [
        ("word " * 60, 40, True),
        ("word " * 20, 50, False),
        ("word " * 4000, 2000, True),
        ("word " * 4000, 5000, False),
        ("字" * 4000, 2200, False),
        ("बहुत अच्छा उत्तर " * 200, 900, False),
        ("😀" * 3000, 290, True),
    ],
)
def test_a_prompt_that_the_server_cut_is_named_once(text, told, cut, tmp_path, capsys):
    reply = {
        **GOOD,
        "usage": {"prompt_tokens": told, "completion_tokens": 1, "total_tokens": told + 1},
    }
    with chat_server(always(sends(reply))) as server:
        lengths = {"max_response_tokens": 8192}
        _, said = written(server, [text, f"{text}!"], tmp_path / "a.sqlite", capsys, **lengths)
    assert said.count("it cuts prompts") == cut
    assert (f"counted {told:,} tokens" in said) == cut


def test_a_long_thought_with_its_log_probabilities_is_read(tmp_path):
    long = [("x", {"x": 0.9, **{f"{i}": 0.001 for i in range(19)}})] * 1500
    reply = completion("7", long)
    assert len(json.dumps(reply)) > 1_000_000
    with chat_server(always(sends(reply))) as server:
        ask(server, ["a"], tmp_path / "a.sqlite", replace(SERVER, max_tokens=2000))
        with pytest.raises(ServerError, match=r"raise \[server\] max_bytes"):
            ask(server, ["a"], tmp_path / "b.sqlite")


def test_answers_without_probabilities_are_counted(tmp_path, capsys):
    def behave(handler, body, number):
        handler.send(GOOD if prompt_of(body).count("bare") else SPREAD)

    with chat_server(behave) as server:
        _, told = written(server, ["bare 1", "a", "b"], tmp_path / "a.sqlite", capsys)
        assert "2 of 3 answers came with probabilities of tokens" in told
        _, told = written(server, ["a", "c"], tmp_path / "a.sqlite", capsys)
        assert "answers came with" not in told


def test_a_model_that_never_answers_validly_is_not_paid_on_and_on(tmp_path):
    with chat_server(says("great!")) as server, pytest.raises(ServerError, match="not valid"):
        ask(server, [f"text {i}" for i in range(100)], tmp_path / "answers.sqlite")
    assert len(server.bodies) <= 20 + SERVER.concurrency
