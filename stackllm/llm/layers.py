"""The layers of a decoder LLM: counting them, and passing by those below or above.

A layer that is left out is replaced in its own place by a module without weights. So the others keep
their numbers, names and types, which models look up by place, and what is saved names them truly.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stackllm.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_OF_ALL_LAYERS = {
    "hidden_states", "hidden", "x", "activations", "attention_mask", "mamba_attention_mask", "conv_mask",
    "position_ids", "position_embeddings", "position_bias", "alibi", "past_key_values", "past_key_value",
    "layer_past", "cache_params", "cache_position", "use_cache", "head_mask", "encoder_hidden_states",
    "encoder_attention_mask", "output_attentions", "output_router_logits",
}  # fmt: skip
"""What layers are given that is the same for each of them, or comes from the layer below."""
_OF_SOME_MODELS = {
    "per_layer_input": "hidden_size_per_layer_input",
    "shared_kv_states": "num_kv_shared_layers",
}
"""What else they are given, where this number of the configuration is not 0."""


@dataclass
class Start:
    """Where a model without its lower layers begins: at their output.

    Parameters
    ----------
    states
        Of the pass that comes next, ``(n, longest, hidden)``.
    """

    states: Tensor | None = None


@contextmanager
def lower_layers(model: Any, n_layers: int) -> Iterator[list[Any]]:
    """Pass by the layers from ``n_layers`` on; each pass appends the last layer's output."""
    layers = layers_of(model)[2]
    outputs: list[Any] = []

    def keep(_: Any, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple | list) else output)

    hook = layers[n_layers - 1].register_forward_hook(keep)
    whole = list(layers)
    _pass_by(layers, range(n_layers, len(layers)))
    try:
        yield outputs
    finally:
        hook.remove()
        for number, layer in enumerate(whole):
            layers[number] = layer


def without_upper(model: Any, n_layers: int) -> None:
    """Take out the top ``n_layers`` and the vocabulary head, for good."""
    layers = layers_of(model)[2]
    _pass_by(layers, range(len(layers) - n_layers, len(layers)))
    head = model.get_output_embeddings()
    if head is not None and not _tied(model):
        model.set_output_embeddings(_place_holder(head))


def without_lower(model: Any, n_layers: int) -> None:
    """Take out all but the top ``n_layers``, and the embedding below them, for good.

    The model then goes on from ``model.start``. Whatever it does to its input embeddings (scaling,
    dropout, position embeddings) is passed by as well: that is in those states.
    """
    inner = plain(model)
    layers = layers_of(model)[2]
    first = len(layers) - n_layers
    inner.start = Start()
    _pass_by(layers, range(first), inner.start)
    embedding = inner.get_input_embeddings()
    if not _tied(inner):
        holder = _place_holder(embedding)
        holder.forward = functools.partial(_nothing, inner.start, embedding.embedding_dim)
        inner.set_input_embeddings(holder)


def _tied(model: Any) -> bool:
    """Are weights of the embedding somebody else's as well? Then they are kept, as they cost nothing more."""
    return bool(getattr(model, "all_tied_weights_keys", None))


def _pass_by(layers: Any, numbers: range, start: Start | None = None) -> None:
    """Let these layers hand on what they are given; the last of them what ``start`` says, if any."""
    import torch

    for number in numbers:
        layer = layers[number]
        if not isinstance(layer, torch.nn.Identity):  # else it is passed by already
            layers[number] = _place_holder(layer)
            of_start = start if number == numbers[-1] else None
            kind: Any = type(layer)
            layers[number].forward = functools.partial(_hand_on, _n_outputs(kind), of_start)


def _place_holder(module: Any) -> Any:
    """A module without weights that has another's plain attributes: models ask layers for their type."""
    import torch

    holder = torch.nn.Identity()
    of_all = vars(holder).keys()
    vars(holder).update({name: it for name, it in vars(module).items() if name not in of_all})
    return holder


def _hand_on(n_outputs: int, start: Start | None, *args: Any, **options: Any) -> Any:
    states = args[0] if args else options["hidden_states"]
    if start is not None:
        states = start.states
    return (states, *[None] * (n_outputs - 1)) if n_outputs else states


def _nothing(start: Start, width: int, ids: Tensor) -> Tensor:
    """Embeddings that nobody reads: models look at their shape and type alone."""
    assert start.states is not None
    return start.states.new_zeros((*ids.shape, width))


@functools.cache
def _n_outputs(kind: Any) -> int:
    """Of how many things the output of a kind of layer is a tuple; 0 if it is the states themselves.

    Models take apart what a layer gives, so what stands in its place has to give the same. Without a
    pass that is in the source alone: of some kinds the annotations are not true.
    """
    forward = inspect.unwrap(kind.forward)
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    values = [it.value for it in ast.walk(tree) if isinstance(it, ast.Return)]
    sizes = {
        len(it.elts) if isinstance(it, ast.Tuple) else int(ast.unparse(it).endswith("outputs"))
        for it in values
        if it is not None
    }
    return max(sizes)


def goes_on_from_states(model: Any) -> bool:
    """Do a decoder's layers need nothing that its lower layers know, but the states between them?

    Some read embeddings of their own, or keys and values of a lower layer (Gemma 3n, the small Gemma 4).
    """
    config = plain(model).config.get_text_config()
    given = {
        name
        for layer in layers_of(model)[2]
        for name, it in inspect.signature(layer.forward).parameters.items()
        if it.kind is it.POSITIONAL_OR_KEYWORD
    }
    special = given - _OF_ALL_LAYERS
    return special <= _OF_SOME_MODELS.keys() and not any(
        getattr(config, _OF_SOME_MODELS[name], 0) for name in special
    )


def check_layers(backbone: str, n_layers: int, n_trained: int | None) -> None:
    """Refuse to train more layers than there are above at least one frozen one.

    Raises
    ------
    UsageError
        With the numbers that make sense.
    """
    if n_trained is not None and n_trained >= n_layers:
        raise UsageError(
            f'backbone "{backbone}" has {n_layers} layers; trainable_layers must be 1 to '
            f'{n_layers - 1}, or "all".'
        )


def plain(model: Any) -> Any:
    """The transformers model that a ``peft`` model stands around, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def positions(model: Any) -> int | None:
    """Most tokens that a model has places for; None where positions have no end.

    A table of positions decides, less the places that RoBERTa and its kin leave to padding; then the
    configuration, unless positions are relative.
    """
    import torch

    inner = plain(model)
    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in inner.base_model.named_modules()
        if isinstance(module, torch.nn.Embedding) and name.endswith("position_embeddings")
    ]
    config = inner.config.get_text_config()
    if tables or getattr(config, "relative_attention", False):
        return min(tables, default=None)
    stated = getattr(config, "max_position_embeddings", None)
    return stated if stated and stated > 0 else None  # XLNet says -1


def count_layers(model: Any) -> int:
    """How many decoder layers a model has."""
    return len(layers_of(model)[2])


def layers_of(model: Any) -> tuple[Any, str, Any]:
    """The list of decoder layers, the module that owns it, and its name there."""
    import torch

    inner = plain(model)
    wanted = inner.config.get_text_config().num_hidden_layers
    # the decoder's first: beside it may stand layers as many that see or hear
    for owner in [*inner.get_decoder().modules(), *inner.modules()]:
        for name, child in owner.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == wanted:
                return owner, name, child
    raise UsageError("this model has no plain list of decoder layers; it is no decoder LLM.")
