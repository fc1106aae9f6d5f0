"""The layers of a decoder LLM: counting them, and leaving out those below or above."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stackllm.errors import UsageError


@contextmanager
def lower_layers(model: Any, n_layers: int) -> Iterator[list[Any]]:
    """Leave out the layers from ``n_layers`` on; each pass appends the last layer's output."""
    owner, name, layers = layers_of(model)
    config = model.config.get_text_config()
    outputs: list[Any] = []

    def keep(_: Any, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hook = layers[n_layers - 1].register_forward_hook(keep)
    setattr(owner, name, layers[:n_layers])
    config.num_hidden_layers = n_layers
    try:
        yield outputs
    finally:
        setattr(owner, name, layers)
        config.num_hidden_layers = len(layers)
        hook.remove()


@contextmanager
def upper_layers(model: Any, n_layers: int | None) -> Iterator[None]:
    """Leave out all but the top ``n_layers`` (None: none); the model starts from the output of the others.

    Whatever a model does to its input embeddings (scaling, dropout) is passed by as well.
    """
    if n_layers is None:
        yield
        return
    owner, name, layers = layers_of(model)
    upper = layers[len(layers) - n_layers :]
    given: list[Any] = []
    inner = plain(model)
    body = getattr(inner, inner.base_model_prefix)

    def remember(_: Any, args: Any, kwargs: Any) -> None:
        given[:] = [kwargs["inputs_embeds"]]

    def replace(_: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return (given[0], *args[1:]), kwargs

    hooks = [
        body.register_forward_pre_hook(remember, with_kwargs=True),
        upper[0].register_forward_pre_hook(replace, with_kwargs=True),
    ]
    config = inner.config.get_text_config()
    whole = {"num_hidden_layers": len(layers)}
    shorter: dict[str, Any] = {"num_hidden_layers": n_layers}
    if getattr(config, "layer_types", None):  # sliding or full attention, looked up by place
        whole["layer_types"] = config.layer_types
        shorter["layer_types"] = config.layer_types[-n_layers:]
    setattr(owner, name, upper)
    _configure(config, shorter)
    try:
        yield
    finally:
        setattr(owner, name, layers)
        _configure(config, whole)
        for hook in hooks:
            hook.remove()


def _configure(config: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


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
