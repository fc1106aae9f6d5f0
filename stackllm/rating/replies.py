"""Reading what a chat server replied: never trusting it, never assuming what it did not show.

A reply is reduced to the few parts that matter (:class:`Reply`), which is what the journal keeps,
and judged against the allowed answers afterwards. So a better judge needs no new requests.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from stackllm.rating.question import Asked

_MOST_TEXT = 200
_MOST_TOKENS = 16
_MOST_TOP = 50
_LEAST_SECRET = 8
"""A shorter key is a placeholder such as "EMPTY"; its letters may stand in any reply."""
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
    n_prompt
        Tokens that the server says the prompt had; 0 if it does not say.
    thought
        Whether the LLM thought before it answered.
    """

    text: str
    tokens: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
    finish: str
    refused: bool
    model: str
    n_tokens: int
    n_prompt: int = 0
    thought: bool = False

    def dump(self) -> str:
        """The reply as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Reply:
        """The inverse of :meth:`dump`.

        Raises
        ------
        ValueError
            If the text is anything else.
        """
        values = json.loads(text)
        if isinstance(values, dict):
            values = {**_LATER, **values}
        if not isinstance(values, dict) or {k: type(v) for k, v in values.items()} != _KINDS:
            raise ValueError("no reply")
        tokens = tuple(
            (str(token), tuple((str(name), float(score)) for name, score in top))
            for token, top in values.pop("tokens")
        )
        return cls(tokens=tokens, **values)


_KINDS = {
    "text": str,
    "tokens": list,
    "finish": str,
    "refused": bool,
    "model": str,
    "n_tokens": int,
    "n_prompt": int,
    "thought": bool,
}
_LATER = {"n_prompt": 0, "thought": False}
"""What replies of older journals lack."""


class Judged(NamedTuple):
    """What a reply is worth.

    Parameters
    ----------
    status
        ``"ok"``, or why there is no answer: ``"wrong model"``, ``"refusal"``, ``"empty"``,
        ``"cut off"``, ``"out of scale"``, ``"unknown answer"``.
    probabilities
        ``(n_answers,)``; NaN without an answer.
    measured
        Whether they were read from token scores.
    """

    status: str
    probabilities: np.ndarray
    measured: bool = False


def read_reply(content: bytes, secret: str = "") -> Reply:
    """Reduce the body of a chat completion to what matters.

    Parameters
    ----------
    content
        The body.
    secret
        The API key, which a server may echo: it is taken out of whatever is kept. That is done
        after decoding, for JSON can write the same text in many ways.

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
    usage = usage if isinstance(usage, dict) else {}
    secret = secret if len(secret) >= _LEAST_SECRET else ""
    return Reply(
        _kept(text, secret),
        _tokens(choices[0].get("logprobs"), secret),
        _kept(finish, secret),
        bool(refusal) or finish == "content_filter",
        _kept(model, secret),
        _count(usage.get("total_tokens")),
        _count(usage.get("prompt_tokens")),
    )


def judge(reply: Reply, asked: Asked, model: str, any_model: bool = False) -> Judged:
    """Whether a reply is a valid answer, and the probability that it gives each allowed one.

    Token log-probabilities are used if the server gave them, they spell the text, its first line
    is an allowed answer, and allowed answers hold most of them; else the text must be an allowed
    answer, which then has probability 1.

    Parameters
    ----------
    reply
        From :func:`read_reply`.
    asked
        The recipe.
    model
        The model that was asked for.
    any_model
        Whether any other may have answered.
    """
    nothing = np.full(len(asked.answers), np.nan)
    if reply.model and not any_model and not same_model(reply.model, model):
        return Judged("wrong model", nothing)
    if reply.refused:
        return Judged("refusal", nothing)
    said = _clean(reply.text)
    known = [_clean(answer) for answer in asked.answers]
    if not said:
        return Judged("empty", nothing)
    if reply.finish == "length" and any(k != said and k.startswith(said) for k in known):
        return Judged("cut off", nothing)
    if _clean(reply.text.strip().splitlines()[0]) in known and _spell_the_text(reply):
        probabilities = token_probabilities(reply.tokens, asked.answers)
        if probabilities is not None:
            return Judged("ok", probabilities, measured=True)
    if said not in known:
        number = asked.kind == "rating" and re.fullmatch(r"[-+]?\d+([.,]\d+)?", said)
        return Judged("out of scale" if number else "unknown answer", nothing)
    return Judged("ok", np.eye(len(known))[known.index(said)])


def token_probabilities(
    tokens: tuple[tuple[str, tuple[tuple[str, float], ...]], ...], answers: tuple[str, ...]
) -> np.ndarray | None:
    """Probabilities of answers along the tokens of one reply.

    At each place every likely token either completes an answer, or begins one and is followed if
    it is the token that was generated. One that is not followed counts for the answer that it
    spells, or for the only one that it can begin. One that spells an answer and can begin another,
    as 1 can begin 10, counts only where it shows that it ended: it is the last that was generated,
    or the other answer stands beside it as a whole.

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
    known = [_clean(answer) for answer in answers]
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


def _message(choice: Any) -> dict[str, Any]:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise BadReplyError("wrong schema")
    return message


def _count(told: Any) -> int:
    return told if type(told) is int and 0 <= told < 10**7 else 0


def _kept(text: Any, secret: str) -> str:
    """What is kept of a text: no key, no more than so much; nothing of what is no text."""
    if not isinstance(text, str):
        return ""
    return (text.replace(secret, "[key]") if secret else text)[:_MOST_TEXT]


def _tokens(told: Any, secret: str) -> tuple[tuple[str, tuple[tuple[str, float], ...]], ...]:
    """Tokens and their alternatives; nothing at all if any of it makes no sense or tells the key."""
    content = told.get("content") if isinstance(told, dict) else None
    if not isinstance(content, list):
        return ()
    tokens = []
    try:
        if secret and secret in "".join(entry["token"] for entry in content):
            return ()
        for entry in content[:_MOST_TOKENS]:
            pairs = [(entry["token"], entry["logprob"])]
            pairs += [(other["token"], other["logprob"]) for other in entry["top_logprobs"]]
            top: dict[str, float] = {}
            for token, score in pairs[:_MOST_TOP]:
                if not isinstance(token, str) or not float(score) <= 0.01:
                    return ()
                if secret and secret in token:
                    return ()
                top[token[:60]] = float(score)
            if sum(map(math.exp, top.values())) > 1.01:
                return ()
            tokens.append((entry["token"][:60], tuple(top.items())))
    except (KeyError, TypeError, ValueError, OverflowError):
        return ()
    return tuple(tokens)


def _spell_the_text(reply: Reply) -> bool:
    """Whether the generated tokens, but for control tokens at the end, are the reply's text."""
    spelled = re.sub(r"(<[^<>]*>\s*)+$", "", "".join(token for token, _ in reply.tokens))
    said, spelled = _squeeze(reply.text), _squeeze(spelled)
    if len(reply.tokens) == _MOST_TOKENS or len(reply.text) == _MOST_TEXT:  # either was cut
        return bool(spelled) and (said.startswith(spelled) or spelled.startswith(said))
    return spelled == said


def _squeeze(text: str) -> str:
    """Without white space, however a tokenizer writes it."""
    return re.sub(r"[\s▁ĠĊ]+", "", text)


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
