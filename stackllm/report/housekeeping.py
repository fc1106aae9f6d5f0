"""What takes up room below a folder of runs, and making room."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackllm.errors import MissingInputError, UsageError, did_you_mean
from stackllm.llm.digests import cache_folder
from stackllm.llm.hub import hub_model
from stackllm.llm.locate import EMBEDDED, EMBEDDED_HUB_NAME
from stackllm.parameters import shown
from stackllm.rating.ask import JOURNAL
from stackllm.report.text import aligned
from stackllm.store.atomic import storage_errors
from stackllm.store.lock import locked
from stackllm.store.records import RECORD, read_json
from stackllm.store.units import QUARANTINE, keys_in
from stackllm.workspace import SHARED

_ANSWERS = f"{SHARED}/{JOURNAL}"
BACKBONES, HUB = "backbones", "hub"
"""What is beside a folder of runs: LLMs that were converted, and those of the hub, which other programs use too."""


@dataclass(frozen=True)
class Size:
    """Something that takes up room.

    Parameters
    ----------
    name
        ``run``, ``cache/trunk``, ``backbones/smollm2-…``, ``hub/org/name`` …
    files, size
        How many files, and their bytes.
    used_by
        Runs that read from it.
    again
        What has to be done to have it again.
    """

    name: str
    files: int
    size: int
    used_by: tuple[str, ...] = ()
    again: str = ""


def sizes(artifacts: Path) -> list[Size]:
    """Runs, the parts of the cache that they share, converted LLMs and those of the hub; the largest first."""
    runs = {run.name: _record(run) for run in _runs(artifacts)}
    parts = [_size(artifacts / name, name, again="trained anew") for name in runs]
    for folder in (artifacts / SHARED).glob("[!.]*/"):
        users = [name for name, record in runs.items() if _reads(record, folder.name)]
        again = "read anew, by a run that changes or goes on" if users else ""
        parts.append(_size(folder, f"{SHARED}/{folder.name}", users, again))
    journal = artifacts / _ANSWERS
    if journal.is_file():
        users = [name for name, record in runs.items() if _at(record, "settings", "rater", "url")]
        parts.append(Size(_ANSWERS, 1, journal.stat().st_size, tuple(users), "paid for: stays"))
    for name, folder in _llms().items():
        users = [run for run, record in runs.items() if _stands_on(record, name, folder)]
        again = "converted anew" if name.startswith(BACKBONES) else "fetched anew"
        parts.append(_size(folder, name, users, again))
    return sorted(parts, key=lambda part: (-part.size, part.name))


def look(artifacts: Path, names: Sequence[str]) -> list[Size]:
    """What :func:`clean` would remove.

    Parameters
    ----------
    artifacts
        Folder of runs.
    names
        Names of :func:`sizes`, or ``quarantine`` for the damaged units of all runs.

    Raises
    ------
    MissingInputError
        If there is no such thing.
    UsageError
        If it is answers that may have been paid for.
    """
    known = {part.name: part for part in sizes(artifacts)}
    parts = []
    for name in dict.fromkeys(names):
        if name == QUARANTINE:
            taken = [_size(folder, name) for folder in artifacts.glob(f"*/{QUARANTINE}/")]
            parts.append(Size(name, sum(it.files for it in taken), sum(it.size for it in taken)))
        elif name == _ANSWERS:
            raise UsageError(
                f"{artifacts / name} holds answers that may have been paid for, and is never removed by stackllm."
            )
        elif name in known:
            parts.append(known[name])
        else:
            raise MissingInputError(
                f"{artifacts}: there is no {shown(name)}. {did_you_mean(name, known)}"
                if known
                else f"{artifacts}: there is no {shown(name)}, and nothing else to remove."
            )
    return parts


def clean(artifacts: Path, what: str) -> Size:
    """Remove a run, a part of the cache, an LLM, or what was quarantined; return what it took.

    Parameters
    ----------
    artifacts
        Folder of runs.
    what
        As for :func:`look`.

    Raises
    ------
    MissingInputError, UsageError
        As for :func:`look`.
    LockedError
        If another process is writing that run, or one that reads from it.
    StorageError
        If it cannot be removed.
    """
    (part,) = look(artifacts, [what])
    outside = _llms().get(what)
    if what == QUARANTINE:
        folders = sorted(artifacts.glob(f"*/{QUARANTINE}/"))
    else:
        folders = [outside or artifacts / what]
    with ExitStack() as held:
        for run in _runs(artifacts):
            # all runs read the cache and the LLMs
            if outside or what.split("/")[0] in (run.name, SHARED, QUARANTINE):
                held.enter_context(locked(run))
        for folder in folders:
            _remove(folder, folder.parent if outside else artifacts)  # on one disk
    return part


def render_sizes(parts: Sequence[Size], artifacts: Path) -> str:
    """The sizes as aligned text, with what depends on each."""
    if not parts:
        return f"nothing below {artifacts}."
    lines = [
        [part.name, f"{part.files:,}", f"{part.size / 2**20:,.1f}", ", ".join(part.used_by), part.again]
        for part in parts
    ]  # fmt: skip
    return aligned([["name", "files", "MiB", "read by", "once it is gone"], *lines], left=(0, 3, 4))


def _llms() -> dict[str, Path]:
    """Folders of LLMs on this machine that can be had again, by name: converted ones, and the hub's."""
    from huggingface_hub import constants

    converted = {
        f"{BACKBONES}/{folder.name}": folder
        for folder in (cache_folder() / BACKBONES).glob("[!.]*/")
    }
    hub = {
        f"{HUB}/{folder.name.removeprefix('models--').replace('--', '/', 1)}": folder
        for folder in Path(constants.HF_HUB_CACHE).glob("models--*/")
    }
    return dict(sorted((converted | hub).items()))


def _stands_on(record: dict[str, Any], name: str, folder: Path) -> bool:
    """Does a run read with the LLM of that name? Converted ones are called by what they were made of."""
    for llm, revision in (_at(record, "backbones") or {}).items():
        if name.startswith(f"{HUB}/"):
            model = hub_model(llm if llm != EMBEDDED else EMBEDDED_HUB_NAME)
            commit = folder / "snapshots" / str(revision)
            if model is not None and f"{HUB}/{model.repo}" == name and commit.is_dir():
                return True
        elif folder.name.endswith(f"-{str(revision)[:16]}") or revision in keys_in(folder):
            return True
    return False


def _reads(record: dict[str, Any], part: str) -> bool:
    """May a run read from that part of the cache?"""
    settings = record.get("settings")
    if part == "encoder":
        return bool(_at(settings, "encoder"))
    if part == "rater":
        return bool(_at(settings, "rater", "ask") and not _at(settings, "rater", "url"))
    members = _at(settings, "members") or []
    return part == "trunk" and any(_at(it, "kind") == "decoder" for it in members)


def _at(record: Any, *names: str) -> Any:
    """A value inside of dicts; None where there is none."""
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    return record


def _record(run: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = read_json(run / RECORD)
    except (OSError, ValueError):  # none yet, or a damaged one: it names nothing
        return {}
    return record


def _runs(artifacts: Path) -> list[Path]:
    return [run for run in sorted(artifacts.glob("[!.]*/")) if run.name != SHARED]


def _remove(folder: Path, beside: Path) -> None:
    """Out of sight first, so that nothing half-removed is ever taken for something whole."""
    gone = beside / f".removed-{folder.name}-{time.time_ns()}"
    with storage_errors(folder, "removing"):
        folder.replace(gone)
        for left in beside.glob(".removed-*"):  # by this call, or one that was killed
            shutil.rmtree(left)


def _size(folder: Path, name: str, used_by: Sequence[str] = (), again: str = "") -> Size:
    """Of all files, links not counted: the hub's cache has every file once and links to it."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return Size(name, len(files), sum(path.stat().st_size for path in files), tuple(used_by), again)
