"""Commands in processes forked off one that has imported everything: as real as started ones, and faster.

A command of the small contest works for a third of a second and imports for two. The processes come
from a server that only imports, so nothing of one command is left for the next. They share one hash seed.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.campaign.contest import environment

_PRELOADED = (
    "stackllm.cli",
    "stackllm.members.build",
    "stackllm.predict",
    "lightgbm",
    "sklearn.linear_model",
    "scipy.optimize",
    "peft",
    "benchmarks.campaign.faulty",
)
_SECONDS = 300.0


def forked(
    folder: Path, action: Callable[..., None], *args: Any
) -> subprocess.CompletedProcess[str]:
    """Do something with ``folder`` as working directory, in a process of its own.

    Parameters
    ----------
    folder
        Working directory.
    action
        A function that can be imported. It ends as a command does, with ``sys.exit``.
    args
        Its arguments.

    Returns
    -------
    subprocess.CompletedProcess
        As if it had been started: a status that is negative after a signal, and what it said.

    Raises
    ------
    subprocess.TimeoutExpired
        If it hangs.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(_PRELOADED))
    with tempfile.TemporaryDirectory() as place:
        process = server.Process(
            target=_begin, args=(folder, Path(place), environment(), action, args)
        )
        process.start()
        process.join(_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(f"{action.__name__} {args}", _SECONDS)
        said = [Path(place, name).read_text(errors="replace") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(args, process.exitcode, *said)


def stackllm(*arguments: str) -> None:
    """An action: the command line."""
    from stackllm.cli import main

    sys.argv = ["stackllm", *arguments]
    main()


def _begin(
    folder: Path,
    place: Path,
    variables: dict[str, str],
    action: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    try:
        action(*args)
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing pass by
