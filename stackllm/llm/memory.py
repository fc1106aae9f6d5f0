"""When memory runs out: which errors say so, and reading with less of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from stackllm.errors import StorageError

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Does this error of torch say that a GPU or the machine has no memory left?"""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def halving(size: int, work: Callable[[int], Result], advice: str, least: int = 1) -> Result:
    """What ``work`` gives with ``size`` at a time; with half as many, and so on, where memory runs out.

    Parameters
    ----------
    size
        How many rows or tokens to begin with.
    work
        Does all that is left to do with so many at a time.
    advice
        What is to be said where even ``least`` at a time are too many.
    least
        A size that is not halved.

    Raises
    ------
    StorageError
        If memory does not even hold ``least``.
    """
    while True:
        try:
            return work(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size <= least:
                raise StorageError(f"out of memory with {advice}") from error
        # outside of the handler, which keeps the failed pass in memory
        size = max(size // 2, least)


def within_memory(longest: int, most: int, read: Callable[[int], Result]) -> Result:
    """What ``read`` gives for passes of so much; for half as much, and so on, where memory runs out.

    Parameters
    ----------
    longest
        Tokens of the longest text, for the sentence that says that nothing helps.
    most
        Tokens or rows per pass at first.
    read
        Reads all of it with passes of so much, or of a single text.

    Raises
    ------
    StorageError
        If memory does not even hold one text.
    """
    return halving(
        most,
        read,
        f"one text at a time, the longest of {longest} tokens. Lower the most "
        "tokens that are read of a text, or take a smaller backbone or precision.",
    )
