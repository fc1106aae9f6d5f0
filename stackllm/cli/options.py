"""Options that several commands share, and what they open. A command takes only what it uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from stackllm.planning import Plan
    from stackllm.settings import Settings
    from stackllm.workspace import Workspace

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Command], Command]

_SECTION_OF = {
    "train": "data", "test": "data", "id": "data", "group": "data", "text": "data", "target": "data",
    "question": "data", "same_question": "data", "quota": "data", "sample": "data", "csv_safe": "data",
    "folds": "run", "parts": "run", "seed": "run",
    "backbone": "encoder", "rounds": "pseudo", "labels": "pseudo",
    "ask": "rater", "max_requests": "server",
}  # fmt: skip
"""Where in the settings an option's value goes."""

FILE = click.Path(path_type=Path, readable=False)
"""Whether it can be read shows when it is read: that has an exit code of its own."""

_COLUMNS = (
    click.option("--id", metavar="COLUMN", help="Id column.  [id]"),
    click.option("--group", metavar="COLUMN", help="Group column.  [Question]"),
    click.option("--text", metavar="COLUMN", help="Response column.  [Response]"),
    click.option(
        "--question", metavar="COLUMN", help="Question text, if the group column holds no text."
    ),
    click.option(
        "--same-question",
        type=click.Choice(["normalised", "exact"]),
        help="When two question texts are one group.  [normalised]",
    ),
)
ARTIFACTS = click.option(
    "--artifacts", type=Path, default=Path("artifacts"), show_default=True, help="Folder of runs."
)
AS_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)
TRUTH = click.option(
    "--truth", metavar="FILE", type=FILE, help="Labels of the test rows, for scoring only."
)
CSV_SAFE = click.option(
    "--csv-safe",
    is_flag=True,
    default=None,
    help="Make ids in CSV exports harmless to spreadsheets.",
)
CONFIG = click.option("--config", type=FILE, metavar="FILE", help="Settings.  [stackllm.toml]")
MAX_REQUESTS = click.option(
    "--max-requests",
    type=click.IntRange(0),
    help="Stop after so many requests to a server, with exit code 75.",
)
_TABLE = (
    click.option("--train", metavar="FILE", help="Training table.  [train.csv]"),
    click.option("--test", metavar="FILE", help="Test table.  [test.csv]"),
    *_COLUMNS,
    click.option("--target", metavar="COLUMN", help="Label column.  [target]"),
    click.option("--quota", type=int, help="How often each class stands in a group.  [1]"),
    TRUTH,
    click.option("--folds", type=int, help="Folds of the training groups.  [5]"),
    click.option("--seed", type=int, help="Seed of everything.  [0]"),
    click.option(
        "--backbone", metavar="NAME", help='Frozen LLM: "smollm2", a folder, a hub name, or "none".'
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
    MAX_REQUESTS,
    CONFIG,
)
_SUBMISSION = (
    click.option("--sample", metavar="FILE", help="Sample submission whose columns to copy."),
    CSV_SAFE,
)
_PSEUDO = (
    click.option("--rounds", type=int, help="Rounds of pseudo-labels.  [2]"),
    click.option(
        "--labels", type=click.Choice(["soft", "hard"]), help="Kind of pseudo-labels.  [soft]"
    ),
    click.option("--parts", type=int, help="Parts of the test groups for pseudo-labels.  [2]"),
)
_WORK = (
    click.option("--name", default="run", show_default=True, help="Name of the run."),
    ARTIFACTS,
    click.option(
        "--jobs", type=click.IntRange(1), help="Units side by side.  [number of cores or workers]"
    ),
    click.option(
        "--engine",
        type=click.Choice(["local", "dask", "ray"]),
        default="local",
        show_default=True,
        help="Whose workers run units.",
    ),
    click.option("--address", metavar="ADDRESS", help="Of a dask scheduler or ray head."),
    click.option("--dry-run", is_flag=True, help="List what would run and why, and run nothing."),
    AS_JSON,
    click.option("--quiet", is_flag=True, help="No progress, warnings only."),
)


def together(*options: Option[Any]) -> Option[Any]:
    """Several options as one decorator."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


column_options = together(*_COLUMNS)
work_options = together(*_WORK)
features_options = together(*_TABLE, *_WORK)
stack_options = together(*_TABLE, *_SUBMISSION, *_WORK)
pseudo_options = together(*_TABLE, *_SUBMISSION, *_PSEUDO, *_WORK)


def settings_of(config: Path | None, recipes: tuple[str, ...] = (), **given: Any) -> Settings:
    """Settings from the file, with the options that were given on top."""
    from stackllm.settings import read_settings

    overrides: dict[str, dict[str, Any]] = {"recipes": {"files": recipes}}
    for option, value in given.items():
        if value not in (None, ()):
            overrides.setdefault(_SECTION_OF[option], {})[option] = value
    return read_settings(config, overrides)


@contextmanager
def workspace_of(
    *, name: str, artifacts: Path, jobs: int | None, engine: str, address: str | None, dry_run: bool,
    quiet: bool, as_json: bool,
) -> Iterator[Workspace]:  # fmt: skip
    """The workspace that a command's options name; what a dry run met is printed."""
    from stackllm.engine.local import PendingError
    from stackllm.workspace import open_workspace

    with open_workspace(
        name, artifacts, n_jobs=jobs, engine=engine, address=address, dry_run=dry_run, quiet=quiet
    ) as workspace:
        try:
            yield workspace
        except PendingError as error:
            if as_json:
                click.echo(json.dumps({"would_run": error.units}))
            raise


def play(until: Any, truth: Path | None, options: dict[str, Any]) -> None:
    """Run the recipe as far as ``until``, and print what it tells."""
    work = {key: options.pop(key) for key in (
        "name", "artifacts", "jobs", "engine", "address", "dry_run", "quiet", "as_json",
    )}  # fmt: skip
    settings = settings_of(**options)
    with workspace_of(**work) as workspace:
        from stackllm import pipeline
        from stackllm.outputs import Run

        step = pipeline.plan if workspace.dry_run else pipeline.run
        result: Run | Plan = step(settings, workspace, until=until, truth=truth)
    if work["quiet"] and isinstance(result, Run) and not work["as_json"]:
        result = replace(result, ratings=())
    click.echo(json.dumps(result.summary()) if work["as_json"] else str(result))
