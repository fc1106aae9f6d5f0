"""What an LLM is given to read: question and response as token ids, each cut to its own length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Len

from stackllm.errors import UsageError
from stackllm.parameters import TokenCount, check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Keep = Literal["head", "tail", "both"]
Text = Annotated[str, Len(0, 100_000)]


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

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, **plainly).input_ids)

    if closed:
        opener, closer = special_ends(tokenizer)
    else:
        opener = [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]
        closer = []
    head = [*opener, *(ids_of(params.instruction) if params.instruction else [])]
    head += ids_of(params.before_question)
    middle = params.before_answer.rstrip(" ")
    opening = params.before_answer[len(middle) :]  # a space belongs to the word that follows it
    tail = ids_of(middle)
    prompts: list[Prompt] = []
    last = None
    for question, response in rows:
        if question != last:
            shown = cut(ids_of(question), params.max_length_prompt, params.keep_prompt)
            prompts.append(Prompt([*head, *shown, *tail], []))
            if not prompts[-1].prefix:
                raise UsageError(
                    "an answer to an empty question has nothing in front of it. Set before_question or "
                    "before_answer."
                )
            last = question
        rest = params.max_length - len(prompts[-1].prefix) - len(closer)
        room = min(params.max_length_answer, rest)
        if room < 1:
            raise UsageError(
                f"max_length {params.max_length} leaves no room for an answer after a question of "
                f"{len(prompts[-1].prefix)} tokens. Raise it or lower max_length_prompt."
            )
        if params.keep_answer == "head":
            response = response[: 16 * room]  # spares tokenising what is cut anyway
        ids = ids_of(opening + response) if response else []
        prompts[-1].responses.append(cut(ids, room, params.keep_answer) + closer)
    return prompts
