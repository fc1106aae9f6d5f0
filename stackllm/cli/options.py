"""Options that several commands share, and what they open."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_SECTION_OF = {
    "train": "data", "test": "data", "id": "data", "group": "data", "text": "data", "target": "data",
    "question": "data", "same_question": "data", "quota": "data", "sample": "data", "csv_safe": "data",
    "folds": "run", "parts": "run", "seed": "run",
    "backbone": "encoder", "rounds": "pseudo", "labels": "pseudo",
    "ask": "rater", "max_requests": "server",
}  # fmt: skip


@dataclass(frozen=True)
class Session:
    """What the shared options mean.

    Parameters
    ----------
    settings
        Settings with the options on top.
    engine
        Runs units below the run's folder.
    cache
        Runs units below the folder that runs share.
    json
        Print one JSON object on standard output.
    truth
        File with the test's labels, for scoring.
    """

    settings: Any
    engine: Any
    cache: Any
    json: bool
    truth: Path | None


def data_options(command: Command) -> Command:
    """Which table, and which settings."""
    for option in reversed(
        [
            click.option("--train", metavar="FILE", help="Training table.  [train.csv]"),
            click.option("--test", metavar="FILE", help="Test table.  [test.csv]"),
            click.option("--id", metavar="COLUMN", help="Id column.  [id]"),
            click.option("--group", metavar="COLUMN", help="Group column.  [Question]"),
            click.option("--text", metavar="COLUMN", help="Response column.  [Response]"),
            click.option("--target", metavar="COLUMN", help="Label column.  [target]"),
            click.option(
                "--question",
                metavar="COLUMN",
                help="Question text, if the group column holds no text.",
            ),
            click.option(
                "--same-question",
                type=click.Choice(["normalised", "exact"]),
                help="When two question texts are one group.  [normalised]",
            ),
            click.option("--quota", type=int, help="How often each class stands in a group.  [1]"),
            click.option(
                "--sample", metavar="FILE", help="Sample submission whose columns to copy."
            ),
            click.option(
                "--csv-safe",
                is_flag=True,
                default=None,
                help="Make ids in CSV exports harmless to spreadsheets.",
            ),
            click.option(
                "--truth",
                metavar="FILE",
                type=Path,
                help="Labels of the test rows, for scoring only.",
            ),
            click.option("--folds", type=int, help="Folds of the training groups.  [5]"),
            click.option(
                "--parts", type=int, help="Parts of the test groups for pseudo-labels.  [2]"
            ),
            click.option("--seed", type=int, help="Seed of everything.  [0]"),
            click.option(
                "--backbone",
                metavar="NAME",
                help='Frozen LLM: "smollm2", a folder, a hub name, or "none".',
            ),
            click.option(
                "--recipe", "recipes", multiple=True, metavar="FILE", help="A further recipe file."
            ),
            click.option(
                "--ask",
                multiple=True,
                metavar="BLOCK",
                help="Turn on an asked recipe, such as gpt_rating or category.",
            ),
            click.option(
                "--max-requests",
                type=click.IntRange(0),
                help="Stop after so many requests to a server, with exit code 75.",
            ),
            click.option("--config", type=Path, metavar="FILE", help="Settings.  [stackllm.toml]"),
        ]
    ):
        command = option(command)
    return command


def run_options(command: Command) -> Command:
    """Where results go and how work is done."""
    for option in reversed(
        [
            click.option("--name", default="run", show_default=True, help="Name of the run."),
            click.option(
                "--artifacts",
                type=Path,
                default=Path("artifacts"),
                show_default=True,
                help="Folder of runs.",
            ),
            click.option(
                "--jobs",
                type=click.IntRange(1),
                help="Units side by side.  [number of cores or workers]",
            ),
            click.option(
                "--engine",
                type=click.Choice(["local", "dask", "ray"]),
                default="local",
                show_default=True,
                help="Whose workers run units.",
            ),
            click.option("--address", metavar="ADDRESS", help="Of a dask scheduler or ray head."),
            click.option(
                "--dry-run", is_flag=True, help="List what would run and why, and run nothing."
            ),
            click.option(
                "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
            ),
            click.option("--quiet", is_flag=True, help="No progress, warnings only."),
        ]
    ):
        command = option(command)
    return command


@contextmanager
def session(
    *, name: str, artifacts: Path, jobs: int | None, engine: str, address: str | None, dry_run: bool, as_json: bool, quiet: bool,
    config: Path | None, truth: Path | None, recipes: tuple[str, ...], **given: Any,
) -> Iterator[Session]:  # fmt: skip
    """Settings, engines and the run's lock out of the shared options."""
    from joblib import cpu_count

    from stackllm.engine.local import Engine, PendingError
    from stackllm.engine.pools import open_pool
    from stackllm.engine.progress import Reporter
    from stackllm.errors import MissingInputError, UsageError
    from stackllm.settings import read_settings
    from stackllm.store.folder import open_folder
    from stackllm.store.lock import locked

    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f'--name may hold letters, digits, ".", "_" and "-" only, not "{name}".')
    if name.lower() == "cache":  # where runs keep what they share
        raise UsageError("--name: choose another than cache, which is the folder that runs share.")
    overrides: dict[str, dict[str, Any]] = {"recipes": {"files": recipes}}
    for option, value in given.items():
        if value not in (None, ()):
            overrides.setdefault(_SECTION_OF[option], {})[option] = value
    settings = read_settings(config, overrides)
    for option, path in (("--truth", truth), ("--sample", settings.data.sample)):
        if path is not None and not Path(path).is_file():  # said now, not after hours of work
            raise MissingInputError(f"{path}: there is no such file. Check {option}.")
    reporter = Reporter(quiet)
    n_jobs = min(jobs or cpu_count(), cpu_count())  # each computes on a thread of its own
    if jobs and jobs > n_jobs and engine == "local":
        reporter.say(f"--jobs {jobs}: {n_jobs}, as many as this machine has cores")
    root = artifacts / name
    shared = artifacts / "cache"
    with ExitStack() as stack:
        pool = None
        if not dry_run:  # which only reads, and starts nobody
            stack.enter_context(locked(root))
            open_folder(shared, shared=True)
            pool = open_pool(engine, address, n_jobs)
        if pool:
            stack.callback(pool.close)
            n_jobs = n_jobs if engine == "local" else jobs or pool.slots
        runner = Engine(root, n_jobs, reporter, dry_run, pool)
        cache = Engine(shared, n_jobs, reporter, dry_run, pool)
        try:
            yield Session(settings, runner, cache, as_json, truth)
        except PendingError as error:
            if as_json:
                click.echo(json.dumps({"would_run": error.units}))
            raise
