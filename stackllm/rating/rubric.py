"""Splitting the reply to a rubric into the answers to its questions, without ever guessing.

A line answers a question if it is the question's name, a colon and the rest; so does an entry of a JSON
object. Marks of a list and of emphasis, quotes and case do not count. What else is said is left alone,
and a question that is answered twice is not answered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stackllm.rating.question import AskedRecipe, Rubric, slug
from stackllm.rating.spelling import Tokens, cut_tokens

_LINE = re.compile(
    r"""\s*(?:(?:[-+*•]|\#+|\(?\d{1,2}[.)])\s+)?["'`*_]*([^\W\d_][\w -]{0,60}?)["'`*_]{0,9}\s{0,9}[:：]\**"""
)
_LINE_OVER = re.compile(r"[\r\nĊ]")
_QUOTE_OVER = re.compile(r'"')
_NUMBER_OVER = re.compile(r"[,}\sĠĊ▁]")
_SPARE_TOKENS = 64
_LINE_TOKENS = 12


class Part(NamedTuple):
    """What a reply says to one question.

    Parameters
    ----------
    text
        The answer as it stands there.
    tokens
        Those that spell it, cut to it; empty if there are none, or it is not the only answer.
    last
        Whether nothing came after it, so that it may have been cut off.
    """

    text: str
    tokens: Tokens
    last: bool


class _Entry(NamedTuple):
    """A name in a reply, and where in the text what is said to it begins and ends."""

    name: str
    begin: int
    end: int
    over: re.Pattern[str]
    text: str


def reply_tokens(recipe: AskedRecipe) -> int:
    """Tokens that a reply with a line per question has at most, with a sentence or two beside them.

    0 for a recipe of one question: its answer alone is short whatever it is.
    """
    if not isinstance(recipe, Rubric):
        return 0
    longest = (
        len(name.encode()) + max(len(answer.encode()) for answer in asked.answers)
        for name, asked in zip(recipe.names, recipe.questions, strict=True)
    )
    return _SPARE_TOKENS + sum(_LINE_TOKENS + n_bytes // 2 for n_bytes in longest)


def split(text: str, tokens: Tokens, names: Sequence[str]) -> list[list[Part]]:
    """What a reply says to each question: nothing, one thing, or more than one.

    Parameters
    ----------
    text, tokens
        Of the reply.
    names
        What the questions are called.

    Examples
    --------
    >>> reply = "Here it is.\\n- **Tone**: casual\\nclarity: 4\\ntone of voice: calm"
    >>> [[part.text for part in parts] for parts in split(reply, (), ["clarity", "tone", "depth"])]
    [['4'], ['casual'], []]
    """
    entries: dict[str, list[_Entry]] = {name: [] for name in names}
    for entry in _entries(text):
        if entry.name in entries:
            entries[entry.name].append(entry)
    return [
        [_part(text, tokens if len(said) == 1 else (), entry) for entry in said]
        for said in entries.values()
    ]


def _part(text: str, tokens: Tokens, entry: _Entry) -> Part:
    spelled = cut_tokens(tokens, text, entry.begin, entry.end, entry.over) if tokens else ()
    return Part(entry.text, spelled, entry.end == len(text))


def _entries(text: str) -> Iterator[_Entry]:
    objects = list(_objects(text))
    for _, _, entries in objects:
        yield from entries
    begin = 0
    for line in text.splitlines(keepends=True):
        end = begin + len(line)
        named = _LINE.match(line)
        if named and not any(first < end and begin < last for first, last, _ in objects):
            start, stop = begin + named.end(), begin + len(line.splitlines()[0])
            said = text[start:stop]
            yield _Entry(slug(named[1]), start, stop, _LINE_OVER, said.strip())
        begin = end


def _objects(text: str) -> Iterator[tuple[int, int, list[_Entry]]]:
    """The outermost JSON objects of a text: where each begins and ends, and its entries."""
    begin = text.find("{")
    while begin >= 0:
        entries, end = _read_object(text, begin)
        if entries:
            yield begin, end, entries
        begin = text.find("{", max(end, begin + 1))


def _read_object(text: str, begin: int) -> tuple[list[_Entry], int]:
    """The entries of the object that begins there, and where it ends, or is no JSON any more."""
    decode = json.JSONDecoder().raw_decode
    entries: list[_Entry] = []
    at = begin
    try:
        while True:
            at = _past(r"[{,]", text, at)
            name, at = decode(text, at)
            first = at = _past(":", text, at)
            value, at = decode(text, at)
            quoted = isinstance(value, str)
            place = (first + quoted, at - quoted, _QUOTE_OVER if quoted else _NUMBER_OVER)
            said = value if quoted else text[first:at]
            entry = _Entry(slug(str(name)), *place, said.strip())
            mark = _past("[,}]", text, at)  # without it 1 may have been about to become 10
            entries.append(entry)
            if text[at:mark].strip() == "}":
                return entries, mark
    except (ValueError, RecursionError):
        return entries, at


def _past(mark: str, text: str, at: int) -> int:
    """Where the text goes on after a mark and the white space around it."""
    passed = re.compile(rf"\s*{mark}\s*").match(text, at)
    if not passed:
        raise ValueError(mark)
    return passed.end()
