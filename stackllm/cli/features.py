"""``stackllm features``: stage one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stackllm.cli.options import features_options, play


@click.command()
@features_options
def features(truth: Path | None, **options: Any) -> None:
    """Stage one: folds, encoder, recipes, and every member out of fold.

    \b
    Examples:
      stackllm features
      stackllm features --train data/train.csv --test data/test.csv --folds 5
      stackllm features --backbone ./my-llm --dry-run
    """
    play("features", truth, options)
