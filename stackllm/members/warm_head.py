"""The warm head: a fine-tuning starts from the head that suits the backbone as it is.

A random head pulls the backbone's features about before it has learnt anything (Kumar et al.,
"Fine-tuning can distort pretrained features and underperform out-of-distribution", 2022).

What the head of the frozen backbone reads does not depend on the seed, so the seeds of a place share
one head. Where it does, as of encoders whose pooler is drawn, every model computes its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stackllm.crossfit.targets import Targets
from stackllm.finetune.dataset import Collate
from stackllm.finetune.model import head_inputs
from stackllm.finetune.structure import last_linear
from stackllm.finetune.train import read
from stackllm.members.inputs import Inputs
from stackllm.members.linear import fit_head
from stackllm.store.records import read_json, write_json

if TYPE_CHECKING:
    from peft import PeftModel

_STATES, _WEIGHTS, _BIAS, _SETTINGS = "states.npy", "weights.npy", "bias.npy", "states.json"
_PENALTIES = (0.0003, 0.001, 0.003, 0.01, 0.03)
"""Inverse strengths of the L2 penalty that a warm head is chosen from."""


def save_states(folder: Path, states: np.ndarray, biased: bool) -> None:
    """Write what the head reads of every row, float32 ``(n_rows, hidden)``, and whether it has a bias."""
    np.save(folder / _STATES, states)
    write_json(folder / _SETTINGS, {"biased": biased})


def fit_start(inputs: Inputs, states: Path, targets: Targets, seed: int, folder: Path) -> None:
    """Write the head that suits the frozen backbone: ``weights`` ``(n_classes, hidden)`` and ``bias``, float32."""
    stored = np.load(states / _STATES, mmap_mode="r", allow_pickle=False)
    biased = read_json(states / _SETTINGS)["biased"]
    rows = np.unique(targets.rows)
    weights, bias = _suiting(stored[rows], rows, inputs.groups, targets, seed, biased, 5)
    np.save(folder / _WEIGHTS, weights)
    np.save(folder / _BIAS, bias)


def start_head(
    model: PeftModel,
    inputs: Inputs,
    targets: Targets,
    lengths: np.ndarray,
    collate: Collate,
    seed: int,
) -> bool:
    """Give the head the start that its place shares, or one of its own; False if it starts at random."""
    if inputs.start is None:
        return warm_head(model, inputs.groups, targets, lengths, collate, seed)
    weights, bias = (np.load(inputs.start / name, allow_pickle=False) for name in (_WEIGHTS, _BIAS))
    _set_head(model, weights, bias)
    return True


def warm_head(
    model: PeftModel,
    groups: np.ndarray,
    targets: Targets,
    lengths: np.ndarray,
    collate: Collate,
    seed: int,
) -> bool:
    """Give the head's last layer the weights of a logistic regression on what it is going to read.

    Parameters
    ----------
    model
        The classifier, whose head is fresh.
    groups, lengths
        Group number and number of tokens of every row of the inputs, ``(n_rows,)``.
    targets
        What it is going to be trained on.
    collate
        Makes a batch of rows.
    seed
        Of the folds by which the penalty is chosen.

    Returns
    -------
    bool
        False if the head does not end in a linear layer on one pooled state a row: it starts at random.
    """
    import torch

    layer, rows = last_linear(model), np.unique(targets.rows)
    if layer is None:
        return False
    model.eval()
    with torch.inference_mode():
        few = collate(rows[:2]).to(next(model.parameters()).device)
        pooled = head_inputs(model, few) is not None
    if pooled:
        # adapters are on, and still add nothing
        states = read(head_inputs, model, rows, lengths[rows], collate)
        _set_head(model, *_suiting(states, rows, groups, targets, seed, layer.bias is not None))
    model.train()
    return pooled


def _suiting(
    states: np.ndarray,
    rows: np.ndarray,
    groups: np.ndarray,
    targets: Targets,
    seed: int,
    biased: bool,
    n_held: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias of a logistic regression on the states of ``rows``, ``(len(rows), width)``, as they are.

    A head of one model has its penalty chosen on a fifth of the groups; a head that all seeds share, on
    all fifths in turn, as there are no others to make up for a bad choice.
    """
    centre = states.mean(axis=0) if biased else np.zeros_like(states[0])
    scale = np.maximum(states.std(axis=0), 1e-6)
    features = np.zeros((len(groups), states.shape[1]), dtype=np.float32)
    features[rows] = (states - centre) / scale
    _, weights, bias = fit_head(features, groups, targets, _PENALTIES, 300, seed, biased, n_held)
    weights = weights / scale
    return weights, bias - weights @ centre


def _set_head(model: PeftModel, weights: np.ndarray, bias: np.ndarray) -> None:
    import torch

    layer = last_linear(model)
    assert layer is not None
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights))
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(bias))
