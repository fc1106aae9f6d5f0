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
from stackllm.group.plan import (
    MAX_STATES,
    Batch,
    Floats,
    Quota,
    check_probabilities,
    plan,
)
from stackllm.group.tempering import check_tempering, log_weights, tempered


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
        How many places each class has in a group: one number, one a class, or a mapping from
        group id to either.
    temperature
        Divides the log-probabilities first; above 1 flattens. Fit it with
        :func:`stackllm.group.calibration.fit_temperature`.
    bias
        Shape ``(n_classes,)``, added to the tempered log-probabilities; matters only in groups that
        leave places free. None: nothing is added.
    exactly
        False: a class has *at most* its quota, so that a group may have fewer rows than places.
        True, or True a class: all its places are filled.
    max_states
        Groups whose lattice is larger are approximated by belief propagation (``bethe``).

    Returns
    -------
    numpy.ndarray
        Shape ``(n_rows, n_classes)``, float64; every row sums to 1. Groups with more rows than
        places (or too few for ``exactly``) keep their tempered row probabilities; :func:`plan`
        lists them.

    Raises
    ------
    DataError
        If the probabilities or groups are not usable.
    UsageError
        If quota, temperature or bias have no sense.

    Examples
    --------
    The first row takes class 0 from the second, which alone could not tell:

    >>> posterior([[0.9, 0.1], [0.5, 0.5]], ["q1", "q1"]).round(3).tolist()
    [[0.9, 0.1], [0.1, 0.9]]
    """
    matrix = check_probabilities(probabilities, groups)
    batches = plan(groups, matrix.shape[1], quota, exactly=exactly, max_states=max_states)
    return posterior_of(matrix, batches, temperature, bias)


def posterior_of(
    matrix: Floats, batches: list[Batch], temperature: float = 1.0, bias: ArrayLike | None = None
) -> Floats:
    """The posterior of checked probabilities and a ready plan: what a fit calls again and again.

    Parameters
    ----------
    matrix
        From :func:`stackllm.group.plan.check_probabilities`.
    batches
        From :func:`stackllm.group.plan.plan`.
    temperature, bias
        As for :func:`posterior`.

    Returns
    -------
    numpy.ndarray
        Shape of ``matrix``; every row sums to 1.

    Raises
    ------
    UsageError
        If temperature or bias have no sense.
    """
    added = check_tempering(temperature, bias, matrix.shape[1])
    result = np.empty_like(matrix)
    for batch in batches:
        # so many groups at a time that the whole of a large file never stands in memory twice
        step = max(1, 8_000_000 // max(1, matrix.shape[1] * batch.rows.shape[1]))
        for start in range(0, batch.n_groups, step):
            rows = batch.rows[start : start + step]
            if _follow(rows):  # as in most files; nothing needs to be copied
                own = slice(int(rows[0, 0]), int(rows[-1, -1]) + 1)
                shape = (*rows.shape, matrix.shape[1])
                given, answer = matrix[own].reshape(shape), result[own].reshape(shape)
                _part(given, batch, temperature, added, answer)
            else:
                result[rows] = _part(matrix[rows], batch, temperature, added)
    return result


def _follow(rows: NDArray[np.intp]) -> bool:
    """Do the rows of these groups stand one after the other?"""
    return bool((np.diff(rows.ravel()) == 1).all())


def _part(
    part: Floats,
    batch: Batch,
    temperature: float,
    bias: Floats | None,
    out: Floats | None = None,
) -> Floats:
    """Rows to posterior for some groups of one shape: ``(n_groups, n_rows, n_classes)``."""
    if batch.how == "exact":
        return marginals(part, batch.quota, batch.exactly, temperature, bias, out)
    if batch.how == "rows":
        found = tempered(part, temperature, bias)
    else:
        from stackllm.group.bethe import bethe  # loads scipy.special, which few need

        found = bethe(log_weights(part, temperature, bias), batch.quota, batch.exactly)
    if out is not None:
        out[:] = found
    return found
