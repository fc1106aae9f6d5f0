"""SIGKILL, SIGINT and SIGTERM at random moments of every stage, and again during the resume."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.campaign.commands import environment
from benchmarks.campaign.contest import (
    Stage,
    digests,
    finished_units,
    ran,
    stages,
    started_units,
)
from benchmarks.campaign.figures import Case, MissedError, difference, play

STAGES = ("features", "decoder", "stack", "pseudo", "optim")
JOBS = 2
SECONDS_TO_STOP = 10.0


def figures(home: Path, draws: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The figures of this file: ``draws`` deaths a stage, and a quarter as many of the rest."""
    known = stages(home)
    draw = random.Random(seed)
    quarter = -(-draws // 4)
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        for stage in (known[name] for name in STAGES):
            count = draws if number == signal.SIGKILL else quarter
            yield play(f"{number.name} in {stage.name}", _cases(stage, number, count, draw))
    stored = [known[name] for name in ("features", "decoder", "stack", "pseudo")]
    twice = [
        (f"{stage.name} {i}", struck(stage, signal.SIGKILL, draw, times=2))
        for stage in stored
        for i in range(-(-draws // 3))
    ]
    yield play("killed again during the resume", twice)


def _cases(
    stage: Stage, number: signal.Signals, draws: int, draw: random.Random
) -> list[tuple[str, Case]]:
    return [(f"case {i}", struck(stage, number, draw)) for i in range(draws)]


def struck(stage: Stage, number: signal.Signals, draw: random.Random, times: int = 1) -> Case:
    """A case: strike ``times`` times at random moments inside work, then finish, and compare."""

    def case() -> str | None:
        folder = stage.copy("struck")
        window = _window(stage)
        for _ in range(times):
            said = _strike(stage, folder, number, window * draw.random() / times)
            if said is not None:
                return said
        had, begun, before = finished_units(folder), started_units(folder), len(ran(folder))
        done = stage.finish(folder)
        if done.returncode:
            return f"the same command ended with {done.returncode}: {done.stderr[-300:]}"
        now = finished_units(folder)  # the model of the stage before is made anew, of another key
        repeated = {unit for unit in set(ran(folder)[before:]) if had.get(unit) == now[unit]}
        if repeated or begun > JOBS * times:
            return f"finished units ran again: {sorted(repeated)}; {begun} units were cut"
        return difference(digests(folder), stage.expected)

    return case


def _window(stage: Stage) -> float:
    """Seconds from the first sign of work to the end, undisturbed; measured once a stage."""
    if not hasattr(stage, "window"):
        folder = stage.copy("timed")
        process = _begin(stage, folder)
        _wait_for_work(stage, folder, process)
        began = time.monotonic()
        process.communicate(timeout=300)
        stage.window = time.monotonic() - began  # type: ignore[attr-defined]
    return float(stage.window)  # type: ignore[attr-defined]


def _begin(stage: Stage, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        stage.command, cwd=folder, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def _wait_for_work(stage: Stage, folder: Path, process: subprocess.Popen[str]) -> None:
    """Until the run's lock is held, or for ``optim``, which has none, until it has been imported."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if stage.name == "optim":
            if b"polars" in Path(f"/proc/{process.pid}/maps").read_bytes():
                return
        elif (folder / "artifacts" / "run" / ".lock.json").exists():
            return
        time.sleep(0.005)


def _strike(stage: Stage, folder: Path, number: signal.Signals, delay: float) -> str | None:
    process = _begin(stage, folder)
    _wait_for_work(stage, folder, process)
    time.sleep(delay)
    while stage.name != "optim" and not started_units(folder) and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay % 0.02)  # not always at the very beginning of a unit
    if process.poll() is not None:
        raise MissedError
    inside = stage.name == "optim" or started_units(folder) > 0
    strike = os.killpg if number == signal.SIGINT else os.kill  # a terminal's goes to all
    strike(process.pid, number)
    asked = time.monotonic()
    _, said = process.communicate(timeout=120)
    took = time.monotonic() - asked
    done = process.returncode == 0 or (
        process.returncode == -number != -signal.SIGKILL and digests(folder) == stage.expected
    )  # while it closes down, the interpreter leaves signals to the system
    if done or not inside:
        raise MissedError  # it was done in the moment the signal came
    expected = -signal.SIGKILL if number == signal.SIGKILL else 128 + number
    if process.returncode != expected:
        return f"exit {process.returncode}, not {expected}: {said[-300:]}"
    if number != signal.SIGKILL:
        if f"goes on from here: stackllm {stage.arguments[0]}" not in said or "Traceback" in said:
            return f"it said {said[-300:]!r}"
        if took > SECONDS_TO_STOP:
            return f"it took {took:.1f} s to stop"
    return _survivors(process.pid)


def _survivors(session: int) -> str | None:
    """None once no process of the session is left; workers follow their parent by themselves."""
    deadline = time.monotonic() + SECONDS_TO_STOP
    while time.monotonic() < deadline:
        listed = subprocess.run(
            ["ps", "-o", "pid=,stat=,args=", "-s", str(session)], capture_output=True, text=True
        ).stdout.splitlines()
        alive = [line for line in listed if line.split()[1][0] != "Z"]
        if not alive:
            return None
        time.sleep(0.05)
    return f"processes outlived it: {alive[:2]}"
