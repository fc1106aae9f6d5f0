"""Digests of files of weights, worked out once per machine and change: weights can be of many GiB.

What a large file's digest was is noted below the cache folder, with what the system said of the file then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from stackllm.errors import StorageError
from stackllm.store.atomic import storage_errors, write_text
from stackllm.store.digest import digest, file_digest
from stackllm.store.records import read_json

SMALL = 2**16
"""Bytes below which a file is simply hashed."""

RACY_NS = 3 * 10**9
"""A file whose last change is nearer than this may change again without its time showing it: the coarsest clock of
the file systems in use ticks every two seconds."""

_FOLDER = "digests"


def cache_folder() -> Path:
    """Where converted weights stand: ``$STACKLLM_CACHE``, else ``~/.cache/stackllm``."""
    return Path(os.environ.get("STACKLLM_CACHE") or Path.home() / ".cache" / "stackllm")


@dataclass(frozen=True)
class _Seen:
    """What the system says of a file, some of which changes with its content."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> _Seen:
        whole = path.resolve()  # of a link the file that is read
        with storage_errors(path, "reading"):
            it = whole.stat()
        return cls(str(whole), it.st_size, it.st_mtime_ns, it.st_ctime_ns, it.st_ino)


def known_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as :func:`~stackllm.store.digest.file_digest`, but of a large file once a change.

    A file that was written a moment ago is hashed and not noted: as for git, nothing would tell that it was
    written once more within the same tick of the clock.

    Raises
    ------
    StorageError
        If the file can't be read.
    """
    began, seen = _now(), _Seen.of(path)
    if seen.size < SMALL:
        return file_digest(path)
    name = hashlib.sha256(seen.path.encode()).hexdigest()[:32]
    record = cache_folder() / _FOLDER / f"{name}.json"
    noted = _noted(record, seen)
    if noted:
        return noted
    made = file_digest(path)
    if _Seen.of(path) == seen and seen.mtime_ns < began - RACY_NS:
        content = {"file": asdict(seen), "sha256": made}
        # of a cache that is only read: the next command hashes anew
        with contextlib.suppress(StorageError):
            write_text(record, json.dumps({**content, "self": digest(content)}))
    return made


def _noted(record: Path, seen: _Seen) -> str | None:
    """The digest that a record has of a file as it is now; None where it has none, or is damaged itself."""
    try:
        content = read_json(record)
        if content.pop("self") == digest(content) and content["file"] == asdict(seen):
            return str(content["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _now() -> int:
    return time.time_ns()
