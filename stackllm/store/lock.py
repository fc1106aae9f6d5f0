"""One writer per run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from stackllm.errors import LockedError
from stackllm.store.atomic import (
    UNSUPPORTED,
    make_folder,
    process_exists,
    storage_errors,
    write_text,
)
from stackllm.store.folder import open_folder
from stackllm.store.records import read_json

_HOLDER_SECONDS = 3.0
"""How long to wait for the name of a holder that has only just taken the lock."""


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; the system frees it however the process ends.

    Raises
    ------
    LockedError
        If another process holds it, with that process's number and machine.
    StorageError
        If the folder cannot be written, or a link in it leads elsewhere.
    """
    with storage_errors(root, "making the run's folder"):
        make_folder(root)
    holder = root / ".lock.json"
    with storage_errors(root, "locking"):
        try:
            lock = acquire(root / ".lock")
        except Timeout as error:
            raise LockedError(
                f"{root}: {_holder(holder)} is writing this run. Wait for it, or choose another with the setting name."
            ) from error
    try:
        write_text(holder, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        open_folder(root)
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def is_locked(root: Path) -> bool:
    """Does a process hold the lock of a run's folder right now?"""
    if not (root / ".lock").is_file():
        return False
    try:
        acquire(root / ".lock").release()
    except Timeout:
        return True
    except OSError:  # a folder that we may only read: nobody of this user writes it
        return False
    return False


def acquire(path: Path, seconds: float = 0.0) -> BaseFileLock:
    """The system's lock, or filelock's ``Timeout`` after so many seconds; on a disk that knows none, a file that stands for one."""
    lock: BaseFileLock = FileLock(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # filelock's own, where flock is unknown
            lock.acquire(timeout=seconds)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in {*UNSUPPORTED, errno.ENOLCK}:
            raise
        lock = SoftFileLock(path.with_suffix(".soft"))
        lock.acquire(timeout=seconds)
    return lock


def _holder(path: Path) -> str:
    """Who holds the lock; a name that a killed holder left is not believed."""
    deadline = time.monotonic() + _HOLDER_SECONDS
    while time.monotonic() < deadline:
        try:
            holder = read_json(path)
            pid, host = int(holder["pid"]), str(holder["host"])
        except (OSError, ValueError, KeyError, TypeError):
            pid, host = 0, ""
        if pid and (host != socket.gethostname() or process_exists(pid)):
            return f"process {pid} on {host}"
        time.sleep(0.05)
    return "another process"
