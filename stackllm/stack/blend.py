"""The hill-climbed blend: a weighted sum of log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stackllm.crossfit.design import CrossFit, Design
from stackllm.group.plan import Plan
from stackllm.group.posterior import posterior_of
from stackllm.metrics import log_loss
from stackllm.probabilities import log_blend, log_probabilities, softmax

STEP = 0.1
"""What one step of the climb adds to a weight."""

MAX_STEPS = 60

SHORTLIST = 20
"""Of more models than this, a step tries only those that promised most when they were last tried."""


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


def climb(logs: np.ndarray, plan: Plan, labels: np.ndarray) -> np.ndarray:
    """Weights of log-probabilities by greedy steps on the log loss of the group posterior.

    From all weights 0, which is chance, each step adds :data:`STEP` to the weight of the model that
    lowers the loss most; it ends when none does. A model that comes in anew must lower the summed
    loss by half the logarithm of the number of groups (Schwarz, "Estimating the dimension of a
    model", 1978), or noise would always find a place. The sum of the weights acts as an inverse
    temperature: blends of different folds come out equally well calibrated, and where no model
    knows anything the blend says so. (After Caruana et al., "Ensemble selection from libraries of
    models", 2004.)

    Of many models a step tries the :data:`SHORTLIST` that gained most when they were last tried, as a gain
    seldom grows while others come in; the climb ends when none of *all* models lowers the loss.

    Parameters
    ----------
    logs
        Log-probabilities ``(n_models, n_rows, n_classes)``.
    plan
        Groups and quotas of the rows.
    labels
        Class index of each row, ``(n_rows,)``.

    Returns
    -------
    numpy.ndarray
        ``(n_models,)``, 0 or more.
    """

    def loss_of(scores: np.ndarray) -> float:
        return log_loss(posterior_of(softmax(scores), plan), labels)

    counts = np.zeros(len(logs))
    gains = np.full(len(logs), np.inf)  # of one more step, when it was last tried
    total = np.zeros_like(logs[0])
    loss = loss_of(total)
    entry = 0.5 * np.log(plan.n_groups) / len(labels)  # nats per row
    n_tried = len(logs)
    while counts.sum() < MAX_STEPS:
        order = np.argsort(entry * (counts == 0) - gains, kind="stable")
        chosen = np.sort(order[:n_tried])
        tried = np.array([loss_of(total + STEP * logs[model]) for model in chosen])
        gains[chosen] = loss - tried
        at = int(np.argmin(tried + entry * (counts[chosen] == 0)))
        best = chosen[at]
        if tried[at] < loss - max(1e-6, entry * (counts[best] == 0)):
            counts[best] += 1
            total, loss = total + STEP * logs[best], float(tried[at])
            n_tried = SHORTLIST
        elif n_tried < len(logs):
            n_tried = len(logs)
        else:
            break
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
    oof = np.empty_like(oofs[0])
    weights = np.empty((design.n_folds, len(models)))
    plan = Plan.of(design.train_groups, oofs.shape[2], quota)
    for fold in range(design.n_folds):
        rest, inside = design.folds != fold, design.folds == fold
        logs = log_probabilities(oofs[:, rest])
        weights[fold] = climb(logs, plan.part(rest), design.labels[rest])
        oof[inside] = log_blend(oofs[:, inside], weights[fold])
    test = blend_views([model.test for model in models.values()], weights)
    return Blend(CrossFit(oof, test), weights, tuple(models))


def blend_views(views: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Blend rows as each fold's models see them, each fold with its weights.

    Parameters
    ----------
    views
        Row probabilities of each model, float64 ``(n_folds, n_rows, n_classes)``.
    weights
        ``(n_folds, n_models)``.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_folds, n_rows, n_classes)``.
    """
    return np.stack(
        [
            log_blend(np.stack([view[fold] for view in views]), weights[fold])
            for fold in range(len(weights))
        ]
    )
