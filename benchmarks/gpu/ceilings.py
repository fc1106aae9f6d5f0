"""What the device does at best: matrix products in each type, copies on it and to it."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.measure import seconds
from benchmarks.gpu.models import device

TYPES = ("bfloat16", "float16", "float32")


def ceilings(bench: Bench) -> dict[str, Any]:
    """TFLOP/s of a square product by type, float32's with TF32 too, and GB/s of copies."""
    import torch

    on_gpu = device() == "cuda"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    for name in TYPES:
        if on_gpu or name != "float16":
            result[f"{name}_tflops"] = _product(bench, getattr(torch, name)) / 1e12
    bench.rate = 1e12 * result["bfloat16_tflops"]
    if not on_gpu:
        return result
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    result["tf32_tflops"] = _product(bench, torch.float32) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = before
    properties = torch.cuda.get_device_properties(0)
    result |= {
        "memory_gib": properties.total_memory / 2**30,
        "capability": [properties.major, properties.minor],
    }
    return result | _copies(bench)


def _product(bench: Bench, dtype: Any) -> float:
    """Operations a second of a large matrix product; random, as zeros cost a GPU less power."""
    import torch

    n = 128 if bench.tiny else 8192
    a, b = (torch.randn(n, n, device=device()).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, bench.repeats)


def _copies(bench: Bench) -> dict[str, float]:
    """GB/s on the GPU, bytes read and written, and from memory of both kinds to the GPU."""
    import torch

    size = 2**28
    here, there = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    pageable = torch.empty(size, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    taken = {
        "copy_gb_s": seconds(lambda: here.copy_(there), bench.repeats) / 2,
        "pageable_gb_s": seconds(lambda: here.copy_(pageable), bench.repeats),
        "pinned_gb_s": seconds(lambda: here.copy_(pinned), bench.repeats),
    }
    return {name: size / it / 1e9 for name, it in taken.items()}
