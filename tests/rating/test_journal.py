"""No paid answer is lost and none is paid for twice, whenever the process is killed."""

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from chat_server import chat_server, completion

from stackllm.engine.local import Engine, PendingError
from stackllm.engine.progress import Reporter
from stackllm.errors import BudgetError, LockedError, StorageError, UsageError
from stackllm.llm.encode import EncoderParams
from stackllm.members.build import build_inputs
from stackllm.rating.address import check_url, read_key
from stackllm.rating.ask import ask as ask_recipes
from stackllm.rating.journal import open_journal, read_replies
from stackllm.rating.local import RaterParams
from stackllm.rating.question import Asked, Case
from stackllm.rating.replies import Reply, read_reply
from stackllm.rating.requests import ServerParams
from stackllm.rating.server import ask_server as ask_all
from stackllm.recipes.loader import find_recipes
from stackllm.workspace import Workspace

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
    (answered,) = ask_all([(ASKED, cases)], rater, params, path, quiet, dry_run)
    return answered.questions[0].probabilities


def rows_of(path):
    """Answers that a stopped process has committed."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("select count(*) from replies").fetchone()[0]


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
        in_flight = []
        while not output.exists():
            process = subprocess.Popen(command, stderr=subprocess.PIPE)
            seen = len(server.bodies)
            goal = seen + draw.randint(1, max(1, N_PROMPTS // (KILLS + 1)))
            early = len(in_flight) < KILLS
            if early:
                assert server.wait_for(lambda goal=goal: len(server.bodies) >= goal)
                time.sleep(draw.random() * 0.03)  # at any moment between two requests
                process.send_signal(signal.SIGKILL)
            _, said = process.communicate(timeout=60)
            if early and process.returncode:
                server.read_all()
                lost = len(server.bodies) - sum(in_flight) - rows_of(tmp_path / "killed.sqlite")
                in_flight.append(lost)
            assert process.returncode in (0, -signal.SIGKILL), said.decode()
    assert len(in_flight) == KILLS
    assert np.array_equal(np.load(output), undisturbed)
    assert set(server.counts) == asked_once
    assert max(in_flight) <= ServerParams().concurrency
    assert len(server.bodies) <= N_PROMPTS + sum(in_flight)


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


def test_a_dry_run_leaves_nothing_behind(tmp_path):
    path = tmp_path / "cache/answers.sqlite"
    with pytest.raises(PendingError, match="0 answers in the journal, 2 requests"):
        ask("https://nowhere.example/v1", path, 2, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    with chat_server(answers_slowly) as server:
        ask(server.url, path, 3)
        before = {file: file.read_bytes() for file in path.parent.iterdir()}
        with pytest.raises(PendingError, match="3 answers in the journal, 2 requests"):
            ask(server.url, path, 5, dry_run=True)
        assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_dry_run_counts_rows_and_every_recipe_at_once(tmp_path):
    rows = pl.DataFrame(
        [("g", "q1", f"r{i % 3}") for i in range(4)] + [("h", "q2", "r")],
        schema=["group_id", "question", "response"], orient="row",
    )  # fmt: skip
    paths = [Path(f"features/{name}.toml") for name in ("gpt_rating", "category")]
    cache = Engine(tmp_path, 1, Reporter(quiet=True), dry_run=True)
    units = {"gpt_rating": "4 of 4 prompts to ask", "category": "2 of 2 prompts to ask"}
    for rater, said in (
        (
            RaterParams(url="https://nowhere.example/v1", model="tiny"),
            r"5 rows; rater tiny: 6 prom",
        ),
        (
            RaterParams(),
            r"5 rows; gpt_rating: 4 of 4 prompts to ask, category: 2 of 2 .*about \d+ tok",
        ),
    ):
        with pytest.raises(PendingError, match=said) as pending:
            ask_recipes(paths, rows, rater, ServerParams(), cache)
        assert pending.value.units == units
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_what_may_cost_money_before_it_stops_at_the_encoder(tmp_path):
    rows = pl.DataFrame(
        [("a", "g", "q", "r1"), ("b", "g", "q", "r2")],
        schema=["row_id", "group_id", "question", "response"], orient="row",
    )  # fmt: skip
    dry = Engine(tmp_path, 1, Reporter(quiet=True), dry_run=True)
    rater = RaterParams(ask=("gpt_rating",), url="https://nowhere.example/v1", model="tiny")
    with pytest.raises(PendingError, match="2 rows; rater tiny: 2 prompts"):
        build_inputs(
            "table",
            rows,
            EncoderParams(),
            find_recipes(ask=("gpt_rating",)),
            Workspace(dry, dry),
            rater=rater,
        )


def test_what_needs_no_requests_does_not_wait_for_another_process(tmp_path):
    path = tmp_path / "answers.sqlite"
    with chat_server(answers_slowly) as server:
        first = ask(server.url, path, 3)
        with open_journal(path):
            assert np.array_equal(ask(server.url, path, 3), first)
            assert np.array_equal(ask(server.url, path, 3, dry_run=True), first)
            with pytest.raises(PendingError, match="3 answers in the journal"):
                ask(server.url, path, 4, dry_run=True)
            with pytest.raises(LockedError, match="another process is asking"):
                ask(server.url, path, 4)


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


REPLY = Reply("7", (), "stop", False, "tiny", 0)
DAMAGE = [
    ("another answer", "update replies set reply = replace(reply, '\"7\"', '\"8\"')"),
    ("another request", "update replies set request = 'other'"),
    ("no reply", "update replies set digest = null, reply = '\"abc\"'"),
    ("a list", "update replies set digest = null, reply = '[1]'"),
    (
        "a number",
        'update replies set digest = null, reply = replace(reply, \'"text": "7"\', \'"text": 7\')',
    ),
    ("no tokens", "update replies set digest = null, reply = replace(reply, '[]', '[[1]]')"),
]


@pytest.mark.parametrize(("name", "harm"), DAMAGE, ids=[name for name, _ in DAMAGE])
def test_a_damaged_reply_is_never_used(name, harm, tmp_path):
    path = tmp_path / "a.sqlite"
    with open_journal(path) as journal:
        journal.put("key", "tiny", REPLY)
    with closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(harm).rowcount == 1
        (left,) = connection.execute("select request || reply from replies").fetchone()
        assert left != "key" + REPLY.dump()
    key = "other" if name == "another request" else "key"
    with pytest.raises(StorageError, match="is damaged"), open_journal(path) as journal:
        journal.get([key])
    with pytest.raises(StorageError, match="is damaged"):
        read_replies(path, [key], untouched=True)


def test_a_journal_from_before_there_were_digests_is_read_on(tmp_path):
    path = tmp_path / "a.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "create table replies (request text primary key, model text not null, reply text not null, "
            "stored text not null default (datetime('now'))) without rowid"
        )
        values = ("key", "tiny", REPLY.dump())
        connection.execute("insert into replies (request, model, reply) values (?, ?, ?)", values)
    assert read_replies(path, ["key"], untouched=True) == {"key": REPLY}
    with open_journal(path) as journal:
        journal.put("new", "tiny", REPLY)
        assert journal.get(["key", "new"]) == {"key": REPLY, "new": REPLY}


def test_a_disk_without_write_ahead_is_refused(tmp_path, monkeypatch):
    original = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *_, **__: original(":memory:")
    )  # it can't either
    with (
        pytest.raises(StorageError, match="its mode is memory"),
        open_journal(tmp_path / "a.sqlite"),
    ):
        pass


def test_nothing_in_a_reply_is_kept_without_a_bound():
    answer = completion("7" * 10**6, model="m" * 10**6)
    answer["choices"][0]["finish_reason"] = "f" * 10**6
    assert len(read_reply(json.dumps(answer).encode()).dump()) < 4000


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


SECRET = "sk-3f/9d-secret"
ECHOES = [
    ("an escaped slash", json.dumps(completion(f"Bearer {SECRET}")).replace("/", "\\/")),
    ("an escaped letter", json.dumps(completion(SECRET)).replace("s", "\\u0073")),
    ("the finish", json.dumps(completion("7")).replace('"stop"', f'"{SECRET}"')),
    ("the model", json.dumps(completion("7", model=SECRET))),
    ("at the cut", json.dumps(completion("x" * 190 + SECRET))),
    ("tokens", json.dumps(completion("7", [(part, {part: 1.0}) for part in ("sk-3f/", "9d-secret")]))),
    ("a token", json.dumps(completion("7", [("7", {"7": 0.5, f"x{SECRET}": 0.5})]))),
    ("past the tokens kept", json.dumps(completion("7", [(part, {part: 1.0}) for part in ["x"] * 15 + [*SECRET]]))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "body"), ECHOES, ids=[name for name, _ in ECHOES])
def test_the_key_is_never_kept_however_a_server_writes_it(name, body):
    kept = read_reply(body.encode(), SECRET)
    every = kept.dump() + "".join(token for token, _ in kept.tokens)
    assert SECRET not in every
    assert "sk-3f" not in every  # nor a part


@pytest.mark.parametrize("key", ["1", "7", "a", "content", "token", "EMPTY"])
def test_a_key_that_is_none_spoils_no_reply(key):
    body = json.dumps(completion("7", [("7", {"7": 0.75, "1": 0.25})])).encode()
    assert read_reply(body, key) == read_reply(body)
    assert read_reply(body, key).tokens


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.org/v1", "unencrypted"),
        ("http://127.0.0.1.example.org/v1", "unencrypted"),
        ("http://10.0.0.1/v1", "unencrypted"),
        ("ftp://127.0.0.1/v1", "must be such as"),
        ("127.0.0.1:8000/v1", "must be such as"),
        ("https://host:port/v1", "must be such as"),
        ("https://host/v1?key=hunter2", "must be such as"),
        ("user:hunter2@host/v1", "must be such as"),
        ("https:/user:hunter2@host/v1", "must be such as"),
        ("http://[::1/hunter2", "must be such as"),
        ("https://host/hunter2\x01", "must be such as"),
        ("https://host/v1 hunter2", "must be such as"),
        ("https://host/v1\nhunter2", "must be such as"),
        ("https://host/hunter2" + "a" * 70_000, "must be such as"),
        ("http://host/hunter2", "to host unencrypted"),
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
