"""``stackllm report``: one HTML page of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from stackllm.cli.options import ARTIFACTS, FILE


@click.command()
@click.argument("name", default="run")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=FILE,
    help="The page; .md and .json stand beside it.  [report.html in the run's folder]",
)
@ARTIFACTS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def report(name: str, output: Path | None, artifacts: Path, as_json: bool) -> None:
    """Write a page about a finished run: one HTML file that needs nothing else.

    NAME is a run. The page shows how good it is and how sure that is, what the group brought, its models, its
    hardest groups with their responses, and checks of what is worth a look. It loads nothing and computes
    nothing anew; report.md and report.json beside it say the same. The same run gives the same bytes. It
    holds texts of the training table: mind whom you send it to.

    \b
    Examples:
      stackllm report
      stackllm report demo -o demo.html
    """
    from stackllm.report.page.report import report as write

    written = write(name, artifacts, output)
    click.echo(json.dumps(written.summary()) if as_json else str(written))
