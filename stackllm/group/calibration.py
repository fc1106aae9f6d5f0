"""How far to trust the rows: a temperature, and where it helps a bias per class, fitted on OOF.

Over-confident rows hurt twice once groups are taken together, because their certainty is passed
on to the others; so the temperature is fitted to the log loss of the *posterior*, not of the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stackllm.group.plan import Plan, Quota, checked
from stackllm.group.posterior import posterior_of
from stackllm.group.tempering import Calibration
from stackllm.metrics import log_loss
from stackllm.probabilities import Floats

LOWEST, HIGHEST = 0.05, 100.0
"""Temperatures tried. A best one at an end means that the rows tell nothing, or all."""

_SHARPER, _FLATTER = 0.5, 2.0
"""Standard deviations of the temperature's logarithm below and above 0 before any row is seen: to
sharpen wrongly costs without bound, to flatten wrongly never costs more than chance."""

_RIDGE = 1e-3
"""Pull of each bias to 0, in nats per squared nat: a class that never occurs must not run away."""


def fit_temperature(
    probabilities: ArrayLike,
    groups: ArrayLike,
    labels: ArrayLike,
    quota: Quota = 1,
    *,
    exactly: bool | ArrayLike = False,
) -> float:
    """The temperature with the lowest log loss of the posterior.

    Parameters
    ----------
    probabilities
        Shape ``(n_rows, n_classes)``: out-of-fold predictions, or the temperature comes out too
        low.
    groups
        Shape ``(n_rows,)``, the group of each row, in any order.
    labels
        Shape ``(n_rows,)``, the index of the true class.
    quota, exactly
        As for :func:`stackllm.group.posterior.posterior`.

    Returns
    -------
    float
        From 0.05 to 100, to about a thousandth of itself.

    Raises
    ------
    DataError
        If the arrays do not fit together, or a mapping lacks the quota of a group.
    UsageError
        If quota or exactly make no sense.
    """
    matrix, plan = checked(probabilities, groups, quota, exactly=exactly)
    return temperature_of(matrix, plan, np.asarray(labels))


def temperature_of(matrix: Floats, plan: Plan, truth: NDArray[np.intp]) -> float:
    """:func:`fit_temperature` for checked probabilities and their plan.

    Parameters
    ----------
    matrix, plan
        As :func:`~stackllm.group.plan.checked` gives them: float64 ``(n_rows, n_classes)``, and its groups.
    truth
        Class index of each row, ``(n_rows,)``.

    Raises
    ------
    DataError
        If the labels do not fit the matrix.
    """

    def loss(temperature: float) -> float:
        return log_loss(posterior_of(matrix, plan, Calibration(temperature)), truth)

    return best_temperature(loss, len(matrix))


def calibration_of(matrix: Floats, plan: Plan, truth: NDArray[np.intp]) -> Calibration:
    """Temperature and a bias per class with the lowest log loss of the posterior.

    In groups whose places are all filled a bias cancels out, so where all groups are such only the
    temperature is fitted.

    Parameters
    ----------
    matrix, plan
        From :func:`stackllm.group.plan.checked`; out-of-fold predictions.
    truth
        Whole numbers ``(n_rows,)``, the index of each row's true class.

    Raises
    ------
    DataError
        If the labels do not fit the matrix.
    """
    temperature = temperature_of(matrix, plan, truth)
    if plan.is_full:
        return Calibration(temperature)
    from scipy.optimize import minimize

    def at(point: Floats) -> Calibration:
        bias = point[1:] - point[1:].mean()
        return Calibration(float(np.exp(point[0])), tuple(bias.tolist()))

    def loss(point: Floats) -> float:
        calibration = at(point)
        answer = posterior_of(matrix, plan, calibration)
        bias = np.array(calibration.bias)
        return log_loss(answer, truth) + _RIDGE * float(bias @ bias)

    start = np.append(np.log(temperature), np.zeros(plan.n_classes))
    bounds = [(np.log(LOWEST), np.log(HIGHEST))] + [(-8.0, 8.0)] * plan.n_classes
    best = minimize(
        loss, start, method="L-BFGS-B", bounds=bounds, options={"maxiter": 15, "eps": 1e-5}
    )
    return at(best.x) if best.fun < loss(start) else Calibration(temperature)


def best_temperature(loss: Callable[[float], float], n_rows: int) -> float:
    """Minimise the mean ``loss(temperature)`` of ``n_rows`` rows, with a prior on the temperature.

    A coarse scan finds the valley, Brent's method its floor. The prior is worth a fraction of one
    group: it decides where a handful of groups happens to be separable, and nothing on hundreds.
    Towards flatter rows it gives way, or rows of pure noise would keep some of their certainty.
    """
    from scipy.optimize import minimize_scalar  # 0.2 s to import, and only fits need it

    def penalised(t: float) -> float:
        spread = _SHARPER if t < 1 else _FLATTER
        return loss(t) + 0.5 * float(np.log(t) / spread) ** 2 / n_rows

    grid = np.geomspace(LOWEST, HIGHEST, 13)
    losses = [penalised(float(t)) for t in grid]
    at = int(np.argmin(losses))
    low, high = np.log(grid[max(at - 1, 0)]), np.log(grid[min(at + 1, len(grid) - 1)])
    best = minimize_scalar(
        lambda x: penalised(float(np.exp(x))),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return float(np.exp(best.x)) if best.fun < losses[at] else float(grid[at])
