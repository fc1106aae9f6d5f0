"""How much memory a language model is going to need, told from its configuration: no weight is read.

All sizes are of what is *allocated*: weights and what a pass holds at its widest. What the driver, the
libraries' workspaces and torch's fragments take beside that is left to :data:`RESERVE`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stackllm.errors import StackllmError
from stackllm.llm.backbone import CAUSAL, CLASSIFIER, load_skeleton
from stackllm.llm.layers import layers_of
from stackllm.llm.machine import Gpu, compute_dtype, packing
from stackllm.llm.vocabulary import SCORES_BYTES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

RESERVE = 3 * 2**28
"""Bytes of a GPU that no tensor gets: CUDA's context, kernels, workspaces of its libraries."""

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
_BLOCK = 64
"""Weights in a row that nf4 gives a common scale, a float32 (bitsandbytes' default, which we keep);"""
_TABLE = 64
"""and bytes of the table with its 16 values, of which every layer has one."""
_COPIES = 3
"""Of the scores that are in memory at once: as they are, their exponentials, and products of both."""


@dataclass(frozen=True)
class Matrix:
    """A linear layer that int8 and nf4 pack.

    Parameters
    ----------
    name
        As the model calls it.
    outputs, inputs
        Its shape.
    """

    name: str
    outputs: int
    inputs: int

    def n_bytes(self, precision: str) -> int:
        """Of its weights in a precision."""
        size = self.outputs * self.inputs
        if packing(precision) == "nf4":
            return math.ceil(size / 2) + 4 * math.ceil(size / _BLOCK) + _TABLE
        if packing(precision) == "int8":
            return size + 4 * self.outputs  # a scale per output
        return size * _WIDTH[precision]


@dataclass(frozen=True)
class Part:
    """What a part of a model consists of.

    Parameters
    ----------
    matrices
        Linear layers that can be packed.
    rest
        How many other weights it has: they stay in the precision that is computed in.
    """

    matrices: tuple[Matrix, ...] = ()
    rest: int = 0

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return self.rest + sum(it.outputs * it.inputs for it in self.matrices)

    def n_bytes(self, precision: str) -> int:
        """Of its weights in a precision that is not ``"auto"``."""
        return sum(it.n_bytes(precision) for it in self.matrices) + self.rest * width(precision)


@dataclass(frozen=True)
class Sizes:
    """How large a language model is.

    Parameters
    ----------
    layers
        Its layers, from the lowest.
    embeddings
        What turns tokens into vectors.
    head
        What turns the last layer's output into scores; nothing where it shares the embeddings' weights.
    beside
        All else, such as the last norm.
    hidden, vocabulary
        Numbers in a token's state, and tokens that it knows.
    cached
        Numbers that a layer keeps of a token that has been read: its keys and values.
    widest
        Numbers that a layer holds of a token at once while it computes.
    """

    layers: tuple[Part, ...]
    embeddings: Part
    head: Part
    beside: Part
    hidden: int
    vocabulary: int
    cached: int
    widest: int

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        parts = (*self.layers, self.embeddings, self.head, self.beside)
        return sum(part.parameters for part in parts)

    def weights(
        self,
        precision: str,
        layers: int | None = None,
        embeddings: bool = True,
        head: bool = True,
    ) -> int:
        """Bytes of the weights.

        Parameters
        ----------
        precision
            One that is not ``"auto"``.
        layers
            Only so many at the top; None: all of them.
        embeddings, head
            Whether these are loaded: what starts from states needs no embeddings, a classifier not
            the head of a language model.
        """
        parts = [self.beside, *(self.layers if layers is None else self.layers[-layers:])]
        tied = not self.head.parameters
        parts += [self.embeddings] * (embeddings or (head and tied)) + [self.head] * head
        return sum(part.n_bytes(precision) for part in parts)

    def cache(self, precision: str) -> int:
        """Bytes that reading a token leaves in memory: keys and values of all layers."""
        return len(self.layers) * self.cached * width(precision)

    def activations(self, precision: str) -> int:
        """Bytes that a token needs while a layer computes, without gradients."""
        return self.widest * width(precision)


def width(precision: str) -> int:
    """Bytes of a number that is computed with weights of a precision."""
    return _WIDTH[compute_dtype(precision)]


def reading_bytes(sizes: Sizes, precision: str, tokens: int, kept: int = 4) -> int:
    """Bytes that reading needs at most: weights and a pass.

    Parameters
    ----------
    sizes
        Of the backbone.
    precision
        Of its weights.
    tokens
        Of a pass. Each row also carries keys and values of the beginning that it goes on from, taken
        to be no longer than itself.
    kept
        How many layers' output is kept until the pass ends.
    """
    per_token = (
        2 * sizes.cache(precision)
        + sizes.activations(precision)
        + kept * sizes.hidden * width(precision)
    )
    scores = _COPIES * min(tokens * sizes.vocabulary * 4, SCORES_BYTES)
    return sizes.weights(precision) + tokens * per_token + scores


def room(gpu: Gpu) -> int:
    """Bytes of a GPU that tensors may take, if nobody else is on it."""
    return max(0, gpu.memory - RESERVE)


def shown(n_bytes: int) -> str:
    """Bytes to read.

    Examples
    --------
    >>> shown(15 * 2**30), shown(300 * 2**20)
    ('15.0 GiB', '0.3 GiB')
    """
    return f"{n_bytes / 2**30:.1f} GiB"


def sizes_of(name: str, kind: str = CAUSAL) -> Sizes:
    """How large a backbone is, from its configuration.

    Parameters
    ----------
    name
        As for :func:`~stackllm.llm.backbone.load_model`.
    kind
        The transformers class that is going to load it.

    Raises
    ------
    MissingInputError, UsageError
        If its configuration cannot be read, or is of no such model.
    """
    return sizes_of_skeleton(load_skeleton(name, kind))


@functools.cache
def count_parameters(name: str) -> int | None:
    """Weights of a backbone, its head included; None where its configuration can't be read."""
    for kind in (CAUSAL, CLASSIFIER):
        try:
            return sizes_of(name, kind).parameters
        except StackllmError:
            continue
    return None


def sizes_of_skeleton(model: PreTrainedModel) -> Sizes:
    """How large a model is whose weights need not be there (torch's device "meta")."""
    packed = _packable(model)
    parts: dict[int | str, tuple[list[Matrix], list[int]]] = {}
    part_of = _parts(model)
    seen = set()  # a weight that two modules share is one
    for name, module in model.named_modules():
        matrices, rest = parts.setdefault(part_of.get(id(module), "beside"), ([], []))
        for weight in module.parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            if id(module) in packed and weight.ndim == 2:
                matrices.append(Matrix(name, *packed[id(module)]))
            else:
                rest.append(weight.numel())
    made = {key: Part(tuple(matrices), sum(rest)) for key, (matrices, rest) in parts.items()}
    layers = tuple(made[key] for key in sorted(key for key in made if isinstance(key, int)))
    embeddings, head, beside = (made.get(key, Part()) for key in ("embeddings", "head", "beside"))
    config = model.config.get_text_config()
    hidden = config.hidden_size
    return Sizes(
        layers, embeddings, head, beside, hidden, config.vocab_size,
        _cached(config), _widest(config, layers or (beside,)),
    )  # fmt: skip


def _parts(model: PreTrainedModel) -> dict[int, int | str]:
    """Which part a module belongs to, by its ``id``: a layer's number, or a name."""
    from stackllm.errors import UsageError

    try:
        layers = list(layers_of(model)[2])
    except UsageError:  # some encoders share one layer's weights among all
        layers = []
    owners: list[tuple[int | str, Any]] = list(enumerate(layers))
    owners += [
        ("head", model.get_output_embeddings()),
        ("embeddings", model.get_input_embeddings()),
    ]
    return {
        id(module): part
        for part, owner in owners
        if owner is not None
        for module in owner.modules()
    }


def _packable(model: PreTrainedModel) -> dict[int, tuple[int, int]]:
    """Outputs and inputs of the linear layers that transformers lets bitsandbytes pack, by ``id``."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D  # what GPT-2 has for linear layers
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    left = get_keys_to_not_convert(model)
    shapes: dict[int, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if not should_convert_module(name, left):
            continue
        if type(module) is nn.Linear:
            shapes[id(module)] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            shapes[id(module)] = (outputs, inputs)
    return shapes


def _cached(config: PretrainedConfig) -> int:
    """Keys and values of a token and layer; of hybrids and of compressed ones rather too many."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:  # a state-space model: what it keeps does not grow
        return 0
    keys = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * int(keys) * int(size)


def _widest(config: PretrainedConfig, layers: tuple[Part, ...]) -> int:
    """What comes out of all linear layers of a layer, and what goes past them.

    Of a gated layer about that much is alive at once: its gate, its other half and their product.
    """
    experts = getattr(config, "num_experts_per_tok", None) or 0
    expert = getattr(config, "moe_intermediate_size", None) or getattr(
        config, "intermediate_size", 0
    )
    linear = max(sum(it.outputs for it in layer.matrices) for layer in layers)
    return 2 * int(config.hidden_size) + linear + 3 * int(experts) * int(expert or 0)
