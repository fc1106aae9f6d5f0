"""Who runs units: this process, or the workers of a pool.

A unit computes on one thread and gets its parallelism from its fellows, so that what it computes
does not depend on how many cores there are, nor on whose they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stackllm.engine import devices, libraries, ranks
from stackllm.engine.devices import Wanted
from stackllm.engine.progress import Reporter, notes_path, taking_notes
from stackllm.errors import ServerError, StackllmError, StorageError
from stackllm.store.atomic import remove_abandoned, storage_errors
from stackllm.store.checkpoints import checkpoints_of, discard
from stackllm.store.records import append_json
from stackllm.store.runs import Runs, Stored
from stackllm.store.units import REUSED, Unit, adopt, publish, quarantine, state

TIMINGS = "timings.jsonl"
"""File in a folder of units: seconds that each took."""

ATTEMPTS = 3
"""How often a unit whose worker died is tried before it is given up."""


class PendingError(StackllmError):
    """A dry run met units that have still to run; what depends on them can't be looked up yet.

    Parameters
    ----------
    said
        What to tell a person.
    units
        The units of the stage that would run, and why each would run or be re-used, if it is units.
    note
        What a person should know beside the units: how much is to be asked of an LLM.
    """

    exit_code = 0

    def __init__(self, said: str, units: dict[str, str] | None = None, note: str = "") -> None:
        super().__init__(said)
        self.units = units or {}
        self.note = note


class WorkerDiedError(Exception):
    """The process that computed a unit is gone, and the unit with it.

    Parameters
    ----------
    times
        How often the pool itself has tried the unit.
    """

    def __init__(self, times: int = 1) -> None:
        super().__init__(times)
        self.times = times


@dataclass(frozen=True)
class Task:
    """A unit and how to compute it.

    Parameters
    ----------
    unit
        Where its results stand and the key of what it depends on.
    function
        A function of a module (it is sent to workers): gets the folder to write into, then ``args``.
    args
        Its arguments: small values and paths.
    here
        Run it in this process, because it holds what would be costly to send.
    together
        If there are several ranks (:mod:`stackllm.engine.ranks`), all of them compute it.
    gpu
        What it wants of the GPUs of its worker's machine, where that has any: ``"one"`` that no other
        unit computes on meanwhile, or ``"all"`` of them. None for what a processor computes.
    """

    unit: Unit
    function: Callable[..., None]
    args: tuple[Any, ...] = ()
    here: bool = False
    together: bool = False
    gpu: Wanted | None = None


class Pool(Protocol):
    """Workers that compute one unit each at a time."""

    @property
    def slots(self) -> int:
        """How many units can run side by side."""

    def pick(self, tasks: Iterable[Task]) -> Task | None:
        """The first of these units for which a worker is free, with the GPUs that it wants."""

    def submit(self, root: Path, task: Task) -> Any:
        """Start a unit; gives a handle."""

    def wait(self, handles: Collection[Any]) -> Collection[Any]:
        """Wait until one of these handles has ended, or there is room for more, and give those that have."""

    def result(self, handle: Any) -> float:
        """Seconds that an ended unit took; raises what it raised, or ``WorkerDiedError``."""

    def drop(self, handles: Collection[Any]) -> None:
        """Give up units that still run, at once; their places are free for others."""

    def close(self) -> None:
        """Drop whatever runs, and end or leave the workers."""


@dataclass(frozen=True)
class Engine:
    """Runs what is missing below one folder.

    Parameters
    ----------
    root
        The run's folder.
    n_jobs
        Most units that run side by side.
    reporter
        Told what happens.
    dry_run
        List units and the reason each would run or be re-used, and run none.
    pool
        Whose workers run units. None runs all of them in this process.
    runs
        Where the same work may stand already, in other runs or under other names. None looks at
        the unit's own place only.
    stand
        Where a dry run has found units that do not stand at their own place.
    met
        How many units each stage of a dry run has, and how many of them would run.
    """

    root: Path
    n_jobs: int
    reporter: Reporter = field(default_factory=Reporter)
    dry_run: bool = False
    pool: Pool | None = None
    runs: Runs | None = None
    stand: dict[str, Path] = field(default_factory=dict)
    met: dict[str, tuple[int, int]] = field(default_factory=dict)

    def ensure(self, label: str, tasks: Sequence[Task]) -> list[Path]:
        """Run those tasks whose unit is not there, and give the folders of all.

        Parameters
        ----------
        label
            What this work is called in progress lines.
        tasks
            The tasks; the slowest first, if that is known. Units of GPUs and of processors run side by
            side, and those of GPUs go first.

        Returns
        -------
        list of Path
            Folder of each task's unit, in order.

        Raises
        ------
        PendingError
            In a dry run, if any unit would have to run.
        StorageError
            If a unit's worker died again and again; all other units have run then.
        """
        conditions = {task.unit: state(self.root, task.unit) for task in tasks}
        absent = [unit for unit, condition in conditions.items() if condition != REUSED]
        elsewhere = {unit: stored for unit in absent if (stored := self._elsewhere(unit))}
        if self.dry_run:
            self.met[label] = (len(tasks), len(absent) - len(elsewhere))
            self._tell(label, conditions, elsewhere)
            return [self.folder(task.unit.path) for task in tasks]
        for unit, condition in conditions.items():
            if condition == "corrupt":
                moved = quarantine(self.root, unit)
                self.reporter.warn(f"{unit.path} was damaged; moved to {moved} and made again.")
        taken = self._take_over(label, len(tasks), elsewhere)
        missing = [task for task in tasks if task.unit in set(absent) - taken]
        if missing:
            known = read_timings(self.root)  # the slowest first, as far as that is known
            missing.sort(key=lambda task: (not task.gpu, -known.get(task.unit.path, 0.0)))
            notes = [notes_path(self.root, task.unit.path) for task in missing]
            with self.reporter.bar(label, len(missing), notes) as advance:
                for task, seconds in self._results(label, missing):
                    self._log_time(task.unit, seconds)
                    advance()
        return [task.unit.inside(self.root) for task in tasks]

    def lacks(self, tasks: Sequence[Task]) -> bool:
        """Would any of these tasks have to be run?"""
        units = [task.unit for task in tasks]
        return any(state(self.root, unit) != REUSED and not self._elsewhere(unit) for unit in units)

    def _elsewhere(self, unit: Unit) -> Stored | None:
        return self.runs.find(unit) if self.runs else None

    def folder(self, path: str) -> Path:
        """Where a unit stands: at its own place, or where a dry run has found it."""
        return self.stand.get(path, self.root / path)

    def _tell(self, label: str, conditions: dict[Unit, str], elsewhere: dict[Unit, Stored]) -> None:
        """List the units of a stage of a dry run, and end it if any would run."""
        told = {unit.path: condition for unit, condition in conditions.items()}
        for unit, stored in elsewhere.items():
            told[unit.path] = f"{REUSED}, in {stored.folder}"
            self.stand[unit.path] = stored.folder
        for path, condition in told.items():
            self.reporter.say(f"{path}: {condition}")
        n_missing = sum(not condition.startswith(REUSED) for condition in told.values())
        if n_missing:
            raise PendingError(
                f"{n_missing} of {len(told)} units of {label} would run; what follows depends on them.",
                told,
            )

    def _take_over(self, label: str, n_tasks: int, elsewhere: dict[Unit, Stored]) -> set[Unit]:
        """Publish what stands in other places at its own, say where it came from, and give which."""
        taken, names = set(), set()
        for unit, stored in elsewhere.items():
            with contextlib.suppress(StorageError):  # gone meanwhile: then it is run
                adopt(self.root, unit, stored.folder)
                self._log_time(unit, read_timings(stored.run).get(stored.path, 0.0))
                taken.add(unit)
                names.add(stored.run.name)
        if taken:
            self.reporter.say(
                f"{len(taken)} of {n_tasks} units of {label} taken over from run {', '.join(sorted(names))}"
            )
        return taken

    def _results(self, label: str, tasks: list[Task]) -> Iterator[tuple[Task, float]]:
        for task in tasks:
            if self.pool is None or _stays(task):
                if task.together:
                    ranks.call(self.root, task)
                yield task, run_task(self.root, task)
        away = [task for task in tasks if not _stays(task)]
        if self.pool and away:
            yield from self._pooled(label, self.pool, away)

    def _pooled(self, label: str, pool: Pool, tasks: list[Task]) -> Iterator[tuple[Task, float]]:
        """Keep the workers busy; one that dies costs the one unit it had."""
        waiting, running = list(tasks), dict[Any, Task]()
        deaths: Counter[str] = Counter()
        try:
            while waiting or running:
                while waiting and len(running) < min(self.n_jobs, pool.slots):
                    task = pool.pick(waiting) or (None if running else waiting[0])
                    if task is None:  # what still waits wants a GPU that is in use
                        break
                    waiting = [it for it in waiting if it is not task]
                    running[pool.submit(self.root, task)] = task
                for handle in pool.wait(running.keys()):
                    task = running.pop(handle)
                    try:
                        yield task, pool.result(handle)
                    except WorkerDiedError as error:
                        deaths[task.unit.path] += error.times
                        if deaths[task.unit.path] < ATTEMPTS:
                            self.reporter.warn(
                                f"a worker died; {task.unit.path} of {label} runs again."
                            )
                            waiting.append(task)
        finally:
            pool.drop(running.keys())
            for path in deaths:
                remove_abandoned(self.root / path)
        lost = [path for path, count in deaths.items() if count >= ATTEMPTS]
        if lost:
            raise StorageError(
                f"{', '.join(lost)}: the worker process died {ATTEMPTS} times, most likely for want of memory; "
                f"the other units of {label} are kept. Run the same command with the setting jobs at 1."
            )

    def _log_time(self, unit: Unit, seconds: float) -> None:
        """Times stand beside the units, never inside: the same work must give the same bytes."""
        path = self.root / TIMINGS
        with storage_errors(path, "writing"):
            append_json(path, {"unit": unit.path, "key": unit.key, "seconds": round(seconds, 3)})


def _stays(task: Task) -> bool:
    """Is a task computed by this process, whatever pool there is?"""
    return task.here or (task.together and ranks.size() > 1)


def run_task(root: Path, task: Task) -> float:
    """Compute and publish a unit on one thread; gives the seconds it took."""
    from threadpoolctl import threadpool_limits

    def fill(folder: Path) -> None:
        notes = notes_path(root, task.unit.path)
        log = root / libraries.LOG
        with (
            taking_notes(notes),  # notes go before the unit comes
            checkpoints_of(root, task.unit),
            libraries.overheard(log, task.unit.path),
        ):
            task.function(folder, *task.args)

    started = time.perf_counter()
    with threadpool_limits(1):
        publish(root, task.unit, fill)
    discard(root, task.unit)
    return time.perf_counter() - started


def run_task_in(folder: str, root: Path, task: Task, gpu: str | None = None) -> float:
    """:func:`run_task` on another machine that shares ``folder``, on which relative paths are meant.

    ``gpu`` is the name of the one GPU that it is to use there, if it wants one and others are there.

    Raises
    ------
    StorageError
        If this machine does not see the folder.
    """
    with storage_errors(Path(folder), "entering the shared folder"):
        os.chdir(folder)
    if gpu is not None:
        devices.bind(gpu)
    return run_task(root, task)


def not_run(address: str, error: BaseException) -> ServerError:
    """What to say of a cluster whose worker could not even run a unit."""
    return ServerError(
        f"{address}: a worker could not run a unit ({type(error).__name__}: {str(error)[:200]}). "
        f"It needs the same stackllm as here and must see the folder {Path.cwd()}."
    )


def read_timings(root: Path) -> dict[str, float]:
    """Seconds that each unit took when it was last run."""
    path = root / TIMINGS
    if not path.is_file():
        return {}
    timings = {}
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            timings[str(entry["unit"])] = float(entry["seconds"])
        except (ValueError, KeyError, TypeError):  # the process was killed inside its last line
            continue
    return timings
