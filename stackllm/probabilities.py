"""Probabilities as arrays: logarithms, softmax, and the weighted product of several models."""

from __future__ import annotations

import numpy as np

FLOOR = 1e-9
"""Smallest probability whose logarithm is taken."""


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Natural logarithm, with probabilities below :data:`FLOOR` raised to it; any shape."""
    logs: np.ndarray = np.log(np.maximum(probabilities, FLOOR))
    return logs


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities from scores along the last axis: float ``(..., n_classes)`` to the same."""
    powers: np.ndarray = np.exp(scores - scores.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)  # in place: this runs over whole tables
    return powers


def log_blend(stack: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Normalised product of powers over the first axis of ``(n_models, n_rows, n_classes)``.

    Weights ``(n_models,)`` that sum to 1 give a weighted geometric mean; a smaller sum is flatter, and
    0 is uniform.

    Examples
    --------
    >>> log_blend(np.array([[[0.9, 0.1]], [[0.5, 0.5]]]), np.array([0.5, 0.5])).round(2).tolist()
    [[0.75, 0.25]]
    """
    return softmax(np.tensordot(weights, log_probabilities(stack), axes=1))
