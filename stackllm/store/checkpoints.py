"""How far an unfinished unit is: states that it resumes from, as units of their own.

Where they stand and whose they are is set by whoever runs the unit (:func:`checkpoints_of`), so that
what computes it need not know. They are verified like all units, and removed once theirs is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from stackllm.store.units import REUSED, Unit, make_unit, publish, quarantine, state

RESUME, FITTED, LAST_GOOD = "checkpoints", "fitted", "last_good"
"""Folders below the root: states to go on from, what is computed but for its use, and weights of before a failure."""

_OWNER: ContextVar[tuple[Path, Unit] | None] = ContextVar("owner", default=None)


@contextmanager
def checkpoints_of(root: Path, unit: Unit) -> Iterator[None]:
    """Let :func:`checkpoint` and :func:`keep` mean ``unit`` inside."""
    token = _OWNER.set((root, unit))
    try:
        yield
    finally:
        _OWNER.reset(token)


def checkpoint(kind: str = RESUME) -> Path | None:
    """Folder of the newest sound state of the unit at work; None if it starts anew.

    Parameters
    ----------
    kind
        :data:`RESUME` or :data:`FITTED`.
    """
    owner = _OWNER.get()
    if owner is None:
        return None
    root, unit = owner
    for folder in reversed(_stored(root, kind, unit)):
        stored = _of(kind, unit, folder.name)
        condition = state(root, stored)
        if condition == REUSED:
            return folder
        if condition == "corrupt":
            quarantine(root, stored)
    return None


def keep(fill: Callable[[Path], None], name: str, kind: str = RESUME) -> Path | None:
    """Store a state of the unit at work; the ones before go once it stands.

    Parameters
    ----------
    fill
        Gets a folder and writes the state's files into it.
    name
        Of the state; the newest comes last in the alphabet.
    kind
        :data:`RESUME`, :data:`FITTED` or :data:`LAST_GOOD`.

    Returns
    -------
    Path or None
        Where it stands; None outside of units, where nothing is stored.
    """
    owner = _OWNER.get()
    if owner is None:
        return None
    root, unit = owner
    before = _stored(root, kind, unit)
    folder = publish(root, _of(kind, unit, name), fill)
    for other in before:
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def root_of_this_unit() -> Path | None:
    """Where the unit at work is stored; None outside of units."""
    owner = _OWNER.get()
    return owner[0] if owner else None


def discard(root: Path, unit: Unit) -> None:
    """Remove what was stored of a unit on its way."""
    for kind in (RESUME, FITTED, LAST_GOOD):
        shutil.rmtree(root / kind / unit.path, ignore_errors=True)


def _of(kind: str, unit: Unit, name: str) -> Unit:
    return make_unit(f"{kind}/{unit.path}/{name}", 1, unit.key, name)


def _stored(root: Path, kind: str, unit: Unit) -> list[Path]:
    return sorted((root / kind / unit.path).glob("[!.]*"))
