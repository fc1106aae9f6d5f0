"""stackllm: tell who wrote what, where several LLMs answered the same questions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "DataError",
    "Encoder",
    "GroupPosterior",
    "GroupStack",
    "LockedError",
    "MissingInputError",
    "ServerError",
    "StackLLM",
    "StackllmError",
    "StorageError",
    "TrainingError",
    "UsageError",
    "__version__",
    "assign",
    "compare",
    "group_folds",
    "metrics",
    "optimise",
    "posterior",
]

if TYPE_CHECKING:  # what type checkers and editors see; tests hold _HOME to it
    from stackllm import metrics
    from stackllm.crossfit.folds import group_folds
    from stackllm.errors import (
        BudgetError,
        DataError,
        LockedError,
        MissingInputError,
        ServerError,
        StackllmError,
        StorageError,
        TrainingError,
        UsageError,
    )
    from stackllm.estimator import StackLLM
    from stackllm.estimator import open_run as open  # noqa: F401 - a star must not bring it
    from stackllm.group.assignment import assign
    from stackllm.group.estimator import GroupPosterior
    from stackllm.group.optimise import optimise
    from stackllm.group.posterior import posterior
    from stackllm.llm.estimator import Encoder
    from stackllm.report.compare import compare
    from stackllm.stack.estimator import GroupStack
else:  # at run time each name is loaded when it is first asked for: importing stackllm costs nothing
    _HOME = {
        "Encoder": "stackllm.llm.estimator",
        "GroupPosterior": "stackllm.group.estimator",
        "GroupStack": "stackllm.stack.estimator",
        "StackLLM": "stackllm.estimator",
        "assign": "stackllm.group.assignment",
        "compare": "stackllm.report.compare",
        "group_folds": "stackllm.crossfit.folds",
        "open": "stackllm.estimator",
        "optimise": "stackllm.group.optimise",
        "posterior": "stackllm.group.posterior",
        **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "stackllm.errors"),
    }

    def __getattr__(name):  # noqa: ANN001, ANN202 - typed, it would tell type checkers that every name exists
        if name == "metrics":
            return importlib.import_module("stackllm.metrics")
        if name in _HOME:
            home = importlib.import_module(_HOME[name])
            value = globals()[name] = getattr(home, "open_run" if name == "open" else name)
            return value
        raise AttributeError(f"module 'stackllm' has no attribute {name!r}")

    def __dir__():  # noqa: ANN202
        return sorted([*__all__, "open"])  # a star must not take Python's own open away
