"""Row probabilities as log-weights with a temperature and a bias per class."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from stackllm.errors import UsageError
from stackllm.probabilities import Floats, as_numbers, softmax

SMALLEST = 5e-324
"""What an exact zero counts as: the smallest double, log -744.4. So an impossible class is taken
only where every assignment needs one, and then as few of them as can be."""

LEAST = -230.0
"""Log of the smallest weight, 1e-100, that methods work with which go round until all agrees: from
farther away they do not arrive, and contradictory certainties come out as nonsense."""


@dataclass(frozen=True)
class Calibration:
    """What is done to row probabilities before groups are taken together.

    Parameters
    ----------
    temperature
        Divides the log-probabilities, from 1e-6 to 1e6; above 1 it flattens, below 1 it sharpens.
    bias
        Added to them then, one number per class. Empty: nothing is added.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, numbers.Real) or not 1e-6 <= self.temperature <= 1e6:
            raise UsageError(
                f"temperature must be between 1e-6 and 1e6; it is {self.temperature!r}."
            )

    @classmethod
    def of(cls, temperature: float, bias: ArrayLike | None) -> Calibration:
        """From a bias that may be an array ``(n_classes,)`` or None.

        Raises
        ------
        DataError
            If the bias is no array of numbers.
        UsageError
            If the temperature is out of its range, or the bias is no list.
        """
        if bias is None:
            return cls(temperature)
        added = as_numbers(bias, "bias")
        if added.ndim != 1 or not len(added):
            raise UsageError(f"bias must be one number per class; its shape is {added.shape}.")
        return cls(temperature, tuple(added.tolist()))


AS_IT_IS = Calibration()
"""Nothing is done to the rows."""


def log_weights(matrix: Floats, calibration: Calibration = AS_IT_IS) -> Floats:
    """``log(p) / temperature + bias``, the largest of each row being 0.

    Parameters
    ----------
    matrix
        Shape ``(..., n_classes)``, not negative, no row all zero.
    calibration
        Temperature and bias.

    Returns
    -------
    numpy.ndarray
        float64, the shape of ``matrix``, finite.

    Raises
    ------
    UsageError
        If the bias does not fit the classes.
    """
    logs = np.log(np.maximum(matrix, SMALLEST))
    logs /= calibration.temperature
    if calibration.bias:
        bias, n_classes = np.asarray(calibration.bias), matrix.shape[-1]
        if len(bias) != n_classes or not np.isfinite(bias).all():
            raise UsageError(
                f"bias must be {n_classes} finite numbers, one per class; it is {bias.tolist()}."
            )
        logs += bias
    logs -= logs.max(axis=-1, keepdims=True)
    return logs


def tempered(matrix: Floats, calibration: Calibration = AS_IT_IS) -> Floats:
    """Rows alone, with temperature and bias, that sum to 1.

    Where neither does anything, rows that sum to 1 already stay as they are to the last digit.

    Parameters
    ----------
    matrix, calibration
        As for :func:`log_weights`.

    Returns
    -------
    numpy.ndarray
        float64, the shape of ``matrix``.

    Raises
    ------
    UsageError
        If the bias does not fit the classes.
    """
    if calibration != AS_IT_IS:
        return softmax(log_weights(matrix, calibration))
    total = matrix.sum(axis=-1, keepdims=True)
    result: Floats = np.where(np.abs(total - 1) < 1e-12, matrix, matrix / total)
    result += 0.0  # a zero with a minus sign becomes one without
    return result
