"""When memory runs out: which errors say so, and reading with less of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from stackllm.errors import StorageError

Read = TypeVar("Read")


def is_out_of_memory(error: BaseException) -> bool:
    """Does this error of torch say that a GPU or the machine has no memory left?"""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def within_memory(longest: int, most: int, read: Callable[[int], Read]) -> Read:
    """What ``read`` gives for passes of so much; for half as much, and so on, where memory runs out.

    Parameters
    ----------
    longest
        Tokens of the longest text, for the sentence that says that nothing helps.
    most
        Tokens or rows a pass at first.
    read
        Reads all of it with passes of so much, or of a single text.

    Raises
    ------
    StorageError
        If memory does not even hold one text.
    """
    while True:
        try:
            return read(most)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if most == 1:
                raise StorageError(
                    f"out of memory with one text at a time, the longest of {longest} tokens. Lower the most "
                    "tokens that are read of a text, or take a smaller backbone or precision."
                ) from error
        most //= 2  # outside of the handler, which keeps what the failed pass had in memory
