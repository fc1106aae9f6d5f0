"""Where a command works: the run's folder, what runs share, who computes, and whom to tell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from stackllm.engine.local import Engine
from stackllm.engine.pools import open_pool
from stackllm.engine.progress import Reporter
from stackllm.errors import UsageError
from stackllm.store.folder import open_folder
from stackllm.store.lock import locked
from stackllm.store.runs import Runs

SHARED = "cache"
"""Name of the folder, beside the runs, of what runs share."""


@dataclass(frozen=True)
class Workspace:
    """What every stage needs beside its data.

    Parameters
    ----------
    run
        Runs units below the run's folder.
    cache
        Runs units below the folder that runs share.
    """

    run: Engine
    cache: Engine

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self.run.root

    @property
    def reporter(self) -> Reporter:
        """Told what happens."""
        return self.run.reporter

    @property
    def dry_run(self) -> bool:
        """Does it only look at what would run?"""
        return self.run.dry_run


@contextmanager
def open_workspace(
    name: str,
    artifacts: Path,
    *,
    n_jobs: int | None = None,
    engine: str = "local",
    address: str | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Iterator[Workspace]:
    """Open a run's folder for writing, and start the workers.

    Parameters
    ----------
    name
        Of the run: letters, digits, ``.``, ``_`` and ``-``.
    artifacts
        Folder of runs.
    n_jobs
        Units side by side. None: as many as there are cores, or workers on a cluster.
    engine, address
        Whose workers run units: ``"local"``, or ``"dask"`` or ``"ray"`` at an address.
    dry_run
        Only read: no lock, no worker, nothing written.
    quiet
        Warnings only, no progress.

    Raises
    ------
    UsageError
        If the name cannot be a run's.
    LockedError
        If another process writes this run.
    MissingInputError, ServerError
        If the cluster's package or the cluster is not there.
    StorageError
        If a folder cannot be written.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(
            f'a run\'s name may hold letters, digits, ".", "_" and "-" only, not "{name}".'
        )
    if name.lower() == SHARED:
        raise UsageError(f"a run cannot be called {name}: that is the folder that runs share.")
    reporter = Reporter(quiet)
    slots = _slots(n_jobs)
    if n_jobs and n_jobs > slots and engine == "local":
        reporter.say(f"{n_jobs} units side by side: {slots}, as many as this machine has cores")
    root, shared = artifacts / name, artifacts / SHARED
    with ExitStack() as stack:
        pool = None
        if not dry_run:
            stack.enter_context(locked(root))
            open_folder(shared, shared=True)
            pool = open_pool(engine, address, slots)
        if pool:
            stack.callback(pool.close)
            slots = slots if engine == "local" else n_jobs or pool.slots
        yield Workspace(
            Engine(root, slots, reporter, dry_run, pool, Runs(artifacts)),
            Engine(shared, slots, reporter, dry_run, pool),
        )


@contextmanager
def open_cache(
    artifacts: Path, *, n_jobs: int | None = None, quiet: bool = True
) -> Iterator[Engine]:
    """Open the folder that runs share, without a run, and start the workers of this machine.

    Parameters
    ----------
    artifacts, n_jobs, quiet
        As for :func:`open_workspace`.

    Raises
    ------
    StorageError
        If a folder cannot be written.
    """
    shared, slots = artifacts / SHARED, _slots(n_jobs)
    open_folder(shared, shared=True)
    pool = open_pool("local", None, slots)
    with ExitStack() as stack:
        if pool:
            stack.callback(pool.close)
        yield Engine(shared, slots, Reporter(quiet), False, pool)


def _slots(n_jobs: int | None) -> int:
    """Units side by side on this machine: each computes on one thread."""
    from joblib import cpu_count

    cores: int = cpu_count()
    return min(n_jobs or cores, cores)
