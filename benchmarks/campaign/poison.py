"""Units that the workers of any engine can import: one that works, and one that kills its worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def write(folder: Path, name: str) -> None:
    """Write a file."""
    (folder / "name.txt").write_text(name)


def die(folder: Path, name: str) -> None:
    """Kill the process that computes this."""
    os.kill(os.getpid(), signal.SIGKILL)
