"""Multinomial logistic regression on weighted targets, as plain arrays."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from stackllm.crossfit.folds import inner_folds
from stackllm.crossfit.targets import Targets
from stackllm.metrics import log_loss
from stackllm.probabilities import softmax


def logistic(
    features: Any, targets: Targets, c: float, max_iter: int, intercept: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a multinomial logistic regression with an L2 penalty.

    Parameters
    ----------
    features
        Dense or sparse ``(n, n_features)``, one row an entry of ``targets``.
    targets
        Labels and weights.
    c
        Inverse strength of the penalty.
    max_iter
        Bound on the optimiser's steps.
    intercept
        Whether there is a bias; without one it comes out 0.

    Returns
    -------
    weights
        float32 ``(n_classes, n_features)``. A class without a training row has none.
    bias
        float32 ``(n_classes,)``; -30 for a class without a training row, which makes it all but
        impossible.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    bias = np.full(targets.n_classes, -30.0, dtype=np.float32)
    if len(np.unique(targets.labels)) == 1:  # so few groups that one class is all there is to learn
        bias[targets.labels[0]] = 0.0
        return np.zeros((targets.n_classes, features.shape[1]), dtype=np.float32), bias
    model = LogisticRegression(C=c, max_iter=max_iter, tol=1e-3, fit_intercept=intercept)
    with warnings.catch_warnings():
        # to stop at max_iter is what its setting says, and nothing that a user has to mend
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, targets.labels, sample_weight=targets.weights)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # one score for both: share it out
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weights = np.zeros((targets.n_classes, coefficients.shape[1]), dtype=np.float32)
    weights[model.classes_] = coefficients
    bias[model.classes_] = intercepts
    return weights, bias


def class_probabilities(features: Any, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """What :func:`logistic` fitted says of rows.

    Parameters
    ----------
    features
        float32 ``(n_rows, n_features)``, or a sparse matrix of that shape.
    weights, bias
        float32 ``(n_classes, n_features)`` and ``(n_classes,)``.

    Returns
    -------
    np.ndarray
        float64 ``(n_rows, n_classes)``.
    """
    return softmax(np.asarray(features @ weights.T + bias, dtype=np.float64))


def choose_penalty(
    features: np.ndarray,
    groups: np.ndarray,
    targets: Targets,
    candidates: tuple[float, ...],
    max_iter: int,
    seed: int,
    intercept: bool = True,
) -> float:
    """The penalty with the least log loss on a fifth of the groups whose labels were given.

    Parameters
    ----------
    features
        Dense ``(n_rows, n_features)``, a row for each row of the inputs.
    groups
        Group number of each row, ``(n_rows,)``.
    targets
        Labels of some of the rows, and their weights.
    candidates
        Inverse strengths to choose from; the first of equals wins.
    max_iter, intercept
        As for :func:`logistic`.
    seed
        Decides which groups are held out.
    """
    # Of the groups whose labels were given: a fifth of all groups may hold pseudo-labels alone.
    given = groups[targets.rows[targets.given]]
    # with one candidate there is nothing to choose, with one group nothing to judge by
    if len(candidates) == 1 or len(np.unique(given)) < 2:
        return min(candidates)
    held = np.isin(groups[targets.rows], given[inner_folds(given, 5, seed) == 0])
    train, test = targets.only(~held), targets.only(held & targets.given)
    losses = []
    for c in candidates:
        weights, bias = logistic(features[train.rows], train, c, max_iter, intercept)
        probabilities = class_probabilities(features[test.rows], weights, bias)
        losses.append(log_loss(probabilities, test.labels))
    return candidates[int(np.argmin(losses))]
