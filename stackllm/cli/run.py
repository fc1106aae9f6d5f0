"""``stackllm run``: all four steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stackllm.cli.options import play, pseudo_options


@click.command()
@pseudo_options
def run(truth: Path | None, **options: Any) -> None:
    """All four steps: members, stack, group posteriors, rounds of pseudo-labels.

    \b
    Examples:
      stackllm run
      stackllm run --train data/train.csv --test data/test.csv --truth data/solution.csv
      stackllm run --rounds 0 --name plain
    """
    play("pseudo", truth, options)
