"""The pool of a ray cluster: units are remote calls, results come through a folder that all machines share."""

from __future__ import annotations

import atexit
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from stackllm.engine.local import Task, WorkerDiedError, not_run, run_task_in
from stackllm.errors import MissingInputError, ServerError, StackllmError, first_line

_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 10.0
"""How long the head may stay silent before it counts as gone."""


def _why(error: BaseException) -> str:
    """A sentence on why ray did not let us in."""
    if "auth token" in str(error.__cause__).lower() or "InvalidAuthToken" in str(error.__cause__):
        return (
            "the ray cluster wants a token. Set RAY_AUTH_MODE=token here, with the token of its "
            "head in RAY_AUTH_TOKEN or ~/.ray/auth_token."
        )
    return f"the ray cluster did not let us in ({first_line(error)})."


class Ray:
    """Workers of a ray cluster, one unit each at a time.

    Parameters
    ----------
    address
        The head's, ``host:port``. None starts a cluster on this machine.
    n_workers
        Workers of the cluster that is started here.

    Raises
    ------
    MissingInputError
        If the extra is not installed.
    ServerError
        If no head answers there.
    """

    def __init__(self, address: str | None, n_workers: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingInputError(
                "engine \"ray\" needs the package ray. Install it: pip install 'stackllm[ray]'"
            ) from error
        self.address = address or "the local ray cluster"
        self._ray = ray
        options: dict[str, Any] = (
            {"address": address}
            if address
            else {"address": "local", "num_cpus": n_workers, "include_dashboard": False}
        )
        if address:
            self._knock(address)
        handlers = {it: signal.getsignal(it) for it in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(log_to_driver=False, logging_level="error", **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise ServerError(f"{self.address}: {_why(error)}") from error
        finally:
            for number, handler in handlers.items():  # ray puts one of its own in place
                signal.signal(number, handler)
        self._remote = ray.remote(max_retries=0, num_cpus=1)(run_task_in)
        # ray ends the process of such a unit with it, and so what it holds of the GPU
        self._on_gpus = ray.remote(max_retries=0, num_cpus=1, num_gpus=1)(run_task_in)
        self._gpus: dict[Any, int] = {}

    @property
    def slots(self) -> int:
        """Processors of the cluster."""
        return max(1, int(self._patiently(self._ray.cluster_resources).get("CPU", 1)))

    def pick(self, tasks: Iterable[Task]) -> Task | None:
        """The first of these units for which enough GPUs are free; ray finds it a place."""
        return next((it for it in tasks if self._gpus_for(it) <= self._free_gpus()), None)

    def submit(self, root: Path, task: Task) -> Any:
        """Start a unit where there is room; ray shows it the GPUs that it gets, and no others."""
        gpus = self._gpus_for(task)
        remote = self._on_gpus.options(num_gpus=gpus) if gpus else self._remote
        handle = self._patiently(lambda: remote.remote(str(Path.cwd()), root, task))
        self._gpus[handle] = gpus
        return handle

    def wait(self, handles: Collection[Any]) -> Collection[Any]:
        """Wait for at least one, and look now and then whether the head is there."""
        waiting = list(handles)
        while True:
            ended, _ = self._patiently(
                lambda: self._ray.wait(waiting, num_returns=1, timeout=_POLL_SECONDS)
            )
            if ended:
                return list(ended)
            self._patiently(self._ray.cluster_resources)

    def result(self, handle: Any) -> float:
        """Seconds that an ended unit took."""
        from ray import exceptions

        self._gpus.pop(handle, None)
        try:
            return float(self._ray.get(handle, timeout=_PATIENCE_SECONDS))
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, StackllmError):
                raise error.cause from error
            raise not_run(self.address, error.cause) from error
        except (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.OutOfMemoryError,
        ) as error:
            raise WorkerDiedError from error
        except exceptions.RayError as error:
            raise not_run(self.address, error) from error

    def drop(self, handles: Collection[Any]) -> None:
        """Kill the workers of these units."""
        with contextlib.suppress(Exception):  # a head that is gone has nothing to cancel
            for handle in handles:
                self._gpus.pop(handle, None)
                self._patiently(partial(self._ray.cancel, handle, force=True))

    def close(self) -> None:
        """Drop what still runs, and leave the cluster."""
        try:
            self._patiently(self._ray.shutdown)
        except Exception:
            atexit.unregister(self._ray.shutdown)  # it would wait for the head again, for ever

    @cached_property
    def _gpus_of_machines(self) -> list[int]:
        """How many GPUs each machine of the cluster has."""
        nodes = self._patiently(self._ray.nodes)
        return [int(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]]

    def _gpus_for(self, task: Task) -> int:
        """How many GPUs of one machine a unit gets; 0 where there are none, or it wants none."""
        most = max(self._gpus_of_machines, default=0) if task.gpu else 0
        return most if task.gpu == "all" else min(1, most)

    def _free_gpus(self) -> int:
        return sum(self._gpus_of_machines) - sum(self._gpus.values())

    def _knock(self, address: str) -> None:
        """Ray looks for a head that is not there for minutes; a plain connection tells at once."""
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=_PATIENCE_SECONDS).close()
        except (OSError, ValueError) as error:
            raise ServerError(
                f"{address}: no ray head answers there. Start one with: ray start --head"
            ) from error

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        """Ray waits for a dead head for minutes: ask in a thread, and give up on it in time."""
        answer: list[Any] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                answer.append(ask())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(_PATIENCE_SECONDS)
        if not answer:
            raise ServerError(
                f"{self.address}: the ray cluster does not answer. Finished units are kept; "
                "start it again (ray start --head), then run the same command."
            ) from (failure[0] if failure else None)
        return answer[0]
