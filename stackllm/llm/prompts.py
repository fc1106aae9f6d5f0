"""What an LLM is given to read: question and response as token ids, each cut to its own length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Len

from stackllm.errors import UsageError
from stackllm.parameters import TokenCount, check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Keep = Literal["head", "tail", "both"]
Text = Annotated[str, Len(0, 100_000)]

_CALL = 512
"""Texts that a tokenizer is given in a call."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of texts that begin alike: of one group, the question once, and each of its responses.

    Parameters
    ----------
    prefix
        Token ids of what they have in common.
    responses
        How each goes on.
    """

    prefix: list[int]
    responses: list[list[int]]


@dataclass(frozen=True)
class PromptParams:
    """How question and response become one sequence.

    Parameters
    ----------
    instruction
        Text in front of everything.
    before_question, before_answer
        Text before the question and between question and answer.
    max_length_prompt, max_length_answer
        Most tokens of the question and of the answer, each cut on its own.
    max_length
        Most tokens altogether; what is too much is taken off the answer.
    keep_prompt, keep_answer
        What stays of a text that is cut: its ``head``, its ``tail``, or half of ``both``.
    """

    instruction: Text = ""
    before_question: Text = "Question: "
    before_answer: Text = "; Answer: "
    max_length_prompt: TokenCount = 96
    max_length_answer: TokenCount = 256
    max_length: TokenCount = 512
    keep_prompt: Keep = "both"
    keep_answer: Keep = "head"

    def __post_init__(self) -> None:
        check(self)


def cut(ids: list[int], most: int, keep: Keep) -> list[int]:
    """At most ``most`` tokens: the first, the last, or the first half and the last half.

    Examples
    --------
    >>> cut([1, 2, 3, 4, 5], 3, "both"), cut([1, 2, 3], 2, "tail"), cut([1], 4, "head")
    ([1, 2, 5], [2, 3], [1])
    """
    if len(ids) <= most:
        return ids
    last = {"head": 0, "tail": most, "both": most // 2}[keep]
    return ids[: most - last] + ids[len(ids) - last :]


def longest(prompts: list[Prompt]) -> int:
    """Tokens of the longest text.

    Examples
    --------
    >>> longest([Prompt([1, 2], [[3], []]), Prompt([4], [])])
    3
    """
    return max(
        len(prompt.prefix) + len(ids) for prompt in prompts for ids in prompt.responses or [[]]
    )


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that a tokenizer puts in front of a text and behind it, such as ``[CLS]`` and ``[SEP]``."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = list(encoded.input_ids), list(encoded.special_tokens_mask)
    if 0 not in special:
        return ids, []
    first, last = special.index(0), len(ids) - special[::-1].index(0)
    return ids[:first], ids[last:]


def make_prompts(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[tuple[str, str]],
    params: PromptParams,
    closed: bool = False,
) -> list[Prompt]:
    """Prompts of consecutive ``(question, response)`` rows that share their question.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    rows
        Questions and responses.
    params
        Template and lengths.
    closed
        Begin and end each text as the tokenizer does, which encoders are used to. LLMs, which would
        write on, begin with their first token only.

    Raises
    ------
    UsageError
        If ``max_length`` leaves no room for an answer, or nothing stands in front of one.
    """

    # a text that spells out "[SEP]" must not end there for a model that pools where it ends
    plainly = {"split_special_tokens": True} if closed else {}

    def ids_of(texts: list[str]) -> list[list[int]]:
        # many in a call, for calls cost time, but not all: what a call keeps of a text is far more than ids
        calls = (texts[at : at + _CALL] for at in range(0, len(texts), _CALL))
        encoded = (tokenizer(call, add_special_tokens=False, **plainly).input_ids for call in calls)
        return [list(ids) for call in encoded for ids in call]

    if closed:
        opener, closer = special_ends(tokenizer)
    else:
        opener = [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]
        closer = []
    middle = params.before_answer.rstrip(" ")
    opening = params.before_answer[len(middle) :]  # a space belongs to the word that follows it
    instruction, before, tail = ids_of([params.instruction, params.before_question, middle])
    head = [*opener, *(instruction if params.instruction else []), *before]
    groups = [(question, list(them)) for question, them in groupby(rows, key=itemgetter(0))]
    prompts, rooms, texts = [], [], []
    for (_, group), ids in zip(groups, ids_of([question for question, _ in groups]), strict=True):
        prefix = [*head, *cut(ids, params.max_length_prompt, params.keep_prompt), *tail]
        if not prefix:
            raise UsageError(
                "an answer to an empty question has nothing in front of it. Set before_question or "
                "before_answer."
            )
        room = min(params.max_length_answer, params.max_length - len(prefix) - len(closer))
        if room < 1:
            raise UsageError(
                f"max_length {params.max_length} leaves no room for an answer after a question of "
                f"{len(prefix)} tokens. Raise it or lower max_length_prompt."
            )
        prompts.append(Prompt(prefix, []))
        rooms.append(room)
        # of a text that keeps its head, characters beyond what is cut anyway are not tokenised
        most = 16 * room if params.keep_answer == "head" else None
        texts += [response[:most] for _, response in group]
    # an empty response is no token, not even the opening's
    encoded = iter(ids_of([opening + text for text in texts if text]))
    answers = (next(encoded) if text else [] for text in texts)
    for prompt, room, (_, group) in zip(prompts, rooms, groups, strict=True):
        cuts = (cut(ids, room, params.keep_answer) for ids in islice(answers, len(group)))
        prompt.responses.extend(ids + closer for ids in cuts)
    return prompts
