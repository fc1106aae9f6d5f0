"""What is sent to a chat server, and how it may be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from stackllm.errors import UsageError
from stackllm.parameters import check, shown
from stackllm.rating.local import RaterParams, prompt_text
from stackllm.rating.prompt import about_tokens
from stackllm.rating.question import AskedRecipe, Case
from stackllm.rating.rubric import reply_tokens
from stackllm.store.digest import LATER

Seconds = Annotated[float, Gt(0), Le(86_400)]
_OURS = {
    "model": "[rater] model names it",
    "messages": "the recipe makes them",
    "stream": "replies are read as a whole",
    "n": "one reply is read",
    "api_key": "settings are told and kept, and a key belongs into STACKLLM_API_KEY alone",
    "max_tokens": "[server] max_tokens is its setting",
    "max_completion_tokens": "[server] max_tokens is its setting, under whatever name the server takes it",
}
"""What ``extra`` may not hold, and why."""

_MOST_BYTES = 1_000_000
_TOKEN_BYTES = 8_000
"""As long as a token with 20 alternatives and their log-probabilities may be in a reply, written with indents."""

PerMinute = Annotated[float, Ge(0), Le(1_000_000_000)]
Price = Annotated[float, Ge(0), Le(1_000_000_000)]


@dataclass(frozen=True)
class ServerParams:
    """How a server may be used.

    Parameters
    ----------
    concurrency
        Requests under way at once.
    requests_per_minute, tokens_per_minute
        Limits; 0 is none. Tokens are estimated from the prompt's length, four bytes per token.
    max_requests
        Stop after so many requests, retries included, and keep every answer. None is no limit.
    attempts
        How often one prompt is sent at most.
    timeout_seconds
        For one attempt, from connecting to the body's last byte.
    deadline_seconds
        For one prompt with all its attempts and the waits between them. Its turn in our own pace,
        and a pause that the server asked another prompt for, do not count.
    backoff_seconds
        First wait before a retry; it doubles, and a random share of it is waited.
    max_bytes
        A longer body is not read. At its default the limit grows with ``max_tokens``.
    max_tokens
        Tokens of a reply, thought included: an LLM that thinks before it answers needs a few thousand. A rubric
        gets what its lines need if that is more.
    extra
        What else stands in the body of each request, such as ``{reasoning_effort = "low"}``. ``temperature``,
        ``logprobs`` and ``top_logprobs`` take the place of ours; nothing of it is ever left out.
    any_model
        Whether an answer counts under whatever name of a model it comes.
    batch
        Whether prompts are handed over as files to the server's batch endpoint, which takes hours and costs less.
    poll_seconds
        How long to wait before asking again whether a batch is done.
    price_in, price_out
        What a million tokens of prompts and of replies cost, in any currency; only for telling what was spent.
    allow_http
        Whether unencrypted HTTP may leave this machine.
    """

    concurrency: Annotated[int, Ge(1), Le(1000)] = 4
    requests_per_minute: PerMinute = 600.0
    tokens_per_minute: PerMinute = 0.0
    max_requests: Annotated[int, Ge(0), Le(1_000_000_000)] | None = None
    attempts: Annotated[int, Ge(1), Le(1000)] = 5
    timeout_seconds: Seconds = 60.0
    deadline_seconds: Seconds = 300.0
    backoff_seconds: Seconds = 0.5
    max_bytes: Annotated[int, Ge(1), Le(1_000_000_000)] = _MOST_BYTES
    allow_http: bool = False
    max_tokens: Annotated[int, Ge(1), Le(1_000_000)] = field(default=16, metadata=LATER)
    extra: dict[str, Any] = field(default_factory=dict, metadata=LATER)
    any_model: bool = field(default=False, metadata=LATER)
    batch: bool = field(default=False, metadata=LATER)
    poll_seconds: Seconds = field(default=30.0, metadata=LATER)
    price_in: Price | None = field(default=None, metadata=LATER)
    price_out: Price | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check(self)
        for name, why in _OURS.items():
            if name in self.extra:
                raise UsageError(f'[server] extra may not hold "{name}": {why}. Take it out.')
        for name, value in self.extra.items():
            try:
                json.dumps({name: value}, allow_nan=False)
            except (TypeError, ValueError, RecursionError):
                raise UsageError(
                    f'[server] extra: "{name}" must be what JSON can say, not {shown(value)}. '
                    "Write a date as a text, and no nan or inf."
                ) from None

    def most_bytes(self, tokens: int) -> int:
        """A longer body is not read: ``max_bytes``, or at its default room for a reply of so many tokens."""
        grown = tokens * _TOKEN_BYTES if self.max_bytes == _MOST_BYTES else 0
        return max(self.max_bytes, grown)


Job = tuple[AskedRecipe, dict[str, Any]]
"""A recipe, and the body of a request that asks it about one case."""


def make_body(
    recipe: AskedRecipe, case: Case, rater: RaterParams, server: ServerParams
) -> dict[str, Any]:
    """The request for one case: greedy, short, with token log-probabilities if there are any."""
    body = {
        "model": rater.model,
        "messages": [{"role": "user", "content": prompt_text(recipe, case, rater)}],
        "temperature": 0,
        "max_tokens": max(server.max_tokens, reply_tokens(recipe)),
        "logprobs": True,
        "top_logprobs": 20,
        "stream": False,
        **server.extra,
    }
    if not body["logprobs"] and "top_logprobs" not in server.extra:
        del body["top_logprobs"]  # servers refuse the one without the other
    return body


def estimate_tokens(body: Mapping[str, Any]) -> int:
    """About how many tokens a request costs: four bytes per token, and the reply's limit."""
    return prompt_tokens(body) + int(body["max_tokens"])


def prompt_tokens(body: Mapping[str, Any]) -> int:
    """About how many tokens a prompt has: four bytes each."""
    return about_tokens(_prompt(body))


def prompt_length(body: Mapping[str, Any]) -> int:
    """Characters of a prompt."""
    return len(_prompt(body))


def _prompt(body: Mapping[str, Any]) -> str:
    return "".join(message["content"] for message in body["messages"])
