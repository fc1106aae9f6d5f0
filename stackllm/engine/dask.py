"""The pool of a dask cluster: units are futures, results come through a folder that all machines share."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackllm.engine.local import Task, WorkerDiedError, not_run, run_task_in
from stackllm.errors import MissingInputError, ServerError, StackllmError

_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 10.0
"""How long the scheduler may stay silent before it counts as gone."""

_RESTART_SECONDS = 25.0
"""How long a worker that died may take to come back."""


@dataclass(frozen=True)
class _Handle:
    """A unit and the worker that it was given to."""

    future: Any
    worker: str

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
        """The first of these units."""
        return next(iter(tasks), None)

    def submit(self, root: Path, task: Task) -> _Handle:
        """Start a unit on a worker that has none."""
        deadline = time.monotonic() + _RESTART_SECONDS
        while not (free := [name for name in self._workers() if name not in self._busy]):
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.address}: the dask cluster has no free worker. Start more, then run the same command again."
                )
            time.sleep(_POLL_SECONDS)
        future = self._client.submit(
            run_task_in, str(Path.cwd()), root, task, workers=[free[0]], pure=False, retries=0
        )
        handle = _Handle(future, free[0])
        self._busy[free[0]] = handle
        return handle

    def wait(self, handles: Collection[_Handle]) -> Collection[_Handle]:
        """Wait until one has ended or its worker is gone."""
        while True:
            alive = self._workers()
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
        with contextlib.suppress(Exception):
            self._client.close(timeout=_POLL_SECONDS)

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
