"""Calibration and stage three inside a cross-fit: no row meets a temperature fitted on its own label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stackllm.crossfit.design import CrossFit, Design
from stackllm.group.calibration import temperature_of
from stackllm.group.plan import Plan, checked
from stackllm.group.posterior import posterior_of
from stackllm.group.tempering import Calibration
from stackllm.probabilities import check_probabilities, log_probabilities, softmax


@dataclass(frozen=True)
class Calibrated:
    """Calibrated row probabilities and group posteriors of a cross-fit.

    Parameters
    ----------
    rows
        Row probabilities, calibrated one by one: what is known before the group is looked at.
    predictions
        Posteriors: fold k, and the test rows as fold k's models see them, with the temperature
        that suits the other folds.
    temperatures
        That temperature for each fold, ``(n_folds,)``.
    """

    rows: CrossFit
    predictions: CrossFit
    temperatures: np.ndarray

    @property
    def oof(self) -> np.ndarray:
        """Posteriors of the training rows, ``(n_train, n_classes)``."""
        return self.predictions.oof


def cross_posteriors(
    predictions: CrossFit, design: Design, quota: int, temperature: float | None = None
) -> Calibrated:
    """Calibrated rows and group posteriors, temperatures nested by fold.

    Parameters
    ----------
    predictions
        Row probabilities.
    design
        Folds and groups.
    quota
        How often a class stands in a group.
    temperature
        Of the posteriors of every fold, for predictions that are calibrated to them. None: fitted
        on the other folds.
    """
    matrix, plan = checked(predictions.oof, design.train_groups, quota)
    oof, temperatures = nested_posterior(matrix, plan, design.labels, design.folds, temperature)
    test = fold_posteriors(predictions.test, design.test_groups, quota, temperatures)
    # rows that are calibrated to their posteriors stay as they are: another temperature on them alone
    # would show a gain of the group even where no group has a second row
    rows = cross_calibrate(predictions, design) if temperature is None else predictions
    return Calibrated(rows, CrossFit(oof, test), temperatures)


def nested_posterior(
    matrix: np.ndarray,
    plan: Plan,
    labels: np.ndarray,
    folds: np.ndarray,
    temperature: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Group posteriors of labelled rows, ``(n_rows, n_classes)``, and the temperature of each fold.

    Parameters
    ----------
    matrix, plan
        From :func:`~stackllm.group.plan.checked`.
    labels, folds
        Class index and fold of each row, ``(n_rows,)``.
    temperature
        Of every fold. None: the one that suits the other folds.
    """
    oof = np.empty_like(matrix)
    temperatures = np.full(int(folds.max()) + 1, temperature or 1.0)
    for fold in range(len(temperatures)):
        rest, inside = folds != fold, folds == fold
        if temperature is None:
            temperatures[fold] = temperature_of(matrix[rest], plan.part(rest), labels[rest])
        calibration = Calibration(float(temperatures[fold]))
        oof[inside] = posterior_of(matrix[inside], plan.part(inside), calibration)
    return oof, temperatures


def cross_calibrate(predictions: CrossFit, design: Design) -> CrossFit:
    """Row probabilities at the temperature that suits the rows of the other folds.

    Parameters
    ----------
    predictions
        Row probabilities.
    design
        Folds.
    """
    # each row is a group of its own
    matrix, plan = checked(predictions.oof, np.arange(len(predictions.oof)))
    oof = np.empty_like(predictions.oof)
    test = np.empty_like(predictions.test)
    for fold in range(design.n_folds):
        rest, inside = design.folds != fold, design.folds == fold
        temperature = temperature_of(matrix[rest], plan.part(rest), design.labels[rest])
        oof[inside] = softmax(log_probabilities(predictions.oof[inside]) / temperature)
        test[fold] = softmax(log_probabilities(predictions.test[fold]) / temperature)
    return CrossFit(oof, test)


def fold_posteriors(
    test: np.ndarray, groups: np.ndarray, quota: int, temperatures: np.ndarray
) -> np.ndarray:
    """Posteriors of the same rows as each fold's models see them.

    Parameters
    ----------
    test
        Row probabilities ``(n_folds, n_rows, n_classes)``.
    groups
        Group of each row, ``(n_rows,)``.
    quota
        How often a class stands in a group.
    temperatures
        Temperature of each fold.

    Returns
    -------
    numpy.ndarray
        ``(n_folds, n_rows, n_classes)``.
    """
    plan = Plan.of(groups, test.shape[2], quota)
    return np.stack(
        [
            posterior_of(check_probabilities(matrix, groups), plan, Calibration(temperature))
            for matrix, temperature in zip(test, temperatures.tolist(), strict=True)
        ]
    )
