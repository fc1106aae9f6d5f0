"""The likeliest assignment of a group's rows to its places (Kuhn's Hungarian method, 1955)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stackllm.group.plan import Batch, Floats, Quota, check_probabilities, plan
from stackllm.group.tempering import check_tempering, log_weights

_MUST = 1e6
"""Worth more than any sum of log-probabilities: a place that must be filled is filled."""


def assign(
    probabilities: ArrayLike,
    groups: ArrayLike,
    quota: Quota = 1,
    *,
    exactly: bool | ArrayLike = False,
) -> NDArray[np.intp]:
    """One class a row, so that no class exceeds its quota and the product of probabilities is largest.

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
        Shape ``(n_rows,)``, the index of a class. Rows of groups with more rows than places (or too
        few for ``exactly``) get their likeliest class.

    Raises
    ------
    DataError
        If the probabilities or groups are not usable.
    UsageError
        If quota or exactly have no sense.

    Examples
    --------
    >>> assign([[0.9, 0.1], [0.6, 0.4]], ["q1", "q1"]).tolist()
    [0, 1]
    """
    matrix = check_probabilities(probabilities, groups)
    return assign_of(matrix, plan(groups, matrix.shape[1], quota, exactly=exactly))


def assign_of(
    matrix: Floats, batches: list[Batch], temperature: float = 1.0, bias: ArrayLike | None = None
) -> NDArray[np.intp]:
    """:func:`assign` for checked probabilities and a ready plan.

    A temperature changes no likeliest assignment, but for how much it lets a bias weigh.
    """
    from scipy.optimize import linear_sum_assignment  # 0.2 s to import

    check_tempering(temperature, bias, matrix.shape[1])
    added = None if bias is None else temperature * np.asarray(bias, dtype=np.float64)
    logs = log_weights(matrix, 1.0, added)
    labels: NDArray[np.intp] = logs.argmax(axis=1)
    for batch in batches:
        if batch.how == "rows":
            continue
        n_rows = batch.rows.shape[1]
        places = np.minimum(batch.quota, n_rows)
        class_of = np.repeat(np.arange(len(places)), places)
        gain = np.where(np.asarray(batch.exactly)[class_of], _MUST, 0.0)
        for rows in batch.rows:
            _, chosen = linear_sum_assignment(logs[rows][:, class_of] + gain, maximize=True)
            labels[rows] = class_of[chosen]
    return labels


def one_hot(labels: NDArray[np.intp], n_classes: int) -> Floats:
    """Shape ``(n_rows, n_classes)``: 1 at each row's label, else 0."""
    matrix: Floats = (labels[:, None] == np.arange(n_classes)).astype(np.float64)
    return matrix
