"""Units on disk: a folder with a verified manifest, or nothing.

``<root>/<stage>/<unit>/`` holds data files and, written last, ``manifest.json`` with the unit's key,
what the key is made of, and a SHA-256 and size for each file. A folder whose manifest is absent, of
another key, or does not match its files does not exist for a reader; one that is corrupt is moved to
``quarantine/``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackllm.errors import StorageError
from stackllm.store.atomic import make_folder, replace_folder, storage_errors
from stackllm.store.digest import digest, file_digest
from stackllm.store.records import read_json

MANIFEST = "manifest.json"
QUARANTINE = "quarantine"
REUSED = "done"
"""State of a unit that need not run."""

_OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP}
"""Errors of the system that say that a stored file is not what was written."""

_REASONS = {"code": "code changed", "params": "parameters changed", "inputs": "input changed"}


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work that is run, stored and resumed.

    Parameters
    ----------
    path
        Folder below the root, ``stage/name``: letters, digits, ``.``, ``_``, ``-`` and ``/``.
    key
        Digest of the stage, its code version, its parameters and its inputs; not of the name.
    parts
        Digest of each of those by name, so that a reader can tell which has changed.
    """

    path: str
    key: str
    parts: dict[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", part) for part in parts):
            raise ValueError(f"unit path {self.path!r} is not made of plain names")

    @property
    def stage(self) -> str:
        """First part of the path."""
        return self.path.split("/")[0]

    def inside(self, root: Path) -> Path:
        """The unit's folder below ``root``."""
        return root.joinpath(*self.path.split("/"))


def make_unit(path: str, version: int, *inputs: Any, params: Any = None) -> Unit:
    """A unit whose key covers its stage and everything that decides its bytes, but not its name.

    So what is the same work is found again under another name and in another run; and two units of
    a stage that hold different things must differ in ``version``, ``params`` or ``inputs``.

    Parameters
    ----------
    path
        Folder below the root; its first part is the stage.
    version
        Version of the stage's code.
    *inputs
        What it reads, or digests of that.
    params
        What the user can set about it.

    Examples
    --------
    >>> make_unit("members/one", 1, "text").key == make_unit("members/two", 1, "text").key
    True
    """
    parts = {"code": digest(version), "params": digest(params), "inputs": digest(*inputs)}
    return Unit(path, _key(path, parts), parts)


def _key(path: str, parts: dict[str, str]) -> str:
    return digest(path.split("/")[0], parts)


def state(root: Path, unit: Unit, hashed: Callable[[Path], str] = file_digest) -> str:
    """Why a unit will run or be re-used; ``hashed`` gives a file's SHA-256.

    Raises
    ------
    StorageError
        If the system does not let us look.

    Returns
    -------
    str
        ``done``, ``new``, ``corrupt``, or which part of its key is another now: ``code changed``,
        ``parameters changed``, ``input changed``.
    """
    folder = unit.inside(root)
    if not folder.is_dir():
        return "new"
    try:
        manifest = _read_manifest(folder)
        if unit.key in _keys(manifest):
            return REUSED if _files_match(folder, manifest["files"], hashed) else "corrupt"
        stored = manifest["parts"]
    except OSError as error:
        if error.errno in _OF_THE_FILE:
            return "corrupt"
        with storage_errors(folder, "reading"):  # too many open files, no permission: no news of it
            raise
    except (StorageError, ValueError, KeyError, TypeError, AttributeError):
        return "corrupt"
    changed = (name for name in _REASONS if stored.get(name) != unit.parts.get(name))
    return _REASONS[next(changed, "inputs")]


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
        _sign(temporary, unit, files)

    replace_folder(folder, fill_and_sign, lambda: state(root, unit) == REUSED)
    return folder


def adopt(root: Path, unit: Unit, source: Path) -> Path:
    """Publish a unit that stands whole in another place, with the same bytes as if it had been run.

    Its files are hard links where the disk knows them: nobody ever writes into a published file.

    Parameters
    ----------
    root, unit
        As for :func:`publish`.
    source
        Folder of a unit of the same key that was just verified (:func:`is_whole`).

    Returns
    -------
    Path
        The published folder.

    Raises
    ------
    StorageError
        If the source has gone meanwhile, or anything on the way fails.
    """
    folder = unit.inside(root)

    def fill_and_sign(temporary: Path) -> None:
        copy_files(source, temporary)
        _sign(temporary, unit, _read_manifest(source)["files"])

    replace_folder(folder, fill_and_sign, lambda: state(root, unit) == REUSED)
    return folder


def copy_files(source: Path, target: Path) -> None:
    """A unit's files in another folder, as hard links where the disk knows them, without its manifest."""
    for path in sorted(source.iterdir()):
        if path.name == MANIFEST:
            continue
        try:
            os.link(path, target / path.name, follow_symlinks=False)
        except (OSError, NotImplementedError):  # another disk, or one without links
            shutil.copyfile(path, target / path.name, follow_symlinks=False)


def is_whole(folder: Path, key: str) -> bool:
    """Does a unit of this key stand in a folder as it was written, wherever that is?"""
    try:
        manifest = _read_manifest(folder)
        return key in _keys(manifest) and _files_match(folder, manifest["files"])
    except (OSError, StorageError, ValueError, KeyError, TypeError, AttributeError):
        return False


def keys_in(folder: Path) -> set[str]:
    """Keys that a unit's folder says it answers to, not verified; none if it can't be read."""
    try:
        return _keys(read_json(folder / MANIFEST))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def quarantine(root: Path, unit: Unit) -> Path:
    """Move a corrupt unit out of the way, so that it is made again and can still be looked at."""
    target = root / QUARANTINE / f"{unit.path.replace('/', '-')}-{time.time_ns()}"
    with storage_errors(target, "moving a damaged unit"):
        make_folder(target.parent)
        with contextlib.suppress(FileNotFoundError):  # another process has just moved it
            unit.inside(root).replace(target)
    return target


def open_unit(root: Path, unit: Unit) -> Path:
    """The folder of a unit that must be complete.

    Raises
    ------
    StorageError
        If it is not there, stale or corrupt.
    """
    condition = state(root, unit)
    if condition != REUSED:
        raise StorageError(
            f"{unit.inside(root)} is {condition if condition == 'corrupt' else 'not there'}. "
            "Run the command that made the run (stackllm run, stack or pseudo) to make it anew."
        )
    return unit.inside(root)


def stored_key(folder: Path) -> str:
    """The key under which a unit was published, for a reader who can't work it out.

    Raises
    ------
    StorageError
        If the manifest is absent or corrupt.
    """
    try:
        return str(_read_manifest(folder)["key"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{folder / MANIFEST} cannot be read. Run the same command again to make it anew."
        ) from error


def _keys(manifest: dict[str, Any]) -> set[str]:
    """The key that a unit was stored under, and the one that it would have today.

    They differ where it was stored when a key covered the whole path: same work all the same.
    """
    return {manifest["key"], _key(manifest["unit"], manifest["parts"])}


def _sign(folder: Path, unit: Unit, files: dict[str, dict[str, Any]]) -> None:
    content = {"unit": unit.path, "key": unit.key, "parts": unit.parts, "files": files}
    (folder / MANIFEST).write_text(_signed(content), encoding="utf-8", newline="\n")


def _signed(content: dict[str, Any]) -> str:
    """A manifest as text, with a digest of itself: a flipped bit in it must not look like news."""
    return json.dumps({**content, "self": digest(content)}, indent=1, sort_keys=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    content.pop("self")
    if _signed(content) != text:
        raise ValueError("the manifest is not as it was written")
    return content


def _files_match(
    folder: Path, files: dict[str, dict[str, Any]], hashed: Callable[[Path], str] = file_digest
) -> bool:
    """Is every file there as it was written, and none beside them?

    Raw formats accept almost every flipped bit, so the digest is the only guard.
    """
    names = {path.name for path in folder.iterdir()} - {MANIFEST}
    return names == set(files) and all(
        not (folder / name).is_symlink()
        and (folder / name).stat().st_size == entry["size"]
        and hashed(folder / name) == entry["sha256"]
        for name, entry in files.items()
    )
