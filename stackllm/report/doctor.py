"""What a machine has and what stackllm would use of it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stackllm import __version__
from stackllm.errors import StackllmError
from stackllm.finetune.dataset import TrainingParams
from stackllm.finetune.memory import training_needs
from stackllm.finetune.model import LoraParams
from stackllm.llm.digests import cache_folder
from stackllm.llm.estimate import Sizes, reading_bytes, room, shown, sizes_of
from stackllm.llm.locate import find_backbone, is_ready
from stackllm.llm.machine import choose_dtype, free_memories, free_memory, gpus
from stackllm.llm.prompts import PromptParams
from stackllm.recipes.loader import find_asked, find_recipes

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "flash-attn",
    "lightgbm",
    "polars",
    "scikit-learn",
    "scipy",
    "numpy",
    "joblib",
    "click",
)

PASS_TOKENS = 1_024
"""Tokens of a pass for which memory is estimated. Those that begin larger become smaller where need be."""

PURPOSES: dict[str, Callable[[Sizes, str], int]] = {
    "read": lambda sizes, precision: reading_bytes(sizes, precision, PASS_TOKENS),
    # adapters on all layers, the least that a training can do with: one row per pass, layers computed twice
    "fine-tune": lambda sizes, precision: training_needs(
        sizes, precision, LoraParams(), TrainingParams(), PromptParams().max_length
    ).of(1, True),
}
"""What a backbone can be used for, and how many bytes that needs, by its sizes and a precision."""


def examine(backbone: str) -> dict[str, str]:
    """Versions, cores, GPUs, precision and its reason, backbone and where it fits, recipes, free disk.

    Parameters
    ----------
    backbone
        Name of the frozen LLM to look for.
    """
    from joblib import cpu_count

    dtype, reason = choose_dtype("auto")
    return {
        "stackllm": __version__,
        "python": platform.python_version(),
        **versions(),
        "cores": str(cpu_count()),
        "cuda": _cuda(),
        **_gpus(),
        "precision": f"{dtype} ({reason})",
        f"backbone {backbone}": _outcome(lambda: find_backbone(backbone)),
        **_fitting(backbone),
        "recipes": _outcome(lambda: ", ".join(recipe.block for recipe in find_recipes())),
        "recipes that ask an LLM, if turned on": _outcome(lambda: ", ".join(find_asked())),
        "cache": str(cache_folder()),
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB",
    }


def _cuda() -> str:
    """What torch was built for, and what the driver is good for."""
    import torch

    built = torch.version.cuda or torch.version.hip
    if not built:
        return "this torch is built for CPUs only"
    driver = torch._C._cuda_getDriverVersion() if torch.version.cuda else 0
    newest = (
        f"; the driver is good for up to {driver // 1000}.{driver % 1000 // 10}" if driver else ""
    )
    return f"{built}{newest}"


def _gpus() -> dict[str, str]:
    """A line per GPU."""
    import torch

    built = torch.cuda.get_arch_list()
    lines = {}
    for number, (gpu, free) in enumerate(zip(gpus(), free_memories(), strict=True)):
        major, minor = gpu.capability
        known = "" if free is None else f", {shown(free)} free"
        halves = "bfloat16" if gpu.has_bfloat16 else "float16, as bfloat16 is only emulated"
        runs = "" if has_kernels(gpu.capability, built) else (
            ". This torch has no kernels for it: install one that is built for an older CUDA"
        )  # fmt: skip
        lines[f"gpu {number}"] = (
            f"{gpu.name}, {shown(gpu.memory)}{known}, capability {major}.{minor}: {halves}{runs}"
        )
    return lines or {"gpu": "none"}


def has_kernels(capability: tuple[int, int], built: list[str]) -> bool:
    """Does a torch that was built for some architectures run on a GPU? An empty list does not tell.

    Machine code runs on its own generation from its number on, and what is compiled on the spot
    (``compute_``) on all later ones.

    Examples
    --------
    >>> has_kernels((7, 0), ["sm_75", "sm_80"]), has_kernels((8, 6), ["sm_75", "sm_80"])
    (False, True)
    >>> has_kernels((12, 0), ["sm_80", "compute_90"]), has_kernels((7, 5), [])
    (True, True)
    """
    number = 10 * capability[0] + capability[1]
    for name in built:
        kind, _, digits = name.partition("_")
        made = int("".join(it for it in digits if it.isdigit()) or 0)
        same = made // 10 == capability[0] or kind == "compute"
        if same and made <= number:
            return True
    return not built


def _fitting(backbone: str) -> dict[str, str]:
    """Of a backbone in each precision, the smallest first: what it needs, and where that fits."""
    halves = "float16" if choose_dtype("auto")[0] == "float16" else "bfloat16"
    try:
        if not is_ready(backbone):
            return {
                "memory that it needs": "not known before its configuration is here: fetch it once, "
                "or give a folder"
            }
        sizes = sizes_of(backbone)
    except StackllmError as error:
        return {"memory that it needs": f"not known: {error}"}
    lines = {"parameters": f"{sizes.parameters / 1e6:,.0f} million"}
    for precision in ("nf4", "int8", halves, "float32"):
        told = (
            f"{purpose} {shown(needs)}, fits {_where(needs)}"
            for purpose, needs in ((it, count(sizes, precision)) for it, count in PURPOSES.items())
        )
        lines[f"in {precision}"] = "; ".join(told)
    return lines


def _where(needs: int) -> str:
    """The GPUs that have so many bytes, or the machine."""
    seen = gpus()
    if not seen:
        return f"{'' if needs < free_memory() else 'not '}into this machine's memory"
    rooms = [
        room(gpu) if free is None else min(room(gpu), free)
        for gpu, free in zip(seen, free_memories(), strict=True)
    ]
    fitting = [number for number, free in enumerate(rooms) if needs <= free]
    if fitting:
        names = dict.fromkeys(seen[number].name for number in fitting)
        return f"on {', '.join(names)}"
    if len(seen) > 1 and needs <= sum(rooms):
        return 'on all GPUs together, with devices = "all"'
    return "on no GPU here"


def versions() -> dict[str, str]:
    """Versions of the packages that decide numbers and speed, by name, those that are not here included."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _outcome(look: Callable[[], object]) -> str:
    try:
        return str(look())
    except StackllmError as error:
        return f"NOT FOUND: {error}"
