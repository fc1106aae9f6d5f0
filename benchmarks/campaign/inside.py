"""The whole command line inside this process: thousands of cases without thousands of starts."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it wrote to standard error and standard output."""

    status: int
    said: str
    printed: str


def stackllm(folder: Path, *arguments: str) -> Done:
    """Type a command in ``folder``; what nobody caught is a traceback, as it would be for a user."""
    from stackllm.cli import main

    said, printed = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    status = 1
    with (
        contextlib.chdir(folder),
        mock.patch.object(sys, "argv", ["stackllm", *arguments]),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(printed),
    ):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        except Exception as error:
            said.write(f"Traceback: {type(error).__name__}: {error}")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Done(status, said.getvalue(), printed.getvalue())
