"""What came back of asking, from an LLM here and from a server alike."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Answers:
    """The answers to one question about every case.

    Parameters
    ----------
    probabilities
        float64 ``(n_cases, n_answers)``, rows sum to 1; a row of NaN where there is no valid answer.
    status
        For each case ``"ok"``, or why there is no answer.
    texts
        What was said, cut; for the LLM on this machine the likeliest answer. Empty where nothing came.
    models
        Who answered.
    prompts
        Digest of what was shown.
    measured
        Whether the probabilities were read from token scores: a text alone counts with probability 1.
    """

    probabilities: np.ndarray
    status: tuple[str, ...]
    texts: tuple[str, ...]
    models: tuple[str, ...]
    prompts: tuple[str, ...]
    measured: tuple[bool, ...]

    @property
    def failures(self) -> Counter[str]:
        """Why there is no answer, counted."""
        return Counter(status for status in self.status if status != "ok")


@dataclass(frozen=True)
class Cost:
    """What the answers to one recipe took.

    Parameters
    ----------
    prompts
        Prompts in all.
    sent
        How many of them were sent, or computed, just now; the others were there.
    prompt_tokens, reply_tokens
        Tokens of all prompts that were answered, and of their replies.
    replies, counted
        How many replies there are, and of how many the server told the tokens; those of the others are
        estimated, as they are for the LLM on this machine.
    money, money_now
        What all replies cost, and those of just now. None where nobody tells a price.
    seconds
        How long the LLM on this machine took just now. None for a server.
    """

    prompts: int = 0
    sent: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    replies: int = 0
    counted: int = 0
    money: float | None = None
    money_now: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Answered:
    """The answers to one recipe: an :class:`Answers` per question that it asks, and what they took."""

    questions: tuple[Answers, ...]
    cost: Cost
