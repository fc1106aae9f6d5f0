"""``stackllm run``: all four steps."""

from __future__ import annotations

from typing import Any

import click

from stackllm.cli.options import data_options, run_options, session


@click.command()
@click.option("--rounds", type=int, help="Rounds of pseudo-labels.  [2]")
@click.option(
    "--labels", type=click.Choice(["soft", "hard"]), help="Kind of pseudo-labels.  [soft]"
)
@data_options
@run_options
def run(**options: Any) -> None:
    """All four steps: members, stack, group posteriors, rounds of pseudo-labels.

    \b
    Examples:
      stackllm run
      stackllm run --train data/train.csv --test data/test.csv --truth data/solution.csv
      stackllm run --rounds 0 --name plain
    """
    with session(**options) as opened:
        from stackllm.cli.show import show_rounds
        from stackllm.pipeline import run as run_all

        show_rounds(opened, *run_all(opened.settings, opened.cache, opened.engine))
