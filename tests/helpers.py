"""What several test files need: typing a command as a user would, and digests of what it left."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.campaign import commands
from benchmarks.campaign.contest import digests

__all__ = ["digests", "stackllm"]


def stackllm(*arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, with one worker unless ``--jobs`` says otherwise.

    The process is forked off a warm server, or, if it is to have environment variables of its own,
    started: libraries read them when they are imported.
    """
    words = [str(word) for word in arguments]
    if not variables:
        few = {} if "--jobs" in words else {"LOKY_MAX_CPU_COUNT": "1"}  # two tests run side by side
        return commands.forked(cwd, commands.stackllm, *words, **few)
    return commands.run(commands.python("-m", "stackllm", *words), cwd, **variables)
