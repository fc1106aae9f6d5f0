"""A list that only grows, whoever is killed at it and whatever happens to its bytes."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import LockedError, StorageError
from stackllm.store import ledger
from stackllm.store.ledger import append, read_ledger
from stackllm.store.lock import acquire

HOSTILE = st.text(st.characters(), max_size=60)


def add(path, *entries):
    return append(path, lambda _: entries)


@given(
    st.lists(
        st.dictionaries(HOSTILE.filter(lambda it: it != "self"), HOSTILE | st.floats(allow_nan=False, allow_infinity=False) | st.none()),
        max_size=5,
    )
)  # fmt: skip
def test_what_is_appended_is_read(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("ledger") / "book.jsonl"
    for entry in entries:
        add(path, entry)
    assert read_ledger(path) == ledger.Ledger(tuple(entries))
    assert not entries or path.read_bytes().count(b"\n") == len(entries)


@pytest.mark.parametrize("whole", [True, False])
def test_a_torn_last_line_is_repaired_by_the_next(tmp_path, whole):
    """Killed in its last line; where only the end of the line is lacking the entry counts."""
    path = tmp_path / "book.jsonl"
    add(path, {"n": 1})
    add(path, {"n": 2})
    content = path.read_bytes()
    for lost in range(1, len(content.splitlines()[1]) + 1):
        if (lost == 1) == whole:
            path.write_bytes(content[:-lost])
            before = [1, 2] if whole else [1]
            assert [it["n"] for it in read_ledger(path).entries] == before
            add(path, {"n": 3})
            assert [it["n"] for it in read_ledger(path).entries] == [*before, 3]
            assert not read_ledger(path).damaged


@given(at=st.integers(0, 10_000), by=st.integers(1, 255))
def test_a_changed_byte_costs_its_line_and_is_told(tmp_path_factory, at, by):
    path = tmp_path_factory.mktemp("ledger") / "book.jsonl"
    for n in range(3):
        add(path, {"n": n, "text": "é\n\u202e"})
    content = bytearray(path.read_bytes())
    at %= len(content) - 1  # the very last end of a line may go: see above
    content[at] ^= by
    path.write_bytes(content)
    read = read_ledger(path)
    whole = [{"n": n, "text": "é\n\u202e"} for n in range(3)]
    assert all(entry in whole for entry in read.entries)
    assert len(read.entries) >= 1
    # space for space is no other content
    assert read.damaged or list(read.entries) == whole
    add(path, {"n": 4})
    assert read_ledger(path).entries == (*read.entries, {"n": 4})


def test_nothing_is_written_that_is_not_json(tmp_path):
    add(tmp_path / "book.jsonl", {"n": 1})
    before = (tmp_path / "book.jsonl").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        add(tmp_path / "book.jsonl", {"n": 2}, {"n": float("nan")})
    assert (tmp_path / "book.jsonl").read_bytes() == before


def test_processes_at_once_lose_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from stackllm.store.ledger import append\n"
        "me, path = sys.argv[1], Path('book.jsonl')\n"
        "for n in range(25): append(path, lambda old: [{'me': me, 'n': n, 'before': len(old)}])\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(me)], cwd=tmp_path) for me in range(3)
    ]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    read = read_ledger(tmp_path / "book.jsonl")
    assert not read.damaged
    assert sorted((it["me"], it["n"]) for it in read.entries) == [
        (str(me), n) for me in range(3) for n in range(25)
    ]
    # each saw all that stood before it
    assert [it["before"] for it in read.entries] == list(range(75))


def test_who_waits_too_long_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "WAIT_SECONDS", 0.01)
    held = acquire(tmp_path / ".book.lock")
    with pytest.raises(LockedError, match="another process holds it"):
        add(tmp_path / "book.jsonl", {"n": 1})
    held.release()
    add(tmp_path / "book.jsonl", {"n": 1})


def test_a_disk_that_is_full_leaves_it_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "book.jsonl"
    add(path, {"n": 1})
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        add(path, {"n": 2})
    assert path.read_bytes() == before


def test_a_folder_in_its_place(tmp_path):
    (tmp_path / "book.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"book\.jsonl: reading failed"):
        read_ledger(tmp_path / "book.jsonl")
    assert read_ledger(tmp_path / "none.jsonl") == ledger.Ledger()


def test_it_is_plain_json(tmp_path):
    add(tmp_path / "book.jsonl", {"name": "é"})
    (line,) = (tmp_path / "book.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "é"
