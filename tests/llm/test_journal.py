"""No paid answer is lost and none is paid for twice, whenever the process is killed."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from chat_server import chat_server, completion

from stackllm.engine.local import PendingError
from stackllm.engine.progress import Reporter
from stackllm.errors import BudgetError, LockedError, StorageError, UsageError
from stackllm.llm.journal import open_journal
from stackllm.llm.rater import RaterParams
from stackllm.llm.replies import Reply
from stackllm.llm.server import ask_server as ask_all
from stackllm.llm.server import check_url, read_key
from stackllm.llm.transport import ServerParams
from stackllm.recipes.asked import Asked, Case

ASKED = Asked("gpt_rating", "rating", "Rate it.", tuple(map(str, range(1, 11))))
N_PROMPTS = 60
KILLS = int(os.environ.get("STACKLLM_KILLS", "3"))


def by_digest(prompt):
    return str(1 + int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10)


def answers_slowly(handler, body, number):
    time.sleep(0.02)
    handler.send(completion(by_digest(body["messages"][0]["content"])))


def ask(url, path, n=N_PROMPTS, dry_run=False, **server):
    params = ServerParams(requests_per_minute=0, **server)
    rater = RaterParams(url=url, model="tiny")
    cases = [Case("What?", (f"text number {i}",)) for i in range(n)]
    quiet = Reporter(quiet=True)
    (found,), _ = ask_all([(ASKED, cases)], rater, params, path, quiet, dry_run)
    return found


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    draw = random.Random(0)
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('journal_test', {__file__!r})\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "np.save(sys.argv[3], module.ask(sys.argv[1], Path(sys.argv[2])))\n"
    )
    with chat_server(answers_slowly) as server:
        undisturbed = ask(server.url, tmp_path / "whole.sqlite")
        asked_once = set(server.counts)
        assert len(asked_once) == N_PROMPTS
    with chat_server(answers_slowly) as server:
        # One address for all: it is part of what a request is known by.
        output = tmp_path / "found.npy"
        command = [
            sys.executable,
            "-c",
            code,
            server.url,
            str(tmp_path / "killed.sqlite"),
            str(output),
        ]
        kills = 0
        while not output.exists():
            process = subprocess.Popen(command, stderr=subprocess.PIPE)
            seen = len(server.bodies)
            goal = seen + draw.randint(1, max(1, N_PROMPTS // (KILLS + 1)))
            while kills < KILLS and process.poll() is None and len(server.bodies) < goal:
                time.sleep(0.001)
            if kills < KILLS and process.poll() is None:
                time.sleep(draw.random() * 0.03)
                process.send_signal(signal.SIGKILL)
                kills += 1
            _, said = process.communicate(timeout=60)
            assert process.returncode in (0, -signal.SIGKILL), said.decode()
    assert kills == KILLS
    assert np.array_equal(np.load(output), undisturbed)
    assert set(server.counts) == asked_once
    assert len(server.bodies) <= N_PROMPTS + KILLS * ServerParams().concurrency


def test_what_was_answered_is_not_asked_again(tmp_path):
    with chat_server(answers_slowly) as server:
        first = ask(server.url, tmp_path / "answers.sqlite", 10)
        second = ask(server.url, tmp_path / "answers.sqlite", 14)
        assert np.array_equal(second[:10], first)
        assert len(server.bodies) == 14
        ask(server.url, tmp_path / "answers.sqlite", 14)
        assert len(server.bodies) == 14


def test_invalid_answers_are_kept_too(tmp_path):
    with chat_server(lambda handler, *_: handler.send(completion("no idea"))) as server:
        for _ in range(2):
            found = ask(server.url, tmp_path / "answers.sqlite", 3)
            assert np.isnan(found).all()
    assert len(server.bodies) == 3


def test_max_requests_stops_and_the_next_run_goes_on(tmp_path):
    path = tmp_path / "answers.sqlite"
    with chat_server(answers_slowly) as server:
        for step in (1, 2, 3):
            with pytest.raises(BudgetError, match="stopped after 4 requests") as stopped:
                ask(server.url, path, 14, max_requests=4)
            assert stopped.value.exit_code == 75
            assert len(server.bodies) == 4 * step
        assert np.isfinite(ask(server.url, path, 14, max_requests=4)).all()
        assert len(server.bodies) == 14
        ask(server.url, path, 14, max_requests=0)


def test_a_dry_run_counts_and_sends_nothing(tmp_path):
    path = tmp_path / "answers.sqlite"
    with chat_server(answers_slowly) as server:
        ask(server.url, path, 3)
        said = r"5 prompts, 3 answers in the journal, 2 requests and about \d+ tokens to send"
        with pytest.raises(PendingError, match=said):
            ask(server.url, path, 5, dry_run=True)
        assert len(server.bodies) == 3
        assert np.isfinite(ask(server.url, path, 3, dry_run=True)).all()


def test_limits_a_minute_are_kept(tmp_path):
    with chat_server(answers_slowly) as server:
        params = ServerParams(requests_per_minute=600, concurrency=8)
        cases = [Case("", (f"{i}",)) for i in range(8)]
        started = time.monotonic()
        rater = RaterParams(url=server.url, model="tiny")
        quiet = Reporter(quiet=True)
        ask_all([(ASKED, cases)], rater, params, tmp_path / "a.sqlite", quiet, False)
    assert time.monotonic() - started >= 0.1 * 7


def test_a_reply_survives_the_journal_unchanged(tmp_path):
    reply = Reply("7", (("7", (("7", -0.1), ("é", -3.0))),), "stop", False, "tiny", 12)
    with open_journal(tmp_path / "a.sqlite") as journal:
        journal.put("key", "tiny", reply)
        journal.put("key", "tiny", Reply("8", (), "", False, "", 0))
    with open_journal(tmp_path / "a.sqlite") as journal:
        assert journal.get(["key", "other"]) == {"key": reply}


def test_every_answer_is_synced_before_it_is_used(tmp_path):
    with open_journal(tmp_path / "a.sqlite") as journal:
        pragma = lambda name: journal._connection.execute(f"pragma {name}").fetchone()[0]  # noqa: E731
        assert pragma("journal_mode") == "wal"
        assert pragma("synchronous") == 2  # full


def test_journals_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.sqlite"
    path.write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(StorageError, match="can't be used"), open_journal(path):
        pass
    with (
        open_journal(tmp_path / "b.sqlite"),
        pytest.raises(LockedError, match="another process is asking"),
        open_journal(tmp_path / "b.sqlite"),
    ):
        pass


def test_the_key_is_sent_and_stays_nowhere(tmp_path, monkeypatch, capfd):
    secret = "sk-3f9d-very-secret"
    monkeypatch.setenv("STACKLLM_API_KEY", secret)

    def echoes(handler, body, number):
        answer = completion(f"Bearer {secret}" if number == 1 else "7", model="tiny")
        handler.send(answer)

    with chat_server(echoes) as server:
        ask(server.url, tmp_path / "answers.sqlite", 2)
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {secret}"}
    with (
        chat_server(lambda handler, *_: handler.send(f"wrong key {secret}", 401)) as server,
        pytest.raises(Exception, match="refuses the API key") as caught,
    ):
        ask(server.url, tmp_path / "answers.sqlite", 2)
    shown = "".join(capfd.readouterr())
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert secret not in shown + str(caught.value) + repr(caught.value)
    assert secret.encode() not in stored
    monkeypatch.setenv("STACKLLM_API_KEY", "sk-one\r\nx-two: 3")
    with pytest.raises(UsageError, match="characters that no API key has") as caught:
        read_key()
    assert "sk-one" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.org/v1", "unencrypted"),
        ("http://127.0.0.1.example.org/v1", "unencrypted"),
        ("http://10.0.0.1/v1", "unencrypted"),
        ("ftp://127.0.0.1/v1", "must be such as"),
        ("127.0.0.1:8000/v1", "must be such as"),
        ("https://host:port/v1", "must be such as"),
        ("https://host/v1?key=1", "must be such as"),
        ("https://user:hunter2@host/v1", "must not hold a password"),
    ],
)
def test_addresses_that_are_refused(url, said):
    with pytest.raises(UsageError, match=said) as caught:
        check_url(url, allow_http=False)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.9.9.9"])
def test_plain_http_may_stay_on_this_machine(host):
    assert check_url(f"http://{host}:8/v1/", False) == f"http://{host}:8/v1/chat/completions"


def test_plain_http_elsewhere_only_if_allowed():
    assert check_url("http://lan.example/v1", True) == "http://lan.example/v1/chat/completions"


def test_a_budget_that_ends_among_failures_is_still_a_budget(tmp_path):
    with chat_server(lambda handler, *_: handler.send("", 503)) as server:
        params = {"max_requests": 12, "concurrency": 12, "backoff_seconds": 0.01}
        with pytest.raises(BudgetError, match="stopped after 12 requests"):
            ask(server.url, tmp_path / "a.sqlite", 30, **params)
    assert len(server.bodies) == 12
