"""``stackllm stack``: stages one to three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stackllm.cli.options import play, stack_options


@click.command()
@stack_options
def stack(truth: Path | None, **options: Any) -> None:
    """Stage two on top of stage one: LightGBM and a blend, leaderboard and submission.

    \b
    Examples:
      stackllm stack --folds 5
      stackllm stack --folds 10 --seed 1 --name ten
    """
    play("stack", truth, options)
