"""The journal: every answer a server gave, on disk before it is used.

One SQLite file in write-ahead mode with full syncs, so an answer that :meth:`Journal.put` took
survives a killed process and a power cut. One process at a time asks and writes.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from filelock import Timeout

from stackllm.errors import LockedError, StorageError
from stackllm.rating.replies import Reply
from stackllm.store.atomic import make_folder, storage_errors
from stackllm.store.lock import acquire

_TABLE = """
create table if not exists replies (
    request text primary key,
    model text not null,
    reply text not null,
    stored text not null default (datetime('now')),
    digest text
) without rowid
"""


class Journal:
    """Replies by the digest of their request.

    Parameters
    ----------
    connection
        An open database; see :func:`open_journal`.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def get(self, requests: Iterable[str]) -> dict[str, Reply]:
        """The replies that are there, by request."""
        replies = {}
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
        told = reply.dump()
        with self._connection:
            self._connection.execute(
                "insert or ignore into replies (request, model, reply, digest) values (?, ?, ?, ?)",
                (request, model, told, _digest(request, model, told)),
            )


def _digest(request: str, model: str, reply: str) -> str:
    return hashlib.sha256(f"{request}\0{model}\0{reply}".encode()).hexdigest()[:32]


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
            connection.execute(_TABLE)
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
    mode = "mode=rw"
    if untouched:  # SQLite leaves files beside a journal that it may read only and not lock
        mode = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    with _connected(path, f"{path.absolute().as_uri()}?{mode}") as connection:
        if not connection.execute("select 1 from sqlite_master where name = 'replies'").fetchone():
            return {}
        return Journal(connection).get(requests)


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
