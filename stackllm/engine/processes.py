"""The pool of this machine: worker processes through joblib's loky, each with a unit of its own.

One executor a worker, so that a worker that dies takes its one unit with it and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from pathlib import Path
from typing import Any

from stackllm.engine.libraries import LOG, errors_to
from stackllm.engine.local import Task, WorkerDiedError, run_task
from stackllm.store.atomic import process_exists

_Handle = Future[tuple[float, int]]

_KEPT_BYTES = 2**30
"""What a worker may hold from one stage to the next; one that holds more ends with its stage."""

_PARENT_SECONDS = 0.2
"""How soon a worker notices that the process it works for is gone."""


class Processes:
    """Worker processes of this machine, started when first needed.

    Parameters
    ----------
    n_workers
        Most of them; each computes on one thread.
    """

    def __init__(self, n_workers: int) -> None:
        self.slots = n_workers
        self._idle: list[Any] = []
        self._held: dict[Any, int] = {}
        self._busy: dict[_Handle, Any] = {}

    def submit(self, root: Path, task: Task) -> _Handle:
        """Start a unit in an idle worker."""
        _start_trackers()
        while True:
            try:
                with _without_interrupts():  # a worker is started by the first unit that it gets
                    worker = self._idle.pop() if self._idle else _start_worker()
                    future: _Handle = worker.submit(_run, root, task)
            except BrokenExecutor:  # it died while it had nothing to do
                self._end(worker)
                continue
            self._busy[future] = worker
            return future

    def wait(self, handles: Collection[_Handle]) -> Collection[_Handle]:
        """Wait for at least one."""
        return wait(handles, return_when=FIRST_COMPLETED).done

    def result(self, handle: _Handle) -> float:
        """Seconds that an ended unit took."""
        worker = self._busy.pop(handle)
        try:
            seconds, self._held[worker] = handle.result()
        except BrokenExecutor as error:
            self._end(worker)
            raise WorkerDiedError from error
        except BaseException:
            self._idle.append(worker)
            raise
        self._idle.append(worker)
        return seconds

    def drop(self, handles: Collection[_Handle]) -> None:
        """Kill the workers of these units; what was not published is made again by the next run."""
        for handle in handles:
            self._end(self._busy.pop(handle))
        if not self._busy:  # a stage is over: what its workers have read, the next has no use for
            for worker in [it for it in self._idle if self._held.get(it, 0) > _KEPT_BYTES]:
                self._idle.remove(worker)
                self._end(worker)

    def close(self) -> None:
        """Kill all workers."""
        self.drop(list(self._busy))
        while self._idle:
            self._end(self._idle.pop())

    def _end(self, worker: Any) -> None:
        self._held.pop(worker, None)
        worker.shutdown(wait=False, kill_workers=True)


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


def _start_worker() -> Any:
    from joblib.externals.loky.process_executor import ProcessPoolExecutor

    return ProcessPoolExecutor(
        max_workers=1,
        initializer=_prepare_worker,
        initargs=(os.getpid(),),
        env={"POLARS_MAX_THREADS": "1"},  # its pool is made at import and as wide as the machine
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
