"""``stackllm clean``: room on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import click

from stackllm.cli.options import ARTIFACTS, AS_JSON


@click.command()
@click.argument("names", nargs=-1, required=True)
@ARTIFACTS
@AS_JSON
def clean(names: tuple[str, ...], artifacts: Path, as_json: bool) -> None:
    """Remove runs or parts of the cache, by the names that "stackllm runs --sizes" lists.

    All that it removes from the cache can be made again. The answers of a server can't, for they
    may have been paid for: cache/answers.sqlite has no name here and stays. "quarantine" stands for
    the damaged units that were moved aside in all runs.

    \b
    Examples:
      stackllm clean cache/trunk
      stackllm clean old_run quarantine
    """
    from stackllm.report import housekeeping

    removed = [housekeeping.clean(artifacts, name) for name in names]
    if as_json:
        click.echo(json.dumps({"removed": [vars(part) for part in removed]}))
        return
    for part in removed:
        click.echo(f"removed {part.name}: {part.files:,} files, {part.size / 2**20:,.1f} MiB")
