"""How the tokens of a reply spell its text, and which of them stand in a stretch of it.

Tokenizers write white space in their own ways and put marks at a text's end, so texts are compared
without.
"""

from __future__ import annotations

import math
import re

Tokens = tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
"""For each generated token: the token, then the likeliest tokens in its place with log-probabilities."""

_BLANK = re.compile(r"[\s▁ĠĊ]+")
_FRONT = re.compile(r"\A[\s▁ĠĊ]+")
_MARKS = re.compile(r"(<[^<>]*>\s*)*")


def squeeze(text: str) -> str:
    """Without white space, however a tokenizer writes it."""
    return _BLANK.sub("", text)


def cut_tokens(tokens: Tokens, text: str, begin: int, end: int, over: re.Pattern[str]) -> Tokens:
    """The tokens of a stretch of a text, each cut to what it spells there, and the one that ends it.

    A token may reach over either end, as ``": 4"`` and ``"4\\nto"`` do. What stands in front is taken
    off it and off its alternatives; those that do not begin like it spell another text, and fall away.
    Of what stands behind a line break is left. The token that ends the stretch belongs to it even if
    nothing of the stretch is in it: only beside it is to be seen how likely 1 was to become 10.

    Parameters
    ----------
    tokens
        Of the whole text; they may break off before its end.
    text
        What they spell.
    begin, end
        The stretch, in characters of the text.
    over
        What ends such a stretch, wherever it comes in a token or an alternative.

    Returns
    -------
    tuple
        Nothing if the tokens do not spell the text up to there.

    Examples
    --------
    >>> said = ((": 4\\n", ((": 4\\n", -0.5), (": 5\\n", -1.0), ("=", -3.0))),)
    >>> cut_tokens(said, ": 4\\n", 2, 3, re.compile("\\n"))
    (('4\\n', (('4\\n', -0.5), ('5\\n', -1.0))),)
    """
    said, spelled = squeeze(text), squeeze("".join(token for token, _ in tokens))
    whole = spelled.startswith(said) and _MARKS.fullmatch(spelled[len(said) :])
    if not whole and not said.startswith(spelled):  # they may break off
        return ()
    first = len(squeeze(text[:begin]))
    last = first + len(squeeze(text[begin:end]))
    if not first < last <= len(spelled):
        return ()
    stretch = []
    place = 0
    for token, top in tokens:
        size = len(squeeze(token))
        if place + size > first or (place == first and not size):
            head = squeeze(token)[: max(0, first - place)]
            stretch.append(_cut(token, top, head, over, opens=place <= first))
        if place >= last or (stretch and stretch[-1][0].endswith("\n")):
            break
        place += size
    return tuple(stretch)


def _cut(
    token: str, top: tuple[tuple[str, float], ...], head: str, over: re.Pattern[str], opens: bool
) -> tuple[str, tuple[tuple[str, float], ...]]:
    """A token and its alternatives without ``head``, up to where the stretch ends."""

    def inside(spelled: str) -> str | None:
        for character in head:
            spelled = _FRONT.sub("", spelled)
            if not spelled.startswith(character):
                return None
            spelled = spelled[1:]
        if opens:  # white space in front ends nothing
            spelled = _FRONT.sub("", spelled)
        ended = over.search(spelled)
        return f"{spelled[: ended.start()]}\n" if ended else spelled

    shares: dict[str, float] = {}
    for other, score in top:
        left = inside(other)
        if left is not None:
            shares[left] = shares.get(left, 0.0) + math.exp(score)
    scores = tuple(
        (left, math.log(share) if share else -math.inf) for left, share in shares.items()
    )
    return inside(token) or "", scores
