"""What a figure of the campaign is: a number of cases, each passed or failed with a reason."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Any

Case = Callable[[], str | None]
"""Strikes once. Gives None if all is well, else what went wrong."""


class MissedError(Exception):
    """The fault came before or after the work; the case is drawn again."""


def play(name: str, cases: Iterable[tuple[str, Case]], retries: int = 30) -> dict[str, Any]:
    """Play all cases of a figure.

    Parameters
    ----------
    name
        The figure's.
    cases
        Name and case of each.
    retries
        How often a case whose fault missed the work is played again.

    Returns
    -------
    dict
        ``figure, cases, passed, met, seconds, failures`` (the first five).
    """
    started = time.monotonic()
    failures, total = [], 0
    for label, case in cases:
        total += 1
        said = _play_one(case, retries)
        if said is not None:
            failures.append(f"{label}: {said}"[:600])
    return {
        "figure": name,
        "cases": total,
        "passed": total - len(failures),
        "met": total > 0 and not failures,
        "seconds": round(time.monotonic() - started, 1),
        "failures": failures[:5],
    }


def _play_one(case: Case, retries: int) -> str | None:
    for _ in range(retries):
        try:
            return case()
        except MissedError:
            continue
        except subprocess.TimeoutExpired as error:
            return f"it hung: {error}"
    return f"the fault missed the work {retries} times"


def difference(found: dict[str, str], expected: dict[str, str]) -> str | None:
    """None if two folders hold the same, else how they differ."""
    if found == expected:
        return None
    names = sorted(
        name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
    )
    return f"{len(names)} files differ: {', '.join(names[:3])}"
