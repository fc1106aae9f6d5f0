"""What libraries say of their own goes into a file beside the units: our users are told by us."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

LOG = "libraries.log"
"""File in a run's folder: what libraries warn of, log and print, and all that workers print as errors."""


def hush() -> None:
    """Keep warnings and log lines of libraries off the terminal for the rest of this process.

    For a command's process only: whoever imports stackllm has settings of their own. Python's
    ``-W`` and ``PYTHONWARNINGS`` show them again.
    """
    if not sys.warnoptions:
        warnings.showwarning = lambda *arguments, **named: None
    logging.getLogger().addHandler(logging.NullHandler())  # else Python prints what nobody handles


@contextlib.contextmanager
def overheard(log: Path, unit: str) -> Iterator[None]:
    """Write what libraries warn of, log and print inside to a file.

    Standard output is for what a command tells, JSON perhaps; LightGBM prints there, and a user's class may.

    Parameters
    ----------
    log
        Is added to; made only if there is something to write.
    unit
        Named in front of every line.
    """

    def write(text: str) -> None:
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(f"{unit}: {line}\n" for line in text.splitlines()))

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        write(f"{category.__name__}: {message} ({filename}:{lineno})")

    handler, printed = _Lines(write), _Printed(write)
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        if not sys.warnoptions:
            warnings.showwarning = show
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            printed.write("\n")  # what stands in a line that nobody ended


@contextlib.contextmanager
def errors_to(log: Path) -> Iterator[None]:
    """Let all that this process prints as errors go to a file, whoever prints it.

    So what a crash leaves is found there too, and progress bars and lines of compiled code are.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    sys.stderr.flush()
    before = os.dup(2)
    try:
        os.dup2(file, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
        os.close(file)


class _Lines(logging.Handler):
    """Passes warnings and errors of all loggers on as text."""

    def __init__(self, write: Any) -> None:
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on."""
        self._write(f"{record.name}: {record.getMessage()}")


class _Printed(io.TextIOBase):
    """Passes printed lines on, each once it is whole."""

    def __init__(self, write: Any) -> None:
        self._tell, self._rest = write, ""

    def write(self, text: str) -> int:
        """Keep what is no whole line yet."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            self._tell(line)
        return len(text)
