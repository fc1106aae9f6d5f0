"""What a user sees while work is going on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

_LINE_SECONDS = 15.0
"""Least time between two plain progress lines."""


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

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """Show progress over ``total`` steps; yields a function to call after each."""
        if self.quiet:
            yield lambda: None
        elif sys.stderr.isatty():
            with _rich_bar(label, total) as advance:
                yield advance
        else:
            yield _plain_lines(label, total)


@contextmanager
def _rich_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
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
        yield lambda: progress.advance(task)


def _plain_lines(label: str, total: int) -> Callable[[], None]:
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

    return advance
