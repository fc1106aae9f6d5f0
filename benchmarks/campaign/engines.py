"""Clusters that die under a run: a worker, a unit that kills every worker, the head; and the same bytes."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.campaign.clusters import CLUSTERS, Cluster, workers_below
from benchmarks.campaign.commands import environment, run
from benchmarks.campaign.contest import Stage, digests, stages, started_units
from benchmarks.campaign.figures import Case, MissedError, difference, play
from benchmarks.campaign.poison import die, write
from benchmarks.campaign.writes import sentence
from stackllm.engine.local import Engine, Task
from stackllm.engine.pools import open_pool
from stackllm.engine.progress import Reporter
from stackllm.errors import StorageError
from stackllm.store.units import make_unit, state

SECONDS_TO_TELL = 30.0
HERE = "local"


def figures(home: Path, draws: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """One digest everywhere, then ``draws`` faults of each kind on each engine."""
    home.mkdir(parents=True, exist_ok=True)
    stage, draw = stages(home)["stack"], random.Random(seed)
    for engine in (HERE, *CLUSTERS):
        with _cluster(engine, home) as cluster:
            yield play(f"{engine}: the same digest", [("stack", same(stage, cluster))])
            killed = [(f"case {i}", worker_killed(stage, cluster, draw)) for i in range(draws)]
            yield play(f"{engine}: a worker killed", killed)
            poisoned = [(f"case {i}", poison(home, cluster)) for i in range(draws)]
            yield play(f"{engine}: a unit that kills its workers", poisoned)
    for engine in CLUSTERS:
        cases = [(f"case {i}", head_killed(stage, engine, draw)) for i in range(draws)]
        yield play(f"{engine}: the head killed", cases)


@contextlib.contextmanager
def _cluster(engine: str, folder: Path) -> Iterator[Cluster | None]:
    """A cluster of an engine; None for this machine's own workers, which come with each command."""
    if engine == HERE:
        yield None
    else:
        with CLUSTERS[engine](folder) as cluster:
            yield cluster


def _options(cluster: Cluster | None) -> tuple[str, ...]:
    return cluster.options if cluster else ()


def same(stage: Stage, cluster: Cluster | None) -> Case:
    """A case: the bytes that this machine's own workers leave."""

    def case() -> str | None:
        folder = stage.copy("engine")
        done = run([*stage.command, *_options(cluster)], folder)
        return (
            done.stderr[-300:] if done.returncode else difference(digests(folder), stage.expected)
        )

    return case


def worker_killed(stage: Stage, cluster: Cluster | None, draw: random.Random) -> Case:
    """A case: SIGKILL to a worker inside a unit; the command says so, and ends as if nothing had been."""

    def case() -> str | None:
        folder = stage.copy("struck")
        process = _begin(stage, folder, cluster)
        time.sleep(draw.random() * 2)
        workers: list[psutil.Process] = []
        while process.poll() is None and not (started_units(folder) and workers):
            time.sleep(
                0.002
            )  # some units are computed by the command itself, before there are workers
            workers = cluster.workers() if cluster else workers_below(process, HERE)
        if process.poll() is None:
            with contextlib.suppress(psutil.Error):
                draw.choice(workers).kill()
        _, said = process.communicate(timeout=300)
        if process.returncode:
            return f"exit {process.returncode}: {said[-300:]}"
        if "a worker died; " not in said:
            raise MissedError
        return difference(digests(folder), stage.expected)

    return case


def poison(home: Path, cluster: Cluster | None) -> Case:
    """A case: a unit that kills every worker it meets is named in time, and all others finish."""

    def case() -> str | None:
        root = home / f"poison-{time.monotonic_ns()}"
        names = ["poison", *(f"good{i}" for i in range(4))]
        tasks = [
            Task(make_unit(f"stage/{name}", 1), die if name == "poison" else write, (name,))
            for name in names
        ]
        engine, address = (cluster.engine, cluster.address) if cluster else (HERE, None)
        pool = open_pool(engine, address, 2)
        assert pool is not None
        started = time.monotonic()
        try:
            Engine(root, 2, Reporter(quiet=True), pool=pool).ensure("work", tasks)
            return "nothing was said of the unit"
        except StorageError as error:
            took = time.monotonic() - started
            if "stage/poison: the worker process died 3 times" not in str(error):
                return str(error)
        finally:
            pool.close()
        lost = [task.unit.path for task in tasks[1:] if state(root, task.unit) != "done"]
        return f"lost: {lost}; {took:.0f} s" if lost or took > SECONDS_TO_TELL else None

    return case


def head_killed(
    stage: Stage, engine: str, draw: random.Random, given: Cluster | None = None
) -> Case:
    """A case: the scheduler or head dies at work; exit 69 in time, and the run goes on elsewhere.

    It is the head of ``given``, or of a cluster that is started for it, as every further try does.
    """

    def case() -> str | None:
        nonlocal given
        folder = stage.copy("struck")
        opening = contextlib.nullcontext(given) if given else CLUSTERS[engine](stage.home)
        given = None
        with opening as cluster:
            process = _begin(stage, folder, cluster)
            time.sleep(draw.random() * 2)
            while not started_units(folder) and process.poll() is None:
                time.sleep(0.002)
            cluster.kill_head()
            asked = time.monotonic()
            _, said = process.communicate(timeout=300)
            took = time.monotonic() - asked
        if process.returncode == 0:
            raise MissedError
        lines = said.splitlines()  # its workers may go first, which is told as well
        said = "\n".join(line for line in lines if not line.startswith("warning: a worker died"))
        done = subprocess.CompletedProcess((), process.returncode, "", said)
        wrong = sentence(done, 69)
        if wrong or took > SECONDS_TO_TELL:
            return f"{took:.0f} s; {wrong}"
        again = run(stage.command, folder)
        return (
            again.stderr[-300:] if again.returncode else difference(digests(folder), stage.expected)
        )

    return case


def _begin(stage: Stage, folder: Path, cluster: Cluster | None) -> psutil.Popen:
    return psutil.Popen(
        [*stage.command, *_options(cluster)], cwd=folder, env=environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
