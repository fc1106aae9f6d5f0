"""stackllm with a fault at one of its writes.

Every change to a file below the working directory is a boundary: opening for writing, making,
renaming and removing (an audit hook sees them before they happen), ``fsync`` and ``replace`` (before
and after), and polars' own writers, which Python does not see. The boundaries met are noted in a file
beside the working directory that is named like it and ends in ``.boundaries``.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.campaign.commands import stackllm

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
_REMOVALS = {"os.remove", "os.rmdir"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Fault:
    """Counts boundaries and strikes at one of them."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.at, self.count, self.busy = kind, at, 0, False
        self.home = str(Path.cwd()) + os.sep
        self.log = os.open(
            Path.cwd().with_suffix(".boundaries"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        )

    def boundary(self, what: str, path: object, after: bool = False) -> None:
        """One boundary: nothing, death, or an error."""
        where = self._path(path)
        if self.busy or not where.startswith(self.home):
            return
        os.write(self.log, f"{what} {where}\n".encode())
        self.count += 1
        if self.kind in {"kill", "tear"} and self.count - 1 == self.at:
            self.busy = True
            if self.kind == "tear" and os.path.isfile(where):
                os.truncate(where, os.path.getsize(where) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind.startswith("E") and self.count > self.at and not after:
            number = getattr(errno, self.kind)
            raise OSError(number, os.strerror(number), where)

    def _path(self, path: object) -> str:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return (
            os.path.abspath(os.fsdecode(path))
            if isinstance(path, str | bytes | os.PathLike)
            else ""
        )

    def audit(self, event: str, details: tuple[Any, ...]) -> None:
        """What the interpreter is about to do."""
        if event == "open" and isinstance(details[2], int) and details[2] & _WRITING:
            self.boundary("open", details[0])
        elif event in _CHANGES and not (event in _REMOVALS and self.kind.startswith("E")):
            self.boundary(event, details[0])  # no error keeps anybody from cleaning up

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function with a boundary before and one after it."""

        def wrapped(*args: Any, **options: Any) -> Any:
            path = args[1] if len(args) > 1 else args[0]
            self.boundary(f"before {name}", path)
            result = function(*args, **options)
            self.boundary(f"after {name}", path, after=True)
            return result

        return wrapped


def strike(kind: str, at: int, *arguments: str) -> None:
    """Run a command with a fault; the process is good for nothing else.

    Parameters
    ----------
    kind
        ``kill``, ``tear`` (cut the file in half, then kill), or the name of an error such as
        ``ENOSPC``, which every write from ``at`` on gets.
    at
        Which write.
    arguments
        Of ``stackllm``.
    """
    import polars as pl

    fault = Fault(kind, at)
    os.fsync = fault.around("fsync", os.fsync)
    os.replace = fault.around("replace", os.replace)
    for name in ("write_parquet", "write_csv"):
        setattr(pl.DataFrame, name, fault.around(name, getattr(pl.DataFrame, name)))
    sys.addaudithook(fault.audit)
    stackllm(*arguments)


def limited(n_bytes: int, *arguments: str) -> None:
    """Run a command under a system that lets no file grow past ``n_bytes``."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    stackllm(*arguments)
