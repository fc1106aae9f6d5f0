"""Which method, with which coefficients: fitted on some groups, judged on others."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stackllm.crossfit.folds import group_folds
from stackllm.errors import UsageError
from stackllm.group.blend import best_blend
from stackllm.group.calibration import best_temperature, calibration_of, temperature_of
from stackllm.group.optimise import METHODS, Method, optimise_of
from stackllm.group.plan import Plan, Quota, checked
from stackllm.group.sinkhorn import sinkhorn_of
from stackllm.group.tempering import Calibration
from stackllm.metrics import bootstrap_error, log_loss, row_losses
from stackllm.probabilities import Floats

CANDIDATES = ("posterior", "posterior+bias", "blend", "sinkhorn", "none")
"""What is tried when no method is named. ``assignment`` answers 0 or 1, and one wrong row costs 34.5."""


@dataclass(frozen=True)
class FitReport:
    """What cross-validation by groups found.

    Parameters
    ----------
    method
        What to use, fitted on all groups; ``none`` if nothing helps.
    candidate
        Its name among the candidates.
    scores
        Log loss of each candidate on groups that it was not fitted on.
    before, after
        Log loss of the probabilities as they came, and of the candidate that each fold's *other*
        groups chose, on that fold.
    gain, gain_error
        ``before - after`` and its standard error over groups.
    helps
        Is the gain larger than its error?
    n_groups, n_folds
        How many groups were used, in how many folds.
    """

    method: Method
    candidate: str
    scores: dict[str, float]
    before: float
    after: float
    gain: float
    gain_error: float
    helps: bool
    n_groups: int
    n_folds: int


def fit_method(
    candidate: str,
    probabilities: ArrayLike,
    groups: ArrayLike,
    labels: ArrayLike,
    quota: Quota = 1,
    *,
    exactly: bool | ArrayLike = False,
) -> Method:
    """Fit the coefficients of one method.

    Parameters
    ----------
    candidate
        A method, or ``posterior+bias``: temperature and a bias per class.
    probabilities
        Shape ``(n_rows, n_classes)``, out-of-fold predictions.
    groups
        Shape ``(n_rows,)``, the group of each row, in any order.
    labels
        Shape ``(n_rows,)``, the index of the true class.
    quota, exactly
        As for :func:`stackllm.group.posterior.posterior`.

    Returns
    -------
    Method

    Raises
    ------
    DataError
        If the arrays do not fit together, or a mapping lacks the quota of a group.
    UsageError
        If candidate, quota or exactly make no sense.
    """
    return fit_of(
        candidate,
        *checked(probabilities, groups, quota, exactly=exactly),
        np.asarray(labels),
    )


def fit_of(candidate: str, matrix: Floats, plan: Plan, truth: NDArray[np.intp]) -> Method:
    """:func:`fit_method` for checked probabilities and their plan.

    Parameters
    ----------
    candidate
        One of :data:`CANDIDATES`, or ``"assignment"``.
    matrix, plan
        As :func:`~stackllm.group.plan.checked` gives them: float64 ``(n_rows, n_classes)``, and its groups.
    truth
        Class index of each row, ``(n_rows,)``.

    Raises
    ------
    DataError
        If the labels do not fit the matrix.
    UsageError
        If there is no such candidate.
    """
    if candidate == "posterior":
        return Method("posterior", Calibration(temperature_of(matrix, plan, truth)))
    if candidate == "posterior+bias":
        return Method("posterior", calibration_of(matrix, plan, truth))
    if candidate == "blend":
        return Method("blend", blend=best_blend(matrix, plan, truth))
    if candidate == "sinkhorn":

        def loss(temperature: float) -> float:
            balanced = sinkhorn_of(matrix, plan, Calibration(temperature), tolerance=1e-3)
            return log_loss(balanced, truth)

        return Method("sinkhorn", Calibration(best_temperature(loss, len(matrix))))
    return Method(candidate)


def choose_method(
    probabilities: ArrayLike,
    groups: ArrayLike,
    labels: ArrayLike,
    quota: Quota = 1,
    *,
    method: str | None = None,
    exactly: bool | ArrayLike = False,
    n_folds: int = 5,
    seed: int = 0,
) -> FitReport:
    """Fit and compare methods by cross-validation over groups.

    The choice between candidates is itself made by cross-validation inside each fold's training groups,
    so ``gain`` is what a user can expect on groups with no label.

    Parameters
    ----------
    probabilities
        Shape ``(n_rows, n_classes)``, out-of-fold predictions.
    groups
        Shape ``(n_rows,)``, the group of each row, in any order.
    labels
        Shape ``(n_rows,)``, the index of the true class.
    quota, exactly
        As for :func:`stackllm.group.posterior.posterior`; a quota by group must name every group.
    method
        The only method to consider beside ``none``. None: all candidates.
    n_folds
        At most; with fewer groups there are as many folds as groups.
    seed
        Of the folds.

    Returns
    -------
    FitReport

    Raises
    ------
    DataError
        If the arrays do not fit together, or a mapping lacks the quota of a group.
    UsageError
        If there are fewer than two groups, or method, quota or exactly make no sense.
    """
    matrix, plan = checked(probabilities, groups, quota, exactly=exactly)
    truth = np.asarray(labels)
    before = row_losses(matrix / matrix.sum(axis=1, keepdims=True), truth)
    if plan.n_groups < 2:
        raise UsageError("fitting needs two groups or more: one to fit on and one to judge on.")
    candidates = _candidates(method, plan)
    n_folds = min(n_folds, plan.n_groups)
    folds = group_folds(plan.codes, n_folds, seed)

    def fit(name: str, rows: NDArray[np.bool_]) -> Method:
        return fit_of(name, matrix[rows], plan.part(rows), truth[rows])

    def judge(method: Method, rows: NDArray[np.bool_]) -> Floats:
        return row_losses(optimise_of(matrix[rows], plan.part(rows), method), truth[rows])

    losses = {name: np.empty(len(truth)) for name in candidates}
    for fold in range(n_folds):
        inside = folds == fold
        for name in candidates:
            losses[name][inside] = judge(fit(name, ~inside), inside)
    chosen = np.empty(len(truth))
    for fold, name in enumerate(_choices(candidates, folds, n_folds, fit, judge)):
        chosen[folds == fold] = losses[name][folds == fold]
    scores = {name: float(loss.mean()) for name, loss in losses.items()}
    best = min(scores, key=scores.__getitem__)
    gain = float((before - chosen).mean())
    error = bootstrap_error(before - chosen, plan.codes, seed)
    helps = best != "none" and gain > error
    return FitReport(
        method=fit(best, np.ones(len(truth), dtype=bool)) if helps else Method("none"),
        candidate=best if helps else "none",
        scores=scores,
        before=float(before.mean()),
        after=float(chosen.mean()),
        gain=gain,
        gain_error=error,
        helps=helps,
        n_groups=plan.n_groups,
        n_folds=n_folds,
    )


def _choices(
    candidates: list[str],
    folds: NDArray[np.int32],
    n_folds: int,
    fit: Callable[[str, NDArray[np.bool_]], Method],
    judge: Callable[[Method, NDArray[np.bool_]], Floats],
) -> list[str]:
    """What each fold's *other* folds choose, by a cross-validation among themselves.

    A method fitted without two folds tells each of the two how it does on the other one. Two folds
    alone leave nothing to fit on then, so the first candidate is what is judged.
    """
    if n_folds < 3 or len(candidates) == 1:
        return [candidates[0]] * n_folds
    sums = {name: np.zeros(n_folds) for name in candidates}
    for one, other in itertools.combinations(range(n_folds), 2):
        rest = (folds != one) & (folds != other)
        for name in candidates:
            method = fit(name, rest)
            sums[name][one] += judge(method, folds == other).sum()
            sums[name][other] += judge(method, folds == one).sum()
    return [min(candidates, key=lambda name: sums[name][fold]) for fold in range(n_folds)]


def _candidates(method: str | None, plan: Plan) -> list[str]:
    # where every place is filled a bias cancels out, so there it would only cost time
    if method is None:
        return [name for name in CANDIDATES if not (plan.is_full and name == "posterior+bias")]
    if method not in METHODS:
        Method(method)  # says what there is
    bias = ["posterior+bias"] if method == "posterior" and not plan.is_full else []
    return [*dict.fromkeys([method, *bias, "none"])]
