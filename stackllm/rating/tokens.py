"""Log-probabilities of a reply's tokens, in the forms that servers tell them, and what they say of answers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stackllm.rating.spelling import Tokens, squeeze
from stackllm.rating.thought import strip

MOST_TOKENS = 16
"""So many are kept of those that spell what a reply says after its thought."""

_MOST_TOP = 50
_MOST_LETTERS = 60
_NAMES = ("token", "content", "tok_str")
_LEAST_MASS = 0.5
"""Token probabilities count only if the allowed answers hold at least this share of them."""


def list_entries(told: Any) -> list[Any]:
    """One entry per token of whatever a server calls log-probabilities; none if it is nothing of the kind.

    Chat completions tell them as ``{"content": [...]}``, Ollama as the list alone, and completions
    side by side: ``{"tokens": [...], "token_logprobs": [...], "top_logprobs": [{token: score}, ...]}``.
    """
    if isinstance(told, dict) and isinstance(told.get("tokens"), list):
        columns = [told.get(name) or [] for name in ("token_logprobs", "top_logprobs")]
        if not all(isinstance(column, list) for column in columns):
            return []
        told = [
            {
                "token": token,
                "logprob": columns[0][i] if i < len(columns[0]) else None,
                "top_logprobs": columns[1][i] if i < len(columns[1]) else None,
            }
            for i, token in enumerate(told["tokens"])
        ]
    elif isinstance(told, dict):
        told = told.get("content")
    return told if isinstance(told, list) else []


def read_tokens(
    entries: Sequence[Any], text: str, thought: bool, secret: str = "", most: int = MOST_TOKENS
) -> Tokens:
    """The tokens that spell a text, which is the end of what was generated, with their alternatives.

    Parameters
    ----------
    entries
        From :func:`list_entries`: of all that was generated, or of the text alone.
    text
        What the LLM said after its thought.
    thought
        Whether there was any: tokens before those of the text may belong to it.
    secret
        The API key: nothing is kept if the tokens tell it.
    most
        How many tokens are kept.

    Returns
    -------
    tuple
        The first ones; empty if the server told no alternatives, what it told are no
        log-probabilities, or no tokens spell the text.
    """
    try:
        names = [_name(entry) for entry in entries]
        if secret and secret in "".join(names):
            return ()
        start = find_start(names, text)
        if start is None or (start and not thought and not strip("".join(names[:start]))[1]):
            return ()
        tokens = tuple(_read_entry(entry) for entry in entries[start : start + most])
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return ()
    if secret and any(secret in token for _, top in tokens for token, _ in top):
        return ()
    return tokens if any(map(_others, entries[start : start + most])) else ()


def find_start(names: Sequence[str], text: str) -> int | None:
    """The first of the tokens that spell a text, which only control tokens may follow.

    Parameters
    ----------
    names
        All tokens that were generated.
    text
        Their end.

    Examples
    --------
    >>> find_start(["<think>", "Hm", "</think>", "7", "<|im_end|>"], "7")
    3
    """
    wanted, spelled = (squeeze(without_control(it)) for it in (text, "".join(names)))
    if not wanted or not spelled.endswith(wanted):
        return None
    place, before = 0, len(spelled) - len(wanted)
    for start, name in enumerate(names):
        if place >= before:  # white space in front counts too: an answer might have stood there
            return start if place == before else None
        place += len(squeeze(name))
    return None


def without_control(text: str) -> str:
    """A text without control tokens, such as ``<|im_end|>``, at its end."""
    text = text.rstrip()
    while text.endswith(">") and (start := text.rfind("<")) >= 0 and ">" not in text[start:-1]:
        text = text[:start].rstrip()
    return text


def clean(text: str) -> str:
    """A text without the white space, quotes, emphasis and full stop that may stand around an answer."""
    return text.strip().strip("\"'`*").rstrip(".").strip("\"'`*").strip().casefold()


def token_probabilities(tokens: Tokens, answers: tuple[str, ...]) -> np.ndarray | None:
    """Probabilities of answers along the tokens of one reply.

    At each place every likely token either completes an answer, or begins one and is followed if
    it is the token that was generated. One that is not followed counts for the answer that it
    spells, or for the only one that it can begin. One that spells an answer and can begin another,
    as 1 can begin 10, counts only where it shows that it ended: it is the last that was generated,
    or the other answer stands beside it as a whole.

    Parameters
    ----------
    tokens
        Those that spell the answer.
    answers
        The allowed answers.

    Returns
    -------
    numpy.ndarray or None
        ``(n_answers,)``, sums to 1. None without tokens, or if the allowed answers hold less than
        half of the probability.
    """
    known = [clean(answer) for answer in answers]
    mass = np.zeros(len(answers))
    begun, share = "", 1.0
    for place, (chosen, top) in enumerate(tokens):
        follow = None
        spelled = {_lead(begun + token) for token, _ in top}
        for token, score in top:
            text = _lead(begun + token)
            likely = share * math.exp(score)
            ended = next((k for k in known if _ends(text, k)), None)
            longer = [k for k in known if k.startswith(text) and k != text]
            if token == chosen and (longer or not text) and place + 1 < len(tokens):
                follow = (text, likely)
            elif not text:
                continue
            elif ended is not None:
                mass[known.index(ended)] += likely
            elif text in known:
                if token == chosen or spelled.issuperset(longer):
                    mass[known.index(text)] += likely
            elif len(longer) == 1:
                mass[known.index(longer[0])] += likely
        if follow is None:
            break
        begun, share = follow
    total = mass.sum()
    return mass / total if _LEAST_MASS <= total <= 1.01 else None


def _name(entry: Any) -> str:
    """The token of an entry; older llama.cpp calls it content."""
    for key in _NAMES:
        if isinstance(entry.get(key), str):
            return str(entry[key])
    raise TypeError("no token")


def _others(entry: Mapping[str, Any]) -> Any:
    """What a server tells of the likeliest tokens in a place."""
    return next((entry[k] for k in ("top_logprobs", "probs", "top_probs") if entry.get(k)), [])


def _score(entry: Mapping[str, Any]) -> Any:
    """The log-probability of an entry; llama.cpp may tell a probability. None if it tells neither."""
    if "logprob" not in entry and (likely := _number(entry.get("prob"))) is not None:
        return math.log(likely) if likely > 0 else -math.inf
    return entry.get("logprob")


def _number(value: Any) -> float | None:
    """A number that a server told; None if it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def _read_entry(entry: Any) -> tuple[str, tuple[tuple[str, float], ...]]:
    """A token and its alternatives.

    An alternative whose score is no number is left out: it costs the others nothing. One that is
    told twice counts once: it is what was generated and one of the likeliest.

    Raises
    ------
    ValueError
        If the scores are no log-probabilities.
    """
    chosen = _name(entry)
    others = _others(entry)
    if isinstance(others, dict):
        pairs = list(others.items())
    else:
        named = [it for it in others if isinstance(it, dict) and any(map(it.get, _NAMES))]
        pairs = [(_name(it), _score(it)) for it in named]
    top: dict[str, float] = {}
    for token, told in [(chosen, _score(entry)), *pairs][:_MOST_TOP]:
        if (score := _number(told)) is None:
            continue
        if score > 0.01:
            raise ValueError("no log-probability")
        short = token[:_MOST_LETTERS]
        top[short] = max(score, top.get(short, -math.inf))
    if chosen[:_MOST_LETTERS] not in top or sum(map(math.exp, top.values())) > 1.01:
        raise ValueError("no log-probabilities of one place")
    return chosen[:_MOST_LETTERS], tuple(top.items())


def _lead(text: str) -> str:
    return text.replace("▁", " ").replace("Ġ", " ").lstrip(" \t\n\"'`*").casefold()


def _ends(text: str, answer: str) -> bool:
    """Whether ``text`` is the answer and then something that does not go on with it.

    A figure after a point does go on: 7.5 is not 7.
    """
    rest = text.removeprefix(answer)
    return text.startswith(answer) and bool(re.match(r"[^\w.,/-]|[.,](?!\w)", rest))
