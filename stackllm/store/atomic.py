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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stackllm.errors import StorageError, first_line

_SYSTEM = re.compile("os error|transport error")
"""What polars says when the system does not take what it writes."""

_TRIES = 20
"""How often a folder is moved into its place against others that do the same."""

_PERMISSIONS = (  # Windows says the same of a file that a program, such as a spreadsheet, has open
    "Check the permissions of the file and its folder, and close any program that has it open."
)

UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
"""What a system answers that does not know a call at all, or not for this kind of file."""


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
            errno.EACCES: _PERMISSIONS,
            errno.EPERM: _PERMISSIONS,
            errno.EROFS: "Choose a folder that can be written.",
            errno.EISDIR: "Name a file, not a folder.",
        }.get(error.errno or 0, "Run the same command again once this is mended.")
        raise StorageError(f"{path}: {doing} failed: {reason}. {step}") from error
    except Exception as error:
        if not type(error).__module__.startswith("polars") or not _SYSTEM.search(str(error)):
            raise
        raise StorageError(  # what the system said, as polars passes it on
            f"{path}: {doing} failed: {first_line(error)}. "
            "Run the same command again once this is mended."
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, whose names are durable then."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names inside ``folder`` durable, where the system can.

    Windows opens no folder as a file, and shared folders, network and FUSE mounts may refuse to
    sync one. What was written there stands all the same, so neither is a failed write.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        return
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return
        raise
    try:
        _sync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Make the bytes of ``path`` durable."""
    with path.open("r+b") as file:  # Windows syncs no file that is open for reading only
        _sync(file.fileno())


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {*UNSUPPORTED, errno.EACCES, errno.EPERM}:
            raise


def _share(path: Path, mode: int) -> None:
    """Give a file or folder, made for its writer alone, the permissions that others get."""
    with contextlib.suppress(PermissionError, NotImplementedError):  # of a disk that knows none
        path.chmod(mode & ~_umask())


def write_file(path: Path, write: Callable[[Path], object]) -> None:
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
            _share(temporary, 0o666)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Publish ``content`` at ``path`` (see :func:`write_file`)."""
    write_file(path, lambda temporary: temporary.write_bytes(content))


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
            _share(temporary, 0o777)
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
    if sys.platform == "win32":  # there os.kill(pid, 0) is Ctrl-C to it
        import ctypes

        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        return windows_process_exists(pid, kernel32, ctypes.get_last_error)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def windows_process_exists(pid: int, kernel32: Any, last_error: Callable[[], int]) -> bool:
    """:func:`process_exists` on Windows, where a process that has ended is a signalled object.

    Parameters
    ----------
    pid
        Number of the process.
    kernel32
        The system's library: ``OpenProcess``, ``WaitForSingleObject`` and ``CloseHandle`` are called.
    last_error
        Gives the number of the error of the last of these calls.
    """
    synchronize, access_denied, signalled = 0x0010_0000, 5, 0
    handle = kernel32.OpenProcess(synchronize, False, pid)
    if not handle:
        return last_error() == access_denied  # of somebody else's process, which is there
    try:
        return int(kernel32.WaitForSingleObject(handle, 0)) != signalled
    finally:
        kernel32.CloseHandle(handle)


def remove_abandoned(path: Path) -> None:
    """Remove what killed writers of the same file or folder left beside it."""
    for left in path.parent.glob(f"{glob.escape(_stem(path))}*.tmp"):
        if is_abandoned(left) and left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif is_abandoned(left):
            left.unlink(missing_ok=True)


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
        is_free = False
        try:
            with contextlib.suppress(FileNotFoundError):
                path.replace(old)
            is_free = True
            temporary.replace(path)
        except BaseException as error:
            taken = isinstance(error, OSError) and error.errno in {errno.ENOTEMPTY, errno.EEXIST}
            if taken or (is_free and isinstance(error, OSError) and path.exists()):
                continue  # another writer was faster; Windows calls that a lack of permission
            if old.exists() and not path.exists():
                old.replace(path)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
        return
    raise FileExistsError(errno.EEXIST, "other processes keep writing it")


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
