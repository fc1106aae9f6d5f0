"""``stackllm doctor``: what this machine has."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--backbone", default="smollm2", show_default=True, help="Frozen LLM to look for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def doctor(backbone: str, as_json: bool) -> None:
    """Check what this machine has, and what would be used and why.

    \b
    Examples:
      stackllm doctor
      stackllm doctor --backbone ./my-llm
    """
    from stackllm.report.doctor import examine

    found = examine(backbone)
    click.echo(
        json.dumps(found)
        if as_json
        else "\n".join(f"{name}: {value}" for name, value in found.items())
    )
