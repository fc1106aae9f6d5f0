"""Probabilities and groups as arrays: what is usable, logarithms, softmax, weighted products of models."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stackllm.errors import DataError

Floats: TypeAlias = NDArray[np.float64]

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


def log_sum(logs: np.ndarray, axis: int) -> np.ndarray:
    """Log of the sum of exponentials along an axis, which goes; any shape, -inf where all of them are -inf."""
    top = np.maximum(logs.max(axis=axis, keepdims=True), -1e300)
    with np.errstate(divide="ignore"):
        summed: np.ndarray = np.squeeze(top, axis) + np.log(np.exp(logs - top).sum(axis=axis))
    return summed


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


def check_probabilities(probabilities: ArrayLike, groups: ArrayLike) -> Floats:
    """The matrix as float64, once it is known to be usable.

    Raises
    ------
    DataError
        If the shape is not ``(n_rows, n_classes)`` with one group id per row, or a value is NaN,
        infinite or negative, or a row is all zero.
    """
    matrix = as_numbers(probabilities, "probabilities")
    n_groups = as_array(groups, "groups").shape
    if matrix.ndim != 2 or not matrix.shape[1] or n_groups != matrix.shape[:1]:
        raise DataError(
            "probabilities must be (n_rows, n_classes) with one group id per row; "
            f"the shapes are {matrix.shape} and {n_groups}."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        # several times faster than a sum over few columns
        total = matrix @ np.ones(matrix.shape[1])
    # NaN and inf survive a sum, and a minimum finds the negative ones: two passes see everything
    if np.isfinite(total).all() and (matrix.size == 0 or matrix.min() >= 0) and (total > 0).all():
        return matrix
    bad = ~np.isfinite(matrix).all(axis=1) | (matrix < 0).any(axis=1) | ~(total > 0)
    first = int(bad.argmax())
    raise DataError(
        f"probabilities must be finite, not negative, and not all zero in a row; {int(bad.sum())} "
        f"rows are otherwise (first: row {first}, counted from 0: {matrix[first].tolist()[:10]})."
    )


def group_codes(groups: ArrayLike) -> tuple[NDArray[np.intp], NDArray[Any]]:
    """Number the groups: ``(codes, names)`` with ``names[codes] == groups``.

    Raises
    ------
    DataError
        If ``groups`` is not one-dimensional or its values cannot be told apart (None, NaN).
    """
    values = as_array(groups, "groups")
    if values.ndim != 1:
        raise DataError(
            f"groups must be one id per row, shape (n_rows,); its shape is {values.shape}."
        )
    if values.dtype.kind in "iu" and len(values):
        low, span = int(values.min()), int(values.max()) - int(values.min()) + 1
        # counting is many times faster than sorting; small types would overflow on the way
        if span <= 4 * len(values) and abs(low) + span < 2**62:
            offset = values.astype(np.int64, copy=False) - low
            seen = np.bincount(offset, minlength=span) > 0
            return (np.cumsum(seen) - 1)[offset], np.flatnonzero(seen) + low
    try:
        if values.dtype.kind in "fO":
            missing = np.array([value is None or value != value for value in values.tolist()], bool)
            if missing.any():
                row = int(missing.argmax())
                raise DataError(
                    f"groups is {values[row]} in row {row} (counted from 0). Give every row a group, or leave it out."
                )
        names, codes = np.unique(values, return_inverse=True)
    except TypeError as error:
        kinds = ", ".join(sorted({type(value).__name__ for value in values.tolist()}))
        raise DataError(f"groups must be all strings or all numbers; they are {kinds}.") from error
    return codes.astype(np.intp, copy=False), names


def as_array(values: ArrayLike, name: str) -> NDArray[Any]:
    """Anything array-like as an array, whatever its shape.

    Raises
    ------
    DataError
        If it is none, with the ``name`` of what it should be.
    """
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{name} must be an array whose rows are equally long: {error}.") from error


def as_numbers(values: ArrayLike, name: str) -> Floats:
    """Anything array-like of numbers as float64 of any shape, uncopied where it is that already.

    Raises
    ------
    DataError
        If it is none, with the ``name`` of what it should be.
    """
    array = as_array(values, name)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} must be numbers; they are {array.dtype}. Convert them to floats.")
    return array.astype(np.float64, copy=False)
