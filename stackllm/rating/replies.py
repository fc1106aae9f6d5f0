"""Reading what a chat server replied: never trusting it, never assuming what it did not show.

A reply is reduced to the few parts that matter (:class:`Reply`), which is what the journal keeps,
and judged against the allowed answers afterwards. So a better judge needs no new requests.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from stackllm.rating.body import BadReplyError as BadReplyError
from stackllm.rating.body import Completion, read_body
from stackllm.rating.body import ToldError as ToldError
from stackllm.rating.names import same_model
from stackllm.rating.question import Asked, AskedRecipe
from stackllm.rating.refusal import LEAST_SECRET
from stackllm.rating.rubric import Part, split
from stackllm.rating.spelling import Tokens, cut_tokens, squeeze
from stackllm.rating.thought import strip
from stackllm.rating.tokens import (
    MOST_TOKENS,
    clean,
    find_start,
    read_tokens,
    token_probabilities,
    without_control,
)
from stackllm.rating.wording import find_answer

_MOST_TEXT = 1000
_GAP = " […] "
_MOST_NAME = 200
"""So many characters of names are kept; older journals hold as many of a text."""
_TOKEN_ROOM = 12
"""Characters per token."""
_CUT = ("length", "max_tokens", "model_length", "max_output_tokens")
"""How servers say that a reply was cut at its limit."""

_REFUSED = re.compile(
    r"content_?filter|safety|refusal|recitation|prohibited|blocklist|spii|sensitive", re.IGNORECASE
)
"""How servers say that a reply was refused or taken back."""
_NUMBER_OVER = re.compile(r"\D")
_LABEL_OVER = re.compile(r"[\r\nĊ\"`*}<]")


@dataclass(frozen=True)
class Reply:
    """What matters of a chat completion.

    Parameters
    ----------
    text
        What was said after any thought: 1000 characters, or more where a rubric was asked; of a
        longer text its beginning and its end.
    tokens
        For each of its first tokens: the token, then the likeliest tokens in its place with their
        log-probabilities. Empty if the server gave none, or none that make sense.
    finish
        Why it ended, as the server says; ``"length"`` if it was cut at its limit.
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
    cost
        What the server says this cost, in its currency; 0 if it does not say.
    """

    text: str
    tokens: Tokens
    finish: str
    refused: bool
    model: str
    n_tokens: int
    n_prompt: int = 0
    thought: bool = False
    cost: float = 0.0

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
    "cost": float,
}
_LATER = {"n_prompt": 0, "thought": False, "cost": 0.0}
"""What replies of older journals lack."""


class Judged(NamedTuple):
    """What a reply is worth.

    Parameters
    ----------
    status
        ``"ok"``, or why there is no answer: ``"wrong model"``, ``"refusal"``, ``"empty"``,
        ``"still thinking"``, ``"cut off"``, ``"out of scale"``, ``"unknown answer"``; for one question of a rubric also
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
        If it is no JSON, or no chat completion with one answer, or a stream that was cut short.
    ToldError
        If it is an error instead, although it came with 200.
    """
    secret = secret if len(secret) >= LEAST_SECRET else ""
    body = read_body(content, secret)
    answer = body.completion
    finish = "length" if answer.finish.casefold() in _CUT else answer.finish
    cut, refused = finish == "length", bool(answer.refusal or _REFUSED.match(finish))
    said, thought = strip(answer.text or "", cut)
    thought = thought or answer.thinks or _count(_details(body.usage)) > 0
    if answer.text is None and not (refused or thought or cut):
        raise BadReplyError("wrong schema")
    if not said.strip() and _is_answer(answer, cut):
        said, thought = answer.thought, False
    return Reply(
        _kept(said, secret, _text_room(keep)),
        read_tokens(answer.entries, said, thought, secret, max(keep, MOST_TOKENS)),
        _kept(finish, secret, _MOST_NAME),
        refused,
        _kept(body.model, secret, _MOST_NAME),
        _count(body.usage.get("total_tokens")),
        _count(body.usage.get("prompt_tokens")),
        thought,
        _paid(body.usage.get("cost")),
    )


def judge_all(
    reply: Reply, recipe: AskedRecipe, model: str, any_model: bool = False
) -> tuple[Judged, ...]:
    """What a reply is worth as an answer to each question of a recipe; see :func:`judge`."""
    if isinstance(recipe, Asked):
        return (judge(reply, recipe, model, any_model)._replace(said=reply.text),)
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
        alone = replace(reply, text=part.text, tokens=part.tokens, finish=finish)
        return judge(alone, asked, model, any_model)._replace(said=part.text)
    finish = "" if reply.text.strip() else reply.finish
    judged = judge(replace(reply, text="", tokens=(), finish=finish), asked, model, any_model)
    if judged.status != "empty" or not reply.text.strip():
        return judged
    why = "cut off" if reply.finish == "length" else "left out"
    return judged._replace(status="answered twice" if parts else why)


def judge(reply: Reply, asked: Asked, model: str, any_model: bool = False) -> Judged:
    """Whether a reply is a valid answer, and the probability that it gives each allowed one.

    What counts is what the LLM said after its thought; where in it the answer stands,
    :func:`~stackllm.rating.wording.find_answer` tells. If the server gave token log-probabilities
    that spell the text, and allowed answers hold most of them where the answer begins, those are
    the answer's probabilities; else it has probability 1. Where the first line is an answer and
    nothing else, they count whatever follows: they tell how the reply begins.

    Parameters
    ----------
    reply
        From :func:`read_reply`, or from a journal of any age.
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
    cut = reply.finish == "length"
    text, thought = strip(reply.text, cut)  # older journals hold thought
    if not text.strip():
        still = "still thinking" if thought or reply.thought else "cut off"
        return Judged(still if cut else "empty", nothing)
    known = [clean(answer) for answer in asked.answers]
    if cut and any(k != clean(text) and k.startswith(clean(text)) for k in known):
        return Judged("cut off", nothing)
    tokens = _spelling(reply.tokens, text, thought)
    if clean(text.strip().splitlines()[0]) in known:
        probabilities = token_probabilities(tokens, asked.answers)
        if probabilities is not None:
            return Judged("ok", probabilities, measured=True)
    stated = find_answer(text, asked, cut)
    if stated is None:
        if asked.kind == "rating" and re.fullmatch(r"[-+]?\d+([.,]\d+)?", clean(text)):
            return Judged("out of scale", nothing)
        return Judged("cut off" if cut else "unknown answer", nothing)
    answer = asked.answers[stated.number]
    if (
        cut
        and stated.last
        and any(k.startswith(clean(answer)) and k != clean(answer) for k in known)
    ):
        return Judged("cut off", nothing)
    over = _NUMBER_OVER if asked.kind == "rating" else _LABEL_OVER
    spelling = cut_tokens(tokens, text, stated.start, stated.end, over)
    probabilities = token_probabilities(spelling, asked.answers)
    if probabilities is not None and probabilities[stated.number] > 0:
        return Judged("ok", probabilities, measured=True)
    return Judged("ok", np.eye(len(known))[stated.number])


def _is_answer(answer: Completion, cut: bool) -> bool:
    """Whether what a server calls thought can be the reply.

    An LLM that skips the thought which its template has opened answers at once, and the server's
    parser, which waits for the thought's end, files the answer under thought. One line, and nothing
    said, is such a case: a thought that goes on for longer is none, whatever it ends with.
    """
    lines = strip(answer.thought)[0].strip().splitlines()
    return len(lines) == 1 and not cut and not answer.refusal


def _details(usage: dict[str, Any]) -> Any:
    """How many tokens went into thought, as the server says."""
    details = usage.get("completion_tokens_details")
    return details.get("reasoning_tokens") if isinstance(details, dict) else None


def _count(told: Any) -> int:
    return told if type(told) is int and 0 <= told < 10**7 else 0


def _paid(told: Any) -> float:
    return float(told) if type(told) in (int, float) and 0 <= told < 10**6 else 0.0


def _text_room(keep: int) -> int:
    """Characters of a text that are kept beside so many tokens."""
    return max(_MOST_TEXT, keep * _TOKEN_ROOM)


def _kept(text: Any, secret: str, most: int) -> str:
    """What is kept of a text: no key, and of a long one its beginning and its end.

    The end is glued to what stands for the middle, so that half a line is never taken for a whole.
    """
    if not isinstance(text, str):
        return ""
    text = text.encode("utf-8", "replace").decode()  # half a character can't be written anywhere
    text = text.replace(secret, "[key]") if secret else text
    end = most // 4
    return text if len(text) <= most else f"{text[: most - end - len(_GAP)]}{_GAP}{text[-end:]}"


def _spelling(tokens: Tokens, text: str, thought: bool) -> Tokens:
    """Those of a reply's tokens that spell its text; none if they spell another."""
    names = [token for token, _ in tokens]
    start = find_start(names, text)
    if start == 0 or (start and thought):
        return tokens[start:]
    said, spelled = squeeze(text), squeeze(without_control("".join(names)))
    was_cut = len(tokens) == MOST_TOKENS or len(text) >= _MOST_NAME
    fits = spelled and (said.startswith(spelled) or spelled.startswith(said))
    return tokens if was_cut and fits else ()
