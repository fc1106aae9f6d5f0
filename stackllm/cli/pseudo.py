"""``stackllm pseudo``: steps three and four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stackllm.cli.options import play, pseudo_options


@click.command()
@pseudo_options
def pseudo(truth: Path | None, **options: Any) -> None:
    """Pseudo-label the test groups with stage three, refit everything, repeat.

    Each round's honest out-of-fold score is printed beside the last one's; the submission is the
    best round's by that score.

    \b
    Examples:
      stackllm pseudo --rounds 2
      stackllm pseudo --rounds 1 --labels hard
    """
    play("pseudo", truth, options)
