"""``stackllm pseudo``: steps three and four."""

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
def pseudo(**options: Any) -> None:
    """Pseudo-label the test groups with stage three, refit everything, repeat.

    Each round's honest out-of-fold score is printed beside the last one's; the submission is the
    best round's by that score.

    \b
    Examples:
      stackllm pseudo --rounds 2
      stackllm pseudo --rounds 1 --labels hard
    """
    with session(**options) as opened:
        from stackllm.cli.show import show_rounds
        from stackllm.pipeline import play_rounds
        from stackllm.study import open_study

        study = open_study(opened.settings, opened.cache, opened.engine)
        show_rounds(opened, study, play_rounds(study, opened.settings.pseudo.rounds))
