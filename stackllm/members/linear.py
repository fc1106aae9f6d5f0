"""Multinomial logistic regression on weighted targets, as plain arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from stackllm.members.targets import Targets


def logistic(
    features: Any, targets: Targets, c: float, max_iter: int
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

    Returns
    -------
    weights
        float32 ``(n_classes, n_features)``. A class without a training row has none.
    bias
        float32 ``(n_classes,)``; -30 for a class without a training row, which makes it all but
        impossible.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=max_iter, tol=1e-3)
    model.fit(features, targets.labels, sample_weight=targets.weights)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # one score for both: share it out
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weights = np.zeros((targets.n_classes, coefficients.shape[1]), dtype=np.float32)
    bias = np.full(targets.n_classes, -30.0, dtype=np.float32)
    weights[model.classes_] = coefficients
    bias[model.classes_] = intercepts
    return weights, bias
