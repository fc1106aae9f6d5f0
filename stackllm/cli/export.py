"""``stackllm export``: a run's fine-tuned models for peft and the model hub."""

from __future__ import annotations

import json
from pathlib import Path

import click

from stackllm.cli.options import ARTIFACTS, AS_JSON


@click.command()
@click.option("--name", default="run", show_default=True, help="Name of the run.")
@click.option("--to", type=click.Path(path_type=Path), metavar="FOLDER", help="Where to write.")
@click.option("--hub", metavar="ORG/NAME", help="Where in the model hub to upload to.")
@click.option(
    "--base", metavar="ORG/NAME", help="What the hub calls the model that was given as a folder."
)
@click.option("--public", is_flag=True, help="Let everybody see what is uploaded.")
@ARTIFACTS
@AS_JSON
def export(
    name: str,
    to: Path | None,
    hub: str | None,
    base: str | None,
    public: bool,
    artifacts: Path,
    as_json: bool,
) -> None:
    """Export a run's fine-tuned models: adapters that peft loads, and a model card.

    The card tells classes, scores with their errors, settings and how to load; no text of the data. An
    upload needs a login (hf auth login, or HF_TOKEN) and is private unless --public is given. What stands
    there already is never replaced.

    \b
    Examples:
      stackllm export --to adapters
      stackllm export --name ten --hub org/who-wrote-it --base org/model
    """
    from stackllm.report.export import export as write

    exported = write(artifacts / name, to, hub, base, public)
    click.echo(json.dumps(exported.summary()) if as_json else str(exported))
