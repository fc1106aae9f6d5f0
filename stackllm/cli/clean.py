"""``stackllm clean``: room on the disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from stackllm.cli.options import ARTIFACTS, AS_JSON


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
@ARTIFACTS
@AS_JSON
def clean(names: tuple[str, ...], yes: bool, dry_run: bool, artifacts: Path, as_json: bool) -> None:
    """Remove runs, parts of the cache, or LLMs, by the names that "stackllm runs --sizes" lists.

    It shows what reads from them, and asks; without a terminal it takes --yes. All that it removes
    but runs can be made or fetched again. The answers of a server can't, for they may have been
    paid for: cache/answers.sqlite stays, and so does the logbook. "quarantine" stands for the
    damaged units that were moved aside in all runs.

    \b
    Examples:
      stackllm clean cache/trunk --dry-run
      stackllm clean old_run quarantine --yes
      stackllm clean hub/org/name
    """
    from stackllm.report import housekeeping

    parts = housekeeping.look(artifacts, names)
    if not dry_run:
        if not yes:
            click.echo(housekeeping.render_sizes(parts, artifacts), err=as_json)
            _ask()
        parts = [housekeeping.clean(artifacts, part.name) for part in parts]
    done = "would_remove" if dry_run else "removed"
    if as_json:
        click.echo(json.dumps({done: [vars(part) for part in parts]}))
    elif dry_run:
        click.echo(housekeeping.render_sizes(parts, artifacts))
    for part in parts if not (as_json or dry_run) else ():
        click.echo(f"removed {part.name}: {part.files:,} files, {part.size / 2**20:,.1f} MiB")


def _ask() -> None:
    """Go on only if somebody at a terminal says so."""
    from stackllm.errors import UsageError

    if not sys.stdin.isatty():
        raise UsageError(
            "nothing was removed: nobody is here to ask. Add --yes, or look with --dry-run."
        )
    click.confirm("Remove this?", abort=True, err=True)
