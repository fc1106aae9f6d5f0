"""The hill-climbed blend: a log-average whose weights live on the simplex."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stackllm.data.metrics import log_loss
from stackllm.data.predictions import log_average, log_probabilities, softmax
from stackllm.group.posterior import posterior
from stackllm.members.crossfit import CrossFit, Design

STEP = 0.1
"""What one step of the climb adds to a weight."""


@dataclass(frozen=True)
class Blend:
    """A blend and what it is made of.

    Parameters
    ----------
    predictions
        The blended predictions; fold k with weights fitted on the other folds.
    weights
        Weights of each fold, ``(n_folds, n_models)``, rows sum to 1.
    names
        Names of the models.
    """

    predictions: CrossFit
    weights: np.ndarray
    names: tuple[str, ...]


def climb(
    logs: np.ndarray, groups: np.ndarray, labels: np.ndarray, quota: int, n_steps: int = 60
) -> np.ndarray:
    """Weights of a log-average by greedy steps on the log loss of the group posterior.

    Each step adds :data:`STEP` to the weight of the model that lowers the loss most; it ends when
    none does. The sum of the weights acts as an inverse temperature while climbing; only their
    proportions are returned, since stage three fits the temperature. (After Caruana et al.,
    "Ensemble selection from libraries of models", 2004.)

    Parameters
    ----------
    logs
        Log-probabilities ``(n_models, n_rows, n_classes)``.
    groups, labels
        Group and class index of each row, ``(n_rows,)``.
    quota
        How often a class stands in a group.
    n_steps
        Most steps to take.

    Returns
    -------
    numpy.ndarray
        ``(n_models,)``, 0 or more, sums to 1.
    """
    counts = np.zeros(len(logs))
    total = np.zeros_like(logs[0])
    loss = np.inf
    for _ in range(n_steps):
        tried = [
            log_loss(posterior(softmax(total + STEP * added), groups, quota), labels)
            for added in logs
        ]
        best = int(np.argmin(tried))
        if tried[best] >= loss - 1e-6:
            break
        counts[best] += 1
        total, loss = total + STEP * logs[best], tried[best]
    result: np.ndarray = counts / counts.sum()
    return result


def cross_blend(models: dict[str, CrossFit], design: Design, quota: int) -> Blend:
    """Blend models, each fold with weights that its own labels had no part in.

    Parameters
    ----------
    models
        Predictions of each model.
    design
        Folds and groups.
    quota
        How often a class stands in a group.
    """
    oofs = np.stack([model.oof for model in models.values()])
    tests = np.stack([model.test for model in models.values()])
    oof = np.empty_like(oofs[0])
    test = np.empty_like(tests[0])
    weights = np.empty((design.n_folds, len(models)))
    for fold in range(design.n_folds):
        rest, own = design.folds != fold, design.folds == fold
        weights[fold] = climb(
            log_probabilities(oofs[:, rest]), design.train_groups[rest], design.labels[rest], quota
        )
        oof[own] = log_average(oofs[:, own], weights[fold])
        test[fold] = log_average(tests[:, fold], weights[fold])
    return Blend(CrossFit(oof, test), weights, tuple(models))
