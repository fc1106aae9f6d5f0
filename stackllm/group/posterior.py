"""Class probabilities of a row given its whole group: what a quota tells beyond the rows alone.

If the rows' probabilities ``p(i, j)`` are calibrated and independent given the labels, and in each
group class j has c(j) places, then::

    P(y_i = j | group) = sum over allowed assignments a with a(i) = j of prod_r p(r, a(r))
                         -----------------------------------------------------------------
                         the same sum over all allowed assignments

which no other answer beats in expected log loss.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stackllm.group.lattice import marginals
from stackllm.group.plan import MAX_STATES, Batch, Plan, Quota, checked
from stackllm.group.tempering import AS_IT_IS, Calibration, log_weights, tempered
from stackllm.probabilities import Floats


def posterior(
    probabilities: ArrayLike,
    groups: ArrayLike,
    quota: Quota = 1,
    *,
    temperature: float = 1.0,
    bias: ArrayLike | None = None,
    exactly: bool | ArrayLike = False,
    max_states: int = MAX_STATES,
) -> Floats:
    """Posterior class probabilities of every row given its group and the quotas.

    Parameters
    ----------
    probabilities
        Shape ``(n_rows, n_classes)``: what a model says of each row alone. Finite and not
        negative; a row is scaled to sum to 1. A zero means "only if nothing else is possible".
    groups
        Shape ``(n_rows,)``: integers or strings; rows of a group need not be neighbours.
    quota
        How many places each class has in a group: one number, one per class, or a mapping from
        group id to either.
    temperature
        Divides the log-probabilities first; above 1 flattens. Fit it with
        :func:`stackllm.group.calibration.fit_temperature`.
    bias
        Shape ``(n_classes,)``, added to the tempered log-probabilities; matters only in groups that
        leave places free. None: nothing is added.
    exactly
        False: a class has *at most* its quota, so that a group may have fewer rows than places.
        True: all places are filled; bools ``(n_classes,)`` say it per class.
    max_states
        Groups whose lattice is larger are approximated by belief propagation (``bethe``).

    Returns
    -------
    numpy.ndarray
        Shape ``(n_rows, n_classes)``, float64; every row sums to 1. Groups with more rows than
        places (or too few for ``exactly``) keep their tempered row probabilities;
        :class:`~stackllm.group.plan.Plan` lists them.

    Raises
    ------
    DataError
        If the probabilities or groups are not usable, or a mapping lacks the quota of a group.
    UsageError
        If quota, temperature, bias or exactly make no sense.

    Examples
    --------
    The first row takes class 0 from the second, which alone could not tell:

    >>> posterior([[0.9, 0.1], [0.5, 0.5]], ["q1", "q1"]).round(3).tolist()
    [[0.9, 0.1], [0.1, 0.9]]
    """
    matrix, plan = checked(probabilities, groups, quota, exactly=exactly, max_states=max_states)
    return posterior_of(matrix, plan, Calibration.of(temperature, bias))


def posterior_of(matrix: Floats, plan: Plan, calibration: Calibration = AS_IT_IS) -> Floats:
    """The posterior of checked probabilities and their plan: what a fit calls again and again.

    Parameters
    ----------
    matrix, plan
        From :func:`stackllm.group.plan.checked`.
    calibration
        What is done to the rows first.

    Returns
    -------
    numpy.ndarray
        float64, the shape of ``matrix``; every row sums to 1.

    Raises
    ------
    UsageError
        If the bias does not fit the classes.
    """
    result = np.empty_like(matrix)
    for batch in plan.batches:
        # so many groups at a time that the whole of a large file never stands in memory twice
        step = max(1, 8_000_000 // max(1, matrix.shape[1] * batch.rows.shape[1]))
        for start in range(0, batch.n_groups, step):
            rows = batch.rows[start : start + step]
            if _follow(rows):  # as in most files; nothing needs to be copied
                block = slice(int(rows[0, 0]), int(rows[-1, -1]) + 1)
                shape = (*rows.shape, matrix.shape[1])
                _fill(
                    result[block].reshape(shape), matrix[block].reshape(shape), batch, calibration
                )
            else:
                answer = np.empty((*rows.shape, matrix.shape[1]))
                _fill(answer, matrix[rows], batch, calibration)
                result[rows] = answer
    return result


def _follow(rows: NDArray[np.intp]) -> bool:
    """Do the rows of these groups stand one after the other?"""
    return bool((np.diff(rows.ravel()) == 1).all())


def _fill(answer: Floats, part: Floats, batch: Batch, calibration: Calibration) -> None:
    """Put the posterior of some groups of one shape, ``(n_groups, n_rows, n_classes)``, in its place."""
    if batch.how == "exact":
        marginals(part, batch.quota, batch.exactly, calibration, answer)
    elif batch.how == "rows":
        answer[:] = tempered(part, calibration)
    else:
        from stackllm.group.bethe import bethe  # loads scipy.special, which few need

        answer[:] = bethe(log_weights(part, calibration), batch.quota, batch.exactly)
