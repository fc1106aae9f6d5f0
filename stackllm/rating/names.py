"""Names of models: whether the one that answered can be the one that was asked for."""

from __future__ import annotations

import re


def same_model(told: str, asked: str) -> bool:
    """Whether a server's name for a model can be the one asked for: equal, or a dated version.

    A date has four figures or more, so that claude-3-5 is not taken for claude-3.

    Examples
    --------
    >>> same_model("gpt-4o-2024-08-06", "gpt-4o"), same_model("gpt-4o-mini", "gpt-4o")
    (True, False)
    """
    first, second = sorted((_last_part(told), _last_part(asked)), key=len)
    rest = second.removeprefix(first)
    return second.startswith(first) and bool(
        re.fullmatch(r"|@.*|[-:](\d{4,}(-\d\d){0,2}|latest)", rest)
    )


def _last_part(name: str) -> str:
    return name.strip().rstrip("/").rsplit("/", 1)[-1].casefold()
