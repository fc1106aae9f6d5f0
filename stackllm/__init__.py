"""stackllm: tell who wrote what, where several LLMs answered the same questions."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTED = {
    "posterior": "stackllm.group.posterior",
    "assign": "stackllm.group.assignment",
    "optimise": "stackllm.group.optimise",
    "GroupPosterior": "stackllm.group.estimator",
}

__all__ = ["GroupPosterior", "__version__", "assign", "optimise", "posterior"]


def __getattr__(name: str) -> Any:
    """Load a public function when it is first asked for, so that importing stackllm costs nothing."""
    if name in _EXPORTED:
        return getattr(importlib.import_module(_EXPORTED[name]), name)
    raise AttributeError(f"module 'stackllm' has no attribute {name!r}")
