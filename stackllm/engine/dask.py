"""The pool of a dask cluster: units are futures, results come through a folder that all machines share.

Every worker is asked once which GPUs it sees, and gets one of them that no other worker has, for as
long as the cluster lives: what it loads stays there from one unit to the next. Workers beyond the
number of GPUs compute what wants none.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackllm.engine import devices
from stackllm.engine.local import Task, WorkerDiedError, not_run, run_task_in
from stackllm.errors import MissingInputError, ServerError, StackllmError

_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 10.0
"""How long the scheduler may stay silent before it counts as gone."""

_RESTART_SECONDS = 25.0
"""How long a worker that died may take to come back."""

_ASK_SECONDS = 120.0
"""How long workers may take to say which GPUs they see: they import torch for it."""


@dataclass(frozen=True)
class _Handle:
    """A unit, the worker that it was given to, and the GPUs that are its own meanwhile."""

    future: Any
    worker: str
    gpus: frozenset[str]

    def __hash__(self) -> int:
        return id(self)


class Dask:
    """Workers of a running dask cluster, one unit each at a time.

    Parameters
    ----------
    address
        The scheduler's, ``tcp://host:port``.

    Raises
    ------
    MissingInputError
        If the extra is not installed.
    ServerError
        If no scheduler answers there, or one without workers.
    """

    def __init__(self, address: str) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise MissingInputError(
                "engine \"dask\" needs the package distributed. Install it: pip install 'stackllm[dask]'"
            ) from error
        for name in (
            "distributed",
            "distributed.client",
            "tornado",
            "tornado.application",
            "asyncio",
        ):
            # a lost scheduler is told once, by us
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.address = address
        self._busy: dict[str, _Handle] = {}
        self._known: list[str] = []
        self._seen: dict[str, dict[str, str]] = {}
        self._gpu: dict[str, str] = {}
        try:
            self._client = Client(address, timeout=_PATIENCE_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise ServerError(
                f"{address}: no dask scheduler answers there. "
                "Start one with: dask scheduler, and workers with: dask worker ADDRESS --nthreads 1"
            ) from error

    @property
    def slots(self) -> int:
        """Number of workers now, at least 1: one that died may be on its way back."""
        return max(1, len(self._workers()))

    def pick(self, tasks: Iterable[Task]) -> Task | None:
        """The first of these units for which a worker is free, with the GPUs that it wants."""
        alive = self._known = self._workers()
        return next((task for task in tasks if self._choose(task, alive)), None)

    def submit(self, root: Path, task: Task) -> _Handle:
        """Start a unit on a worker that has none."""
        deadline = time.monotonic() + _RESTART_SECONDS
        while not (worker := self._choose(task, self._workers())):
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.address}: the dask cluster has no free worker. Start more, then run the same command again."
                )
            time.sleep(_POLL_SECONDS)
        gpus = self._wanted(task, worker)
        if task.gpu == "all" and gpus:  # what others keep there for their next unit is in the way
            self._ask(devices.release_beside, [it for it in self._gpu if it != worker])
        name = self._seen[worker][self._gpu[worker]] if gpus and task.gpu != "all" else None
        future = self._client.submit(
            run_task_in, str(Path.cwd()), root, task, name, workers=[worker], pure=False, retries=0
        )
        handle = _Handle(future, worker, gpus)
        self._busy[worker] = handle
        return handle

    def wait(self, handles: Collection[_Handle]) -> Collection[_Handle]:
        """Wait until one has ended or its worker is gone; none if a worker came that others may want."""
        while True:
            alive = self._workers()
            if not {*alive} <= {*self._known}:
                self._known = alive
                return []
            asked = time.monotonic()
            while time.monotonic() < asked + _POLL_SECONDS:
                ended = [it for it in handles if it.future.done() or it.worker not in alive]
                if ended:
                    return ended
                time.sleep(_POLL_SECONDS / 20)

    def result(self, handle: _Handle) -> float:
        """Seconds that an ended unit took."""
        from distributed import CancelledError, KilledWorker

        if not handle.future.done():
            self.drop([handle])
            raise WorkerDiedError
        del self._busy[handle.worker]
        try:
            return float(handle.future.result(timeout=_PATIENCE_SECONDS))
        except KilledWorker as error:
            raise WorkerDiedError from error
        except (CancelledError, TimeoutError) as error:
            raise self._silent() from error
        except StackllmError:
            raise
        except Exception as error:
            raise not_run(self.address, error) from error

    def drop(self, handles: Collection[_Handle]) -> None:
        """Cancel these units; a thread at work can't be stopped, so what it has begun it may publish."""
        for handle in handles:
            del self._busy[handle.worker]
            with contextlib.suppress(Exception):  # a scheduler that is gone has nothing to cancel
                handle.future.cancel(force=True)

    def close(self) -> None:
        """Cancel what still runs, and leave the cluster."""
        self.drop(list(self._busy.values()))
        # workers live on, for others
        self._ask(devices.release_beside, list(self._gpu), _PATIENCE_SECONDS)
        with contextlib.suppress(Exception):
            self._client.close(timeout=_POLL_SECONDS)

    def _choose(self, task: Task, alive: Collection[str]) -> str | None:
        """The worker that a unit would be given to now, if any is free for it."""
        if task.gpu:
            self._deal_gpus(alive)
        free = [it for it in alive if it not in self._busy]
        if not task.gpu or not self._gpu:
            return min(free, key=self._gpu.__contains__, default=None)
        in_use = {gpu for handle in self._busy.values() for gpu in handle.gpus}
        fit = [it for it in free if it in self._gpu and not self._wanted(task, it) & in_use]
        if task.gpu == "all":  # CUDA, once it has started on all, computes on the first
            fit.sort(key=lambda it: next(iter(self._seen[it])) != self._gpu[it])
        return next(iter(fit), None)

    def _wanted(self, task: Task, worker: str) -> frozenset[str]:
        """The GPUs that a unit would have for itself on a worker."""
        if not task.gpu or worker not in self._gpu:
            return frozenset()
        return frozenset(self._seen[worker] if task.gpu == "all" else [self._gpu[worker]])

    def _deal_gpus(self, alive: Collection[str]) -> None:
        """Ask workers that are new, and give each a GPU that it sees and no other that lives has."""
        new = [it for it in alive if it not in self._seen]
        if new:
            answers = self._ask(devices.identified_beside, new)
            self._seen |= {it: answers.get(it) or {} for it in new}
        taken = {gpu for worker, gpu in self._gpu.items() if worker in alive}
        for worker in new:
            gpu = next((it for it in self._seen[worker] if it not in taken), None)
            if gpu is not None:
                self._gpu[worker] = gpu
                taken.add(gpu)

    def _ask(
        self, function: Callable[[], Any], workers: list[str], patience: float = _ASK_SECONDS
    ) -> dict[str, Any]:
        """What a function gives on workers, as far as they answer."""
        if not workers:
            return {}
        with contextlib.suppress(Exception):  # who is gone, or has another stackllm, is met later
            answers = self._client.sync(
                self._client._run, function, workers=workers, on_error="return",
                callback_timeout=patience,
            )  # fmt: skip
            return {
                it: answer for it, answer in answers.items() if not isinstance(answer, Exception)
            }
        return {}

    def _workers(self) -> list[str]:
        """Addresses of the workers that the scheduler knows now.

        Raises
        ------
        ServerError
            If the scheduler is silent.
        """
        try:
            known = self._client.sync(
                self._client.scheduler.ncores, callback_timeout=_PATIENCE_SECONDS
            )
        except Exception as error:
            raise self._silent() from error
        return sorted(known)

    def _silent(self) -> ServerError:
        return ServerError(
            f"{self.address}: the dask scheduler no longer answers. Finished units are kept; "
            "start it again, then run the same command."
        )
