"""What all benchmarks share: the command line, the JSON envelope, interleaved timing, child processes."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = (
    "stackllm",
    "numpy",
    "scipy",
    "polars",
    "scikit-learn",
    "lightgbm",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "POT",
)


@dataclass(frozen=True)
class Figure:
    """One measured number and what it should be.

    Parameters
    ----------
    value
        What was measured.
    goal
        What it should reach.
    better
        ``"lower"`` or ``"higher"``.
    """

    value: float
    goal: float
    better: str = "lower"

    @property
    def met(self) -> bool:
        """Is the goal reached?"""
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal


@dataclass(frozen=True)
class Result:
    """What a benchmark measured.

    Parameters
    ----------
    figures
        By name.
    details
        Whatever helps to read the figures: seconds behind a ratio, sizes.
    """

    figures: dict[str, Figure]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Child:
    """A finished child process: wall-clock seconds and peak resident memory in GiB."""

    seconds: float
    peak_gib: float


def main(name: str, measure: Callable[[bool, Path | None], Result]) -> None:
    """Parse the options, measure and print."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="smaller inputs, under a minute")
    parser.add_argument("--data", type=Path, help="folder with train.csv, test.csv, solution.csv")
    options = parser.parse_args()
    show(name, measure(options.quick, options.data), options.json)


def show(name: str, result: Result, as_json: bool) -> None:
    """Print a table, or one JSON object and nothing else."""
    if as_json:
        print(json.dumps(envelope(name, result)))
        return
    for figure, it in result.figures.items():
        said = "met" if it.met else "NOT MET"
        print(f"{figure:28} {it.value:10.4g}  goal {it.goal:g}, {it.better} is better  {said}")
    for key, value in result.details.items():
        print(f"  {key}: {value}")


def envelope(name: str, result: Result) -> dict[str, Any]:
    """The object that ``--json`` prints."""
    return {
        "benchmark": name,
        "figures": {key: {**asdict(it), "met": it.met} for key, it in result.figures.items()},
        "details": result.details,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }


def machine() -> dict[str, Any]:
    """What it ran on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured, with ``-dirty`` if files differ from it; empty outside git."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told.stdout.strip()


def interleaved(repeats: int, *runs: Callable[[], object]) -> list[float]:
    """Median seconds of each, measured in turns so that a busy moment hits all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [median(taken) for taken in times]


def interleaved_children(repeats: int, *commands: Sequence[str], cwd: Path) -> list[Child]:
    """Median seconds and largest peak of each command, measured in turns."""
    runs: list[list[Child]] = [[] for _ in commands]
    for _ in range(repeats):
        for command, done in zip(commands, runs, strict=True):
            done.append(run_child(command, cwd))
    return [Child(median(r.seconds for r in done), max(r.peak_gib for r in done)) for done in runs]


def run_child(command: Sequence[str], cwd: Path) -> Child:
    """Run a command to its end.

    Raises
    ------
    RuntimeError
        If it fails, with what it said.
    """
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)[:200]}: {said.read().decode()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Child(seconds, usage.ru_maxrss * unit / 2**30)
