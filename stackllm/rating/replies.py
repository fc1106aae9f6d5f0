"""Reading what a chat server replied: never trusting it, never assuming what it did not show.

A reply is reduced to the few parts that matter (:class:`Reply`), which is what the journal keeps,
and judged against the allowed answers afterwards. So a better judge needs no new requests.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from stackllm.rating.names import same_model
from stackllm.rating.question import Asked, AskedRecipe
from stackllm.rating.rubric import Part, reply_tokens, split
from stackllm.rating.spelling import Tokens, squeeze
from stackllm.rating.thought import strip

_MOST_TEXT = 200
_MOST_TOKENS = 16
_MOST_TOP = 50
_LEAST_SECRET = 8
"""A shorter key is a placeholder such as "EMPTY"; its letters may stand in any reply."""
_LEAST_MASS = 0.5
"""Token probabilities count only if the allowed answers hold at least this share of them."""


class BadReplyError(Exception):
    """A body that is no chat completion; the message is one of a few fixed reasons."""


class ErrorReply(BadReplyError):
    """A body that tells of an error although it came with 200.

    Parameters
    ----------
    code
        The HTTP status that it tells; 0 if none.
    reason
        What it says, on one line, cut and without the key.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Reply:
    """What matters of a chat completion.

    Parameters
    ----------
    text
        The reply's text, its first 200 characters, or more where a rubric was asked.
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
    tokens: Tokens
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
        ``"cut off"``, ``"out of scale"``, ``"unknown answer"``; for one question of a rubric also
        ``"left out"`` and ``"answered twice"``.
    probabilities
        ``(n_answers,)``; NaN without an answer.
    measured
        Whether they were read from token scores.
    said
        The text that was judged.
    """

    status: str
    probabilities: np.ndarray
    measured: bool = False
    said: str = ""


def read_reply(content: bytes, secret: str = "", keep: int = 0) -> Reply:
    """Reduce the body of a chat completion to what matters.

    Parameters
    ----------
    content
        The body.
    secret
        The API key, which a server may echo: it is taken out of whatever is kept. That is done
        after decoding, for JSON can write the same text in many ways.
    keep
        Tokens to keep if these are more than for one answer; see
        :func:`~stackllm.rating.rubric.reply_tokens`.

    Raises
    ------
    BadReplyError
        If it is no JSON, or no chat completion with one answer.
    ErrorReply
        If it is an error instead, whatever the status it came with.
    """
    secret = secret if len(secret) >= _LEAST_SECRET else ""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadReplyError("bad JSON") from error
    _check_error(data, secret)
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
    answer, thought = strip(text) if text else ("", False)
    return Reply(
        _kept(answer, secret, _text_room(keep)),
        _tokens(choices[0].get("logprobs"), secret, max(keep, _MOST_TOKENS)),
        _kept(finish, secret),
        bool(refusal) or finish == "content_filter",
        _kept(model, secret),
        _count(usage.get("total_tokens")),
        _count(usage.get("prompt_tokens")),
        thought,
    )


def judge_all(
    reply: Reply, recipe: AskedRecipe, model: str, any_model: bool = False
) -> tuple[Judged, ...]:
    """What a reply is worth as an answer to each question of a recipe; see :func:`judge`."""
    if isinstance(recipe, Asked):
        return (judge(reply, recipe, model, any_model)._replace(said=reply.text),)
    if len(reply.text) >= _text_room(reply_tokens(recipe)):
        reply = replace(reply, finish="length")  # we did cut it off
    split_up = split(reply.text, reply.tokens, recipe.names)
    return tuple(
        _judge_parts(reply, parts, asked, model, any_model)
        for parts, asked in zip(split_up, recipe.questions, strict=True)
    )


def _judge_parts(
    reply: Reply, parts: list[Part], asked: Asked, model: str, any_model: bool
) -> Judged:
    """What a reply is worth that says so much to a question of a rubric."""
    if len(parts) == 1:
        (part,) = parts
        finish = reply.finish if part.last else "stop"
        own = replace(reply, text=part.text, tokens=part.tokens, finish=finish)
        return judge(own, asked, model, any_model)._replace(said=part.text)
    finish = "" if reply.text.strip() else reply.finish
    judged = judge(replace(reply, text="", tokens=(), finish=finish), asked, model, any_model)
    if judged.status != "empty" or not reply.text.strip():
        return judged
    why = "cut off" if reply.finish == "length" else "left out"
    return judged._replace(status="answered twice" if parts else why)


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


def _check_error(data: Any, secret: str) -> None:
    """Raise what a body without choices says went wrong.

    Hosts that pass on others' answers, servers behind a proxy, and some that were asked at a wrong
    path tell it in a 200: ``{"error": {"code", "message"}}``, ``{"error": "text"}``,
    ``{"object": "error", "message"}``, ``{"detail": "text"}``.
    """
    if not isinstance(data, dict):
        return
    choices = data.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else data
    told = first.get("error") if isinstance(first, dict) else None
    if told is None and not choices:
        told = data if data.get("object") == "error" else data.get("detail")
    if not told:
        return
    parts = told if isinstance(told, dict) else {"message": told}
    said = parts.get("message") or parts.get("type") or parts.get("code") or told
    code = parts.get("code") or parts.get("status") or 0
    code = int(code) if str(code).isdecimal() else 0
    said = said if isinstance(said, str) else json.dumps(said)
    raise ErrorReply(code if 400 <= code < 600 else 0, " ".join(_kept(said, secret).split()))


def _message(choice: Any) -> dict[str, Any]:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise BadReplyError("wrong schema")
    return message


def _count(told: Any) -> int:
    return told if type(told) is int and 0 <= told < 10**7 else 0


def _text_room(keep: int) -> int:
    """Characters of a text that are kept beside so many tokens."""
    return max(_MOST_TEXT, keep * _MOST_TEXT // _MOST_TOKENS)


def _kept(text: Any, secret: str, most: int = _MOST_TEXT) -> str:
    """What is kept of a text: no key, no more than so much; nothing of what is no text."""
    if not isinstance(text, str):
        return ""
    return (text.replace(secret, "[key]") if secret else text)[:most]


def _tokens(told: Any, secret: str, most: int) -> Tokens:
    """Tokens and their alternatives; nothing at all if any of it makes no sense or tells the key."""
    content = told.get("content") if isinstance(told, dict) else None
    if not isinstance(content, list):
        return ()
    tokens = []
    try:
        if secret and secret in "".join(entry["token"] for entry in content):
            return ()
        for entry in content[:most]:
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
    said, spelled = squeeze(reply.text), squeeze(spelled)
    if len(reply.tokens) == _MOST_TOKENS or len(reply.text) == _MOST_TEXT:  # either was cut
        return bool(spelled) and (said.startswith(spelled) or spelled.startswith(said))
    return spelled == said


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
