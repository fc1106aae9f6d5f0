"""What a user sees while work is going on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import click

from stackllm.store.atomic import storage_errors
from stackllm.store.records import append_json

_LINE_SECONDS = 15.0
"""Least time between two plain progress lines."""

_LOOK_SECONDS = 0.5
"""Time between two looks at what units note while they run."""

_NOTES: ContextVar[Path | None] = ContextVar("notes", default=None)


def notes_path(root: Path, unit: str) -> Path:
    """Where a unit notes how far it is, for as long as it is not published."""
    return root / "live" / f"{unit.replace('/', '-')}.jsonl"


@contextmanager
def taking_notes(path: Path) -> Iterator[None]:
    """Let :func:`note` write to ``path`` inside; the file stays only if the work fails.

    Notes hold times, so they stand outside the unit: the same work must give the same bytes.
    """
    with storage_errors(path, "removing old notes"):
        path.unlink(missing_ok=True)
    token = _NOTES.set(path)
    try:
        yield
    finally:
        _NOTES.reset(token)
    path.unlink(missing_ok=True)


def note(entry: dict[str, Any]) -> None:
    """Tell whoever watches this unit how far it is; outside of units this does nothing.

    Parameters
    ----------
    entry
        Shown are ``step`` and ``of``, and where they are there ``loss``, ``tokens_per_second``
        and ``seconds_left``.
    """
    path = _NOTES.get()
    if path is not None:
        with storage_errors(path, "writing"):
            path.parent.mkdir(exist_ok=True)
            append_json(path, entry)


def notes_of_this_unit() -> Path | None:
    """The file that :func:`note` writes to; None if nothing was noted."""
    path = _NOTES.get()
    return path if path is not None and path.exists() else None


def trackers_folder() -> Path | None:
    """Where trackers of the unit at work may write: beside all units, which hold results only.

    None outside of units.
    """
    path = _NOTES.get()
    return None if path is None else path.parents[1] / "trackers" / path.stem


class Reporter:
    """Writes to standard error, so that standard output stays clean for results.

    Parameters
    ----------
    quiet
        Say nothing but warnings.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, text: str) -> None:
        """One line of news: an automatic choice with its reason, a count, a path."""
        if not self.quiet:
            click.echo(text, err=True)

    def warn(self, text: str) -> None:
        """One line that matters even to a quiet user."""
        click.echo(f"warning: {text}", err=True)

    def tell(self, notes: Iterable[str], warnings: Iterable[str]) -> None:
        """Say every note, and warn of every warning."""
        for note in notes:
            self.say(note)
        for warning in warnings:
            self.warn(warning)

    @contextmanager
    def bar(
        self, label: str, total: int, notes: Sequence[Path] = ()
    ) -> Iterator[Callable[[], None]]:
        """Show progress over ``total`` steps; yields a function to call after each.

        Parameters
        ----------
        label
            What the work is called.
        total
            How many steps it has.
        notes
            Files in which steps may note how far they are; what they say last is shown too.
        """
        if self.quiet:
            yield lambda: None
        elif sys.stderr.isatty():
            with _rich_bar(label, total) as (advance, show), _watching(notes, show):
                yield advance
        else:
            advance, show = _plain_lines(label, total)
            with _watching(notes, show):
                yield advance


Show = Callable[[dict[str, dict[str, Any]]], None]
"""Gets the newest note of each unit that is at work, the newest of all last."""


@contextmanager
def _watching(notes: Sequence[Path], show: Show) -> Iterator[None]:
    """Show new notes from a thread of its own: this one waits for units to end."""
    ended, began = threading.Event(), time.time()

    def look() -> None:
        if hasattr(signal, "pthread_sigmask"):  # signals are for the main thread, when it lets them
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not ended.wait(_LOOK_SECONDS):
            show(newest_notes(notes, began))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def newest_notes(notes: Sequence[Path], since: float) -> dict[str, dict[str, Any]]:
    """The last whole note in each file that was written to, by the file's name.

    Parameters
    ----------
    notes
        Files that may be there.
    since
        Seconds since the epoch; files that were last written earlier tell of work long over.
    """
    newest: list[tuple[float, str, dict[str, Any]]] = []
    for path in notes:
        try:
            written, lines = path.stat().st_mtime, path.read_bytes().split(b"\n")[:-1]
        except OSError:  # not begun, or published meanwhile
            continue
        entries = [entry for entry in map(json.loads, lines) if "step" in entry]
        if entries and written >= since:
            newest.append((written, path.stem, entries[-1]))
    return {name: entry for _, name, entry in sorted(newest, key=lambda it: it[:2])}


def describe_note(entry: dict[str, Any]) -> str:
    """A note for people.

    Examples
    --------
    >>> describe_note({"loss": 0.41234, "tokens_per_second": 5213.2, "seconds_left": 75.0})
    'loss 0.4123, 5,213 tokens/s, about 75 s left'
    """
    shown = {
        "loss": "loss {:.4f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "seconds_left": "about {:.0f} s left",
    }
    return ", ".join(text.format(entry[name]) for name, text in shown.items() if name in entry)


@contextmanager
def _rich_bar(label: str, total: int) -> Iterator[tuple[Callable[[], None], Show]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        units: dict[str, TaskID] = {}

        def show(notes: dict[str, dict[str, Any]]) -> None:
            for name in units.keys() - notes.keys():
                progress.remove_task(units.pop(name))
            for name, entry in notes.items():
                if name not in units:
                    units[name] = progress.add_task(name)
                told = {key: value for key, value in entry.items() if key != "seconds_left"}
                progress.update(
                    units[name],
                    total=entry["of"],
                    completed=entry["step"],
                    description=f"{name}: {describe_note(told)}",
                )

        yield lambda: progress.advance(task), show


def _plain_lines(label: str, total: int) -> tuple[Callable[[], None], Show]:
    started = time.monotonic()
    done, spoken = 0, started

    def advance() -> None:
        nonlocal done, spoken
        done += 1
        now = time.monotonic()
        if done == total or now - spoken >= _LINE_SECONDS:
            spoken = now
            left = (now - started) / done * (total - done)
            tail = f"{now - started:.0f} s" if done == total else f"about {left:.0f} s left"
            click.echo(f"{label}: {done}/{total}, {tail}", err=True)

    def show(notes: dict[str, dict[str, Any]]) -> None:
        nonlocal spoken
        now = time.monotonic()
        if notes and now - spoken >= _LINE_SECONDS:
            spoken = now
            name, entry = list(notes.items())[-1]
            told = describe_note(entry)
            click.echo(f"{label}: {name}: step {entry['step']}/{entry['of']}, {told}", err=True)

    return advance, show
