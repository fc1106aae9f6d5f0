"""Multinomial logistic regression on weighted targets, as plain arrays.

Of more features than rows, as large backbones give, the weights lie in the span of the rows. So
:func:`fit_head` turns the features, exactly and once, to the rows' principal axes. Along these the
loss is curved by about the axis' variance, and a step that knows this comes to the optimum in a tenth
of the time.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from stackllm.crossfit.folds import inner_folds
from stackllm.crossfit.targets import Targets
from stackllm.metrics import log_loss
from stackllm.probabilities import softmax

_TOLERANCE = 1e-3
"""Slope of the mean loss at which a fit has come to its end."""


def logistic(
    features: Any,
    targets: Targets,
    c: float,
    max_iter: int,
    intercept: bool = True,
    axes: bool = False,
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
    axes
        Whether the features are principal axes, dense float32 and by themselves uncorrelated.

    Returns
    -------
    weights
        float32 ``(n_classes, n_features)``. A class without a training row has none.
    bias
        float32 ``(n_classes,)``; -30 for a class without a training row, which makes it all but
        impossible.
    """
    bias = np.full(targets.n_classes, -30.0, dtype=np.float32)
    classes, labels = np.unique(targets.labels, return_inverse=True)
    if len(classes) == 1:  # so few groups that one class is all there is to learn
        bias[classes] = 0.0
        return np.zeros((targets.n_classes, features.shape[1]), dtype=np.float32), bias
    solve = _along_axes if axes else _anywhere
    coefficients, intercepts = solve(features, labels, targets.weights, c, max_iter, intercept)
    weights = np.zeros((targets.n_classes, coefficients.shape[1]), dtype=np.float32)
    weights[classes] = coefficients
    bias[classes] = intercepts
    return weights, bias


def _anywhere(
    features: Any, labels: np.ndarray, weights: np.ndarray, c: float, max_iter: int, intercept: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients ``(n_labels, n_features)`` and intercepts of any features, by scikit-learn."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=max_iter, tol=_TOLERANCE, fit_intercept=intercept)
    with warnings.catch_warnings():
        # to stop at max_iter is what its setting says, and nothing that a user has to mend
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels, sample_weight=weights)
    if len(model.classes_) > 2:
        return model.coef_, model.intercept_
    # one score for both: share it out
    shared = (np.concatenate([-it, it]) / 2 for it in (model.coef_, model.intercept_))
    coefficients, intercepts = shared
    return coefficients, intercepts


def _along_axes(
    features: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    c: float,
    max_iter: int,
    intercept: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_anywhere` for uncorrelated features, in steps of the length that each of them wants."""
    from scipy.optimize import minimize

    n_labels = int(labels.max()) + 1
    if n_labels == 2:
        c = c / 2  # two scores of half the size each are penalised half as much as one
    share = (weights / weights.sum()).astype(np.float32)[:, None]  # (n, 1)
    strength = 1 / (c * weights.sum())  # of the penalty, beside the mean loss
    curvature = 1 / n_labels * (1 - 1 / n_labels)  # of the loss, where nothing is known
    step = 1 / np.sqrt(curvature * (share * features**2).sum(0) + strength)  # (n_features,)
    bias_step = 1 / np.sqrt(curvature) if intercept else 0.0
    truth = np.eye(n_labels, dtype=np.float32)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        steps = flat.astype(np.float32).reshape(n_labels, -1)
        coefficients = steps[:, :-1] * step
        scores = features @ coefficients.T + steps[:, -1] * bias_step  # (n, n_labels)
        scores -= scores.max(1, keepdims=True)
        log_total = np.log(np.exp(scores).sum(1, keepdims=True))
        slope = share * (np.exp(scores - log_total) - truth)
        mean = (share * (log_total - (scores * truth).sum(1, keepdims=True))).sum(dtype=np.float64)
        penalty = strength / 2 * (coefficients**2).sum(dtype=np.float64)
        of_features = (slope.T @ features + strength * coefficients) * step
        of_bias = slope.sum(0)[:, None] * bias_step
        return mean + penalty, np.hstack([of_features, of_bias]).ravel().astype(np.float64)

    start = np.zeros(n_labels * (features.shape[1] + 1))
    options = {"maxiter": max_iter, "gtol": _TOLERANCE, "ftol": _TOLERANCE**2 / 10}
    steps = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    steps = steps.reshape(n_labels, -1)
    return steps[:, :-1] * step, steps[:, -1] * bias_step


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
    axes: bool = False,
    n_held: int = 1,
) -> float:
    """The penalty with the least log loss on a fifth of the groups whose labels were given, or on several.

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
    max_iter, intercept, axes
        As for :func:`logistic`.
    seed
        Decides which groups are held out.
    n_held
        How many fifths are, one after the other: all 5 choose best, of few groups above all.
    """
    # Of the groups whose labels were given: a fifth of all groups may hold pseudo-labels alone.
    given = groups[targets.rows[targets.given]]
    # with one candidate there is nothing to choose, with one group nothing to judge by
    if len(candidates) == 1 or len(np.unique(given)) < 2:
        return min(candidates)
    folds = inner_folds(given, 5, seed)
    losses = np.zeros(len(candidates))
    for fold in range(min(n_held, int(folds.max()) + 1)):
        held = np.isin(groups[targets.rows], given[folds == fold])
        train, test = targets.only(~held), targets.only(held & targets.given)
        for i, c in enumerate(candidates):
            weights, bias = logistic(features[train.rows], train, c, max_iter, intercept, axes)
            probabilities = class_probabilities(features[test.rows], weights, bias)
            losses[i] += log_loss(probabilities, test.labels) * len(test.labels)
    return candidates[int(np.argmin(losses))]


def fit_head(
    features: np.ndarray,
    groups: np.ndarray,
    targets: Targets,
    candidates: tuple[float, ...],
    max_iter: int,
    seed: int,
    intercept: bool = True,
    n_held: int = 1,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Choose the penalty, and fit with it on all targets.

    Parameters
    ----------
    features, groups, targets, candidates, max_iter, seed, intercept, n_held
        As for :func:`choose_penalty`.

    Returns
    -------
    c
        The penalty that was chosen.
    weights, bias
        As :func:`logistic` gives them.
    """
    rows, entries = np.unique(targets.rows, return_inverse=True)
    wide = features.shape[1] > len(rows)
    if wide:
        features = np.asarray(features[rows], dtype=np.float32)
        groups, targets = groups[rows], replace(targets, rows=entries)
        original, (features, loadings) = features, principal_axes(features)
    c = choose_penalty(
        features, groups, targets, candidates, max_iter, seed, intercept, wide, n_held
    )
    weights, bias = logistic(features[targets.rows], targets, c, max_iter, intercept, wide)
    return c, (weights @ loadings.T) @ original if wide else weights, bias


def principal_axes(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rows stand along the axes of their own cross product, and what the axes are made of.

    Parameters
    ----------
    features
        float32 ``(n, n_features)``, more features than rows.

    Returns
    -------
    coordinates
        float32 ``(n, n_axes)``: products of any two rows are those of the features, but for axes with
        less than a millionth of the greatest one's share, which float32 cannot tell from rounding.
    loadings
        float32 ``(n, n_axes)``: ``features.T @ loadings`` are the axes, of length 1.

    Examples
    --------
    >>> features = np.float32([[3, 0, 4], [0, 2, 0]])
    >>> coordinates, loadings = principal_axes(features)
    >>> np.allclose(coordinates @ coordinates.T, features @ features.T)
    True
    >>> np.allclose(features @ (features.T @ loadings), coordinates)
    True
    """
    from scipy.linalg import eigh

    # "evd" is several times as fast as scipy's default
    shares, axes = eigh(features @ features.T, driver="evd", overwrite_a=True)
    telling = shares > 1e-6 * shares[-1]
    lengths, axes = np.sqrt(shares[telling]), axes[:, telling]
    return np.ascontiguousarray(axes * lengths), axes / lengths
