"""The contest's recipe: the 0/1 assignment blended with the raw matrix, then pushed apart.

Three coefficients, found by a systematic search on OOF: how much the assignment weighs, how far
each row's maximum is pushed towards 1, and how far the other probabilities are pushed towards 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stackllm.errors import UsageError
from stackllm.group.assignment import assign_of, one_hot
from stackllm.group.plan import Plan
from stackllm.metrics import row_losses
from stackllm.probabilities import Floats


@dataclass(frozen=True)
class BlendParams:
    """Coefficients of the blend, each from 0 (nothing happens) to 1.

    Parameters
    ----------
    weight
        Share of the 0/1 assignment in the mixture with the raw probabilities.
    up
        How far the row's maximum goes towards 1.
    down
        How far the row's other values go towards 0.
    """

    weight: float = 0.0
    up: float = 0.0
    down: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "up", "down"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UsageError(f"{name} must be from 0 to 1; it is {value}.")


def blend_of(matrix: Floats, plan: Plan, labels: NDArray[np.intp], params: BlendParams) -> Floats:
    """Apply the recipe.

    Parameters
    ----------
    matrix
        float64 ``(n_rows, n_classes)``, rows that sum to 1.
    plan
        Of its rows.
    labels
        intp ``(n_rows,)``, the likeliest assignment.
    params
        The coefficients.

    Returns
    -------
    numpy.ndarray
        float64, the shape of ``matrix``; every row sums to 1. Rows of groups that do not fit their
        quotas stay as they are.
    """
    result = _pushed(matrix, labels, params)
    result[plan.alone] = matrix[plan.alone]
    return result


def best_blend(matrix: Floats, plan: Plan, truth: NDArray[np.intp]) -> BlendParams:
    """The coefficients with the lowest log loss: a grid, refined four times around its best point.

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
    matrix = matrix / matrix.sum(axis=1, keepdims=True)
    row_losses(matrix, truth)  # refuses labels that are no columns
    assigned = assign_of(matrix, plan)
    changed = np.ones(len(matrix), dtype=np.bool_)
    changed[plan.alone] = False
    if not changed.any():
        return BlendParams()
    matrix, assigned, truth = matrix[changed], assigned[changed], truth[changed]
    best, best_loss = np.zeros(3), np.inf
    span = 0.5
    centre = np.full(3, 0.5)
    for _ in range(5):
        steps = np.clip(centre[:, None] + span * np.linspace(-1, 1, 7), 0.0, 1.0)
        for weight in np.unique(steps[0]):
            mixed = _Mixture(matrix, assigned, truth, float(weight))
            for up in np.unique(steps[1]):
                for down in np.unique(steps[2]):
                    loss = mixed.loss(float(up), float(down))
                    if loss < best_loss:
                        best, best_loss = np.array([weight, up, down]), loss
        centre, span = best, span / 3
    return BlendParams(*(float(value) for value in best))


class _Mixture:
    """What the loss of one weight needs: each row's maximum, and its truth's place and value."""

    def __init__(
        self, matrix: Floats, assigned: NDArray[np.intp], truth: NDArray[np.intp], weight: float
    ) -> None:
        row = np.arange(len(matrix))
        mixed = (1 - weight) * matrix
        mixed[row, assigned] += weight
        top = mixed.argmax(axis=1)
        self.largest = mixed[row, top]
        self.given = mixed[row, truth]
        self.hit = top == truth

    def loss(self, up: float, down: float) -> float:
        raised = self.largest + up * (1 - self.largest)
        total = raised + (1 - down) * (1 - self.largest)
        given = np.where(self.hit, raised, (1 - down) * self.given) / total
        return float(-np.log(np.clip(given, 1e-15, 1.0)).mean())


def _pushed(matrix: Floats, assigned: NDArray[np.intp], params: BlendParams) -> Floats:
    mixed = (1 - params.weight) * matrix + params.weight * one_hot(assigned, matrix.shape[1])
    row, top = np.arange(len(mixed)), mixed.argmax(axis=1)
    largest = mixed[row, top]
    mixed *= 1 - params.down
    mixed[row, top] = largest + params.up * (1 - largest)
    mixed /= mixed.sum(axis=1, keepdims=True)
    return mixed
