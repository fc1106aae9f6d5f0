"""``stackllm stack``: stages one to three."""

from __future__ import annotations

from typing import Any

import click

from stackllm.cli.options import data_options, run_options, session


@click.command()
@data_options
@run_options
def stack(**options: Any) -> None:
    """Stage two on top of stage one: LightGBM and a blend, leaderboard and submission.

    \b
    Examples:
      stackllm stack --folds 5
      stackllm stack --folds 10 --seed 1 --name ten
    """
    with session(**options) as opened:
        from stackllm.cli.show import show_rounds
        from stackllm.pipeline import play_rounds
        from stackllm.study import open_study

        study = open_study(opened.settings, opened.cache, opened.engine)
        show_rounds(opened, study, play_rounds(study, 0))
