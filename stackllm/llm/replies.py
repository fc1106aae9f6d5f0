"""Reading what a chat server replied: never trusting it, never assuming what it did not show.

A reply is reduced to the few parts that matter (:class:`Reply`), which is what the journal keeps,
and judged against the allowed answers afterwards. So a better judge needs no new requests.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stackllm.recipes.asked import Asked

_MOST_TEXT = 200
_MOST_TOKENS = 16
_MOST_TOP = 50
_LEAST_MASS = 0.5
"""Token probabilities count only if the allowed answers hold at least this share of them."""


class BadReplyError(Exception):
    """A body that is no chat completion; the message is one of a few fixed reasons."""


@dataclass(frozen=True)
class Reply:
    """What matters of a chat completion.

    Parameters
    ----------
    text
        The reply's text, its first 200 characters.
    tokens
        For each generated token: the token, then the likeliest tokens in its place with their
        log-probabilities. Empty if the server gave none, or none that make sense.
    finish
        Why it ended, as the server says.
    refused
        Whether the server says that the LLM refused.
    model
        The model that the server says has answered; empty if it does not say.
    n_tokens
        Tokens that the server says were used; 0 if it does not say.
    """

    text: str
    tokens: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
    finish: str
    refused: bool
    model: str
    n_tokens: int

    def dump(self) -> str:
        """The reply as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Reply:
        """The inverse of :meth:`dump`."""
        values = json.loads(text)
        tokens = tuple(
            (token, tuple((name, float(score)) for name, score in top))
            for token, top in values.pop("tokens")
        )
        return cls(tokens=tokens, **values)


def read_reply(content: bytes) -> Reply:
    """Reduce the body of a chat completion to what matters.

    Raises
    ------
    BadReplyError
        If it is no JSON, or no chat completion with one answer.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadReplyError("bad JSON") from error
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list):
        raise BadReplyError("wrong schema")
    if not choices:
        raise BadReplyError("no choices")
    messages = [_message(choice) for choice in choices]
    if len({str(message.get("content")) for message in messages}) > 1:
        raise BadReplyError("several answers")
    text, refusal = messages[0].get("content"), messages[0].get("refusal")
    if text is not None and not isinstance(text, str):
        raise BadReplyError("wrong schema")
    if text is None and not refusal:
        raise BadReplyError("wrong schema")
    finish, model, usage = choices[0].get("finish_reason"), data.get("model"), data.get("usage")
    used = usage.get("total_tokens") if isinstance(usage, dict) else None
    return Reply(
        (text or "")[:_MOST_TEXT],
        _tokens(choices[0].get("logprobs")),
        finish if isinstance(finish, str) else "",
        bool(refusal) or finish == "content_filter",
        model[:_MOST_TEXT] if isinstance(model, str) else "",
        used if isinstance(used, int) and 0 <= used < 10**7 else 0,
    )


def judge(reply: Reply, asked: Asked, model: str) -> tuple[str, np.ndarray]:
    """Whether a reply is a valid answer, and the probability that it gives each allowed one.

    Token log-probabilities are used if the server gave them and allowed answers hold most of
    them; else the text must be an allowed answer, which then has probability 1.

    Parameters
    ----------
    reply
        From :func:`read_reply`.
    asked
        The recipe.
    model
        The model that was asked for.

    Returns
    -------
    status
        ``"ok"``, or why there is no answer: ``"wrong model"``, ``"refusal"``, ``"empty"``,
        ``"cut off"``, ``"out of scale"``, ``"unknown answer"``.
    probabilities
        ``(n_answers,)``; NaN without an answer.
    """
    nothing = np.full(len(asked.answers), np.nan)
    if reply.model and not same_model(reply.model, model):
        return "wrong model", nothing
    if reply.refused:
        return "refusal", nothing
    probabilities = token_probabilities(reply.tokens, asked.answers)
    if probabilities is not None:
        return "ok", probabilities
    said = _clean(reply.text)
    known = [answer.casefold() for answer in asked.answers]
    if not said:
        return "empty", nothing
    if said not in known:
        number = asked.kind == "rating" and re.fullmatch(r"[-+]?\d+([.,]\d+)?", said)
        return "out of scale" if number else "unknown answer", nothing
    if reply.finish == "length" and any(k != said and k.startswith(said) for k in known):
        return "cut off", nothing
    return "ok", np.eye(len(known))[known.index(said)]


def token_probabilities(
    tokens: tuple[tuple[str, tuple[tuple[str, float], ...]], ...], answers: tuple[str, ...]
) -> np.ndarray | None:
    """Probabilities of answers along the tokens of one reply.

    At each place every likely token either completes an answer, or begins one and is followed if
    it is the token that was generated. One that is not followed counts for the answer that it
    spells, or for the only one that it can begin.

    Parameters
    ----------
    tokens
        As in :class:`Reply`.
    answers
        The allowed answers.

    Returns
    -------
    numpy.ndarray or None
        ``(n_answers,)``, sums to 1. None without tokens, or if the allowed answers hold less than
        half of the probability.
    """
    known = [answer.casefold() for answer in answers]
    mass = np.zeros(len(answers))
    begun, share = "", 1.0
    for place, (chosen, top) in enumerate(tokens):
        follow = None
        for token, score in top:
            text = _lead(begun + token)
            likely = share * math.exp(score)
            ended = next((k for k in known if _ends(text, k)), None)
            longer = [k for k in known if k.startswith(text) and k != text]
            if token == chosen and (longer or not text) and place + 1 < len(tokens):
                follow = (text, likely)
            elif not text:
                continue
            elif ended is not None or text in known:
                mass[known.index(ended or text)] += likely
            elif len(longer) == 1:
                mass[known.index(longer[0])] += likely
        if follow is None:
            break
        begun, share = follow
    total = mass.sum()
    return mass / total if _LEAST_MASS <= total <= 1.01 else None


def same_model(told: str, asked: str) -> bool:
    """Whether a server's name for a model can be the one asked for: equal, or a dated version.

    Examples
    --------
    >>> same_model("gpt-4o-2024-08-06", "gpt-4o"), same_model("gpt-4o-mini", "gpt-4o")
    (True, False)
    """
    first, second = sorted((_last_part(told), _last_part(asked)), key=len)
    rest = second.removeprefix(first)
    return second.startswith(first) and bool(re.fullmatch(r"|@.*|[-:](\d[\d.-]*|latest)", rest))


def _last_part(name: str) -> str:
    return name.strip().rstrip("/").rsplit("/", 1)[-1].casefold()


def _message(choice: Any) -> dict[str, Any]:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise BadReplyError("wrong schema")
    return message


def _tokens(found: Any) -> tuple[tuple[str, tuple[tuple[str, float], ...]], ...]:
    """Tokens and their alternatives; nothing at all if any of it makes no sense."""
    content = found.get("content") if isinstance(found, dict) else None
    if not isinstance(content, list):
        return ()
    tokens = []
    try:
        for entry in content[:_MOST_TOKENS]:
            pairs = [(entry["token"], entry["logprob"])]
            pairs += [(other["token"], other["logprob"]) for other in entry["top_logprobs"]]
            top: dict[str, float] = {}
            for token, score in pairs[:_MOST_TOP]:
                if not isinstance(token, str) or not float(score) <= 0.01:
                    return ()
                top[token[:60]] = float(score)
            if sum(map(math.exp, top.values())) > 1.01:
                return ()
            tokens.append((entry["token"][:60], tuple(top.items())))
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(tokens)


def _clean(text: str) -> str:
    """Without the white space, quotes, emphasis and full stop that may stand around an answer."""
    return text.strip().strip("\"'`*").rstrip(".").strip("\"'`*").strip().casefold()


def _lead(text: str) -> str:
    return text.replace("▁", " ").replace("Ġ", " ").lstrip(" \t\n\"'`*").casefold()


def _ends(text: str, answer: str) -> bool:
    """Whether ``text`` is the answer and then something that does not go on with it.

    A figure after a point does go on: 7.5 is not 7.
    """
    rest = text.removeprefix(answer)
    return text.startswith(answer) and bool(re.match(r"[^\w.,/-]|[.,](?!\w)", rest))
