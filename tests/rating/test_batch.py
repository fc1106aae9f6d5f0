"""Batches: no answer that was paid for is lost and none is paid for twice, whatever happens on the way."""

import json
import re
import signal
import sqlite3
import ssl
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from batch_server import DONE, batch_server, done_and_lost, error_line, line, refused
from chat_server import completion
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackllm.engine.local import PendingError
from stackllm.engine.progress import Reporter
from stackllm.errors import BudgetError, LockedError, ServerError, StorageError
from stackllm.rating import batch as batch_module
from stackllm.rating.batch import cut_files
from stackllm.rating.endpoint import Endpoint, _split_lines
from stackllm.rating.journal import Batch, Journal, open_journal, read_batches, read_replies
from stackllm.rating.local import RaterParams
from stackllm.rating.question import Asked, Case, Rubric
from stackllm.rating.requests import ServerParams
from stackllm.rating.server import ask_server

ASKED = Asked("gpt_rating", "rating", "Rate it.", tuple(map(str, range(1, 11))))


def ask(url, path, n=6, dry_run=False, quiet=True, **server):
    params = {
        "requests_per_minute": 0,
        "batch": True,
        "poll_seconds": 0.001,
        "backoff_seconds": 0.001,
    }
    rater = RaterParams(url=url, model="tiny")
    cases = [Case("What?", (f"text number {i}",)) for i in range(n)]
    (answered,) = ask_server(
        [(ASKED, cases)], rater, ServerParams(**params | server), path, Reporter(quiet), dry_run
    )
    return answered.questions[0]


def rating(body):
    """A rating that the text decides."""
    number = int(re.search(r"text number (\d+)", body["messages"][0]["content"])[1])
    return completion(str(1 + number % 10))


EXPECTED = lambda n: np.eye(10)[[i % 10 for i in range(n)]]  # noqa: E731


@pytest.fixture(scope="module")
def only_server():
    with batch_server() as server:
        yield server


@pytest.fixture(autouse=True)
def no_certificates(monkeypatch):
    """Reading all certificates of the world takes 40 ms a client, and nothing here is encrypted."""
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)


@pytest.fixture
def server(only_server):
    only_server.forget()
    only_server.say = rating
    return only_server


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.sqlite"


def assert_paid_once(server, n):
    """Every prompt was answered once, live or in a batch."""
    paid = server.paid + Counter(server.counts)
    assert len(paid) == n
    assert set(paid.values()) == {1}


def test_the_first_prompt_goes_live_and_the_others_as_a_file(server, path):
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert len(server.bodies) == 1
    assert (server.seen["POST /files"], server.seen["POST /batches"]) == (1, 1)
    assert_paid_once(server, 6)
    orders = server.orders("batch-1")
    assert len({order["custom_id"] for order in orders}) == 5
    (live,) = server.bodies
    for order in orders:
        assert (order["method"], order["url"]) == ("POST", "/v1/chat/completions")
        assert order["body"].keys() == live.keys() - {"stream"}
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert_paid_once(server, 6)


RUBRIC = Rubric("r", "Review it.", (ASKED, Asked("r_b", "category", "Tone?", ("warm", "cold"))))
SPELLED = [
    ("gpt", 1),
    ("_rating", 1),
    (":", 1),
    (" ", 1),
    ("7", 0.5),
    ("\n", 1),
    ("b", 1),
    (":", 1),
    (" warm", 0.75),
]


@pytest.mark.parametrize("recipe", [ASKED, RUBRIC], ids=["a question", "a rubric"])
def test_answers_are_the_same_as_live_ones(server, tmp_path, recipe):
    spelled = [(" ", 1)] * 12 + SPELLED  # more than are kept of a single answer
    tokens = [(token, {token: p, **({"8": 0.5} if token == "7" else {})}) for token, p in spelled]
    if recipe is ASKED:
        tokens = tokens[16:17]
    text = "".join(token for token, _ in tokens)
    server.say = lambda body: completion(text, tokens)
    cases = [Case("What?", (f"text number {i}",)) for i in range(4)]
    rater, quiet = RaterParams(url=server.url, model="tiny"), Reporter(quiet=True)
    by_file, live = (
        ask_server(
            [(recipe, cases)], rater, ServerParams(batch=batch, poll_seconds=0.001),
            tmp_path / f"{batch}.sqlite", quiet, False,
        )[0].questions
        for batch in (True, False)
    )  # fmt: skip
    assert len(server.batches) == 1
    for one, other in zip(by_file, live, strict=True):
        assert one.status == other.status == ("ok",) * 4
        assert one.measured == other.measured
        assert one.texts == other.texts
        assert np.array_equal(one.probabilities, other.probabilities)
    assert all(by_file[0].measured)


def test_lines_speak_the_dialect_that_the_first_prompt_has_found(server, path):
    def strict(handler, body, number):
        if "max_tokens" in body:
            handler.send(
                {"error": {"message": "max_tokens is not taken, max_completion_tokens is"}}, 400
            )
        elif body.get("top_logprobs", 0) > 5:
            handler.send({"error": {"message": "top_logprobs may be 5 at most"}}, 400)
        else:
            handler.send(rating(body))

    server.behave = strict
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    for order in server.orders("batch-1"):
        assert order["body"]["max_completion_tokens"] == 16
        assert order["body"]["top_logprobs"] == 5
        assert "max_tokens" not in order["body"]
    assert len(server.bodies) == 3


def test_files_are_cut_at_lines_and_bytes(monkeypatch):
    bodies = {str(i): {"messages": "x" * (10 * i)} for i in range(30)}
    for most_lines, most_bytes in [(7, 10**6), (50, 1000), (50, 100), (1, 1)]:
        monkeypatch.setattr(batch_module, "MOST_LINES", most_lines)
        monkeypatch.setattr(batch_module, "MOST_BYTES", most_bytes)
        files = [*cut_files(bodies)]
        assert [key for keys, _ in files for key in keys] == [*bodies]
        for keys, content in files:
            assert len(keys) == len(content.splitlines()) <= most_lines
            assert len(content) <= most_bytes or len(keys) == 1
        for (keys, content), (_, after) in pairwise(files):
            room = most_bytes - len(content)
            assert len(keys) == most_lines or len(after.splitlines(True)[0]) > room


def test_several_batches_side_by_side(server, path, monkeypatch):
    monkeypatch.setattr(batch_module, "MOST_LINES", 2)
    server.plans = [("in_progress",) * 4 + ("completed",), DONE]
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert len(server.batches) == 3
    assert_paid_once(server, 6)


# Kills.


class KilledError(BaseException):
    """The process ends here."""


@contextmanager
def killed_after(steps, monkeypatch):
    """Die at a step; each request to files and batches and each commit has one before and one after."""
    left = [steps]

    def step():
        left[0] -= 1
        if left[0] < 0:
            raise KilledError

    def stepping(original):
        def wrapped(*args, **kwargs):
            step()
            result = original(*args, **kwargs)
            step()
            return result

        return wrapped

    with monkeypatch.context() as patch:
        commit = Journal.put_all  # of live answers: what is in flight when a process dies is lost
        patch.setattr(
            Journal, "put", lambda self, key, model, reply: commit(self, [(key, reply)], model)
        )
        for owner, name in [
            (Endpoint, "_request"),
            (Journal, "put_batch"),
            (Journal, "put_all"),
        ]:
            patch.setattr(owner, name, stepping(getattr(owner, name)))
        yield


def test_killed_at_every_moment_one_after_the_other(server, tmp_path, monkeypatch):
    monkeypatch.setattr("stackllm.rating.results._AT_ONCE", 2)
    steps, is_done = 0, False
    while not is_done:
        server.forget()
        server.say = rating
        path = tmp_path / f"{steps}.sqlite"
        with killed_after(steps, monkeypatch):
            try:
                ask(server.url, path)
                is_done = True
            except KilledError:
                pass
        assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
        assert_paid_once(server, 6)
        assert len(server.batches) == 1
        steps += 1
    assert steps > 20


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.integers(0, 45), max_size=4),
    st.lists(
        st.sampled_from([DONE, ("expired",), ("in_progress", "cancelled"), ("failed",)]), max_size=3
    ),
    st.sets(st.tuples(st.integers(1, 3), st.integers(0, 2))),
)
def test_any_order_of_kills_and_expiries_asks_every_prompt_once(only_server, kills, plans, late):
    server = only_server
    server.forget()
    server.say = rating
    server.plans = [*plans]
    expiring = {i + 1 for i, plan in enumerate(plans) if plan != DONE}
    server.answer = lambda order, place, number: (
        None
        if number in expiring and (number, place) in late
        else line(order["custom_id"], rating(order["body"]))
    )
    monkeypatch = pytest.MonkeyPatch()
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        patch.setattr(batch_module, "MOST_LINES", 3)
        path = Path(folder) / "a.sqlite"
        for steps in kills:
            with killed_after(steps, monkeypatch), suppress(KilledError, ServerError):
                ask(server.url, path)
        for _ in plans:  # a batch that failed ends a run in which no other brought anything
            with suppress(ServerError):
                ask(server.url, path)
        found = ask(server.url, path)
    assert np.array_equal(found.probabilities, EXPECTED(6))
    assert_paid_once(server, 6)


CODE = (
    "import sys; from pathlib import Path\n"
    f"sys.path[:0] = {sys.path!r}\n"
    "import importlib.util as u\n"
    f"spec = u.spec_from_file_location('batch_test', {__file__!r})\n"
    "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
    "from stackllm.cli.signals import catch_signals, StoppedError\n"
    "catch_signals()\n"
    "try: module.ask(sys.argv[1], Path(sys.argv[2]), quiet=False, poll_seconds=600)\n"
    "except StoppedError as stopped: sys.exit(stopped.status)\n"
)


def stop_at(server, path, name, number, how):
    """Start a process, end it when a request waits for its answer or after it, and tell what it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, server.url, str(path)], stderr=subprocess.PIPE
    )
    try:
        assert server.wait_for(lambda: server.seen[name] >= number)
        process.send_signal(how)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, said.decode()


def waits_for_the_end(handler, act):
    """The request is done, and its answer is not sent while anybody waits."""
    act()
    handler.gone(30.0)


def half_of_it(handler, act):
    """Some lines, and then nothing while anybody waits."""
    content = act()
    handler.send_response_only(200)
    handler.send_header("content-length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.wfile.flush()
    handler.gone(30.0)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("POST /batches", waits_for_the_end), ("GET /files/ID/content", half_of_it)],
    ids=["made and not written down", "amid the results"],
)
def test_a_killed_process(server, path, name, fault):
    server.plans = [("completed",)]
    server.faults[name] = [fault]
    status, _ = stop_at(server, path, name, 1, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert len(server.batches) == 1
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert len(server.batches) == 1
    assert_paid_once(server, 6)


def test_an_interrupted_process_ends_at_once_and_says_that_the_batch_goes_on(server, path):
    server.plans = [("in_progress", "completed")]
    status, said = stop_at(server, path, "GET /batches/ID", 1, signal.SIGINT)
    assert status == 130
    assert "batch batch-1: 5 prompts handed over" in said
    (left,) = read_batches(path, f"{server.url}/chat/completions", all_requests(path), True)
    assert (left.id, len(left.requests)) == ("batch-1", 5)
    assert (
        "the server goes on with 1 batch of 5 prompts; the same command picks up the answers"
        in said
    )
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert_paid_once(server, 6)


# What servers do on the way.


def test_what_expired_is_asked_again_and_what_came_is_kept(server, path):
    server.plans = [("in_progress", "expired"), ("cancelling", "cancelled"), DONE]
    server.answer = lambda order, place, number: (
        line(order["custom_id"], rating(order["body"])) if place < number else None
    )
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert [len(server.orders(name)) for name in server.batches] == [5, 4, 2]
    assert_paid_once(server, 6)


def test_batches_that_always_expire_end(server, path):
    server.plans = [("expired",)] * 5
    server.answer = lambda *_: None
    answers = ask(server.url, path, attempts=3)
    assert answers.failures == {"batch expired": 5}
    assert len(server.batches) == 3
    assert np.array_equal(ask(server.url, path, batch=False).probabilities, EXPECTED(6))
    assert_paid_once(server, 6)


def test_a_refused_file_says_the_line_and_the_reason(server, path):
    server.plans = [("validating", "failed")]
    told = [{"code": "invalid", "line": 3, "message": "no such field: top_k", "param": None}] * 2
    server.shape = lambda batch: {**batch, "errors": {"object": "list", "data": told}}
    with pytest.raises(
        ServerError,
        match=r"refused batch batch-1: line 3: no such field: top_k.*, and 1 more\. .*Change what",
    ):
        ask(server.url, path)
    server.shape = lambda batch: batch
    server.plans = [("validating", "failed")]
    with pytest.raises(ServerError, match=r"refused batch batch-2: it gives no reason\. "):
        ask(server.url, path)
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert_paid_once(server, 6)


def test_a_queue_that_is_full_gets_the_rest_later(server, path, monkeypatch):
    """OpenAI limits the tokens in its queue and lets a batch fail that is one too many."""
    monkeypatch.setattr(batch_module, "MOST_LINES", 3)
    server.plans = [DONE, ("failed",), DONE]
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    server.faults["POST /batches"] = [
        lambda handler, act: handler.send(act()),
        refused(400, "queue"),
    ]
    assert np.array_equal(ask(server.url, path, 11).probabilities, EXPECTED(11))
    assert_paid_once(server, 11)


def lines_that_fail(order, place, number):
    key, good = order["custom_id"], rating(order["body"])
    return [
        line(key, good),
        line(key, {"error": {"message": "the prompt is too long", "code": "context"}}, 400),
        line(key, {"error": {"message": "slow down"}}, 429),
        line(key, {"error": {"message": "upstream"}}),
        line(key, {"choices": []}),
        line(key, None, 500),
        error_line(key, "server_error"),
        None,
        line(key, good | {"model": "another"}),
        line(key, completion("")),
        line(key, completion("11")),
    ][place]


def test_lines_that_fail_are_counted_and_asked_again_next_time(server, path):
    server.answer = lines_that_fail
    first = ask(server.url, path, 12)
    assert first.status.count("ok") == 2
    failures = {re.sub(r" \(.*", "", reason): count for reason, count in first.failures.items()}
    assert failures == {
        "HTTP 400: the prompt is too long": 1,
        "HTTP 429: slow down": 1,
        "an error in a 200: upstream": 1,
        "no choices": 1,
        "HTTP 500": 1,
        "This request was not executed: server_error.": 1,
        "missing from the results": 1,
        "wrong model": 1,
        "empty": 1,
        "out of scale": 1,
    }
    server.answer = lambda order, *_: line(order["custom_id"], rating(order["body"]))
    again = ask(server.url, path, 12)
    assert again.failures == {"wrong model": 1, "empty": 1, "out of scale": 1}
    assert len(server.batches) == 2
    assert len(server.orders("batch-2")) == 12 - 1 - 4 - 1


def test_nothing_but_failures_is_a_server_out_of_reach(server, path, monkeypatch):
    server.answer = lambda order, *_: line(order["custom_id"], {"error": "no"}, 400)
    with killed_after(8, monkeypatch), suppress(KilledError):
        ask(server.url, path)
    with pytest.raises(ServerError, match=r"gives no answers \(5 HTTP 400: no\)"):
        ask(server.url, path)
    server.answer = lambda order, *_: line(order["custom_id"], rating(order["body"]))
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert_paid_once(server, 6)


def test_odd_lines_are_told_and_harm_no_other(server, path, capsys):
    def odd(order, place, number):
        good = json.dumps(line(order["custom_id"], rating(order["body"]))).encode() + b"\n"
        other = json.dumps(line(order["custom_id"], completion("10"))).encode() + b"\n"
        stranger = json.dumps(line("a" * 64, completion("1"))).encode() + b"\n"
        return [
            b"\n" + good,
            good + other,
            b'{"custom_id": ' + b"\n" + b"[1]\n" + b"\xff\n" + good,
            stranger + b"[" * 10**5 + b"\n" + good,
            b"x" * 2_000_000 + b"\n" + good[:-1],
        ][place]

    server.answer = odd
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    told = capsys.readouterr().err
    assert (
        "batch batch-1: lines of its results that answer a prompt a second time are left out (1)"
        in told
    )
    assert "lines of its results that are no JSON objects are left out (4)" in told
    assert "lines of its results that answer no prompt of ours are left out (1)" in told
    assert "lines of its results that are longer than [server] max_bytes are left out (1)" in told


def test_an_endless_file_of_results_ends(server, path):
    def endless(handler, act):
        handler.send_response_only(200)
        handler.end_headers()
        handler.close_connection = True
        handler.wfile.write(act())
        with suppress(OSError):
            while True:
                handler.wfile.write(b"x" * 10**5)

    server.faults["GET /files/ID/content"] = [endless]
    with pytest.raises(
        ServerError, match=r"holds more than 6 times 3,000 bytes.*Raise \[server\] max_bytes"
    ):
        ask(server.url, path, max_bytes=3000)
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert_paid_once(server, 6)


PASSING = {
    "429": refused(429, "slow down", retry_after="0"),
    "503": refused(503),
    "lost": done_and_lost,
    "compressed": lambda handler, act: handler.send(b"x", content_encoding="gzip"),
    "no JSON": lambda handler, act: handler.send("<html>"),
}
EVERY = ["POST /files", "POST /batches", "GET /batches/ID", "GET /files/ID/content"]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(server, path, fault):
    for name in EVERY:
        kind = fault if fault != "no JSON" or "content" not in name else "503"
        server.faults[name] = [PASSING[kind]] * 2
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert len(server.batches) == 1 or fault == "compressed"
    assert_paid_once(server, 6)


@pytest.mark.parametrize("name", EVERY)
def test_what_does_not_pass_is_a_server_out_of_reach_and_nothing_is_lost(server, path, name):
    server.faults[name] = [refused(503, "down")] * 3
    with pytest.raises(
        ServerError, match=r"gives no answer .HTTP 503: down.*the same command"
    ) as stopped:
        ask(server.url, path, attempts=3)
    assert stopped.value.exit_code == 69
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert len(server.batches) == 1
    assert_paid_once(server, 6)


def test_waits_grow_and_do_as_the_server_asks(server, path, monkeypatch):
    waits = []
    monkeypatch.setattr(batch_module.time, "sleep", waits.append)
    server.plans = [("in_progress",) * 9 + ("completed",)]
    server.faults["GET /batches/ID"] = [
        lambda handler, act: handler.send(act(), retry_after="77"),
        refused(429, retry_after="88"),
    ]
    ask(server.url, path, poll_seconds=10)
    assert waits[0] == 77
    assert 88 <= waits[1] < 89
    assert waits[2:] == pytest.approx([3.0, 4.5, 6.75, 10, 10, 10, 10, 10])


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_without_batches_says_so_at_once(server, path, status):
    server.faults["POST /files"] = [refused(status, "nothing here")]
    with pytest.raises(
        ServerError,
        match=rf"takes no batches \(/files: HTTP {status}: nothing here\)\. Set \[server\] batch = false",
    ):
        ask(server.url, path)
    assert server.seen["POST /files"] == 1
    assert np.array_equal(ask(server.url, path, batch=False).probabilities, EXPECTED(6))
    assert_paid_once(server, 6)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (refused(401, "who are you?"), "refuses the API key .HTTP 401: who are you.*batch = false"),
        (
            refused(400, "no such window"),
            "refuses a batch .HTTP 400: no such window.*batch = false",
        ),
        (refused(402, "no credits"), "credits or quota are used up .HTTP 402: no credits"),
        (
            lambda handler, act: handler.send("", 302, location="/v1/batches/x"),
            "redirects elsewhere",
        ),
        (lambda handler, act: handler.send({"ok": True}), "an answer without an id"),
        (lambda handler, act: handler.send({"id": "../../chat"}), "takes no batches"),
        (lambda handler, act: handler.send({"id": ".."}), "takes no batches"),
        (lambda handler, act: handler.send({"id": 7}), "takes no batches"),
        (lambda handler, act: handler.send("[]"), "takes no batches"),
    ],
)
@pytest.mark.parametrize("name", ["POST /files", "POST /batches"])
def test_refusals_stop_and_nothing_is_lost(server, path, fault, said, name):
    server.faults[name] = [fault]
    with pytest.raises(ServerError, match=said):
        ask(server.url, path)
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert_paid_once(server, 6)


def test_a_batch_that_cannot_be_found_does_not_keep_others_from_being_read(
    server, path, monkeypatch
):
    monkeypatch.setattr(batch_module, "MOST_LINES", 2)
    server.faults["GET /batches/ID"] = [refused(404)]
    with pytest.raises(ServerError, match=r"knows no batch batch-1.* ask its 2 prompts anew"):
        ask(server.url, path)
    assert path.exists()
    assert len(read_replies(path, all_requests(path), True)) == 3
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert_paid_once(server, 6)


def test_results_behind_a_redirect_are_told_and_given_up_where_users_say_so(server, path, capsys):
    away = lambda handler, act: handler.send("", 302, location="/v1/elsewhere")  # noqa: E731
    server.faults["GET /files/ID/content"] = [away] * 2
    with pytest.raises(
        ServerError, match=r"file-2 \(HTTP 302: it redirects elsewhere.* batch = false"
    ):
        ask(server.url, path)
    assert np.array_equal(ask(server.url, path, batch=False).probabilities, EXPECTED(6))
    assert "Its 5 prompts are asked anew" in capsys.readouterr().err


@pytest.mark.parametrize("mark", ["metadata", "input_file_id"])
def test_a_batch_that_was_not_written_down_is_found_on_any_page(server, path, mark, monkeypatch):
    with killed_after(6, monkeypatch), suppress(KilledError):
        ask(server.url, path)
    (left,) = read_batches(path, f"{server.url}/chat/completions", [*all_requests(path)], True)
    assert (len(server.batches), left.id) == (1, "")
    for number in range(2, 7):  # of others, meanwhile
        server.batches[f"batch-{number}"] = {"id": f"batch-{number}", "plan": ["completed"]}
    server.page = 2
    server.shape = lambda batch: {
        k: v for k, v in batch.items() if k in (mark, "id", "status", "output_file_id")
    }
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert server.seen["GET /batches"] == 3
    assert_paid_once(server, 6)


def all_requests(path):
    with closing(sqlite3.connect(path)) as connection:
        return [
            key
            for (told,) in connection.execute("select requests from batches")
            for key in json.loads(told)
        ]


def test_shapes_of_other_hosts(server, path, monkeypatch):
    """Together: states in capitals, a new batch inside "job", a list that is only a list."""
    server.faults["POST /batches"] = [lambda handler, act: handler.send({"job": act()})]
    server.faults["GET /batches"] = [lambda handler, act: handler.send(json.dumps(act()["data"]))]
    server.shape = lambda batch: {**batch, "status": batch["status"].upper()}
    with killed_after(6, monkeypatch), suppress(KilledError):
        ask(server.url, path)
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert_paid_once(server, 6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GET /batches", "does not list its batches .HTTP 405.*works on file file-1 already"),
        ("GET /batches/ID", "knows no batch batch-1 .HTTP 404"),
        ("GET /files/ID/content", "gives no file of results file-2 .HTTP 404"),
    ],
)
def test_a_batch_that_cannot_be_found_is_for_users_to_give_up(
    server, path, name, said, monkeypatch, capsys
):
    gone = refused(405 if name == "GET /batches" else 404)
    server.faults[name] = [gone] * 2
    steps = 6 if name == "GET /batches" else 1000
    with killed_after(steps, monkeypatch), suppress(KilledError, ServerError):
        ask(server.url, path)
    server.faults[name] = [gone] * 2
    with pytest.raises(
        ServerError, match=rf"{said}.* or set \[server\] batch = false to ask its 5 prompts anew"
    ):
        ask(server.url, path)
    assert len(server.bodies) == 1
    assert np.array_equal(ask(server.url, path, batch=False).probabilities, EXPECTED(6))
    assert re.search(rf"{said}.* Its 5 prompts are asked anew", capsys.readouterr().err)
    assert len(server.bodies) == 6


def test_results_that_are_not_named_yet_are_waited_for(server, path):
    server.shape = lambda batch: {**batch, "output_file_id": None}
    with pytest.raises(ServerError, match="has done batch batch-1 and names no file"):
        ask(server.url, path)
    server.shape = lambda batch: batch
    assert np.array_equal(ask(server.url, path).probabilities, EXPECTED(6))
    assert_paid_once(server, 6)


# Settings, budgets and other runs.


def test_a_budget_counts_lines(server, path):
    for spent in (3, 6):
        with pytest.raises(
            BudgetError, match="stopped after 3 requests; every answer is kept"
        ) as stopped:
            ask(server.url, path, 8, max_requests=3)
        assert stopped.value.exit_code == 75
        assert server.paid.total() + len(server.bodies) == spent
    assert np.array_equal(ask(server.url, path, 8, max_requests=2).probabilities, EXPECTED(8))
    ask(server.url, path, 8, max_requests=0)
    assert_paid_once(server, 8)


def test_a_budget_of_nothing_sends_nothing(server, path):
    with pytest.raises(BudgetError, match="stopped after 0 requests"):
        ask(server.url, path, max_requests=0)
    assert not server.seen
    assert not server.bodies


def test_a_dry_run_counts_batches_and_sends_nothing(server, path, monkeypatch):
    said = r"6 prompts, 0 answers in the journal, 6 requests and about [\d,]+ tokens to send, the first at once and "
    with pytest.raises(PendingError, match=said + "the others as 1 batch"):
        ask(server.url, path, dry_run=True)
    assert not path.exists()
    monkeypatch.setattr(batch_module, "MOST_LINES", 2)
    with pytest.raises(PendingError, match=said + "the others as 3 batches"):
        ask(server.url, path, dry_run=True)
    with killed_after(12, monkeypatch), suppress(KilledError):
        ask(server.url, path, 3)
    before = (server.seen.copy(), len(server.bodies))
    files = {file: file.read_bytes() for file in path.parent.iterdir()}
    said = r"8 prompts, 1 answers in the journal, 5 requests and .*; 2 prompts are under way at the server in 1 batch"
    with pytest.raises(PendingError, match=said):
        ask(server.url, path, 8, dry_run=True)
    assert before == (server.seen, len(server.bodies))
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == files


def test_batches_under_way_are_waited_for_where_batches_are_turned_off(server, path, monkeypatch):
    with killed_after(12, monkeypatch), suppress(KilledError):
        ask(server.url, path)
    assert len(server.batches) == 1
    assert np.array_equal(ask(server.url, path, 8, batch=False).probabilities, EXPECTED(8))
    assert len(server.batches) == 1
    assert_paid_once(server, 8)


def test_answers_to_prompts_that_nobody_asks_for_any_more_are_kept(server, path, monkeypatch):
    with killed_after(12, monkeypatch), suppress(KilledError):
        ask(server.url, path, 8)
    assert np.array_equal(ask(server.url, path, 2).probabilities, EXPECTED(2))
    seen = server.seen.copy()
    assert np.array_equal(ask(server.url, path, 8).probabilities, EXPECTED(8))
    assert server.seen == seen
    assert_paid_once(server, 8)


def test_one_process_asks(server, path):
    with open_journal(path), pytest.raises(LockedError, match="another process is asking"):
        ask(server.url, path)
    assert not server.bodies


def test_an_llm_that_never_answers_gets_no_file(server, path):
    server.say = lambda body: completion("no idea")
    with pytest.raises(ServerError, match="20 replies in a row were not valid"):
        ask(server.url, path, 60)
    assert not server.batches
    assert len(server.bodies) <= 25
    server.forget()
    server.say = lambda body: completion("no idea") if len(server.bodies) == 1 else rating(body)
    answers = ask(server.url, path.with_name("b.sqlite"), 60)
    assert answers.status.count("ok") == 59
    assert len(server.batches) == 1


def test_the_key_is_sent_and_stays_nowhere(server, path, monkeypatch, capfd):
    secret = "sk-3f9d-very-secret"
    monkeypatch.setenv("STACKLLM_API_KEY", secret)
    server.answer = lambda order, place, number: [
        line(order["custom_id"], completion(f"Bearer {secret}")),
        line(order["custom_id"], completion("7", model=secret)),
        line(order["custom_id"], {"error": {"message": f"wrong key {secret}"}}, 401),
        error_line(order["custom_id"], secret),
    ][min(place, 3)]
    answers = ask(server.url, path, 9, quiet=False)
    assert server.last_headers["authorization"] == f"Bearer {secret}"
    server.faults["POST /files"] = [
        refused(403, f"not with {secret}"),
        lambda handler, act: handler.send({"id": secret}),
    ]
    told = ""
    for _ in range(2):
        with pytest.raises(ServerError, match=r"file|batch") as caught:
            ask(server.url, path, 9)
        told += str(caught.value) + repr(caught.value)
    shown = "".join(capfd.readouterr()) + told + repr(answers)
    assert secret not in shown
    assert "text number" not in shown
    stored = b"".join(file.read_bytes() for file in path.parent.rglob("*") if file.is_file())
    assert secret.encode() not in stored


# The journal.


BATCH = Batch("name", "url", "tiny", ("a", "b"), 0, "file-1", "batch-1")


def test_a_batch_survives_the_journal_unchanged(path):
    with open_journal(path) as journal:
        journal.put_batch(BATCH)
        assert journal.under_way("url", ["b", "c"]) == [BATCH]
        assert journal.under_way("url", ["c"]) == []
        assert journal.under_way("other", ["b"]) == []
    assert read_batches(path, "url", ["a"], True) == [BATCH]
    with open_journal(path) as journal:
        journal.put_batch(Batch(**{**vars(BATCH), "is_over": True}))
    assert read_batches(path, "url", ["a"], False) == []


def test_a_journal_from_before_there_were_batches_is_read_on(path):
    with open_journal(path):
        pass
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("drop table batches")
    assert read_batches(path, "url", ["a"], True) == []
    assert read_replies(path, ["a"], True) == {}
    with open_journal(path) as journal:
        journal.put_batch(BATCH)
    assert read_batches(path, "url", ["a"], True) == [BATCH]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("requests", '["a"]'),
        ("url", "other"),
        ("id", "batch-2"),
        ("is_over", "1"),
        ("file", "f"),
        ("name", "x"),
    ],
)
def test_a_damaged_batch_is_never_used(path, column, value):
    with open_journal(path) as journal:
        journal.put_batch(BATCH)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"update batches set {column} = ?", (value,))
    with pytest.raises(StorageError, match=r"batch \w+ is damaged"):
        read_batches(path, "url", ["a"], True)


@given(st.lists(st.binary(max_size=9)), st.integers(1, 8), st.integers(1, 7))
def test_lines_are_cut_right_however_they_come(lines, most, size):
    content = b"\n".join(line.replace(b"\n", b"") for line in lines)
    chunks = [content[i : i + size] for i in range(0, len(content), size)]
    expected = [None if len(line) > most else line for line in content.split(b"\n")]
    if expected[-1] == b"":
        expected.pop()
    assert [*_split_lines(iter(chunks), most)] == expected
