"""Which types of models are read and trained right, and how much of the reading their rows may share.

Every type that transformers generates text with was compared with transformers itself, one row at a
time: ``make families`` writes what came out into families.json here and docs/families.md. A type
that is not in there is newer; it is read one row at a time, which is slow, and right for any model.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stackllm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LISTED = Path(__file__).with_name("families.json")

Level = Literal["shared", "front", "whole", "alone"]
"""What rows share, the most first: what they begin with, and shorter beginnings are padded wherever that is
handy; the same, but padding may stand in front of all else only, for a layer that is no attention would take it
for text; nothing, but they are read side by side, padded at their ends; not even that."""

_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
_NO_ATTENTION = {"linear_attention", "conv"}


@dataclass(frozen=True)
class Family:
    """What is known of a type of models; by default, of one that nobody has tried.

    Parameters
    ----------
    level
        How its rows are read.
    pools
        Do its layers hand on one state of each token?
    classifies
        Can it have a classifier of ours, where transformers has none?
    trunk
        Can its upper layers be trained from the cached output of the lower ones?
    refused
        Why it is not read at all; empty if it is.
    """

    level: Level = "alone"
    pools: bool = True
    classifies: bool = False
    trunk: bool = False
    refused: str = ""


@functools.cache
def families() -> dict[str, Family]:
    """What is known, by the type's name in config.json."""
    listed = json.loads(LISTED.read_text(encoding="utf-8"))
    return {name: Family(**values) for name, values in listed.items()}


def family_of(config: PretrainedConfig) -> Family:
    """What is known of a model's type."""
    return families().get(config.model_type, Family())


def level_of(model: PreTrainedModel) -> Level:
    """How rows are read with a model."""
    level = family_of(model.config).level
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    if level in ("shared", "front") and layers and layers <= _NO_ATTENTION:
        return "whole"  # a layer of attention counts for all what has been read
    return level


def window_of(model: PreTrainedModel) -> float:
    """How many places back the model's narrowest layer looks; infinite if all of them look at everything."""
    config: Any = model.config.get_text_config()
    stated = (getattr(config, name, None) for name in _WINDOWS)
    return min((it for it in stated if isinstance(it, int) and it > 0), default=math.inf)


def check_reads(backbone: str, config: PretrainedConfig) -> None:
    """Refuse to read with a model of a type that is known not to be read right.

    Raises
    ------
    UsageError
        With the reason.
    """
    reason = family_of(config).refused
    if reason and not getattr(config, "is_decoder", False):
        raise UsageError(
            f'backbone "{backbone}" is of type {config.model_type}, which {reason}. Choose a decoder LLM, such as '
            "one of the types Llama, Qwen, Gemma or Mistral."
        )


def check_pools(backbone: str, config: PretrainedConfig) -> None:
    """Refuse to pool layers of a model whose layers do not hand on one state of each token.

    Raises
    ------
    UsageError
        With its type.
    """
    if not family_of(config).pools:
        raise UsageError(
            f'backbone "{backbone}" is of type {config.model_type}, whose layers do not hand on one state of each '
            "token, so that there is none to pool. Choose another backbone for the encoder; the rater can ask this one."
        )
