"""What a classifier of transformers is made of: its body, its layers, and the head behind them.

Two kinds are told apart by what stands in the model. A *decoder* has a single linear layer, ``score``, that
reads the last real token; it can start from the cached output of its lower layers. All others (encoders,
encoder-decoders) pool in a way of their own, so that only their own forward pass gives logits.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stackllm.errors import UsageError
from stackllm.llm.backbone import load_skeleton
from stackllm.llm.families import family_of
from stackllm.llm.layers import goes_on_from_states, plain
from stackllm.llm.locate import is_ready, revision_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Structure:
    """What a backbone can do as a classifier, known without its weights.

    Parameters
    ----------
    reads_last_token
        Is it a decoder?
    goes_on_from_states
        Is it one that can train from a cached trunk?
    layers
        Names of its layers from the lowest, such as ``("deberta.encoder.layer.0", …)``; empty if they are no
        plain list, as where layers share weights.
    beside
        Names of its linear layers that stand in no list of layers: the head, poolers, projections.
    pools_last_place
        Does it take the last place of a sequence, padding or not? Then padding has to stand in front.
    """

    reads_last_token: bool
    goes_on_from_states: bool
    layers: tuple[str, ...]
    beside: tuple[str, ...]
    pools_last_place: bool


def structure_of(backbone: str) -> Structure:
    """What a backbone can do as a classifier.

    Raises
    ------
    MissingInputError, UsageError
        If its configuration cannot be read, or there is no such classifier.
    """
    return _structure(backbone, revision_of(backbone))


def may_start_from_trunk(backbone: str) -> bool:
    """Can a backbone train from a cached trunk, as far as that can be told without fetching or converting it?

    Where it cannot, whoever goes on to load it learns why.
    """
    return not is_ready(backbone) or structure_of(backbone).goes_on_from_states


def may_read_last_token(backbone: str) -> bool:
    """Is a backbone a decoder, as far as that can be told likewise?"""
    return not is_ready(backbone) or structure_of(backbone).reads_last_token


@functools.lru_cache(maxsize=16)
def _structure(backbone: str, revision: str) -> Structure:
    import torch

    model = load_skeleton(backbone)
    lists = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)
    ]
    beside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not any(name.startswith(f"{each}.") for each in lists)
    ]
    layers = tuple(_layers(model))
    missing = {"input_ids", "attention_mask"} - inspect.signature(model.forward).parameters.keys()
    if missing:  # padding would be read as text, or texts not at all
        raise UsageError(
            f'backbone "{backbone}": {type(model).__name__} takes no {" and no ".join(sorted(missing))}, so texts of '
            "unlike length cannot be read side by side. Take another backbone."
        )
    return Structure(
        reads_last_token(model),
        bool(layers) and may_start_from_states(model),
        layers,
        tuple(beside),
        getattr(model.config, "summary_type", None) == "last",  # XLNet and what follows it
    )


def reads_last_token(model: PreTrainedModel) -> bool:
    """Is it a decoder, with a single linear layer on the last real token?

    Every decoder of transformers calls that layer ``score``; what other models call so is no linear layer.
    """
    import torch

    score = getattr(plain(model), "score", None)
    return isinstance(getattr(score, "original_module", score), torch.nn.Linear)


def may_start_from_states(model: PreTrainedModel) -> bool:
    """Is it a decoder whose upper layers can be trained from the output of the lower ones?"""
    tried = family_of(model.config).trunk
    return tried and reads_last_token(model) and goes_on_from_states(model)


def head_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules with weights behind the body: what classifying adds to it."""
    body = model.base_model
    return [
        name
        for name, child in model.named_children()
        if child is not body and any(True for _ in child.parameters())
    ]


def trained_copy(module: nn.Module) -> nn.Module:
    """The copy that is trained and saved, of a module that ``peft`` keeps twice; else the module."""
    copies = getattr(module, "modules_to_save", None)
    return module if copies is None else copies["default"]


def last_linear(model: PreTrainedModel) -> nn.Linear | None:
    """The linear layer that gives the logits; None if the head ends otherwise."""
    import torch

    inner = plain(model)
    layers = [
        module
        for name in head_names(inner)
        for module in trained_copy(inner.get_submodule(name)).modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == inner.config.num_labels
    ]
    return layers[-1] if layers else None


def _layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers, if exactly one list in the body is of as many as the configuration says."""
    import torch

    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return []
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == getattr(config, "num_hidden_layers", None)
    ]
    if len(lists) != 1 and not reads_last_token(model):
        return []
    return [f"{lists[0]}.{number}" for number in range(config.num_hidden_layers)] if lists else []
