"""What an LLM thinks before it answers, taken off its reply."""

from __future__ import annotations

import re

_THOUGHT = re.compile(
    r"<(think|thinking|thought|reasoning)>.*?(</\1>|\Z)", re.DOTALL | re.IGNORECASE
)


def strip(text: str) -> tuple[str, bool]:
    """The text without thought, and whether there was any.

    Examples
    --------
    >>> strip("<think>Hm.</think>7"), strip("<think>Hm"), strip("7")
    (('7', True), ('', True), ('7', False))
    """
    left, count = _THOUGHT.subn("", text)
    return left, count > 0
