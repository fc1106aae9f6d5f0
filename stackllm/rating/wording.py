"""Where in a reply's words the answer stands, if it does.

An LLM that is told to reply with one allowed answer may still write ``Rating: 7``, ``**7**/10`` or
``{"rating": 7}``. One rule decides: a *line* (or a JSON object) states an answer if an allowed answer is all that it
says, but for marks, a word such as "rating" before it, and zeros and the top of the scale after it. What the
first line states is the answer, else what the last one states, if what stands before it has ended; and
no other line may state another.
Nothing is looked for within a sentence: "not a 7" and "7 or 8" state nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from stackllm.rating.question import Asked
from stackllm.rating.tokens import clean

_WORDS = "answer|rating|score|category|label|class|classification|grade|verdict|choice|preference|preferred|result"
_BEFORE = "the|my|your|a|final|overall|best|better|chosen|predicted|likely|most|category|preferred"
_MOST_LINE = 120
"""A longer line says more than an answer."""

_ENDED = re.compile(r"(?:\A|\n[ \t]*\r?\n|[^\w\s,/&+\-][ \t]*\r?\n)\Z")
"""What stands before a line that begins something new: else it may be the end of a sentence."""

_OPENED = re.compile(r"\s*(?:```\w*|<[^<>]{1,40}>)|\s+")
_CLOSED = re.compile(r"(?:```|<[^<>]{1,40}>|\[END FINAL RESPONSE\]|\s+)\Z")
_MOST_CLOSED = 64
"""No longer is what :data:`_CLOSED` finds at once, so a reply of nothing but fences is read in little time."""

_MARKS = r"[\s*_`\"'“”‘’()\[\]{}$]*"
_BOXED = r"(?:\\[\[(])?\s*(?:\\boxed\{)?"
_BETTER = r"(?:\s+is\s+(?:the\s+)?(?:better|best|preferred)(?:\s+(?:one|answer|response))?)?"


class Stated(NamedTuple):
    """An answer that a reply states.

    Parameters
    ----------
    number
        Of the answer among the allowed ones.
    start, end
        Where in the reply it begins and ends.
    first, last
        Whether that is its first or its last line.
    plain
        Whether the line is the answer alone.
    """

    number: int
    start: int
    end: int
    first: bool
    last: bool
    plain: bool


def find_answer(text: str, asked: Asked, cut: bool = False) -> Stated | None:
    """The one answer that a reply states; None if it states none, or several.

    Parameters
    ----------
    text
        A reply, without thought.
    asked
        The question.
    cut
        Whether the reply was cut at its limit: its last line has not ended then and counts only if
        it is the first, too.

    Examples
    --------
    >>> scale = Asked("gpt_rating", "rating", "Rate it.", ("1", "2", "3"))
    >>> [find_answer(text, scale) is not None for text in ("Rating: **2**/3", "2 or 3", "not 2")]
    [True, False, False]
    >>> find_answer("I like it.\\n\\nFinal answer: 2", scale).number
    1
    """
    stated = list(_state(text, asked))
    if len({it.number for it in stated}) != 1:
        return None
    return next((it for it in stated if it.first or (it.last and not cut)), None)


def _state(text: str, asked: Asked) -> Iterator[Stated]:
    """Every answer that a reply states."""
    objects = list(_objects(text))
    for start, end, pairs in objects:
        place, value = _value(pairs, text, start, end, asked)
        number = _number(value, asked)
        if number is not None:
            before, after = _unfenced(text[:start]), _unfenced(text[end:])
            yield Stated(number, *place, not before, not after, False)
    lines = [match for match in re.finditer(r"[^\r\n]+", text) if _unfenced(match[0])]
    for line in lines:
        if any(start <= line.start() < end for start, end, _ in objects):
            continue
        first = line is lines[0]
        last = line is lines[-1] and bool(_ENDED.search(text[: line.start()]))
        said = clean(_unfenced(line[0]))
        known = [clean(answer) for answer in asked.answers]
        if said in known:
            yield Stated(known.index(said), *line.span(), first, last, True)
        elif (match := _match(_unfenced(line[0]), asked)) is not None:
            at = line.start() + line[0].find(match[0])
            span = at + match.start("answer"), at + match.end("answer")
            yield Stated(known.index(clean(match["answer"])), *span, first, last, False)


def _number(value: Any, asked: Asked) -> int | None:
    """Which allowed answer a text or a number is."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    said = clean(str(value))
    known = [clean(answer) for answer in asked.answers]
    if said not in known and (match := _match(str(value), asked)) is not None:
        said = clean(match["answer"])
    return known.index(said) if said in known else None


def _match(line: str, asked: Asked) -> re.Match[str] | None:
    """The match of a line that states an answer."""
    return _pattern(asked).fullmatch(line) if len(line) <= _MOST_LINE else None


@lru_cache(maxsize=64)
def _pattern(asked: Asked) -> re.Pattern[str]:
    """A line that states an answer, with a group ``answer``."""
    answers = sorted((clean(answer) for answer in asked.answers), key=len, reverse=True)
    block = "|".join(
        re.escape(word) for word in re.split(r"[\W_]+", asked.block.casefold()) if word
    )
    words = f"{_WORDS}|{block}" if block else _WORDS
    name = rf"(?:(?:{_BEFORE})\s+)*(?:{words})(?:[\s_]+(?:{words}))?"
    top = rf"(?:{_MARKS}(?:/|\bout\s+of\b){_MARKS}{re.escape(asked.answers[-1])})?"
    after = {"rating": rf"(?:[.,]0+(?!\d))?{top}", "comparison": _BETTER}.get(asked.kind, "")
    return re.compile(
        rf"[#>\s]*{_MARKS}(?:{name}{_MARKS}(?:\s*[:=：]|\s+is(?:\s*:)?(?=\s)|(?=\s)){_MARKS})?{_BOXED}{_MARKS}"
        rf"(?P<answer>{'|'.join(map(re.escape, answers))}){_MARKS}{after}[.!\s]*{_MARKS}(?:\\\]|\\\))?",
        re.IGNORECASE,
    )


def _unfenced(text: str) -> str:
    """A text without the fences, tags and control tokens around it, such as ``<answer>`` and ``<|end|>``."""
    begin, end = 0, len(text)
    while opened := _OPENED.match(text, begin, end):
        begin = opened.end()
    while closed := _CLOSED.search(text, max(begin, end - _MOST_CLOSED), end):
        end = closed.start()
    return text[begin:end]


def _objects(text: str) -> Iterator[tuple[int, int, list[tuple[str, Any]]]]:
    """The JSON objects in a text: where each begins and ends, and its pairs."""
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: pairs)
    place = text.find("{")
    while place >= 0:
        try:
            pairs, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            yield place, end, pairs
        place = text.find("{", end)


def _value(
    pairs: list[tuple[str, Any]], text: str, start: int, end: int, asked: Asked
) -> tuple[tuple[int, int], Any]:
    """The value in a JSON object that can be the answer, and where it stands; None if it is not clear which."""
    words = {*_WORDS.split("|"), *re.split(r"[\W_]+", asked.block.casefold())}
    named = [it for it in pairs if {*re.split(r"[\W_]+", it[0].casefold())} & words]
    chosen = named if named or len(pairs) != 1 else pairs
    if len(chosen) != 1:
        return (start, end), None
    key, value = chosen[0]
    place = re.compile(rf'"{re.escape(key)}"\s*:\s*("?)[^"}},\s]*').search(text, start, end)
    return ((place.end(1), place.end()) if place else (start, end)), value
