"""Writes that are seen whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stackllm.errors import StorageError


@contextmanager
def storage_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn the system's errors while ``doing`` something to ``path`` into one sentence.

    Raises
    ------
    StorageError
        With the path, the system's reason and the next step.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        step = {
            errno.ENOSPC: "Free some space and run the same command again.",
            errno.EACCES: "Check the permissions of the file and its folder.",
            errno.EPERM: "Check the permissions of the file and its folder.",
            errno.EROFS: "Choose a folder that can be written.",
            errno.EISDIR: "Name a file, not a folder.",
        }.get(error.errno or 0, "Run the same command again once this is mended.")
        raise StorageError(f"{path}: {doing} failed: {reason}. {step}") from error


def fsync_folder(folder: Path) -> None:
    """Make the names inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Make the bytes of ``path`` durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Publish one file: written beside its place under a temporary name, then moved there.

    Parameters
    ----------
    path
        Where the file is to stand; its folder is made if need be. What stood there before stays
        whole until the new file is complete.
    write
        Gets the temporary path and writes the whole content to it.

    Raises
    ------
    StorageError
        If anything on the way fails; the temporary file is gone then.
    """
    with storage_errors(path, "writing"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            fsync_file(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Publish ``content`` at ``path`` (see :func:`write_file`)."""
    write_file(path, lambda temporary: _write_all(temporary, content))


def write_text(path: Path, content: str) -> None:
    """Publish ``content`` at ``path`` as UTF-8 (see :func:`write_file`)."""
    write_bytes(path, content.encode())


def replace_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Publish a folder: filled under a temporary name beside its place, then moved there.

    Parameters
    ----------
    path
        Where the folder is to stand; one that stands there already is removed once the new one
        is complete and durable.
    fill
        Gets the temporary folder and writes every file into it.

    Raises
    ------
    StorageError
        If anything on the way fails.
    """
    with storage_errors(path, "writing"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            fill(temporary)
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    fsync_file(file)
            fsync_folder(temporary)
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                old = temporary.with_suffix(".old")
                path.replace(old)
                temporary.replace(path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(path.parent)


def _write_all(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
