"""Why a server refuses: its own words, what kind of refusal they make it, and what can be done.

Servers tell a reason in a dozen shapes, and what they tell may hold anything: an HTML page, the key
that was sent, ten thousand characters. What is shown of it is one printable line.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

_MOST_REASON = 200
LEAST_SECRET = 8
"""A shorter key is a placeholder such as "EMPTY"; its letters may stand in any reply."""

_SPOKEN = ("error", "errors", "message", "detail", "msg", "error_description", "reason", "title")
"""Where servers put their words, the likeliest first."""

Kind = Literal[
    "key",
    "quota",
    "path",
    "model",
    "context",
    "tokens",
    "stream",
    "loading",
    "busy",
    "flagged",
    "prompt",
]
"""What a refusal is about; ``"busy"`` may pass by itself, ``"prompt"`` is all that is not known better."""

_QUOTA = re.compile(
    r"insufficient[_ ](user[_ ])?(quota|credit|balance|fund)|exceeded your current quota|credits? balance"
    r"|(out of|no|not enough|more) credits(?! (were|was|are|is|have been|will be) charged)|key limit exceeded|(billing|spend\w*) (hard )?limit|payment required|quota_exceeded|usage limit"
    r"|\barrears\b|余额不足|欠费"
)
_SOON = re.compile(r"(retry|try again) (in|after) |per[- ](minute|second)|rate.?limit|[rt]pm\b")
_CONTEXT = re.compile(
    r"(context|sequence)[ _-]?(size|length|window)|exceed_context|maximum (context|prompt|input)|max_model_len|n_ctx"
    r"|(prompt|input|messages?|request)( is| are|_is)? too (long|large)|too many (input )?tokens"
    r"|reduce the length|(inputs?|prompt) tokens.*(exceed|must be|at most)|longer than the (model|maximum)|token count.*exceed"
)
_PATH = re.compile(
    r"^(404 )?(page |path |route )?not found\.?$|unexpected endpoint|method not allowed|invalid url|no (such )?route|unknown (endpoint|url|path)|cannot post"
)
_KEY = re.compile(r"(invalid|incorrect) api[_ ]?key|api[_ ]?key (is )?(not valid|invalid|expired)")
_MODEL = re.compile(
    r"model[^.;]{0,120}?(not[ _]found|(does|do|did)(es)? ?n[o']t exist|not exist|unknown|not (a )?(valid|loaded|served"
    r"|available|installed))|(no such|unknown|invalid|unsupported|missing|which) model|models? loaded|not a valid model"
    r"|try pulling it|model (is|was) unloaded|fail(ed|ure) to load (the )?model|model has crashed|does not support chat\b"
)
_FLAGGED = re.compile(
    r"\bmoderation\b|\b(was|were|been|is) flagged|content[_ ](filter|(management )?policy|moderation)"
    r"|inappropriate content|content exists risk|data_inspection_failed|responsibleaipolicy|prohibited[_ ]content|safety (system|filter|polic|guideline)"
)
_PARAMETERS = re.compile(r"(requested|these|given|specified) parameters")
_TOKENS = re.compile(
    r"max(imum)?_?(completion|output|new)?_?tokens.{0,80}?(too |at (most|least)|less|great|larg|small|exceed|maxim|minim"
    r"|between|range|<|>|≤|≥|cannot be|can't be)|(too|exceed|maxim).{0,80}max_(completion_)?tokens|higher max_tokens"
)
_STREAM = re.compile(
    r"only stream|stream\W{0,3}(=|to)\W{0,3}true|stream.{0,40}(only|require|must|enable)|only.{0,20}(support|take|allow)\w* stream"
)


@dataclass(frozen=True)
class Refusal:
    """What a server said instead of an answer.

    Parameters
    ----------
    status
        Of HTTP, also where it stood in the body of a 200; 0 where a 200 holds an error and tells none.
    reason
        From :func:`read_reason`; may be empty.
    wait
        Seconds that the server asks to wait; 0 if it does not ask. One that says when to come again has not
        closed the account.
    """

    status: int
    reason: str
    wait: float = 0.0

    def __str__(self) -> str:
        """``HTTP 400: what the server said``."""
        name = f"HTTP {self.status}" if self.status else "an error in a 200"
        return f"{name}: {self.reason}" if self.reason else name

    @property
    def kind(self) -> Kind:
        """What it is about.

        Examples
        --------
        >>> Refusal(429, "slow down").kind, Refusal(429, "You are out of credits").kind
        ('busy', 'quota')
        >>> Refusal(429, "You exceeded your current quota", wait=20.0).kind
        'busy'
        >>> Refusal(400, "the request exceeds the available context size").kind
        'context'
        """
        said = self.reason.casefold()
        if self.status in (0, 400, 403, 422, 451) and _FLAGGED.search(said):
            return "flagged"
        soon = _SOON.search(said) or (self.status == 429 and self.wait)
        if self.status == 402 or (_QUOTA.search(said) and not soon):
            return "quota"
        if self.status in (403, 404) and (names_logprobs(said) or _PARAMETERS.search(said)):
            return "prompt"  # so OpenAI refuses log-probabilities, and a router that finds no host for them
        if self.status in (401, 403, 407):
            return "key"
        if self.status == 400 and _KEY.search(said):
            return "key"
        if self.status == 503 and "loading" in said:
            return "loading"
        if self.status in (408, 409, 425, 429):
            return "busy"
        if _PATH.search(said) or self.status == 405:
            return "path"
        if _CONTEXT.search(said) or self.status in (413, 414):
            return "context"
        if _MODEL.search(said) and self.status not in (0, 500, 502, 503):
            return "model"
        if self.status == 404:
            return "path"
        if self.status >= 500 or self.status == 0:
            return "busy"
        if "max_completion_tokens" not in said and _TOKENS.search(said):
            return "tokens"
        return "stream" if _STREAM.search(said) else "prompt"


def read_reason(content: bytes, secret: str = "") -> str:
    """The server's own words out of the body of an error.

    Parameters
    ----------
    content
        The body, or its beginning.
    secret
        The API key, which a server may echo. It is taken out before anything is cut.

    Returns
    -------
    str
        One printable line of about 200 characters at most; empty if the server said nothing.

    Examples
    --------
    >>> read_reason(b'{"error": {"message": "no such\\\\nthing", "code": 400}}')
    'no such thing'
    >>> read_reason(b"<html><title>Just a moment...</title></html>")
    'an HTML page ("Just a moment...")'
    """
    return one_line(_words(content.decode("utf-8", "replace"), 0), secret)


def one_line(text: str, secret: str = "", most: int = _MOST_REASON) -> str:
    """A text on one printable line, without the key, cut to about so many characters."""
    line = without_key("".join(c if c.isprintable() else _blank(c) for c in text), secret)
    line = without_key(" ".join(line.split()), secret)
    return line if len(line) <= most else f"{line[:most].rstrip()}…"


def without_key(text: str, secret: str) -> str:
    """The text with ``[key]`` where the key stood, also where its letters were written as escapes.

    Examples
    --------
    >>> without_key(r"bad key sk-0123456, s\\u006b%2d0123456", "sk-0123456")
    'bad key [key], [key]'
    """
    if len(secret) < LEAST_SECRET:
        return text
    letters = [
        rf"(?:\\{{0,4}}{re.escape(c)}|\\{{1,4}}u{ord(c):04x}|\\{{1,4}}x{ord(c):02x}|%{ord(c):02x}|&#0*{ord(c)};|&#x0*{ord(c):x};)"
        for c in secret
    ]
    escaped = re.compile("".join(letters), re.IGNORECASE)
    return escaped.sub("[key]", text.replace(secret, "[key]"))


def names_logprobs(reason: str) -> bool:
    """Whether a server speaks of log-probabilities."""
    return bool(re.search(r"log[ _-]?prob", reason.casefold()))


def count_reasons(reasons: Iterable[str], most: int = 3) -> str:
    """Reasons with how often each occurred, the most frequent first.

    Those that differ in numbers only are one: a server tells in each how long the prompt was.

    Parameters
    ----------
    reasons
        One per failure.
    most
        So many are shown, and how many others there are.

    Examples
    --------
    >>> count_reasons(["time-out", "12 tokens are too many", "13 tokens are too many"])
    '2 12 tokens are too many, 1 time-out'
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for reason in reasons:
        sort = re.sub(r"(?<!HTTP )\d[\d.,]*", "#", reason)
        counts[sort] += 1
        first.setdefault(sort, reason)
    ranked = sorted(counts.items(), key=lambda it: (-it[1], it[0]))
    shown = [f"{count} {first[sort]}" for sort, count in ranked[:most]]
    others = sum(count for _, count in ranked[most:])
    return ", ".join(shown) + (f" and {others} others" if others else "")


def _blank(character: str) -> str:
    """A space for what separates; nothing for marks that can't be seen, which may stand within a key."""
    return " " if character.isspace() else ""


def _words(text: str, depth: int) -> str:
    """What a body, or a body quoted within one, says."""
    text = text.strip()
    if text.startswith("data:"):  # an error sent as an event of a stream
        text = text.splitlines()[0].removeprefix("data:").strip()
    if text[:1] in ("{", "["):
        try:
            return _spoken(json.loads(text), depth)
        except (ValueError, RecursionError):  # cut, or no JSON after all
            quoted = re.search(r'"(?:message|detail|error|msg)"\s*:\s*("(?:[^"\\]|\\.)*)', text)
            with_end = f'{quoted[1]}"' if quoted else ""
            try:
                return str(json.loads(with_end, strict=False)) if with_end else text
            except ValueError:
                return text
    if re.match(r"<(!doctype|html|head|body|\?xml|!--)", text, re.IGNORECASE):
        title = re.search(r"<title[^>]*>(.*?)</title", text, re.IGNORECASE | re.DOTALL)
        said = html.unescape(title[1]).strip() if title else ""
        return f'an HTML page ("{said}")' if said else "an HTML page"
    return text


def _spoken(value: Any, depth: int) -> str:
    """The words in a decoded body."""
    if depth > 6 or value is None or isinstance(value, bool):
        return ""
    if isinstance(value, str):
        return _words(value, depth + 1)
    if isinstance(value, list):
        said = dict.fromkeys(_spoken(entry, depth + 1) for entry in value[:5])
        return "; ".join(filter(None, said))
    if not isinstance(value, dict):
        return str(value) if depth else ""
    fields = {str(name).casefold(): entry for name, entry in value.items()}
    words = next(filter(None, (_spoken(fields.get(name), depth + 1) for name in _SPOKEN)), "")
    # Hosts that pass on others' answers say what those said beside it.
    details = fields.get("metadata")
    raw = _spoken(details.get("raw"), depth + 1) if isinstance(details, dict) else ""
    if raw and raw not in words:
        words = f"{words}: {raw}" if words else raw
    place = fields.get("loc")  # of FastAPI: which field is meant
    if words and isinstance(place, list) and place and str(place[-1]) not in words.split():
        words = f"{place[-1]}: {words}"
    for name in ("param", "code"):  # often the only place that names the field or the kind
        mark = fields.get(name)
        if isinstance(mark, str) and re.search("[a-z]", mark) and mark not in words:
            words = f"{words} ({mark})" if words else mark
    return words
