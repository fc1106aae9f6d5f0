"""What a classifier learns from, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, cast

import numpy as np
from annotated_types import Ge, Gt, Le

from stackllm.engine.trackers import check_trackers
from stackllm.finetune.model import Batch
from stackllm.parameters import Name, PartOf, check
from stackllm.store.digest import LATER

Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]

Collate = Callable[[np.ndarray], Batch]
"""Rows, int ``(n,)``, as a batch on the CPU."""


@dataclass(frozen=True)
class TrainingParams:
    """Settings of the optimiser.

    Parameters
    ----------
    epochs
        How often every row is seen.
    batch_size, accumulation
        Rows a pass, and passes a step. Out of memory lowers the first and raises the second, so that
        a step is of as many rows as before.
    learning_rate, head_learning_rate
        Of the adapters and of the head; both fall along a cosine after a warm-up. The default is for
        LLMs of billions of parameters; small ones want 5e-4 to 2e-3.
    warmup
        Share of the steps in which the rates rise.
    weight_decay, max_grad_norm
        Decay of the weights; length to which gradients are clipped, 0 for any.
    label_smoothing
        Share of every label that is spread over all classes.
    patience
        Stop after so many epochs without a lower loss on a fifth of the *training* groups, which are
        then not trained on, and go back to the best epoch. 0 trains on everything for all epochs.
    checkpointing
        Keep only what enters a layer, and compute the layer again for its gradients: a third more time for
        a small part of the memory, and the same numbers. ``"auto"`` does so where a GPU's memory asks for it.
    optimizer
        ``"adamw"``; ``"adamw_8bit"`` keeps its moments in 8 bits (bitsandbytes), and ``"paged_adamw_8bit"``
        lets them move to the machine's memory when a GPU's runs out.
    report_to
        Trackers that get this member's steps, beside those of ``[tracking]``: ``"trackio"``, ``"wandb"``,
        ``"tensorboard"``, ``"mlflow"``. What they keep in files stands in ``artifacts/<run>/trackers/``.
    """

    epochs: Annotated[float, Gt(0), Le(10_000)] = 2.0
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 16
    accumulation: Annotated[int, Ge(1), Le(1_000_000)] = 1
    learning_rate: Annotated[float, Gt(0), Le(10)] = 1e-4
    head_learning_rate: Annotated[float, Ge(0), Le(10)] = 1e-5
    warmup: PartOf = 0.1
    weight_decay: Annotated[float, Ge(0), Le(1000)] = 0.0
    max_grad_norm: Annotated[float, Ge(0), Le(1e12)] = 1.0
    label_smoothing: PartOf = 0.0
    patience: Annotated[int, Ge(0), Le(10_000)] = 0
    checkpointing: Literal["auto"] | bool = field(default="auto", metadata=LATER)
    optimizer: Optimizer = field(default="adamw", metadata=LATER)
    report_to: tuple[Name, ...] = ()

    def __post_init__(self) -> None:
        check(self)
        check_trackers(self.report_to)

    @property
    def numbers(self) -> TrainingParams:
        """The same without what changes no number: part of the key of what is trained with it."""
        optimizer = cast(Optimizer, self.optimizer.removeprefix("paged_"))
        return dataclasses.replace(self, checkpointing="auto", optimizer=optimizer, report_to=())


@dataclass(frozen=True)
class Examples:
    """What a classifier learns from.

    Parameters
    ----------
    rows
        Which rows, int ``(n,)``.
    labels
        Their label probabilities, ``(n, n_classes)``.
    weights
        Their weights in the loss, ``(n,)``.
    lengths
        Their tokens, ``(n,)``: rows of like length go into one batch.
    collate
        Makes a batch of rows.
    """

    rows: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    collate: Collate

    def smoothed(self, share: float) -> Examples:
        """The same with ``share`` of every label spread over all classes."""
        labels = (1 - share) * self.labels + share / self.labels.shape[1]
        return dataclasses.replace(self, labels=labels)
