"""Commands, started as a user does, or forked off a process that has imported everything: as real, and faster.

A command of a small contest works for a third of a second and imports for two, or for ten with a
decoder. The processes come from a server that only imports, so nothing of one command is left for the
next, and no thread but a memory allocator's stands in it when it forks (polars, OpenMP and torch start
theirs at the first work). What a library reads when it is imported, the hash seed among it, is the
server's: a command that is to have other variables has to be started.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
_PRELOADED = (
    "stackllm.members.build",
    "stackllm.members.decoder",
    "stackllm.predict",
    "lightgbm",
    "sklearn.linear_model",
    "scipy.optimize",
    "peft",
    "transformers.trainer",
    "benchmarks.campaign.faulty",
)
_SECONDS = 300.0


def python(*arguments: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *arguments]


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: this clone importable, nothing else changed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


_VARIABLES = environment()
"""Of the server, whenever it is started."""


def run(command: Sequence[str], cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Start a command and wait for its end."""
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=_SECONDS
    )


def forked(
    folder: Path, action: Callable[..., None], *args: Any, **variables: str
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
    variables
        Of its environment, beside those of this process; see above which can matter.

    Returns
    -------
    subprocess.CompletedProcess
        As if it had been started: a status that is negative after a signal, and what it said.

    Raises
    ------
    subprocess.TimeoutExpired
        If it hangs.
    """
    with tempfile.TemporaryDirectory() as place:
        process = _server().Process(
            target=_begin, args=(folder, Path(place), environment(**variables), action, args)
        )
        process.start()
        process.join(_SECONDS)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        said = [Path(place, name).read_text(errors="replace") for name in ("stdout", "stderr")]
    if code is None:
        raise subprocess.TimeoutExpired(f"{action.__name__} {args}", _SECONDS, *said)
    return subprocess.CompletedProcess(args, code, *said)


def stackllm(*arguments: str) -> None:
    """An action: the command line."""
    from stackllm.cli import main

    sys.argv = ["stackllm", *arguments]
    main()


def _server() -> Any:
    from stackllm.cli import COMMANDS

    context = multiprocessing.get_context("forkserver")
    commands = (f"stackllm.cli.{name}" for name in COMMANDS)
    context.set_forkserver_preload([*commands, *_PRELOADED])
    with mock.patch.dict(os.environ, _VARIABLES, clear=True):
        forkserver.ensure_running()
    return context


def _begin(
    folder: Path,
    place: Path,
    variables: dict[str, str],
    action: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    try:
        action(*args)
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing pass by
