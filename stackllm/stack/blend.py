"""The hill-climbed blend: a weighted sum of log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stackllm.crossfit.design import CrossFit, Design
from stackllm.group.posterior import posterior
from stackllm.metrics import log_loss
from stackllm.probabilities import log_blend, log_probabilities, softmax

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
        Weights of each fold, ``(n_folds, n_models)``, 0 or more.
    names
        Names of the models.
    """

    predictions: CrossFit
    weights: np.ndarray
    names: tuple[str, ...]


def climb(
    logs: np.ndarray, groups: np.ndarray, labels: np.ndarray, quota: int, n_steps: int = 60
) -> np.ndarray:
    """Weights of log-probabilities by greedy steps on the log loss of the group posterior.

    From all weights 0, which is chance, each step adds :data:`STEP` to the weight of the model that
    lowers the loss most; it ends when none does. A model that comes in anew must lower the summed
    loss by half the logarithm of the number of groups (Schwarz, "Estimating the dimension of a
    model", 1978), or noise would always find a place. The sum of the weights acts as an inverse
    temperature: blends of different folds come out equally well calibrated, and where no model
    knows anything the blend says so. (After Caruana et al., "Ensemble selection from libraries of
    models", 2004.)

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
        ``(n_models,)``, 0 or more.
    """
    counts = np.zeros(len(logs))
    total = np.zeros_like(logs[0])
    loss = log_loss(posterior(softmax(total), groups, quota), labels)
    entry = 0.5 * np.log(len(np.unique(groups))) / len(labels)  # nats a row
    for _ in range(n_steps):
        tried = [
            log_loss(posterior(softmax(total + STEP * added), groups, quota), labels)
            for added in logs
        ]
        best = int(np.argmin(np.array(tried) + entry * (counts == 0)))
        if tried[best] >= loss - max(1e-6, entry * (counts[best] == 0)):
            break
        counts[best] += 1
        total, loss = total + STEP * logs[best], tried[best]
    return STEP * counts


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
        oof[own] = log_blend(oofs[:, own], weights[fold])
        test[fold] = log_blend(tests[:, fold], weights[fold])
    return Blend(CrossFit(oof, test), weights, tuple(models))
