"""What to say when a server gives no answers: what it said itself, and a step that helps.

Only what may pass by itself is worth the same command again; for the rest something must be set.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stackllm.errors import ServerError, did_you_mean
from stackllm.rating.address import KEY, nearest_base
from stackllm.rating.refusal import Refusal, count_reasons, one_line
from stackllm.rating.replies import Reply
from stackllm.rating.requests import ServerParams

_THOUGHT_TOKENS = 2000
"""As many as an LLM that thinks needs for a short answer, mostly."""

_LONGEST_TOKEN, _LONGEST_SHORT = 8.0, 12.5
"""Characters per token that prose does not reach, in a long prompt and in a short one."""

_LEAST_CONTEXT = 256
"""No server's context is shorter: a count below is more likely wrong than cut, unless it is far too low."""

_NO_COMPLETION = ("bad JSON", "wrong schema", "no choices", "several answers")

TOO_LONG_A_WAIT = ", to be asked again after the deadline"
"""What the reason of a prompt ends with that nobody waits for."""

_AGAIN = "; run the same command again when it does."


class UnansweredError(Exception):
    """One prompt got no answer and another may; the message is a short reason.

    Parameters
    ----------
    reason
        What happened.
    refusal
        What the server said; None if nothing.
    """

    def __init__(self, reason: str, refusal: Refusal | None = None) -> None:
        super().__init__(reason)
        self.refusal = refusal


def turned_away(url: str, refusal: Refusal, has_key: bool) -> ServerError:
    """For a key that is not taken, or an account that is used up."""
    if refusal.kind == "quota":
        return ServerError(
            f"{url}: the account's credits or quota are used up ({refusal}). Answers so far are kept: "
            "add credits, or set another [rater] url, model or key, and the same command goes on from there."
        )
    page = " Is [rater] url the API's address, and not that of a page for people?"
    return ServerError(
        f"{url} refuses the API key ({refusal}). Check the environment variable {KEY}"
        f"{'' if has_key else ', which is not set'}.{page if 'HTML page' in refusal.reason else ''}"
    )


def not_there(
    url: str, model: str, refusal: Refusal, base: str, models: Sequence[str]
) -> ServerError:
    """For an address or a model that the server does not know.

    Parameters
    ----------
    url
        What was asked.
    model
        The model that was asked for.
    refusal
        What the server said.
    base
        Below which it was asked for its models.
    models
        Their names; empty if it told none.
    """
    versioned = url.startswith(f"{base}/")
    if not versioned and not (refusal.kind == "model" and models):
        step = f'Does [rater] url end in /v1? Set it to "{base}"' + (
            ", where a server answers." if models else "."
        )
    elif models and model not in models:
        step = f'It has no model "{model}". {did_you_mean(model, models)} Set [rater] model to a name it has.'
    elif models:
        step = f'It lists the model "{model}", though: is that one for chats, and loaded?'
    else:
        step = "Check [rater] url and model."
    return ServerError(f"{url}: the server knows no such address or model ({refusal}). {step}")


def unreachable(
    url: str,
    reasons: Collection[str],
    refusals: Sequence[Refusal],
    server: ServerParams,
) -> ServerError:
    """For a server that answers no prompt, or none any more.

    Parameters
    ----------
    url
        What was asked.
    reasons
        Why each prompt has no answer.
    refusals
        What the server said to those that it refused.
    server
        How it may be used.
    """
    told = f"{url} gives no answers ({count_reasons(reasons)}). Answers so far are kept"
    kinds = Counter(refusal.kind for refusal in refusals)
    kind = kinds.most_common(1)[0][0] if kinds and 2 * kinds.total() > len(reasons) else "busy"
    if kind == "loading":
        return ServerError(
            f"{told}: the server is loading its model; run the same command again when it has."
        )
    if kind != "busy":
        last = next(it for it in reversed(refusals) if it.kind == kind)
        return ServerError(f"{told}. {refused_step(last, server)}")
    if Counter(reasons).most_common(1)[0][0] in _NO_COMPLETION:
        base = nearest_base(url)
        step = "" if url.startswith(f"{base}/") else f' It mostly ends in /v1: try "{base}".'
        return ServerError(
            f"{told}. What it sends is no chat completion: is [rater] url that of an OpenAI-compatible API?{step}"
        )
    return ServerError(f"{told}{_AGAIN}{_waiting_step(reasons, server)}")


def lasting_refusals(refusals: Sequence[Refusal], server: ServerParams) -> str:
    """For prompts that were refused and will be again; empty if there are none."""
    lasting = [it for it in refusals if it.kind not in ("busy", "loading")]
    if not lasting:
        return ""
    reasons = count_reasons(map(str, lasting))
    return (
        f"rater: the server refuses {len(lasting)} prompts ({reasons}). "
        f"{refused_step(lasting[-1], server)}"
    )


def refused_step(refusal: Refusal, server: ServerParams) -> str:
    """What to do about a refusal that comes again whenever the same is asked."""
    if refusal.kind == "context":
        return (
            "The server's context is too short for these prompts: lower [rater] max_question_tokens and "
            f"max_response_tokens, or [server] max_tokens (now {server.max_tokens}), or raise its context (-c in "
            "llama.cpp, num_ctx in Ollama, the context length in LM Studio, --max-model-len in vLLM)."
        )
    if refusal.kind == "flagged":
        return "Its moderation does not let these texts through: leave them without an answer, or ask another model or server."
    if refusal.kind == "tokens":
        return f"Set [server] max_tokens, now {server.max_tokens}, to what the server takes."
    if refusal.kind == "stream":
        return "Replies are read as a whole, which this model does not give: ask another model or server."
    if refusal.kind == "model":
        return "Check [rater] model."
    if refusal.kind == "path":
        return "Check [rater] url."
    names = named_fields(refusal.reason, server.extra)
    if names:
        return f"It refuses {_listed(names)} of [server] extra: change it, or take it out."
    also = f", or {_listed(server.extra)} of [server] extra" if server.extra else ""
    return f"Asked again it would refuse the same: change what it names{also}, or ask another model or server."


def named_fields(reason: str, extra: Mapping[str, Any]) -> list[str]:
    """Fields that the user sends and the server's reason names, those within others too.

    Examples
    --------
    >>> named_fields("unknown field 'enable_thinking'", {"chat_template_kwargs": {"enable_thinking": False}})
    ['enable_thinking']
    """
    names = []
    for name, value in extra.items():
        if re.search(rf"(?<!\\w){re.escape(name)}(?!\\w)", reason):
            names.append(name)
        if isinstance(value, Mapping):
            names += named_fields(reason, value)
    return names


def misnamed(url: str, told: str, asked: str) -> ServerError:
    """For answers that come under another model's name."""
    name = json.dumps(one_line(told), ensure_ascii=False)
    return ServerError(
        f'{url}: the server answers as {name}, not as "{asked}": set [rater] model to {name}, '
        "or [server] any_model = true if any name will do. What it answered is kept."
    )


def never_done_thinking(url: str, reply: Reply, count: int, server: ServerParams) -> ServerError:
    """For an LLM whose tokens run out while it thinks."""
    more = max(_THOUGHT_TOKENS, 4 * server.max_tokens)
    return ServerError(
        f"{url}: the model thinks before it answers, and its tokens run out first: {count} replies in a row ended with "
        f'finish_reason "{one_line(reply.finish)}" within their thought, which stands in <think> or beside the content, '
        "and said nothing else. They are kept. "
        f"Set [server] max_tokens = {more} or so (now {server.max_tokens}), or turn thinking off: "
        '[server] extra = {reasoning_effort = "low"} or {chat_template_kwargs = {enable_thinking = false}}.'
    )


def never_valid(
    url: str, status: str, reply: Reply, count: int, server: ServerParams
) -> ServerError:
    """For a model whose answers are no valid ones."""
    steps = {
        "still thinking": f"Raise [server] max_tokens (now {server.max_tokens}), or turn its thinking off by [server] extra.",
        "cut off": f"Raise [server] max_tokens (now {server.max_tokens}).",
        "empty": f"Raise [server] max_tokens (now {server.max_tokens}), for it may think before it answers, or ask "
        "another model.",
        "refusal": "Ask another model, or change the recipe's instruction.",
    }
    step = steps.get(status, "Ask another model, or change the recipe's instruction.")
    said = one_line(reply.text, most=60)
    shown = f'"{said}", {status}' if said else status
    return ServerError(
        f"{url}: {count} replies in a row were not valid (the last one: {shown}). They are kept. {step}"
    )


def cut_prompt(told: int, length: int, estimate: int) -> str:
    """What to say of a prompt of which the server has read a part only; empty if it has read it all.

    Parameters
    ----------
    told
        Tokens that it counted; 0 if it does not say.
    length
        Characters of the prompt. Prose has about 4 per token in English and fewer in most other languages.
    estimate
        Tokens that it has about.

    Examples
    --------
    >>> cut_prompt(50, 590, 148), cut_prompt(2048, 9000, 2250), cut_prompt(0, 9000, 2250)
    ('', '', '')
    >>> bool(cut_prompt(40, 590, 148)), bool(cut_prompt(2048, 20_000, 5000))
    (True, True)
    """
    longest = _LONGEST_TOKEN if told >= _LEAST_CONTEXT else _LONGEST_SHORT
    if not told or (length <= longest * told and estimate < 10 * told):
        return ""
    return (
        f"rater: the server counted {told:,} tokens in a prompt of {length:,} characters, about {estimate:,} tokens: it "
        "cuts prompts, or its count is wrong. Raise num_ctx (Ollama), the context length (LM Studio) or -c "
        "(llama.cpp); to ask anew what was cut, move the journal answers.sqlite away."
    )


def _waiting_step(reasons: Collection[str], server: ServerParams) -> str:
    """What to do besides waiting."""
    reason = Counter(reasons).most_common(1)[0][0]
    if reason in ("time-out", "deadline"):
        long = f"with max_tokens = {server.max_tokens} " if server.max_tokens >= 200 else ""
        return (
            f" A reply {long}may take longer than [server] timeout_seconds (now {server.timeout_seconds:g}) or "
            f"deadline_seconds (now {server.deadline_seconds:g}): raise them."
        )
    if reason.endswith(TOO_LONG_A_WAIT):
        return f" It asks to wait for longer than [server] deadline_seconds (now {server.deadline_seconds:g})."
    if reason.startswith("HTTP 429"):
        limit = server.requests_per_minute
        return (
            f" Lower [server] requests_per_minute (now {f'{limit:g}' if limit else '0, which is no limit'}) "
            f"or concurrency (now {server.concurrency})."
        )
    if reason == "connection":
        return " Is it running, and is [rater] url its address?"
    if reason == "body too large":
        return f" Or raise [server] max_bytes (now {server.most_bytes(server.max_tokens):,})."
    return ""


def _listed(names: Collection[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
