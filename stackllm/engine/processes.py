"""The pool of this machine: worker processes through joblib's loky, each with a unit of its own.

One executor a worker, so that a worker that dies takes its one unit with it and nothing else. A
worker that computes on a GPU is bound to it for life, and all others see none, because CUDA looks
once in a process's life at what it may use, and would keep memory of every GPU that it sees.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stackllm.engine import devices
from stackllm.engine.libraries import LOG, errors_to
from stackllm.engine.local import Task, WorkerDiedError, run_task
from stackllm.store.atomic import process_exists

_Handle = Future[tuple[float, int]]

_KEPT_BYTES = 2**30
"""What a worker may hold from one stage to the next; one that holds more ends with its stage."""

_PARENT_SECONDS = 0.2
"""How soon a worker notices that the process it works for is gone."""


@dataclass(eq=False)
class _Worker:
    """A process, the GPUs that it is bound to, and the bytes that it holds between units."""

    executor: Any
    gpus: tuple[str, ...]
    held: int = 0

    def end(self) -> None:
        self.executor.shutdown(wait=False, kill_workers=True)


class Processes:
    """Worker processes of this machine, started when first needed.

    Parameters
    ----------
    n_workers
        Most of them at work; each computes on one thread.
    """

    def __init__(self, n_workers: int) -> None:
        self.slots = n_workers
        self._idle: list[_Worker] = []
        self._busy: dict[_Handle, _Worker] = {}

    def pick(self, tasks: Iterable[Task]) -> Task | None:
        """The first of these units that no GPU has to be waited for."""
        return next((task for task in tasks if self._room(task) is not None), None)

    def submit(self, root: Path, task: Task) -> _Handle:
        """Start a unit in an idle worker."""
        _start_trackers()
        gpus = self._room(task) or ()
        # one GPU is never held by two processes: a unit of all GPUs takes the place of others' workers
        self._end_idle(lambda it: it.gpus != gpus and bool({*it.gpus} & {*gpus}))
        while True:
            alike = [it for it in self._idle if it.gpus == gpus]
            try:
                with _without_interrupts():  # a worker is started by the first unit that it gets
                    worker = alike[-1] if alike else _Worker(_start_executor(gpus), gpus)
                    future: _Handle = worker.executor.submit(_run, root, task)
            except BrokenExecutor:  # it died while it had nothing to do
                self._end_idle(worker.__eq__)
                continue
            if alike:
                self._idle.remove(worker)
            self._busy[future] = worker
            return future

    def wait(self, handles: Collection[_Handle]) -> Collection[_Handle]:
        """Wait for at least one."""
        return wait(handles, return_when=FIRST_COMPLETED).done

    def result(self, handle: _Handle) -> float:
        """Seconds that an ended unit took."""
        worker = self._busy.pop(handle)
        try:
            seconds, worker.held = handle.result()
        except BrokenExecutor as error:
            worker.end()
            raise WorkerDiedError from error
        except BaseException:
            self._idle.append(worker)
            raise
        self._idle.append(worker)
        return seconds

    def drop(self, handles: Collection[_Handle]) -> None:
        """Kill the workers of these units; what was not published is made again by the next run."""
        for handle in handles:
            self._busy.pop(handle).end()
        if not self._busy:  # a stage is over: what its workers have read, the next has no use for
            self._end_idle(lambda it: bool(it.gpus) or it.held > _KEPT_BYTES)

    def close(self) -> None:
        """Kill all workers."""
        self.drop(list(self._busy))
        self._end_idle(lambda it: True)

    @cached_property
    def _gpus(self) -> tuple[str, ...]:
        """Asked when the first unit wants one: most commands never do, and torch is slow to import."""
        return devices.visible()

    def _room(self, task: Task) -> tuple[str, ...] | None:
        """The GPUs that a unit would get now; None if it has to wait for them."""
        if not task.gpu:
            return ()
        in_use = {gpu for worker in self._busy.values() for gpu in worker.gpus}
        free = tuple(gpu for gpu in self._gpus if gpu not in in_use)
        if task.gpu == "all":
            return None if in_use else free
        return free[:1] if free or not self._gpus else None

    def _end_idle(self, condition: Callable[[_Worker], bool]) -> None:
        for worker in [it for it in self._idle if condition(it)]:
            self._idle.remove(worker)
            worker.end()


def _start_trackers() -> None:
    """Start what clears up after killed workers, loky's and Python's own, unless they are there.

    Starting Python's unblocks Ctrl-C, so they must be there before a worker is started; and what
    they find to clear up is no news to a user.
    """
    from multiprocessing import resource_tracker

    from joblib.externals.loky.backend.resource_tracker import ensure_running

    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        ensure_running()
        resource_tracker.ensure_running()
    finally:
        os.environ.pop("PYTHONWARNINGS")
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits meanwhile, and never reaches the processes that are started meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_executor(gpus: tuple[str, ...]) -> Any:
    from joblib.externals.loky.process_executor import ProcessPoolExecutor

    return ProcessPoolExecutor(
        max_workers=1,
        initializer=_prepare_worker,
        initargs=(os.getpid(),),
        # polars' pool is made at import and as wide as the machine
        env={"POLARS_MAX_THREADS": "1", devices.VARIABLE: ",".join(gpus)},
    )


def _prepare_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and never outlive it: a killed run must not go on writing.

    Loky would end a worker whose memory has grown by 300 MB, as one does that has read a language
    model, and warn of it. Ours live on; see :func:`_run` for their memory.
    """
    from joblib.externals.loky import process_executor

    process_executor._USE_PSUTIL = False
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _run(root: Path, task: Task) -> tuple[float, int]:
    """:func:`run_task` in a worker; gives the seconds, and the bytes that the worker holds after it."""
    import psutil

    try:
        with errors_to(root / LOG):
            seconds = run_task(root, task)
    finally:
        gc.collect()
        give_back_memory()
    return seconds, psutil.Process().memory_full_info().uss


def give_back_memory() -> None:
    """Return what was freed to the system, where its C library keeps it for itself otherwise."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # it is glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


def _follow(parent: int) -> None:
    while os.getppid() == parent and process_exists(parent):  # the first never changes on Windows
        time.sleep(_PARENT_SECONDS)
    os._exit(1)
