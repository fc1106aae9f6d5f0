"""Sinkhorn's balancing: scale rows and columns until the rows sum to 1 and the classes fit.

The answer is the matrix nearest to the row probabilities (in relative entropy) among those whose
columns hold their quotas (Sinkhorn 1964). It is the mean-field cousin of the posterior: right sums,
but too little contrast, which a temperature below 1 partly mends.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stackllm.group.plan import Plan
from stackllm.group.tempering import AS_IT_IS, LEAST, Calibration, log_weights, tempered
from stackllm.probabilities import Floats

MAX_ROUNDS, MOST_ROUNDS = 500, 5000
"""For groups that still move, and for those whose columns are still off by more than :data:`OFF`. Certainties
that contradict each other move a factor by the ratio of rows to places in each round, down to the smallest
weight: 332 rounds for two rows on one place, 2,400 for 11 rows on 10."""
OFF = 1e-3
TOLERANCE = 1e-9


def sinkhorn_of(
    matrix: Floats,
    plan: Plan,
    calibration: Calibration = AS_IT_IS,
    tolerance: float = TOLERANCE,
) -> Floats:
    """Row probabilities balanced inside each group.

    Parameters
    ----------
    matrix, plan
        From :func:`stackllm.group.plan.checked`.
    calibration
        What is done to the rows first.
    tolerance
        As for :func:`balance`.

    Returns
    -------
    numpy.ndarray
        float64, the shape of ``matrix``; every row sums to 1. Groups that do not fit keep their
        tempered row probabilities.

    Raises
    ------
    UsageError
        If the bias does not fit the classes.
    """
    result = tempered(matrix, calibration)
    for batch in plan.batches:
        if batch.how == "rows":
            continue
        for start in range(0, batch.n_groups, 2048):
            rows = batch.rows[start : start + 2048]
            logs = log_weights(matrix[rows], calibration)
            result[rows] = balance(logs, batch.quota, batch.exactly, tolerance)
    return result


def balance(
    log_weights: Floats,
    quota: tuple[int, ...],
    exactly: tuple[bool, ...],
    tolerance: float = TOLERANCE,
) -> Floats:
    """Balance groups of one shape.

    Parameters
    ----------
    log_weights
        float64 ``(n_groups, n_rows, n_classes)``, finite.
    quota
        Places per class; together at least ``n_rows``.
    exactly
        Per class: must all its places be filled?
    tolerance
        A group is done once no probability moves by so much in a round, and its columns hold what they
        should to ten times that per row.

    Returns
    -------
    numpy.ndarray
        float64, the shape of ``log_weights``; every row sums to 1.
    """
    limits = np.asarray(quota, dtype=np.float64)
    room = np.flatnonzero(limits)
    must = (np.asarray(exactly) | (sum(quota) == log_weights.shape[1]))[room, None]
    wanted = limits[room, None]
    # groups last, so that every sum runs over long vectors: (n_rows, n_classes, n_groups)
    weights = np.exp(np.maximum(log_weights[:, :, room].transpose(1, 2, 0), LEAST))
    result = np.zeros_like(log_weights.transpose(1, 2, 0))
    factor = np.ones(weights.shape[1:])
    belief = weights / weights.sum(axis=1, keepdims=True)
    active = np.arange(weights.shape[2])
    for done in range(MOST_ROUNDS):
        # class factors that would make the sums right; a class under its quota is left alone
        sums = (weights / np.einsum("rcg,cg->rg", weights, factor)[:, None]).sum(axis=0)
        factor = np.where(must, wanted / sums, np.minimum(wanted / sums, 1.0))
        before, belief = belief, weights * factor
        belief /= belief.sum(axis=1, keepdims=True)
        moving = np.abs(belief - before).max(axis=(0, 1)) >= tolerance
        # where all is certain nothing seems to move, however wrong the columns still are
        off = belief.sum(axis=0) - wanted
        off = np.where(must, np.abs(off), off).max(axis=0)
        moving |= off >= 10 * tolerance * len(belief)
        if done >= MAX_ROUNDS:
            moving = off >= OFF
        if moving.mean() < 0.7 or done == MAX_ROUNDS:  # go on with those that still move
            _put(result, room, active[~moving], belief[:, :, ~moving])
            active, factor = active[moving], factor[:, moving]
            weights, belief = weights[:, :, moving], belief[:, :, moving]
            if not len(active):
                break
    _put(result, room, active, belief)
    return np.ascontiguousarray(result.transpose(2, 0, 1))


def _put(result: Floats, room: NDArray[np.intp], groups: NDArray[np.intp], belief: Floats) -> None:
    result[:, room[:, None], groups] = belief
