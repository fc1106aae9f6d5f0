"""How much memory a training is going to need, and what follows: rows per pass, and checkpointing.

What a pass keeps for its gradients is counted per token and layer, from shapes alone. The count is
of what torch saves for a layer as transformers and peft write it: adapters in float32, attention
that never writes its scores out ("eager" does), a gated or plain feed-forward part. Tests hold it to what torch
really saves.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stackllm.errors import StorageError
from stackllm.llm.estimate import room, shown, width
from stackllm.llm.machine import QUANTISED, device, gpus, packing
from stackllm.store.atomic import make_folder, write_text
from stackllm.store.checkpoints import root_of_this_unit
from stackllm.store.digest import digest
from stackllm.store.records import read_json

if TYPE_CHECKING:
    from peft import PeftModel

    from stackllm.finetune.dataset import TrainingParams
    from stackllm.finetune.model import LoraParams
    from stackllm.llm.estimate import Matrix, Part, Sizes

_FULL_PASS = 4096
"""Tokens that keep a GPU busy: of a pass with so many, more rows would not pay for computing layers twice."""

_ROOM = 0.92
"""Share of the room that is planned with: the rest is lost between the blocks that torch's allocator cuts."""

_MATRICES = 7
"""Linear layers of a block with attention and a gated part; six, of one without a gate, round to one block too."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a training takes at its peak.

    Parameters
    ----------
    fixed
        Weights, adapters, their gradients and the optimiser's state.
    row, checkpointed
        Of each row in a pass, as long as the longest; the same where only what enters a layer is
        kept, and the layer computed again for its gradients.
    """

    fixed: int
    row: int
    checkpointed: int

    def of(self, n_rows: int, checkpointing: bool) -> int:
        """With so many rows per pass."""
        return self.fixed + n_rows * (self.checkpointed if checkpointing else self.row)


@dataclass(frozen=True)
class Plan:
    """How a training uses the memory that is there.

    Parameters
    ----------
    batch_size
        Rows per pass, over all ranks.
    checkpointing
        Are layers computed twice, rather than kept?
    told
        A line for the user; empty without a GPU.
    """

    batch_size: int
    checkpointing: bool
    told: str = ""


_fitted: dict[str, int] = {}
"""Rows per pass that memory had room for where it had none for more, in this process."""


class Fitting:
    """What memory had room for, remembered: a training need not die of what one like it died of.

    It stands beside the units, in the folder ``fitted`` of the run, and is no part of any: passes of
    fewer rows give the same steps.

    Parameters
    ----------
    model
        What is trained.
    longest
        Tokens of its longest row.
    plan
        What was planned.
    """

    def __init__(self, model: PeftModel, longest: int, plan: Plan) -> None:
        shapes = sorted((name, *value.shape) for name, value in model.named_parameters())
        kinds = sorted({str(value.dtype) for value in model.parameters()})
        cards = [(gpu.name, gpu.memory) for gpu in gpus()]
        self._key = digest(shapes, kinds, longest, cards, plan.batch_size, plan.checkpointing)
        self._plan = plan

    def load(self) -> int:
        """Rows per pass to begin with."""
        path, size = self._path(), _fitted.get(self._key)
        if size is None and path is not None and path.exists():
            with contextlib.suppress(ValueError, TypeError):  # torn: it is found out again
                size = int(read_json(path))
        return min(self._plan.batch_size, max(1, size or self._plan.batch_size))

    def save(self, size: int) -> None:
        """Remember what fitted, if that was less than planned."""
        if size >= self._plan.batch_size:
            return
        _fitted[self._key] = size
        path = self._path()
        if path is not None:
            make_folder(path.parent)
            write_text(path, json.dumps(size))

    def _path(self) -> Path | None:
        root = root_of_this_unit()
        return None if root is None else root / "fitted" / f"{self._key[:32]}.json"


def gpu_room(devices: str) -> tuple[int, int] | None:
    """Bytes that tensors may take on this process's GPU, or on all of them, and bytes that there are."""
    seen = gpus()
    if not seen:
        return None
    if devices != "all":
        seen = (seen[device().index or 0],)
    return sum(map(room, seen)), sum(gpu.memory for gpu in seen)


def saved_by_layer(
    part: Part, sizes: Sizes, number: int, lora: LoraParams, scores: int = 0, mask: int = 1
) -> int:
    """Bytes that a layer keeps of a token for its gradients.

    Parameters
    ----------
    part
        The layer.
    sizes
        Of the model.
    number
        Bytes of a number that is computed with the frozen weights.
    lora
        Which adapters it has.
    scores
        Attention scores of a token that are written out: heads times tokens for "eager", else none.
    mask
        Bytes per number of dropout's mask: 1 on a GPU, 4 on a CPU.
    """
    adapted = adapted_matrices(part, lora)
    inputs = [(it.name.rpartition(".")[0], it.inputs) for it in adapted]
    if number == 4 and not lora.dropout:  # as they are, and those of q, k and v are one
        inputs = sorted(set(inputs))
    each = 4 + (mask if lora.dropout else 0)  # what dropout leaves, and its mask
    adapters = sum(width * each for _, width in inputs) + 4 * lora.r * len(adapted)
    blocks = max(1, round(len(part.matrices) / _MATRICES))
    norms = 2 * 4 * sizes.hidden  # in float32, whatever the weights are
    attention = 4 * sizes.hidden * number + scores * (
        4 + 2 * number
    )  # queries, keys, values, output
    widest = max((it.outputs for it in part.matrices), default=0)
    experts = max(0, sizes.widest - 2 * sizes.hidden - sum(it.outputs for it in part.matrices))
    forward = number * (3 * widest + experts)  # gate, what it lets through, and their product
    return adapters + blocks * (norms + attention + forward)


def adapted_matrices(part: Part, lora: LoraParams) -> list[Matrix]:
    """The linear layers of a part that get an adapter."""
    every = lora.target_modules == ("all-linear",)
    return [
        it
        for it in part.matrices
        if every or any(f".{it.name}".endswith(f".{wanted}") for wanted in lora.target_modules)
    ]


def training_needs(
    sizes: Sizes,
    precision: str,
    lora: LoraParams,
    training: TrainingParams,
    longest: int,
    n_trained: int | None = None,
    from_trunk: bool = False,
    heads: int = 0,
    mask: int = 1,
) -> Needs:
    """Bytes that a training needs.

    Parameters
    ----------
    sizes
        Of the backbone as a classifier.
    precision
        Of its frozen weights.
    lora, training
        Settings.
    longest
        Tokens of the longest row.
    n_trained
        How many layers at the top are trained; None: all.
    from_trunk
        Are only these loaded, and read from states?
    heads
        Of attention, if that writes its scores out; else 0.
    mask
        As for :func:`saved_by_layer`.
    """
    number = width(precision)
    layers = sizes.layers or (sizes.beside,)
    upper = layers[-n_trained:] if n_trained else layers
    adapted = [matrix for part in upper for matrix in adapted_matrices(part, lora)]
    n_values = sum(lora.r * (it.inputs + it.outputs) for it in adapted)
    # weights, what they were at first, gradients, moments, and those of the best epoch
    of_value = 4 + 4 + 4 + (8 if training.optimizer == "adamw" else 2) + 4 * (training.patience > 0)
    every = [matrix for part in layers for matrix in part.matrices]
    largest = max((it.inputs * it.outputs for it in every), default=0)
    unpacked = 2 * largest * number if packing(precision) in QUANTISED else 0
    fixed = sizes.weights(precision, n_trained if from_trunk else None, not from_trunk, False)
    kept = [saved_by_layer(part, sizes, number, lora, heads * longest, mask) for part in upper]
    widest = max((it.outputs for it in every), default=0)
    passing = 4 * (3 * widest + 4 * sizes.hidden)  # gradients on their way through one layer
    ends = sizes.hidden * (4 + 2 * number)  # what enters the first layer, and the last norm
    enter = len(upper) * sizes.hidden * number
    return Needs(
        fixed + n_values * of_value + unpacked,
        longest * (sum(kept) + passing + ends),
        longest * (enter + max(kept) + passing + ends),
    )


def plan_training(
    name: str,
    precision: str,
    needs: Needs,
    training: TrainingParams,
    longest: int,
    memory: tuple[int, int],
    n_ranks: int = 1,
) -> Plan:
    """Rows per pass, and whether layers are computed twice; steps stay of as many rows as before.

    Parameters
    ----------
    name, precision
        Of the backbone, to say.
    needs
        From :func:`training_needs`.
    training
        Settings: a pass is never of more rows than ``batch_size``.
    longest
        Tokens of the longest row.
    memory
        From :func:`gpu_room`.
    n_ranks
        Processes that each read their share of a pass on a GPU of their own.

    Raises
    ------
    StorageError
        If one row does not fit.
    """
    free, whole = memory
    most = max(1, training.batch_size // n_ranks)

    def rows(checkpointing: bool) -> int:
        left = int(free * _ROOM) - needs.fixed
        fitting = left // (needs.checkpointed if checkpointing else needs.row)
        if fitting < 1 and needs.of(1, checkpointing) <= free:
            fitting = 1
        return max(0, min(most, fitting))

    checkpointing = training.checkpointing is True
    if training.checkpointing == "auto":
        plain = rows(False)
        checkpointing = plain < most and plain * longest < _FULL_PASS
    n_rows = rows(checkpointing)
    if not n_rows:
        ways = ['precision "nf4"'] if packing(precision) != "nf4" else []
        ways += ["checkpointing = true"] if not checkpointing else []
        raise StorageError(
            f"fine-tuning {name} in {precision} needs about {shown(needs.of(1, checkpointing))} for one row of "
            f"{longest} tokens, and the GPU has {shown(whole)}. Take {', '.join([*ways, 'fewer trainable_layers'])}, "
            "a lower max_length_answer or a smaller backbone."
        )
    told = (
        f"fine-tuning {name} in {precision}: about {shown(needs.of(n_rows, checkpointing))} of {shown(whole)} "
        f"with {n_rows} row{'s' if n_rows > 1 else ''} per pass{' and checkpointing' if checkpointing else ''}"
    )
    return Plan(n_rows * n_ranks, checkpointing, told)
