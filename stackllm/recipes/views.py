"""Views of a response for n-gram members: its words, its style without its subject, its two ends.

What a response is about is given by the question and says little about who wrote it. The skeleton
keeps function words, punctuation and layout and masks the rest; the edges keep how a response
opens and closes.
"""

from __future__ import annotations

import re
from itertools import pairwise

FUNCTION_WORDS = frozenset(
    """
    a about above after again against all also although always am an and another any anyone
    anything are around as at away back be because been before being below between both but by can
    cannot could did do does doing done down during each either else enough even ever every few
    first for from further get give given go good had has have having he her here hers him his how
    however i if in into is it its itself just keep last least less let like likely made make many
    may maybe me might more most much must my need neither never new next no nor not nothing now of
    off often on once one only or other our out over own per perhaps please quite rather really same
    second several shall she should since so some something sometimes soon still such take than
    thank that the their them then there therefore these they this those though through thus to
    together too toward two under unless until up upon us use used using very was way we well were
    what when where whether which while who whom whose why will with within without would yes yet
    you your yours
    """.split()  # noqa: SIM905 -- a list of words reads better than a list of strings
)
"""English words that carry grammar more than a subject. In other languages the skeleton is shape alone."""

_TOKEN = re.compile(r"\n+|[^\W\d_]+(?:['’][^\W\d_]+)?|\d+|[^\w\s]|_| {2,}")
_EDGE = 12
_LONG_WORD = 7


def tokens(text: str) -> list[str]:
    """Words, numbers, single marks, line breaks and runs of spaces, in order.

    Examples
    --------
    >>> tokens("It's 42!")
    ["It's", '42', '!']
    """
    return _TOKEN.findall(text)


def skeleton(text: str) -> list[str]:
    """Tokens with the subject masked: other words become their shape, numbers ``0``.

    Examples
    --------
    >>> skeleton("However, the Danube has 3 bridges.")
    ['However', ',', 'the', 'A', 'has', '0', 'a+', '.']
    """
    return [_masked(token) for token in tokens(text)]


def edges(text: str) -> list[str]:
    """The first and last tokens, single and in runs of two and three, and where each stands.

    Examples
    --------
    >>> edges("Sure!")[:3]
    ['first0 Sure', 'first1 !', 'first Sure']
    """
    parts = tokens(text.strip())
    return _edge("first", parts[:_EDGE]) + _edge("last", parts[-_EDGE:][::-1])


def _masked(token: str) -> str:
    if token[0] == "\n":
        return "\n" * min(len(token), 3)
    if token[0] == " ":
        return "  "
    if token[0].isdigit():
        return "0"
    if not token[0].isalpha() or token.lower() in FUNCTION_WORDS or not token.isalpha():
        return token
    return ("A" if token[0].isupper() else "a") + ("+" if len(token) >= _LONG_WORD else "")


def _edge(name: str, parts: list[str]) -> list[str]:
    return (
        [f"{name}{place} {token}" for place, token in enumerate(parts[:4])]
        + [f"{name} {token}" for token in parts]
        + [f"{name} {' '.join(pair)}" for pair in pairwise(parts)]
        + [f"{name} {' '.join(run)}" for run in zip(parts, parts[1:], parts[2:], strict=False)]
    )
