"""Writes that are seen whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stackllm.errors import StorageError

_SYSTEM = re.compile("os error|transport error")
"""What polars says when the system does not take what it writes."""

_TRIES = 20
"""How often a folder is moved into its place against others that do the same."""


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
    except Exception as error:
        if not type(error).__module__.startswith("polars") or not _SYSTEM.search(str(error)):
            raise
        raise StorageError(  # what the system said, as polars passes it on
            f"{path}: {doing} failed: {str(error).splitlines()[0]:.200}. "
            "Run the same command again once this is mended."
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, whose names are durable then."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


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
        make_folder(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        remove_abandoned(path)
        handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=".tmp", dir=path.parent)
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


def replace_folder(
    path: Path, fill: Callable[[Path], None], is_there: Callable[[], bool] = lambda: False
) -> None:
    """Publish a folder: filled under a temporary name beside its place, then moved there.

    Parameters
    ----------
    path
        Where the folder is to stand; one that stands there already is removed once the new one
        is complete and durable.
    fill
        Gets the temporary folder and writes every file into it.
    is_there
        Asked when the new folder is complete: has another writer published the same meanwhile?
        Then that one stays, and readers never find the place empty.

    Raises
    ------
    StorageError
        If anything on the way fails.
    """
    with storage_errors(path, "writing"):
        make_folder(path.parent)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=".tmp", dir=path.parent))
        try:
            fill(temporary)
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    fsync_file(file)
            fsync_folder(temporary)
            temporary.chmod(0o777 & ~_umask())
            if is_there():
                shutil.rmtree(temporary, ignore_errors=True)
                return
            _move_into_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(path.parent)


def is_abandoned(path: Path) -> bool:
    """Was this temporary file or folder left by a process of this machine that is gone?"""
    told = re.search(r"\.([0-9a-f]{8})-(\d+)-[^.]*(\.\d+)?\.(tmp|old)$", path.name)
    return told is not None and told[1] == _host() and not process_exists(int(told[2]))


def process_exists(pid: int) -> bool:
    """Is there a process of this number on this machine?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def remove_abandoned(path: Path) -> None:
    """Remove what killed writers of the same file or folder left beside it."""
    for found in path.parent.glob(f"{glob.escape(_stem(path))}*.tmp"):
        if is_abandoned(found) and found.is_dir():
            shutil.rmtree(found, ignore_errors=True)
        elif is_abandoned(found):
            found.unlink(missing_ok=True)


def _stem(path: Path) -> str:
    return f".{path.name[:100]}."


def _prefix(path: Path) -> str:
    """Beginning of a temporary name: of which file, and whose."""
    return f"{_stem(path)}{_host()}-{os.getpid()}-"


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _move_into_place(temporary: Path, path: Path) -> None:
    """Rename a folder onto ``path``, whatever stands there and whoever else does the same."""
    for _ in range(_TRIES):
        old = temporary.with_suffix(f".{time.time_ns()}.old")
        try:
            with contextlib.suppress(FileNotFoundError):
                path.replace(old)
            temporary.replace(path)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                continue  # another writer was faster
            if old.exists() and not path.exists():
                old.replace(path)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
        return
    raise FileExistsError(errno.EEXIST, "other processes keep writing it")


def _write_all(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
