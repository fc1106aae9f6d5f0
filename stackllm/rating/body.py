"""What a server sent back, put together: one completion, whether it came whole or in pieces.

Servers that were asked not to stream may do it all the same, as server-sent events or as a line of
JSON per piece. A whole completion is read as a stream of one piece, so there is one reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from stackllm.rating.refusal import read_reason
from stackllm.rating.tokens import list_entries

_THOUGHT = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
"""Where servers put what an LLM thought, beside what it said."""

_ERRORS = ("error", "errors", "detail", "message", "msg")
_CODES = ("code", "status", "statusCode", "status_code")


class BadReplyError(Exception):
    """A body that is no chat completion; the message is one of a few fixed reasons."""


class ToldError(BadReplyError):
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


@dataclass
class Completion:
    """One answer of a chat completion, as much of it as has come.

    Parameters
    ----------
    text
        What was said; None if there is no such field.
    thought
        What was thought, as far as the server tells it apart.
    thinks
        Whether the server shows that anything was thought.
    refusal
        The words of a refusal.
    finish
        Why it ended.
    entries
        Log-probabilities, an entry per token; see :func:`~stackllm.rating.tokens.list_entries`.
    """

    text: str | None = None
    thought: str = ""
    thinks: bool = False
    refusal: str = ""
    finish: str = ""
    entries: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Body:
    """A chat completion.

    Parameters
    ----------
    completion
        Its answer.
    model
        Who answered, as the server says.
    usage
        How many tokens of which kind.
    """

    completion: Completion
    model: Any
    usage: dict[str, Any]


def read_body(content: bytes, secret: str = "") -> Body:
    """Put together what a server sent back.

    Parameters
    ----------
    content
        One JSON object, server-sent events, or a line of JSON per piece.
    secret
        The API key: it is taken out of what an error says.

    Raises
    ------
    BadReplyError
        If it is no chat completion with one answer, or a stream that was cut short.
    ToldError
        If it is an error instead.
    """
    pieces, streamed = _split(content)
    answers: dict[Any, Completion] = {}
    model: Any = None
    usage: dict[str, Any] = {}
    ended = not streamed
    for piece in pieces:
        if piece is None:
            ended = True
            continue
        _check_error(piece, secret)
        choices = _choices(piece)
        if choices is None and not streamed:
            raise BadReplyError("wrong schema")
        for place, choice in enumerate(choices or []):
            if not isinstance(choice, dict):
                raise BadReplyError("wrong schema")
            number = choice.get("index", place) if streamed else place
            answer = answers.setdefault(str(number), Completion())
            _add(answer, choice, streamed)
            ended = ended or bool(answer.finish)
        model = piece.get("model") or model
        usage = _usage(piece) or usage
    if not ended:
        raise BadReplyError("broken stream")
    if not answers:
        raise BadReplyError("no choices")
    first = next(iter(answers.values()))
    if any(other.text != first.text for other in answers.values()):
        raise BadReplyError("several answers")
    return Body(first, model, usage)


def _split(content: bytes) -> tuple[list[dict[str, Any] | None], bool]:
    """The JSON objects of a body, None where a stream says that it has ended, and whether it is a stream."""
    try:
        text = content.decode("utf-8-sig")
        if text.lstrip().startswith(("data:", "event:", "id:", "retry:", ":")):
            return [None if it == "[DONE]" else _loads(it) for it in _events(text)], True
        try:
            data = _loads(text)
        except ValueError:  # a line of JSON each
            lines = [_loads(line) for line in text.splitlines() if line.strip()]
            if not lines or not all(_is_piece(line) for line in lines):
                raise
            return [*lines, *([None] if any(line.get("done") for line in lines) else [])], True
    except (ValueError, RecursionError) as error:
        raise BadReplyError("bad JSON") from error
    return [data], bool(data.get("choices")) and _is_piece(data)


def _loads(text: str) -> dict[str, Any]:
    data = json.loads(text)
    if not isinstance(data, dict):
        raise BadReplyError("wrong schema")
    return data


def _is_piece(data: dict[str, Any]) -> bool:
    """Whether an object is a piece of a stream: of Ollama's, or one with no whole message."""
    choices = data.get("choices")
    pieces = isinstance(choices, list) and all(
        isinstance(choice, dict) and "message" not in choice for choice in choices
    )
    return pieces or "done" in data or "error" in data


def _events(text: str) -> Iterator[str]:
    """The data of each server-sent event; the last one need not be followed by an empty line."""
    lines: list[str] = []
    for line in [*text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), ""]:
        if line.startswith("data:"):
            lines.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and lines:
            yield "\n".join(lines).strip()
            lines = []


def _choices(piece: dict[str, Any]) -> list[Any] | None:
    """The choices of a piece; Ollama has a message of its own instead. None if there are none."""
    if isinstance(piece.get("message"), dict) and "done" in piece:
        told = {"delta": piece["message"], "logprobs": piece.get("logprobs")}
        return [{**told, "finish_reason": piece.get("done_reason")}]
    choices = piece.get("choices")
    if not isinstance(choices, list):
        return None
    if choices and "completion_probabilities" in piece and isinstance(choices[0], dict):
        told = {"logprobs": {"content": piece["completion_probabilities"]}}  # older llama.cpp
        return [{**choices[0], **told}, *choices[1:]]
    return choices


def _add(answer: Completion, choice: dict[str, Any], streamed: bool) -> None:
    """Add a piece to what has come of an answer; a whole message takes the place of pieces."""
    message = choice.get("message") or choice.get("delta") or ({} if streamed else None)
    if not isinstance(message, dict):
        raise BadReplyError("wrong schema")
    if choice.get("message"):
        answer.text, answer.thought, answer.refusal, answer.entries = None, "", "", []
    text, thinks, refusal = _read_content(message.get("content"))
    if text is not None:
        answer.text = (answer.text or "") + text
    told = [message.get(name) for name in _THOUGHT]
    answer.thought += next((it for it in told if isinstance(it, str) and it), "")
    answer.thinks |= thinks or any(it.strip() if isinstance(it, str) else it for it in told)
    said = message.get("refusal")
    answer.refusal += refusal + (said if isinstance(said, str) else "refusal" if said else "")
    finish = choice.get("finish_reason")
    answer.finish = finish if isinstance(finish, str) and finish else answer.finish
    answer.entries += list_entries(choice.get("logprobs"))


def _read_content(content: Any) -> tuple[str | None, bool, str]:
    """Text, whether there is thought, and refusal of a content, which may come in parts; no text is None."""
    if content is None or isinstance(content, str):
        return content, False, ""
    if not isinstance(content, list):
        raise BadReplyError("wrong schema")
    text, thinks, refusal, others = "", False, "", False
    for part in content:
        if isinstance(part, str):
            text += part
        elif not isinstance(part, dict):
            raise BadReplyError("wrong schema")
        elif any(word in str(part.get("type")) for word in ("think", "reason")):
            thinks = True
        elif part.get("type") == "refusal":
            refusal += str(part.get("refusal") or "refusal")
        elif isinstance(part.get("text"), str):
            text += part["text"]
        else:
            others = True
    if others and not text:  # beside a text, a reference or an image says nothing
        raise BadReplyError("wrong schema")
    return text, thinks, refusal


def _usage(piece: dict[str, Any]) -> dict[str, Any]:
    """How many tokens were used; Ollama tells it beside the message."""
    usage = piece.get("usage")
    if not isinstance(usage, dict) and "eval_count" in piece:
        prompt, reply = piece.get("prompt_eval_count", 0), piece["eval_count"]
        if isinstance(prompt, int) and isinstance(reply, int):
            return {"prompt_tokens": prompt, "total_tokens": prompt + reply}
    return usage if isinstance(usage, dict) else {}


def _check_error(data: dict[str, Any], secret: str) -> None:
    """Raise what a body says went wrong.

    Hosts that pass on others' answers, servers behind a proxy, and some that were asked at a wrong
    path tell it in a 200: ``{"error": {"code", "message"}}``, ``{"error": "text"}``,
    ``{"object": "error", "message"}``, ``{"detail": "text"}``, ``{"choices": [{"error": {...}}]}``.
    """
    choices = data.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else {}
    told = data.get("error") or (first.get("error") if isinstance(first, dict) else None)
    if not told and ("choices" in data or "done" in data):
        return
    told = told or next((data[name] for name in _ERRORS if data.get(name)), None)
    if not told or (told is data.get("message") and not isinstance(told, str)):
        return
    parts = told if isinstance(told, dict) else data
    codes = [str(parts.get(name)) for name in _CODES]
    code = next((int(code) for code in codes if re.fullmatch("[45][0-9][0-9]", code)), 0)
    raise ToldError(code, read_reason(json.dumps(told).encode(), secret))
