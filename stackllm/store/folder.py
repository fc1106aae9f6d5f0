"""Opening a folder that holds units: nothing in it leads out of it, and no rubbish stays."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from stackllm.errors import StorageError
from stackllm.store.atomic import is_abandoned, make_folder, storage_errors

_DAY = 86_400.0
"""Seconds after which a writer on another machine counts as gone."""


def open_folder(root: Path, shared: bool = False) -> None:
    """Check a folder before units are written below it.

    Parameters
    ----------
    root
        A run's folder, or the one that runs share.
    shared
        Others may be writing below it now. Then only what no process at work can own is removed of
        all that killed writers left.

    Raises
    ------
    StorageError
        If a link stands in it, through which a write would go elsewhere.
    """
    with storage_errors(root, "opening"):
        _refuse_link(root, root)
        make_folder(root)
        for folder, folders, files in os.walk(root, onerror=_raise):
            for name in [*folders, *files]:
                path = Path(folder, name)
                _refuse_link(path, root)
                if name.startswith(".") and path.suffix in {".tmp", ".old"}:
                    _remove(path, shared)
            folders[:] = [name for name in folders if not name.endswith((".tmp", ".old"))]


def _refuse_link(path: Path, root: Path) -> None:
    if path.is_symlink():
        raise StorageError(
            f"{path} is a link, and results are written below {root} only. "
            "Put the file or folder itself there, or remove the link."
        )


def _remove(path: Path, shared: bool) -> None:
    """Remove a temporary file or folder; one that its own writer removes meanwhile is gone too."""
    with contextlib.suppress(FileNotFoundError):
        old = time.time() - path.stat().st_mtime > _DAY
        if shared and not (old or is_abandoned(path)):
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a folder that another process has just moved
        raise error
