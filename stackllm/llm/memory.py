"""When memory runs out: which errors say so, and reading with less of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from stackllm.errors import StorageError
from stackllm.llm.prompts import Prompt

Read = TypeVar("Read")


def is_out_of_memory(error: BaseException) -> bool:
    """Does this error of torch say that a GPU or the machine has no memory left?"""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def within_memory(prompts: list[Prompt], budget: int, read: Callable[[int], Read]) -> Read:
    """What ``read`` gives for a budget of tokens; for half of it, and so on, where memory runs out.

    Parameters
    ----------
    prompts
        What is read.
    budget
        Most tokens of a pass.
    read
        Reads all of it with passes of so many tokens, or of a single text.

    Raises
    ------
    StorageError
        If memory does not even hold one text.
    """
    longest = max(
        len(prompt.prefix) + len(ids) for prompt in prompts for ids in prompt.responses or [[]]
    )
    while True:
        try:
            return read(budget)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if budget == 1:
                raise StorageError(
                    f"out of memory with one text at a time, the longest of {longest} tokens. Lower the most "
                    "tokens that are read of a text, or take a smaller backbone or precision."
                ) from error
            budget //= 2
