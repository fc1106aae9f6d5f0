"""The likeliest assignment of a group's rows to its places (Kuhn's Hungarian method, 1955)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stackllm.group.plan import Plan, Quota, checked
from stackllm.group.tempering import AS_IT_IS, Calibration, log_weights
from stackllm.probabilities import Floats

_MUST = 1e6
"""Worth more than any sum of log-probabilities: a place that must be filled is filled."""


def assign(
    probabilities: ArrayLike,
    groups: ArrayLike,
    quota: Quota = 1,
    *,
    exactly: bool | ArrayLike = False,
) -> NDArray[np.intp]:
    """One class per row, so that no class exceeds its quota and the product of probabilities is largest.

    Parameters
    ----------
    probabilities
        Shape ``(n_rows, n_classes)``, in [0, 1]. A zero counts as the smallest double: it is chosen
        only where every assignment needs one.
    groups
        Shape ``(n_rows,)``, the group of each row, in any order.
    quota, exactly
        As for :func:`stackllm.group.posterior.posterior`.

    Returns
    -------
    numpy.ndarray
        intp ``(n_rows,)``, the index of a class. Rows of groups with more rows than places (or too
        few for ``exactly``) get their likeliest class.

    Raises
    ------
    DataError
        If the probabilities or groups are not usable, or a mapping lacks the quota of a group.
    UsageError
        If quota or exactly make no sense.

    Examples
    --------
    >>> assign([[0.9, 0.1], [0.6, 0.4]], ["q1", "q1"]).tolist()
    [0, 1]
    """
    return assign_of(*checked(probabilities, groups, quota, exactly=exactly))


def assign_of(matrix: Floats, plan: Plan, calibration: Calibration = AS_IT_IS) -> NDArray[np.intp]:
    """:func:`assign` for checked probabilities and their plan.

    A temperature changes no likeliest assignment, but for how much it lets a bias weigh.

    Parameters
    ----------
    matrix, plan
        As :func:`~stackllm.group.plan.checked` gives them: float64 ``(n_rows, n_classes)``, and its groups.
    calibration
        Of the rows.

    Returns
    -------
    numpy.ndarray
        intp ``(n_rows,)``, the class of each row.

    Raises
    ------
    UsageError
        If the bias does not fit the classes.
    """
    from scipy.optimize import linear_sum_assignment  # 0.2 s to import

    weighed = tuple(calibration.temperature * value for value in calibration.bias)
    logs = log_weights(matrix, Calibration(bias=weighed))
    labels: NDArray[np.intp] = logs.argmax(axis=1)
    for batch in plan.batches:
        if batch.how == "rows":
            continue
        limits = np.minimum(batch.quota, batch.rows.shape[1])
        class_of = np.repeat(np.arange(plan.n_classes), limits)
        gain = np.where(np.asarray(batch.exactly)[class_of], _MUST, 0.0)
        for rows in batch.rows:
            _, chosen = linear_sum_assignment(logs[rows][:, class_of] + gain, maximize=True)
            labels[rows] = class_of[chosen]
    return labels


def one_hot(labels: NDArray[np.intp], n_classes: int) -> Floats:
    """float64 ``(n_rows, n_classes)``: 1 at the label of each row, ``(n_rows,)``, else 0."""
    matrix: Floats = (labels[:, None] == np.arange(n_classes)).astype(np.float64)
    return matrix
