"""Row probabilities as log-weights with a temperature and a bias a class."""

from __future__ import annotations

import numbers

import numpy as np
from numpy.typing import ArrayLike

from stackllm.errors import UsageError
from stackllm.group.plan import Floats

SMALLEST = 5e-324
"""What an exact zero counts as: the smallest double, log -744.4. So an impossible class is taken
only where every assignment needs one, and then as few of them as can be."""

LEAST = -230.0
"""Log of the smallest weight, 1e-100, that methods work with which go round until all agrees: from
farther away they do not arrive, and contradictory certainties come out as nonsense."""


def log_weights(matrix: Floats, temperature: float = 1.0, bias: ArrayLike | None = None) -> Floats:
    """``log(p) / temperature + bias``, the largest of each row being 0.

    Parameters
    ----------
    matrix
        Shape ``(..., n_classes)``, not negative, no row all zero.
    temperature
        Above 0; above 1 it flattens, below 1 it sharpens.
    bias
        Shape ``(n_classes,)``. None: nothing is added.

    Returns
    -------
    numpy.ndarray
        Shape of ``matrix``, finite.

    Raises
    ------
    UsageError
        If the temperature is not a number above 0, or the bias does not fit the classes.
    """
    added = check_tempering(temperature, bias, matrix.shape[-1])
    logs = np.log(np.maximum(matrix, SMALLEST))
    logs /= temperature
    if added is not None:
        logs += added
    logs -= logs.max(axis=-1, keepdims=True)
    return logs


def check_tempering(temperature: float, bias: ArrayLike | None, n_classes: int) -> Floats | None:
    """The bias as an array, once temperature and bias are known to have sense.

    Raises
    ------
    UsageError
        If the temperature is not between 1e-6 and 1e6, or the bias is not ``(n_classes,)`` finite
        numbers.
    """
    check_temperature(temperature)
    if bias is None:
        return None
    added = np.asarray(bias, dtype=np.float64)
    if added.shape != (n_classes,) or not np.isfinite(added).all():
        raise UsageError(
            f"bias must be {n_classes} finite numbers, one a class; it has shape {added.shape}."
        )
    return added


def check_temperature(temperature: float) -> None:
    """Refuse what cannot divide a log-probability.

    Raises
    ------
    UsageError
        If it is not a number between 1e-6 and 1e6.
    """
    if not isinstance(temperature, numbers.Real) or not 1e-6 <= temperature <= 1e6:
        raise UsageError(f"temperature must be between 1e-6 and 1e6; it is {temperature!r}.")


def softmax(logs: Floats) -> Floats:
    """Exponentials that sum to 1 along the last axis."""
    powers = np.exp(logs - logs.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    share: Floats = powers
    return share


def tempered(matrix: Floats, temperature: float = 1.0, bias: ArrayLike | None = None) -> Floats:
    """Rows alone, with temperature and bias, that sum to 1.

    Where neither does anything, rows that sum to 1 already stay as they are to the last digit.

    Parameters
    ----------
    matrix, temperature, bias
        As for :func:`log_weights`.

    Returns
    -------
    numpy.ndarray
        Shape of ``matrix``.
    """
    if temperature != 1.0 or bias is not None:
        return softmax(log_weights(matrix, temperature, bias))
    total = matrix.sum(axis=-1, keepdims=True)
    result: Floats = np.where(np.abs(total - 1) < 1e-12, matrix, matrix / total)
    result += 0.0  # a zero with a minus sign becomes one without
    return result
