"""Real clusters of this machine, all processes of their own, which the campaign and the tests strike at."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil

from benchmarks.campaign.commands import environment

_PATIENCE_SECONDS = 60
_MARKS = {"dask": "spawn_main", "ray": "ray::run_task_in", "local": "popen_loky"}
"""What the command line of a process at work holds."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster of two workers.

    Parameters
    ----------
    engine, address
        What ``--engine`` and ``--address`` take.
    head
        Process of the scheduler or head.
    processes
        All processes that were started here.
    """

    engine: str
    address: str
    head: psutil.Process
    processes: tuple[psutil.Process, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """Options of ``stackllm`` that run its units here."""
        return ("--engine", self.engine, "--address", self.address)

    def workers(self) -> list[psutil.Process]:
        """Processes that are there to compute units."""
        return [it for process in self.processes for it in workers_below(process, self.engine)]

    def kill_head(self) -> None:
        """Kill the scheduler, or the head with all that belongs to it."""
        kill_tree(self.head)


def workers_below(process: psutil.Process, engine: str) -> list[psutil.Process]:
    """Processes below another that compute units for an engine."""
    found = []
    for child in _family(process):
        with contextlib.suppress(psutil.Error):
            if _MARKS[engine] in " ".join(child.cmdline()):
                found.append(child)
    return found


def kill_tree(process: psutil.Process) -> None:
    """Kill a process and all below it."""
    for it in [*_family(process), process]:
        with contextlib.suppress(psutil.Error):
            it.kill()


@contextlib.contextmanager
def dask_cluster(folder: Path) -> Iterator[Cluster]:
    """A scheduler, and two workers with their nannies, whose files go into ``folder``."""
    from distributed import Client

    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    given = ["--scheduler-file", str(file), "--no-dashboard"]
    run = [sys.executable, "-m", "distributed.cli.dask_scheduler", *given]
    work = [sys.executable, "-m", "distributed.cli.dask_worker", *given]
    scheduler = _start([*run, "--host", "127.0.0.1", "--port", "0"], folder)
    nannies = _start([*work, "--nworkers", "2", "--nthreads", "1"], folder)
    try:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        address = ""
        while not address and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError, ValueError):  # not there, or not yet whole
                address = json.loads(file.read_text())["address"]
            time.sleep(0.05)
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=_PATIENCE_SECONDS)
        yield Cluster("dask", address, scheduler, (scheduler, nannies))
    finally:
        kill_tree(nannies)
        kill_tree(scheduler)


@contextlib.contextmanager
def ray_cluster(folder: Path) -> Iterator[Cluster]:
    """A head of two processors; the token that it wants is in the environment meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    options = [f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    with mock.patch.dict(os.environ, token):
        head = _start(
            [*run, *options, "--node-ip-address=127.0.0.1", "--disable-usage-stats"], folder
        )
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not _serves(head) and time.monotonic() < deadline:
                time.sleep(0.1)
            yield Cluster("ray", f"127.0.0.1:{port}", head, (head,))
        finally:
            kill_tree(head)


CLUSTERS = {"dask": dask_cluster, "ray": ray_cluster}


def _start(command: list[str], folder: Path) -> psutil.Process:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return psutil.Popen(command, cwd=folder, env=environment(), **quiet)


def _serves(head: psutil.Process) -> bool:
    """Is ray's node manager up, which comes after the head's own port?"""
    return any("raylet" in " ".join(child.cmdline()[:1]) for child in _family(head))


def _family(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []
