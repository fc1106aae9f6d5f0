"""What a chat server takes of what we send: found step by step, and known to the run.

What is *meant* is always the same body, under whose digest the journal knows the answer; what is
*sent* is that body in the server's dialect. Nothing is dropped that is not refused, and the
likeliest tokens, which give an answer its probabilities, go last.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from stackllm.rating.refusal import names_logprobs

_FEW = 5
"""As many likely tokens as older vLLM and many hosts give at most."""

_ALL = 20
"""As many as anybody gives."""

_PROBABILITIES = {"logprobs", "top_logprobs"}
"""Fields that ask for likely tokens."""

Limit = Literal["max_tokens", "max_completion_tokens"] | None
Temperature = Literal["meant", "left out", "one"]
_RENAMED: Limit = "max_completion_tokens"


@dataclass(frozen=True)
class Dialect:
    """What a server takes.

    Parameters
    ----------
    limit
        What the field is called that limits a reply's tokens; None if it takes none.
    temperature
        Whether it takes the one that is meant, takes it when it is left out, or takes 1 only.
    alternatives
        How many of the likeliest tokens it tells at most; 0 for no log-probabilities at all.
    """

    limit: Limit = "max_tokens"
    temperature: Temperature = "meant"
    alternatives: int = _ALL

    def apply(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """What is sent for what is meant.

        Examples
        --------
        >>> Dialect("max_completion_tokens", "left out", 5).apply(
        ...     {"temperature": 0, "max_tokens": 16, "logprobs": True, "top_logprobs": 20}
        ... )
        {'max_completion_tokens': 16, 'logprobs': True, 'top_logprobs': 5}
        """
        sent: dict[str, Any] = {}
        for name, value in body.items():
            if name == "max_tokens":
                if self.limit:
                    sent[self.limit] = value
            elif name == "top_logprobs" and self.alternatives and isinstance(value, int):
                sent[name] = min(value, self.alternatives)
            elif name == "temperature" and self.temperature != "meant":
                if self.temperature == "one":
                    sent[name] = 1
            elif self.alternatives or name not in _PROBABILITIES:
                sent[name] = value
        return sent


def guided(dialect: Dialect, reason: str, fixed: Collection[str]) -> Dialect | None:
    """The next dialect to try after a refusal that names a field; None if it names none of ours.

    Parameters
    ----------
    dialect
        What was refused.
    reason
        The server's own words.
    fixed
        Fields that the user has set, which are never dropped.

    Examples
    --------
    >>> guided(Dialect(), "top_logprobs may be 8 at most", ())
    Dialect(limit='max_tokens', temperature='meant', alternatives=8)
    >>> guided(Dialect(), "temperature is not taken", ["temperature"]) is None
    True
    """
    said = reason.casefold()
    if dialect.limit == "max_tokens" and re.search("max_(completion_)?tokens", said):
        return replace(dialect, limit=_RENAMED)
    if dialect.limit and dialect.limit in said:
        return replace(dialect, limit=None)
    if "temperature" in said and dialect.temperature != "one" and "temperature" not in fixed:
        return replace(dialect, temperature="left out" if dialect.temperature == "meant" else "one")
    if names_logprobs(said):
        return _fewer(dialect, said, fixed)
    return None


def blind(dialect: Dialect, fixed: Collection[str]) -> Iterator[Dialect]:
    """Dialects to try one after the other where a refusal says nothing: each drops as little as it can.

    Parameters
    ----------
    dialect
        What was refused.
    fixed
        Fields that the user has set, which are never dropped.
    """
    plain = dialect
    for plain in without_logprobs(dialect, fixed):
        yield plain
    if dialect.limit == "max_tokens":
        yield replace(dialect, limit=_RENAMED)
    limit: Limit = dialect.limit and _RENAMED
    if dialect.temperature == "meant" and "temperature" not in fixed:
        yield replace(dialect, temperature="left out")
        yield replace(dialect, limit=limit, temperature="left out")
        plain = replace(plain, temperature="left out")
    yield replace(plain, limit=limit)
    yield replace(plain, limit=None)


def without_logprobs(dialect: Dialect, fixed: Collection[str]) -> Iterator[Dialect]:
    """Dialects with fewer likely tokens, and with none at the end."""
    step = _fewer(dialect, "", fixed)
    while step:
        yield step
        step = _fewer(step, "", fixed)


def _fewer(dialect: Dialect, said: str, fixed: Collection[str]) -> Dialect | None:
    """The same with as many likely tokens as the server names, else with 5, else with none."""
    most = dialect.alternatives
    if not most or _PROBABILITIES & {*fixed}:
        return None
    told = [int(number) for number in re.findall(r"(?<![\w.-])\d{1,3}(?![\w-]|\.\d)", said)]
    fitting = [number for number in told if 0 < number < most]
    if (
        most == _ALL and fitting
    ):  # once only: a server that names one less each time is not followed
        return replace(dialect, alternatives=max(fitting))
    return replace(dialect, alternatives=_FEW if most > _FEW else 0)


def losses(before: Dialect, after: Dialect) -> list[tuple[str, bool]]:
    """What a step from one dialect to another changes, a clause for each, and whether something is lost by it.

    Examples
    --------
    >>> losses(Dialect(), Dialect(limit="max_completion_tokens"))
    [('no "max_tokens": "max_completion_tokens" is sent instead, and nothing is lost', False)]
    """
    told = []
    if after.limit != before.limit:
        told.append(
            (f'no "{before.limit}": "{after.limit}" is sent instead, and nothing is lost', False)
            if after.limit
            else (
                "no limit on a reply's tokens: none is sent, so a reply may be long and cost more",
                True,
            )
        )
    if after.temperature != before.temperature:
        how = "it is left out" if after.temperature == "left out" else "1 is sent"
        told.append((f"no temperature of 0: {how}, so answers may differ when asked again", True))
    if after.alternatives != before.alternatives:
        many = f"{after.alternatives} likely tokens at most: less likely answers count as 0"
        none = "no logprobs: without probabilities each answer counts as certain, its entropy as 0"
        told.append((many if after.alternatives else none, True))
    return told
