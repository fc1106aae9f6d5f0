"""The journal: every answer a server gave and every batch it works on, on disk before it is used.

One SQLite file in write-ahead mode with full syncs, so an answer that :meth:`Journal.put` took
survives a killed process and a power cut. One process at a time asks and writes.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import Timeout

from stackllm.errors import LockedError, StorageError
from stackllm.rating.replies import Reply
from stackllm.store.atomic import make_folder, storage_errors
from stackllm.store.lock import acquire

_TABLES = (
    """
create table if not exists replies (
    request text primary key,
    model text not null,
    reply text not null,
    stored text not null default (datetime('now')),
    digest text
) without rowid
""",
    """
create table if not exists batches (
    name text primary key,
    url text not null,
    model text not null,
    requests text not null,
    keep integer not null,
    file text not null,
    id text not null,
    is_over integer not null,
    stored text not null default (datetime('now')),
    digest text not null
) without rowid
""",
)


@dataclass(frozen=True)
class Batch:
    """Requests that were handed over to a server as one file.

    Parameters
    ----------
    name
        Ours, a digest; the server keeps it beside the batch.
    url
        Of the chat completions.
    model
        That is asked.
    requests
        Their digests, in the order of the file's lines.
    keep
        Tokens to keep of a reply; see :func:`~stackllm.rating.replies.read_reply`.
    file
        The server's name for the file.
    id
        The server's name for the batch; empty until it has told it.
    is_over
        Whether nothing more is to come of it.
    """

    name: str
    url: str
    model: str
    requests: tuple[str, ...]
    keep: int
    file: str
    id: str = ""
    is_over: bool = False


class Journal:
    """Replies by the digest of their request, and batches.

    Parameters
    ----------
    connection
        An open database; see :func:`open_journal`.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def get(self, requests: Iterable[str]) -> dict[str, Reply]:
        """The replies that are there, by request."""
        replies: dict[str, Reply] = {}
        if not self._has("replies"):
            return replies
        for request in requests:
            row = self._connection.execute(
                "select * from replies where request = ?", (request,)
            ).fetchone()
            if row:
                _, model, reply, _, *known = row
                try:
                    if any(known) and known != [_digest(request, model, reply)]:
                        raise ValueError("not what was stored")
                    replies[request] = Reply.load(reply)
                except (ValueError, TypeError, OverflowError) as error:
                    raise sqlite3.DatabaseError(f"reply {request[:12]} is damaged") from error
        return replies

    def put(self, request: str, model: str, reply: Reply) -> None:
        """Commit a reply; what is there already stays."""
        self.put_all([(request, reply)], model)

    def put_all(self, replies: Iterable[tuple[str, Reply]], model: str) -> None:
        """Commit replies to requests at once, which takes one sync; what is there already stays."""
        told = [(request, model, reply.dump()) for request, reply in replies]
        with self._connection:
            self._connection.executemany(
                "insert or ignore into replies (request, model, reply, digest) values (?, ?, ?, ?)",
                [(*row, _digest(*row)) for row in told],
            )

    def put_batch(self, batch: Batch) -> None:
        """Commit a batch in the place of what was known of it."""
        row = _row(batch)
        with self._connection:
            self._connection.execute(
                "insert or replace into batches (name, url, model, requests, keep, file, id, is_over, digest) "
                "values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, _digest(*map(str, row))),
            )

    def under_way(self, url: str, requests: Collection[str]) -> list[Batch]:
        """The batches at an address that are not over and hold one of these requests."""
        if not self._has("batches"):  # of an older journal that we only read
            return []
        wanted, batches = {*requests}, []
        for *row, known in self._connection.execute(
            "select name, url, model, requests, keep, file, id, is_over, digest from batches order by stored, name"
        ):
            if known != _digest(*map(str, row)):
                raise sqlite3.DatabaseError(f"batch {row[0][:12]} is damaged")
            name, at, model, listed, keep, file, number, is_over = row
            batch = Batch(
                name, at, model, tuple(json.loads(listed)), keep, file, number, bool(is_over)
            )
            if at == url and not is_over and not wanted.isdisjoint(batch.requests):
                batches.append(batch)
        return batches

    def _has(self, table: str) -> bool:
        query = "select 1 from sqlite_master where name = ?"
        return self._connection.execute(query, (table,)).fetchone() is not None


def _row(batch: Batch) -> tuple[str | int, ...]:
    values = {
        **asdict(batch),
        "requests": json.dumps(batch.requests),
        "is_over": int(batch.is_over),
    }
    return tuple(values.values())


def _digest(*values: str) -> str:
    return hashlib.sha256("\0".join(values).encode()).hexdigest()[:32]


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Open or make the journal at ``path`` and hold it until done.

    Raises
    ------
    LockedError
        If another process is asking.
    StorageError
        If the file is no journal, is damaged, or can't be written.
    """
    with storage_errors(path, "making its folder"):
        make_folder(path.parent)
    with storage_errors(path, "locking"):
        try:
            lock = acquire(path.with_suffix(".lock"))
        except Timeout as error:
            raise LockedError(
                f"{path}: another process is asking a server. Wait for it, so that nothing is paid for twice."
            ) from error
    try:
        with _connected(path, path) as connection:
            (mode,) = connection.execute("pragma journal_mode = wal").fetchone()
            if mode != "wal":
                raise StorageError(
                    f"{path}: the disk does not let SQLite write ahead (its mode is {mode}), so a paid answer could be "
                    "lost. Put the artifacts on a local disk."
                )
            connection.execute("pragma synchronous = full")
            for table in _TABLES:
                connection.execute(table)
            columns = [column for _, column, *_ in connection.execute("pragma table_info(replies)")]
            if "digest" not in columns:  # a journal from before there were any
                connection.execute("alter table replies add column digest text")
            yield Journal(connection)
    finally:
        lock.release()


def read_replies(path: Path, requests: Collection[str], untouched: bool) -> dict[str, Reply]:
    """What the journal at ``path`` holds, whoever is asking meanwhile.

    Parameters
    ----------
    path
        The journal; there need be none.
    requests
        What to look for.
    untouched
        Leave nothing beside the journal, not even for a moment.

    Raises
    ------
    StorageError
        If the file is no journal or is damaged.
    """
    if not requests or not path.is_file():
        return {}
    with _reading(path, untouched) as journal:
        return journal.get(requests)


def read_batches(path: Path, url: str, requests: Collection[str], untouched: bool) -> list[Batch]:
    """The batches that are under way; as :meth:`Journal.under_way` and :func:`read_replies`."""
    if not requests or not path.is_file():
        return []
    with _reading(path, untouched) as journal:
        return journal.under_way(url, requests)


@contextmanager
def _reading(path: Path, untouched: bool) -> Iterator[Journal]:
    mode = "mode=rw"
    if untouched:  # SQLite leaves files beside a journal that it may read only and not lock
        mode = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    with _connected(path, f"{path.absolute().as_uri()}?{mode}") as connection:
        yield Journal(connection)


@contextmanager
def _connected(path: Path, address: Path | str) -> Iterator[sqlite3.Connection]:
    try:
        # The event loop may run in a thread of its own; only ever one uses the connection.
        connection = sqlite3.connect(
            address, timeout=10, uri=isinstance(address, str), check_same_thread=False
        )
        with closing(connection):
            yield connection
    except sqlite3.Error as error:
        raise StorageError(
            f"{path}: this journal of answers can't be used ({error}). Move it away to ask everything anew, "
            "or put back a copy."
        ) from error
