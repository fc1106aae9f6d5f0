"""Which method, with which coefficients: fitted on some groups, judged on others."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stackllm.crossfit.folds import assign_folds
from stackllm.errors import UsageError
from stackllm.group.blend import fit_blend
from stackllm.group.calibration import (
    Calibration,
    best_temperature,
    fit_calibration,
    fit_temperature,
)
from stackllm.group.optimise import METHODS, Method, optimise
from stackllm.group.plan import Floats, Quota, check_probabilities, group_codes, plan
from stackllm.group.sinkhorn import sinkhorn_of
from stackllm.metrics import bootstrap_error, log_loss, row_losses

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
        A method, or ``posterior+bias``: temperature and a bias a class.
    probabilities
        Shape ``(n_rows, n_classes)``, out-of-fold predictions.
    groups
        Shape ``(n_rows,)``.
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
        If the arrays do not fit together.
    UsageError
        If the candidate, quota or exactly have no sense.
    """
    if candidate == "posterior":
        temperature = fit_temperature(probabilities, groups, labels, quota, exactly=exactly)
        return Method("posterior", Calibration(temperature))
    if candidate == "posterior+bias":
        return Method(
            "posterior", fit_calibration(probabilities, groups, labels, quota, exactly=exactly)
        )
    if candidate == "blend":
        return Method(
            "blend", blend=fit_blend(probabilities, groups, labels, quota, exactly=exactly)
        )
    if candidate == "sinkhorn":
        matrix = check_probabilities(probabilities, groups)
        batches = plan(groups, matrix.shape[1], quota, exactly=exactly)
        temperature = best_temperature(
            lambda t: log_loss(sinkhorn_of(matrix, batches, t, tolerance=1e-3), labels),
            len(matrix),
        )
        return Method("sinkhorn", Calibration(temperature))
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
        Shape ``(n_rows,)``.
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
        If the arrays do not fit together.
    UsageError
        If there are fewer than two groups, or method, quota or exactly have no sense.
    """
    matrix = check_probabilities(probabilities, groups)
    truth, names = np.asarray(labels), np.asarray(groups)
    codes, distinct = group_codes(names)
    if len(distinct) < 2:
        raise UsageError("fitting needs two groups or more: one to fit on and one to judge on.")
    candidates = _candidates(method, matrix, names, quota, exactly)
    n_folds = min(n_folds, len(distinct))
    folds = assign_folds(codes.astype(str), n_folds, seed)

    def fit(name: str, rows: NDArray[np.bool_]) -> Method:
        return fit_method(name, matrix[rows], names[rows], truth[rows], quota, exactly=exactly)

    def judge(method: Method, rows: NDArray[np.bool_]) -> Floats:
        answer = optimise(matrix[rows], names[rows], quota, method=method, exactly=exactly)
        return row_losses(answer, truth[rows])

    losses = {name: np.empty(len(truth)) for name in candidates}
    for fold in range(n_folds):
        own = folds == fold
        for name in candidates:
            losses[name][own] = judge(fit(name, ~own), own)
    chosen = np.empty(len(truth))
    for fold, name in enumerate(_choices(candidates, folds, n_folds, fit, judge)):
        chosen[folds == fold] = losses[name][folds == fold]
    before = row_losses(matrix / matrix.sum(axis=1, keepdims=True), truth)
    scores = {name: float(loss.mean()) for name, loss in losses.items()}
    best = min(scores, key=scores.__getitem__)
    gain = float((before - chosen).mean())
    error = bootstrap_error(before - chosen, codes, seed)
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
        n_groups=len(distinct),
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


def _candidates(
    method: str | None,
    matrix: Floats,
    groups: NDArray[np.generic],
    quota: Quota,
    exactly: bool | ArrayLike,
) -> list[str]:
    batches = plan(groups, matrix.shape[1], quota, exactly=exactly)
    # a bias cancels out where every place is filled, so there it would only cost time
    free = any(b.how == "rows" or sum(b.quota) > b.rows.shape[1] for b in batches)
    if method is None:
        return [name for name in CANDIDATES if free or name != "posterior+bias"]
    if method not in METHODS:
        Method(method)  # says what there is
    bias = ["posterior+bias"] if method == "posterior" and free else []
    return [*dict.fromkeys([method, *bias, "none"])]
