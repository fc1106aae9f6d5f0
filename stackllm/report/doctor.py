"""What a machine has and what stackllm would use of it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stackllm import __version__
from stackllm.errors import StackllmError
from stackllm.llm.digests import cache_folder
from stackllm.llm.locate import find_backbone
from stackllm.llm.machine import choose_dtype, gpus
from stackllm.recipes.loader import find_asked, find_recipes

PACKAGES = (
    "torch",
    "transformers",
    "lightgbm",
    "polars",
    "scikit-learn",
    "scipy",
    "numpy",
    "joblib",
    "click",
)


def examine(backbone: str) -> dict[str, str]:
    """Versions, cores, GPU, precision and its reason, backbone, recipes, free disk.

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
        **{name: _version(name) for name in PACKAGES},
        "cores": str(cpu_count()),
        "gpu": ", ".join(gpu.name for gpu in gpus()) or "none",
        "precision": f"{dtype} ({reason})",
        f"backbone {backbone}": _outcome(lambda: find_backbone(backbone)),
        "recipes": _outcome(lambda: ", ".join(recipe.block for recipe in find_recipes())),
        "recipes that ask an LLM, if turned on": _outcome(lambda: ", ".join(find_asked())),
        "cache": str(cache_folder()),
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB",
    }


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
