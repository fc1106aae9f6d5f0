"""``stackllm features``: stage one."""

from __future__ import annotations

from typing import Any

import click

from stackllm.cli.options import data_options, run_options, session


@click.command()
@data_options
@run_options
def features(**options: Any) -> None:
    """Stage one: folds, encoder, recipes, and every member out of fold.

    \b
    Examples:
      stackllm features
      stackllm features --train data/train.csv --test data/test.csv --folds 5
      stackllm features --backbone ./my-llm --dry-run
    """
    with session(**options) as opened:
        from stackllm.cli.show import show_members
        from stackllm.pipeline import stage_one
        from stackllm.study import open_study

        study = open_study(opened.settings, opened.cache, opened.engine)
        _, posteriors = stage_one(study, study.design.first_fits())
        show_members(opened, study, posteriors)
