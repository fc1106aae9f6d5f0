"""``stackllm doctor``: what this machine has."""

from __future__ import annotations

import json

import click

from stackllm.cli.options import AS_JSON


@click.command()
@click.option("--backbone", default="smollm2", show_default=True, help="Frozen LLM to look for.")
@AS_JSON
def doctor(backbone: str, as_json: bool) -> None:
    """Check what this machine has, and what would be used and why.

    \b
    Examples:
      stackllm doctor
      stackllm doctor --backbone ./my-llm
    """
    from stackllm.report.doctor import examine

    told = examine(backbone)
    lines = (f"{name}: {value}" for name, value in told.items())
    click.echo(json.dumps(told) if as_json else "\n".join(lines))
