"""A list that only ever grows: one JSON object per line, each with its digest, in a file that processes share."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from stackllm.errors import LockedError
from stackllm.store.atomic import fsync_folder, make_folder, storage_errors
from stackllm.store.digest import digest
from stackllm.store.lock import acquire

WAIT_SECONDS = 30.0
"""How long to wait for others that append: each takes milliseconds."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Ledger:
    """What a file of entries holds.

    Parameters
    ----------
    entries
        Whole ones, in the order in which they were appended.
    damaged
        Numbers, from 1, of lines that are not as they were written; they are passed over.
    """

    entries: tuple[Entry, ...] = ()
    damaged: tuple[int, ...] = ()


def read_ledger(path: Path) -> Ledger:
    """All entries of a file; none where there is no file.

    What stands behind the last end of a line is being written now, or its writer was killed. It counts if it
    is whole, and is no damage if it isn't: nobody was told that it is there.

    Raises
    ------
    StorageError
        If the system refuses to read it.
    """
    with storage_errors(path, "reading"):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
    *lines, last = content.split(b"\n")
    read = [_entry(line) for line in lines]
    damaged = tuple(number for number, entry in enumerate(read, 1) if entry is None)
    entries = [entry for entry in (*read, _entry(last)) if entry is not None]
    return Ledger(tuple(entries), damaged)


def append(path: Path, make: Callable[[Sequence[Entry]], Sequence[Entry]]) -> list[Entry]:
    """Add entries to a file that may not be there yet, all of them or none; others wait meanwhile.

    Parameters
    ----------
    path
        The file.
    make
        Gets the entries that are there, and gives those to add: what JSON can hold. It runs under the
        lock, so that two processes that add what is not there yet add it once.

    Returns
    -------
    list of dict
        What was added.

    Raises
    ------
    LockedError
        If others held the file for long.
    StorageError
        If it cannot be read or written; it is as it was then.
    """
    with storage_errors(path, "writing"), _held(path):
        added = list(make(read_ledger(path).entries))
        if added:
            _write(path, b"".join(map(_line, added)))
    return added


def _write(path: Path, content: bytes) -> None:
    is_new = not path.exists()
    if is_new:
        path.touch()
    with path.open("r+b") as file:
        whole = file.read()
        end = whole.rfind(b"\n") + 1
        rest = whole[end:]
        if rest and _entry(rest) is not None:  # its writer was killed before the end of the line
            end, content = len(whole), b"\n" + content
        try:
            file.seek(end)
            file.truncate()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(
                OSError
            ):  # what part of it was written is torn, and goes next time
                file.truncate(end)
            raise
    if is_new:
        fsync_folder(path.parent)


def _line(entry: Entry) -> bytes:
    text = json.dumps({**entry, "self": digest(entry)}, allow_nan=False)
    return text.encode() + b"\n"


def _entry(line: bytes) -> Entry | None:
    """What a line holds; None if that is not what was written."""
    try:
        entry = json.loads(line)
        if entry.pop("self") == digest(entry):
            return dict(entry)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None


@contextmanager
def _held(path: Path) -> Iterator[None]:
    make_folder(path.parent)
    try:
        lock = acquire(path.with_name(f".{path.stem}.lock"), WAIT_SECONDS)
    except Timeout as error:
        raise LockedError(
            f"{path}: another process holds it for more than {WAIT_SECONDS:.0f} s. "
            "Run the same command again once that has ended."
        ) from error
    try:
        yield
    finally:
        lock.release()
