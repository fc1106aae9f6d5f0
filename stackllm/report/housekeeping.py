"""What takes up room below a folder of runs, and making room."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from stackllm.errors import MissingInputError
from stackllm.report.text import aligned
from stackllm.store.atomic import storage_errors
from stackllm.store.lock import locked
from stackllm.store.units import QUARANTINE
from stackllm.workspace import SHARED


@dataclass(frozen=True)
class Size:
    """A part of the folder.

    Parameters
    ----------
    name
        ``run``, ``run/members``, ``cache/trunk`` …
    files, size
        How many files, and their bytes.
    """

    name: str
    files: int
    size: int


def sizes(artifacts: Path) -> list[Size]:
    """Every run and every part of the shared cache, the largest first."""
    folders = _runs(artifacts)
    folders += list((artifacts / SHARED).glob("*/"))
    parts = [_size(folder, str(folder.relative_to(artifacts))) for folder in folders]
    return sorted(parts, key=lambda part: (-part.size, part.name))


def clean(artifacts: Path, what: str) -> Size:
    """Remove a run, a part of the cache, or what was quarantined; return what it took.

    Parameters
    ----------
    artifacts
        Folder of runs.
    what
        A name of :func:`sizes`, or ``quarantine`` for the damaged units of all runs.

    Raises
    ------
    MissingInputError
        If there is no such thing.
    LockedError
        If another process is writing that run.
    StorageError
        If it cannot be removed.
    """
    if what == QUARANTINE:
        folders = sorted(artifacts.glob(f"*/{QUARANTINE}/"))
    else:
        known = [part.name for part in sizes(artifacts)]
        if what not in known:
            raise MissingInputError(
                f'{artifacts}: there is no "{what}". There are: {", ".join(known) or "no runs"}.'
            )
        folders = [artifacts / what]
    taken = [_size(folder, what) for folder in folders]
    with ExitStack() as held:
        for run in _runs(artifacts):
            if what.split("/")[0] in (run.name, SHARED, QUARANTINE):  # all runs read the cache
                held.enter_context(locked(run))
        for folder in folders:
            _remove(folder, artifacts)
    return Size(what, sum(part.files for part in taken), sum(part.size for part in taken))


def render_sizes(parts: list[Size], artifacts: Path) -> str:
    """The sizes as aligned text."""
    if not parts:
        return f"nothing below {artifacts}."
    lines = [[part.name, f"{part.files:,}", f"{part.size / 2**20:,.1f}"] for part in parts]
    return aligned([["name", "files", "MiB"], *lines])


def _runs(artifacts: Path) -> list[Path]:
    return [run for run in sorted(artifacts.glob("[!.]*/")) if run.name != SHARED]


def _remove(folder: Path, artifacts: Path) -> None:
    """Out of sight first, so that nothing half-removed is ever taken for something whole."""
    gone = artifacts / f".removed-{folder.name}-{time.time_ns()}"
    with storage_errors(folder, "removing"):
        folder.replace(gone)
        for left in artifacts.glob(".removed-*"):  # by this call, or one that was killed
            shutil.rmtree(left)


def _size(folder: Path, name: str) -> Size:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return Size(name, len(files), sum(path.stat().st_size for path in files))
