"""What this machine computes with: its GPUs, where tensors go, and in which precision.

All of stackllm asks here what GPUs there are, so that one place can be told otherwise: the tests'
``pretend_gpus`` replaces what :func:`gpus` sees. Where tensors really go is a question of its own
(:func:`device`): with GPUs that are only pretended it stays the CPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

Precision = Literal[
    "auto", "float32", "bfloat16", "float16", "int8", "nf4",
    "int8-float32", "int8-bfloat16", "int8-float16", "nf4-float32", "nf4-bfloat16", "nf4-float16",
]  # fmt: skip
"""Of weights; packed ones may say what they are computed in, which else the machine says."""

QUANTISED = ("int8", "nf4")
"""Precisions of weights that bitsandbytes packs and computes with in another."""

NATIVE_BFLOAT16 = (8, 0)
"""The least compute capability, Ampere's, with bfloat16 in hardware; torch emulates it on older ones."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use.

    Parameters
    ----------
    name
        As its maker calls it.
    memory
        All its memory, in bytes.
    capability
        CUDA's compute capability, such as ``(7, 5)`` for a T4 and ``(9, 0)`` for an H100.
    uuid
        Tells it from others of its name, whatever number it has in a process; empty if not known.
    """

    name: str
    memory: int
    capability: tuple[int, int]
    uuid: str = ""

    @property
    def has_bfloat16(self) -> bool:
        """Does it multiply in bfloat16, rather than emulate that many times slower?"""
        return self.capability >= NATIVE_BFLOAT16


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process may use, in torch's order; empty on a machine without."""
    return _visible()


def _visible() -> tuple[Gpu, ...]:
    """What torch sees. Not remembered: a process may be given fewer GPUs while it lives."""
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(_seen(number) for number in range(torch.cuda.device_count() or 1))


def _seen(number: int) -> Gpu:
    """A GPU of torch's. One that is busy or broken may be counted and yet not answer: it gets no bfloat16."""
    from torch import cuda

    properties = _told(lambda: cuda.get_device_properties(number), None)
    return Gpu(
        _told(lambda: cuda.get_device_name(number), f"GPU {number}"),
        getattr(properties, "total_memory", 0),
        _told(lambda: cuda.get_device_capability(number), (0, 0)),
        str(getattr(properties, "uuid", "")),
    )


def _told(ask: Callable[[], T], otherwise: T) -> T:
    """What CUDA answers; ``otherwise`` where it cannot be started."""
    try:
        return ask()
    except (RuntimeError, AssertionError):  # the latter of a torch that was built without
        return otherwise


def device() -> torch.device:
    """Where this process's tensors go: the GPU that is meant for it, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def free_memory() -> int:
    """Bytes that are free on :func:`device`, other programs' use counted."""
    place = device()
    if place.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(place)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def free_memories() -> tuple[int | None, ...]:
    """Bytes that are free on each of :func:`gpus`; None where nobody can be asked."""
    import torch

    if not torch.cuda.is_available():
        return (None,) * len(gpus())
    return tuple(_told(functools.partial(_free, number), None) for number in range(len(gpus())))


def _free(number: int) -> int:
    import torch

    return int(torch.cuda.mem_get_info(number)[0])


def choose_dtype(dtype: Precision) -> tuple[str, str]:
    """The precision to load weights in, and why.

    GPUs without bfloat16 get float16. That holds for those before Volta too, such as the P100 and
    the GTX 1080, some of which add and multiply halves at a 64th of their speed: torch asks cuBLAS for
    products that are summed up in float32, and its own kernels compute in float32 as well, so halves are
    only how numbers are *stored*, at half the memory and traffic. Of several GPUs that differ, all take
    what each of them can do: stored numbers must not depend on which of them a unit came to.

    Parameters
    ----------
    dtype
        ``"auto"`` looks at the machine; anything else is taken as it is, but that packed weights get a
        word of what they are computed in, which decides numbers as well.

    Returns
    -------
    tuple[str, str]
        The precision, and the reason for the user to read.

    Examples
    --------
    >>> choose_dtype("float16")[0], choose_dtype("nf4-float32")[0]
    ('float16', 'nf4-float32')
    >>> choose_dtype("nf4")[0].partition("-")[0]
    'nf4'
    """
    if dtype in QUANTISED:
        return f"{dtype}-{compute_dtype(dtype)}", "asked for"
    if dtype != "auto":
        return dtype, "asked for"
    seen = gpus()
    without = [gpu.name for gpu in seen if not gpu.has_bfloat16]
    if without:
        return "float16", f"{without[0]} has no bfloat16 in hardware"
    if seen:
        return "bfloat16", f"{seen[0].name} computes in bfloat16"
    if _cpu_has_bfloat16():
        return "bfloat16", "the CPU multiplies in bfloat16 (AVX512-BF16 or AMX)"
    return "float32", "the CPU has no bfloat16 matrix product"


def packing(precision: str) -> str:
    """How weights of a precision are stored: that of ``"nf4-float16"`` is ``"nf4"``."""
    return precision.partition("-")[0]


def compute_dtype(precision: str) -> str:
    """The type that weights of a precision, not ``"auto"``, are computed in, as torch names it."""
    packed, _, computed = precision.partition("-")
    return computed or choose_dtype("auto")[0] if packed in QUANTISED else precision


def pass_tokens(on_gpu: int, on_cpu: int = 1_024) -> int:
    """Tokens of a pass: a GPU wants many at once to be busy, a processor few that its cache holds."""
    return on_gpu if gpus() else on_cpu


@contextlib.contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """Multiply float32 matrices as weights of a precision deserve it.

    Beside weights in half precision the float32 products (of LoRA's adapters, of heads) may be rounded
    to TensorFloat-32: its 10 bits of mantissa are float16's, and more than bfloat16's 7. Who asks for
    ``"float32"`` wants float32, though GPUs since Ampere would be several times faster without. On a
    CPU, and on GPUs that have no such arithmetic, nothing changes.

    Parameters
    ----------
    precision
        Of the weights; ``"int8"`` and ``"nf4"`` count as what they are computed in.
    """
    import torch

    if device().type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    exact = compute_dtype(precision) == "float32"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def use_one_thread() -> None:
    """Compute on one thread, unless on a GPU: units get their parallelism from their fellows."""
    import torch

    if device().type == "cpu":
        torch.set_num_threads(1)


def _cpu_has_bfloat16() -> bool:
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)
