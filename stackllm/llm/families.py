"""Which families of models are read right, and how much of the reading their rows may share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Level = Literal["shared", "equal", "whole", "alone"]


def level_of(model: PreTrainedModel) -> Level:
    """How rows may be read side by side."""
    return "shared"


_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")


def window_of(model: PreTrainedModel) -> float:
    """How many tokens back the model's narrowest layer looks, by their places; infinite if all."""
    config = model.config.get_text_config()
    stated = (getattr(config, name, None) for name in _WINDOWS)
    return min((it for it in stated if isinstance(it, int) and it > 0), default=math.inf)
