"""One writer a run."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from stackllm.errors import LockedError
from stackllm.store.atomic import storage_errors


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; the system frees it however the process ends.

    Raises
    ------
    LockedError
        If another process holds it, with that process's number and machine.
    """
    with storage_errors(root, "making the run's folder"):
        root.mkdir(parents=True, exist_ok=True)
    holder = root / ".lock.json"
    lock = FileLock(root / ".lock")
    with storage_errors(root, "locking"):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise LockedError(
                f"{root}: {_holder(holder)} is writing this run. Wait for it, or choose another with --name."
            ) from error
    try:
        holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"
