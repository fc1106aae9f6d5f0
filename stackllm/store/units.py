"""Units on disk: a folder with a verified manifest, or nothing.

``<root>/<stage>/<unit>/`` holds data files and, written last, ``manifest.json`` with the unit's key
and a SHA-256 and size for each file. A folder whose manifest is absent, of another key, or does not
match its files does not exist for a reader; one that is damaged is moved to ``quarantine/``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackllm.errors import StorageError
from stackllm.store.atomic import replace_folder, storage_errors
from stackllm.store.digest import digest, file_digest

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work that is run, stored and resumed.

    Parameters
    ----------
    path
        Folder below the root, ``stage/name``: letters, digits, ``.``, ``_``, ``-`` and ``/``.
    key
        Digest of the stage, its code version, its parameters and its inputs.
    """

    path: str
    key: str

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", part) for part in parts):
            raise ValueError(f"unit path {self.path!r} is not made of plain names")

    def inside(self, root: Path) -> Path:
        """The unit's folder below ``root``."""
        return root.joinpath(*self.path.split("/"))


def make_unit(path: str, version: int, *inputs: Any) -> Unit:
    """A unit whose key covers its path, its stage's code version and its inputs."""
    return Unit(path, digest(path, version, *inputs))


def state(root: Path, unit: Unit) -> str:
    """Why a unit will run or be re-used: ``done``, ``new``, ``inputs changed`` or ``damaged``.

    Every file's size and SHA-256 is checked: raw formats accept almost every flipped bit, so the
    digest is the only guard.
    """
    folder = unit.inside(root)
    if not folder.is_dir():
        return "new"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["key"] != unit.key:
            return "inputs changed"
        for name, entry in manifest["files"].items():
            file = folder / name
            if file.stat().st_size != entry["size"] or file_digest(file) != entry["sha256"]:
                return "damaged"
    except (OSError, StorageError, ValueError, KeyError, TypeError, AttributeError):
        return "damaged"
    return "done"


def publish(root: Path, unit: Unit, fill: Callable[[Path], None]) -> Path:
    """Write a unit's files through ``fill`` and publish them with their manifest, all at once.

    Parameters
    ----------
    root
        The folder that holds all units of a run or cache.
    unit
        Which unit.
    fill
        Gets a temporary folder and writes the data files into it.

    Returns
    -------
    Path
        The published folder.
    """
    folder = unit.inside(root)

    def fill_and_sign(temporary: Path) -> None:
        fill(temporary)
        files = {
            path.name: {"size": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(temporary.iterdir())
        }
        content = {"unit": unit.path, "key": unit.key, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True))

    replace_folder(folder, fill_and_sign)
    return folder


def quarantine(root: Path, unit: Unit) -> Path:
    """Move a damaged unit out of the way, so that it is made again and can still be looked at."""
    target = root / "quarantine" / f"{unit.path.replace('/', '-')}-{time.time_ns()}"
    with storage_errors(target, "moving a damaged unit"):
        target.parent.mkdir(parents=True, exist_ok=True)
        unit.inside(root).replace(target)
    return target


def open_unit(root: Path, unit: Unit) -> Path:
    """The folder of a unit that must be complete.

    Raises
    ------
    StorageError
        If it is not there, stale or damaged.
    """
    found = state(root, unit)
    if found != "done":
        raise StorageError(
            f"{unit.inside(root)} is {found if found == 'damaged' else 'not there'}. "
            "Run the same command again to make it anew."
        )
    return unit.inside(root)
