"""What answers cost: requests, tokens as the server counts them, and money where somebody tells a price."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from stackllm.rating.answers import Cost
from stackllm.rating.prompt import about_tokens
from stackllm.rating.replies import Reply
from stackllm.rating.requests import Job, ServerParams, prompt_tokens


def count_cost(
    keys: Collection[str],
    replies: Mapping[str, Reply],
    sent: Collection[str],
    jobs: Mapping[str, Job],
    server: ServerParams,
) -> Cost:
    """What the answers to one recipe took.

    Parameters
    ----------
    keys
        Its requests.
    replies
        Those that came, whenever that was.
    sent
        Requests that were sent just now, of all recipes.
    jobs
        What each request asks.
    server
        Its prices.
    """
    requests = dict.fromkeys(keys)
    came = {key: replies[key] for key in requests if key in replies}
    tokens = {key: _tokens(reply, jobs[key]) for key, reply in came.items()}
    money = {key: reply.cost or price(*tokens[key], server) for key, reply in came.items()}
    known = {key: paid for key, paid in money.items() if paid is not None}
    return Cost(
        len(requests),
        sum(key in sent for key in requests),
        sum(prompt for prompt, _ in tokens.values()),
        sum(reply for _, reply in tokens.values()),
        len(came),
        sum(reply.n_prompt > 0 for reply in came.values()),
        sum(known.values()) if known else None,
        sum(paid for key, paid in known.items() if key in sent) if known else None,
    )


def _tokens(reply: Reply, job: Job) -> tuple[int, int]:
    """Tokens of prompt and reply: as the server counted them, else about as many as there are texts for."""
    if reply.n_prompt:
        return reply.n_prompt, max(0, reply.n_tokens - reply.n_prompt)
    return prompt_tokens(job[1]), about_tokens(reply.text)


def price(prompt: int, reply: int, server: ServerParams) -> float | None:
    """What so many tokens cost at the prices that were set; None without any."""
    if server.price_in is None and server.price_out is None:
        return None
    return (prompt * (server.price_in or 0.0) + reply * (server.price_out or 0.0)) / 1e6


def told_of_work(jobs: Sequence[Job], server: ServerParams) -> str:
    """What is still to be sent would cost, at most: no reply is longer than its limit."""
    prompt = sum(prompt_tokens(body) for _, body in jobs)
    reply = sum(body["max_tokens"] for _, body in jobs)
    money = price(prompt, reply, server)
    paid = "" if money is None else f", at most {money:,.4g} by [server] price_in and price_out"
    return f"about {prompt:,} tokens in prompts, at most {reply:,} in replies{paid}"


def told_of_cost(cost: Cost) -> str:
    """What answers took, for people.

    Examples
    --------
    >>> told_of_cost(Cost(5, 2, 900, 5, 5, 5, 0.25, 0.1))
    '2 requests now, 3 answers found in the journal; 900 tokens in prompts and 5 in replies as the server counted them; 0.25 in all, 0.1 of it now'
    >>> told_of_cost(Cost(5, 5, 900, seconds=12.0))
    '5 prompts put to the LLM on this machine now, 0 found in the cache; about 900 tokens in all prompts; 12 s now'
    """
    there = cost.prompts - cost.sent
    if cost.seconds is not None:
        return (
            f"{cost.sent:,} prompts put to the LLM on this machine now, {there:,} found in the cache; "
            f"about {cost.prompt_tokens:,} tokens in all prompts; {cost.seconds:.0f} s now"
        )
    counted = f"as the server counted {cost.counted:,} of {cost.replies:,}, the rest estimated"
    if cost.counted in (0, cost.replies):
        counted = "as the server counted them" if cost.counted else "by our estimate"
    money = (
        "" if cost.money is None else f"; {cost.money:,.4g} in all, {cost.money_now:,.4g} of it now"
    )
    return (
        f"{cost.sent:,} requests now, {there:,} answers found in the journal; "
        f"{cost.prompt_tokens:,} tokens in prompts and {cost.reply_tokens:,} in replies {counted}{money}"
    )
