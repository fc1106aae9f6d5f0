"""``stackllm runs``: the logbook."""

from __future__ import annotations

import json
from pathlib import Path

import click

from stackllm.cli.options import ARTIFACTS, AS_JSON


@click.command()
@ARTIFACTS
@AS_JSON
@click.option("--sizes", is_flag=True, help="What takes up room instead; see stackllm clean.")
def runs(artifacts: Path, as_json: bool, sizes: bool) -> None:
    """List all runs: rows, folds, seed, members, and the out-of-fold score of each round.

    \b
    Examples:
      stackllm runs
      stackllm runs --json
      stackllm runs --sizes
    """
    if sizes:
        from stackllm.report import housekeeping

        parts = housekeeping.sizes(artifacts)
        told = {"sizes": [vars(part) for part in parts]}
        click.echo(json.dumps(told) if as_json else housekeeping.render_sizes(parts, artifacts))
        return
    from stackllm.report.logbook import read_runs, render_runs

    listed = read_runs(artifacts)
    click.echo(json.dumps({"runs": listed}) if as_json else render_runs(listed, artifacts))
