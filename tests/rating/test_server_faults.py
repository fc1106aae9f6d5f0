"""Everything a server can do wrong: what is recorded, and how often it is asked, as it counts itself."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
from chat_server import chat_server, completion

from stackllm.engine.progress import Reporter
from stackllm.errors import ServerError
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


FAULTS = [
    Fault(
        "429 with Retry-After", first_then_good(sends("", 429, retry_after="0.5")), "ok", 2, 7, 0.5
    ),
    Fault("429 without", first_then_good(sends("", 429)), "ok", 2, 7),
    Fault("429 for ever", always(sends("", 429)), "HTTP 429", 3),
    Fault("429 come back tomorrow", always(sends("", 429, retry_after="86400")), "deadline", 1),
    Fault(
        "Retry-After is nonsense", first_then_good(sends("", 429, retry_after="soon")), "ok", 2, 7
    ),
    Fault("Retry-After is negative", first_then_good(sends("", 503, retry_after="-9")), "ok", 2, 7),
    Fault(
        "Retry-After is infinite", first_then_good(sends("", 503, retry_after="inf")), "deadline", 1
    ),
    Fault(
        "Retry-After is huge", first_then_good(sends("", 503, retry_after="9" * 400)), "deadline", 1
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
        texts = ["poison", "fine"] if fault.first else ["fine", "poison"]
        path, params = tmp_path / "answers.sqlite", replace(SERVER, concurrency=1)
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


def test_a_model_that_never_answers_validly_is_not_paid_on_and_on(tmp_path):
    with chat_server(says("great!")) as server, pytest.raises(ServerError, match="not valid"):
        ask(server, [f"text {i}" for i in range(100)], tmp_path / "answers.sqlite")
    assert len(server.bodies) <= 20 + SERVER.concurrency
