"""Options that several commands share, and what they open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_SECTION_OF = {
    "train": "data", "test": "data", "id": "data", "group": "data", "text": "data", "target": "data",
    "question": "data", "quota": "data", "sample": "data",
    "folds": "run", "parts": "run", "seed": "run",
    "backbone": "encoder", "rounds": "pseudo", "labels": "pseudo",
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
            click.option("--quota", type=int, help="How often each class stands in a group.  [1]"),
            click.option(
                "--sample", metavar="FILE", help="Sample submission whose columns to copy."
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
                "--jobs", type=click.IntRange(1), help="Worker processes.  [number of cores]"
            ),
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
    *, name: str, artifacts: Path, jobs: int | None, dry_run: bool, as_json: bool, quiet: bool,
    config: Path | None, truth: Path | None, recipes: tuple[str, ...], **given: Any,
) -> Iterator[Session]:  # fmt: skip
    """Settings, engines and the run's lock out of the shared options."""
    from joblib import cpu_count

    from stackllm.engine.local import Engine
    from stackllm.engine.progress import Reporter
    from stackllm.errors import MissingInputError, UsageError
    from stackllm.settings import read_settings
    from stackllm.store.lock import locked

    if not name.replace("_", "a").replace("-", "a").replace(".", "a").isalnum() or name[0] in ".-":
        raise UsageError(f'--name may hold letters, digits, ".", "_" and "-" only, not "{name}".')
    overrides: dict[str, dict[str, Any]] = {"recipes": {"files": recipes}}
    for option, value in given.items():
        if value is not None:
            overrides.setdefault(_SECTION_OF[option], {})[option] = value
    settings = read_settings(config, overrides)
    for option, path in (("--truth", truth), ("--sample", settings.data.sample)):
        if path is not None and not Path(path).is_file():  # said now, not after hours of work
            raise MissingInputError(f"{path}: there is no such file. Check {option}.")
    reporter = Reporter(quiet)
    n_jobs = jobs or cpu_count()
    root = artifacts / name
    with locked(root):
        engine = Engine(root, n_jobs, reporter, dry_run)
        cache = Engine(artifacts / "cache", n_jobs, reporter, dry_run)
        yield Session(settings, engine, cache, as_json, truth)
