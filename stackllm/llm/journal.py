"""The journal: every answer a server gave, on disk before it is used.

One SQLite file in write-ahead mode with full syncs, so an answer that :meth:`Journal.put` took
survives a killed process and a power cut. One process at a time asks and writes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from stackllm.errors import LockedError, StorageError
from stackllm.llm.replies import Reply
from stackllm.store.atomic import storage_errors

_TABLE = """
create table if not exists replies (
    request text primary key,
    model text not null,
    reply text not null,
    stored text not null default (datetime('now'))
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
        found = {}
        for request in requests:
            row = self._connection.execute(
                "select reply from replies where request = ?", (request,)
            ).fetchone()
            if row:
                try:
                    found[request] = Reply.load(row[0])
                except (ValueError, KeyError, TypeError) as error:
                    raise sqlite3.DatabaseError(f"reply {request[:12]} is damaged") from error
        return found

    def put(self, request: str, model: str, reply: Reply) -> None:
        """Commit a reply; what is there already stays."""
        with self._connection:
            self._connection.execute(
                "insert or ignore into replies (request, model, reply) values (?, ?, ?)",
                (request, model, reply.dump()),
            )


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
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    with storage_errors(path, "locking"):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise LockedError(
                f"{path}: another process is asking a server. Wait for it, so that nothing is paid for twice."
            ) from error
    try:
        connection = sqlite3.connect(path, timeout=10)
        try:
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = full")
            connection.execute(_TABLE)
            yield Journal(connection)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StorageError(
            f"{path}: this journal of answers can't be used ({error}). Move it away to ask everything anew, "
            "or put back a copy."
        ) from error
    finally:
        lock.release()
