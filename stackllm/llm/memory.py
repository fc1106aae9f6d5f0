"""When memory runs out: which errors say so, what is to be said of it, and reading with less of it."""

from __future__ import annotations

import errno
import gc
import sys
import traceback
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from stackllm.errors import StackllmError, StorageError
from stackllm.llm.machine import device, free_memory, gpus

Result = TypeVar("Result")

_WORDS = (
    "out of memory",  # torch's allocators, CUDA itself, and what bitsandbytes passes on of it
    "_status_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE
    "cudaerrormemoryallocation",
    "can't allocate memory",  # torch's allocator for the CPU
    "cannot allocate memory",  # the system, of mapped files too
    "not enough memory",  # the same on Windows, and oneMKL
    "unable to allocate",  # numpy
    "bad_alloc",
    "memory allocation of",  # Rust: tokenizers, safetensors
    "dispatched on the cpu or the disk",  # transformers' plan for too few or too small GPUs
    "offloaded to the disk",
)
_PERHAPS = (
    "_status_not_initialized",
    "cudnn_status_internal_error",
    "cublas_status_internal_error",
    "cublaslt ran into an error",  # bitsandbytes' int8
    "unable to find an engine to execute",
)
"""What CUDA's libraries say when a handle or a workspace finds no memory, and of other troubles too."""
_TIGHT = 2**29
"""Free bytes below which such words are taken to be about memory: handles and kernels take some 300 MiB."""

_fitting: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()
"""Per model, what fitted where more did not: the next shard need not find that out again."""


def is_out_of_memory(error: BaseException) -> bool:
    """Does this error of a library say that a GPU or the machine has no memory left?

    Examples
    --------
    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling …"))
    True
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, StackllmError):  # a sentence already: nothing is to be tried again
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error):
        return True
    said = str(error).lower()
    if any(words in said for words in _WORDS):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    perhaps = any(words in said for words in _PERHAPS)
    return perhaps and device().type == "cuda" and free_memory() < _TIGHT


def let_go(error: BaseException) -> None:
    """Free what a failed pass or loading still holds: an error keeps its frames, and these their tensors."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def does_not_fit(name: str, kind: str, precision: str) -> StorageError:
    """That a backbone is too large for this machine: what it needs, what is there, and what would fit.

    Parameters
    ----------
    name, kind, precision
        As for :func:`~stackllm.llm.backbone.load_model`.
    """
    from stackllm.llm.estimate import shown, sizes_of
    from stackllm.llm.machine import QUANTISED, choose_dtype

    free = free_memory()
    seen = gpus()
    where = f"{seen[0].name} has {shown(seen[0].memory)}" if seen else "this machine's memory has"
    has = f"{where}, {shown(free)} of them free" if seen else f"{where} {shown(free)} free"
    try:
        sizes = sizes_of(name, kind)
    except StackllmError:  # its weights are what was asked for, not its shape
        return StorageError(
            f'backbone "{name}": out of memory while it was loaded in {precision}; {has}.'
        )
    needs = {it: sizes.weights(it) for it in (precision, choose_dtype("auto")[0], *QUANTISED)}
    smaller = [it for it in needs if needs[it] < min(free, needs[precision])]
    ways = [f'precision "{it}" ({shown(needs[it])})' for it in smaller]
    ways += ['devices = "all"'] if len(seen) > 1 else []
    ways += ["a smaller backbone"]
    return StorageError(
        f'backbone "{name}": out of memory while it was loaded. In {precision} its weights take '
        f"{shown(needs[precision])}; {has}. Free some, or take {', or '.join(ways)}."
    )


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
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            let_go(error)  # whoever reports it may keep the error for long
            if size <= least:
                raise StorageError(f"out of memory with {advice}") from error
        size = max(size // 2, least)


def within_memory(
    longest: int, most: int, read: Callable[[int], Result], model: object = None
) -> Result:
    """What ``read`` gives for passes of so much; for half as much, and so on, where memory runs out.

    Parameters
    ----------
    longest
        Tokens of the longest text, for the sentence that says that nothing helps.
    most
        Tokens or rows per pass at first.
    read
        Reads all of it with passes of so much, or of a single text.
    model
        Who reads. Where less than ``most`` fitted it once, that is where it begins from then on.

    Raises
    ------
    StorageError
        If memory does not even hold one text.
    """
    remembered = {} if model is None else _fitting.setdefault(model, {})

    def attempt(size: int) -> Result:
        result = read(size)
        remembered[most] = size
        return result

    return halving(
        remembered.get(most, most),
        attempt,
        f"one text at a time, the longest of {longest} tokens. Lower the most "
        "tokens that are read of a text, or take a smaller backbone or precision.",
    )
