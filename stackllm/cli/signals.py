"""Ctrl-C and SIGTERM: drop the units at work, keep all finished ones, and say how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from types import FrameType

_GRACE_SECONDS = 3.0
"""How long the way up through every ``finally`` may take before the process is ended without it."""


class StoppedError(BaseException):
    """A signal to stop, on its way up through every ``finally``.

    Parameters
    ----------
    number
        The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.status = 128 + number


def catch_signals() -> None:
    """Turn SIGINT and SIGTERM into :class:`StoppedError`, and see to it that they end the process.

    An exception can be swallowed on its way, or wait for a library that computes; nothing is lost
    by ending the process without it, since units and files are published whole or not at all.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def farewell(number: int) -> str:
    """What to tell a user who stopped a command."""
    word = "stopped" if number == signal.SIGINT else "terminated"
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join  # as the shell there quotes
    command = join(["stackllm", *sys.argv[1:]])
    return f"{word}; finished work is kept, and the same command goes on from here: {command}"


def _stop(number: int, frame: FrameType | None) -> None:
    for caught in (signal.SIGINT, signal.SIGTERM):
        signal.signal(caught, lambda again, frame: _end(number))  # the second time, at once
    timer = threading.Timer(_GRACE_SECONDS, _end, (number,))
    timer.daemon = True
    timer.start()
    raise StoppedError(number)


def _end(number: int) -> None:
    os.write(2, f"{farewell(number)}\n".encode())
    os._exit(128 + number)
