"""Who runs units: worker processes of this machine, through joblib.

A unit computes on one thread and gets its parallelism from its fellows, so that what it computes
does not depend on how many cores there are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackllm.engine.progress import Reporter
from stackllm.errors import StackllmError, StorageError
from stackllm.store.units import Unit, publish, quarantine, state

_ATTEMPTS = 3
"""How often a unit whose worker died is tried before it is given up."""


class PendingError(StackllmError):
    """A dry run met units that have still to run; what comes after them can't be planned yet."""

    exit_code = 0


@dataclass(frozen=True)
class Task:
    """A unit and how to compute it.

    Parameters
    ----------
    unit
        Where its results stand and the key of what it depends on.
    function
        A function of a module (it is sent to worker processes): gets the folder to write into,
        then ``args``.
    args
        Its arguments: small values and paths.
    """

    unit: Unit
    function: Callable[..., None]
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Engine:
    """Runs what is missing below one folder.

    Parameters
    ----------
    root
        The run's folder.
    n_jobs
        Worker processes.
    reporter
        Told what happens.
    dry_run
        List units and the reason each would run or be re-used, and run none.
    """

    root: Path
    n_jobs: int
    reporter: Reporter = field(default_factory=Reporter)
    dry_run: bool = False

    def ensure(self, label: str, tasks: Sequence[Task], n_jobs: int | None = None) -> list[Path]:
        """Run those tasks whose unit is not there, and give the folders of all.

        Parameters
        ----------
        label
            What this work is called in progress lines.
        tasks
            The tasks; the slowest first, if that is known.
        n_jobs
            Fewer workers than usual, for units that need much memory or a GPU.

        Returns
        -------
        list of Path
            Folder of each task's unit, in order.

        Raises
        ------
        PendingError
            In a dry run, if any unit would have to run.
        StorageError
            If a unit's worker died again and again.
        """
        found = [(task, state(self.root, task.unit)) for task in tasks]
        missing = [task for task, condition in found if condition != "done"]
        for task, condition in found:
            if self.dry_run:
                self.reporter.say(f"{task.unit.path}: {condition}")
            elif condition == "damaged":
                moved = quarantine(self.root, task.unit)
                self.reporter.warn(
                    f"{task.unit.path} was damaged; moved to {moved} and made again."
                )
        if missing and self.dry_run:
            raise PendingError(
                f"{len(missing)} of {len(tasks)} units of {label} would run; what follows depends on them."
            )
        if missing:
            self._run(label, missing, min(n_jobs or self.n_jobs, self.n_jobs))
        return [task.unit.inside(self.root) for task in tasks]

    def _run(self, label: str, tasks: list[Task], n_jobs: int) -> None:
        with self.reporter.bar(label, len(tasks)) as advance:
            for _ in range(_ATTEMPTS):
                try:
                    for task, seconds in _results(self.root, tasks, n_jobs):
                        self._log_time(task, seconds)
                        advance()
                    return
                except _worker_deaths():
                    tasks = [task for task in tasks if state(self.root, task.unit) != "done"]
                    self.reporter.warn(f"a worker died; {len(tasks)} units of {label} run again.")
        raise StorageError(
            f"{tasks[0].unit.path}: its worker process died {_ATTEMPTS} times, most likely for want of memory. "
            "Run the same command with --jobs 1."
        )

    def _log_time(self, task: Task, seconds: float) -> None:
        """Times stand beside the units, never inside: the same work must give the same bytes."""
        line = json.dumps(
            {"unit": task.unit.path, "key": task.unit.key, "seconds": round(seconds, 3)}
        )
        with (self.root / "timings.jsonl").open("a") as file:
            file.write(line + "\n")


def read_timings(root: Path) -> dict[str, float]:
    """Seconds that each unit took when it was last run."""
    path = root / "timings.jsonl"
    if not path.is_file():
        return {}
    timings = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the process was killed inside its last line
            continue
        timings[entry["unit"]] = entry["seconds"]
    return timings


def _results(root: Path, tasks: list[Task], n_jobs: int) -> Any:
    if n_jobs == 1 or len(tasks) == 1:
        return ((task, _run_task(root, task)[1]) for task in tasks)
    from joblib import Parallel, delayed

    parallel = Parallel(
        n_jobs=n_jobs, backend="loky", return_as="generator_unordered", batch_size=1
    )
    return parallel(delayed(_run_task)(root, task) for task in tasks)


def _run_task(root: Path, task: Task) -> tuple[Task, float]:
    from threadpoolctl import threadpool_limits

    started = time.perf_counter()
    with threadpool_limits(1):
        publish(root, task.unit, lambda folder: task.function(folder, *task.args))
    return task, time.perf_counter() - started


def _worker_deaths() -> tuple[type[BaseException], ...]:
    from joblib.externals.loky.process_executor import BrokenProcessPool, TerminatedWorkerError

    return (BrokenProcessPool, TerminatedWorkerError)
