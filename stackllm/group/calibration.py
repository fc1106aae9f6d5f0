"""How far to trust the rows: a temperature, and where it helps a bias a class, fitted on OOF.

Over-confident rows hurt twice once groups are taken together, because their certainty is passed
on to the others; so the temperature is fitted to the log loss of the *posterior*, not of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stackllm.group.plan import Batch, Floats, Quota, check_probabilities, plan
from stackllm.group.posterior import posterior_of
from stackllm.group.tempering import check_temperature
from stackllm.metrics import log_loss

LOWEST, HIGHEST = 0.05, 100.0
"""Temperatures tried. A best one at an end means that the rows tell nothing, or all."""

_SHARPER, _FLATTER = 0.5, 2.0
"""Standard deviations of the temperature's logarithm below and above 0 before any row is seen: to
sharpen wrongly costs without bound, to flatten wrongly never costs more than chance."""

_RIDGE = 1e-3
"""Pull of each bias to 0, in nats a squared nat: a class that never occurs must not run away."""


@dataclass(frozen=True)
class Calibration:
    """What is done to row probabilities before groups are taken together.

    Parameters
    ----------
    temperature
        Divides the log-probabilities; above 0.
    bias
        Added to them, one number a class. Empty: nothing is added.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


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
        Shape ``(n_rows,)``.
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
        If the arrays do not fit together.
    UsageError
        If quota or exactly have no sense.
    """
    matrix = check_probabilities(probabilities, groups)
    batches = plan(groups, matrix.shape[1], quota, exactly=exactly)
    return best_temperature(
        lambda t: log_loss(posterior_of(matrix, batches, t), labels), len(matrix)
    )


def fit_calibration(
    probabilities: ArrayLike,
    groups: ArrayLike,
    labels: ArrayLike,
    quota: Quota = 1,
    *,
    exactly: bool | ArrayLike = False,
) -> Calibration:
    """Temperature and a bias a class with the lowest log loss of the posterior.

    In groups whose places are all filled a bias cancels out, so where all groups are such only the
    temperature is fitted.

    Parameters
    ----------
    probabilities, groups, labels, quota, exactly
        As for :func:`fit_temperature`.

    Returns
    -------
    Calibration

    Raises
    ------
    DataError
        If the arrays do not fit together.
    UsageError
        If quota or exactly have no sense.
    """
    matrix = check_probabilities(probabilities, groups)
    truth = np.asarray(labels)
    batches = plan(groups, matrix.shape[1], quota, exactly=exactly)
    temperature = best_temperature(
        lambda t: log_loss(posterior_of(matrix, batches, t), truth), len(matrix)
    )
    if all(_is_full(batch) for batch in batches):
        return Calibration(temperature)
    return _with_bias(matrix, batches, truth, temperature)


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
    found = minimize_scalar(
        lambda x: penalised(float(np.exp(x))),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return float(np.exp(found.x)) if found.fun < losses[at] else float(grid[at])


def _with_bias(
    matrix: Floats, batches: list[Batch], truth: NDArray[np.intp], temperature: float
) -> Calibration:
    from scipy.optimize import minimize

    def loss(point: Floats) -> float:
        bias = point[1:] - point[1:].mean()
        answer = posterior_of(matrix, batches, float(np.exp(point[0])), bias)
        return log_loss(answer, truth) + _RIDGE * float(bias @ bias)

    start = np.append(np.log(temperature), np.zeros(matrix.shape[1]))
    bounds = [(np.log(LOWEST), np.log(HIGHEST))] + [(-8.0, 8.0)] * matrix.shape[1]
    found = minimize(
        loss, start, method="L-BFGS-B", bounds=bounds, options={"maxiter": 15, "eps": 1e-5}
    )
    if not found.fun < loss(start):
        return Calibration(temperature)
    bias = found.x[1:] - found.x[1:].mean()
    return Calibration(float(np.exp(found.x[0])), tuple(bias.tolist()))


def _is_full(batch: Batch) -> bool:
    return batch.how != "rows" and sum(batch.quota) == batch.rows.shape[1]
