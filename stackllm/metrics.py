"""How good predictions are, and how sure we can be of that.

Rows of one group answer the same question, so they rise and fall together: every error bar here
resamples whole groups, never single rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stackllm.errors import DataError
from stackllm.probabilities import Floats, as_array, as_numbers, group_codes

CLIP = 1e-15
"""Probabilities below this count as this, as in the contest's own metric."""


def row_losses(probabilities: ArrayLike, labels: ArrayLike) -> Floats:
    """Minus the log of the probability that each row gave to its true class.

    Parameters
    ----------
    probabilities
        Shape ``(n_rows, n_classes)``, in [0, 1]; values under 1e-15 are raised to it.
    labels
        Shape ``(n_rows,)``, the index of the true class.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_rows,)``, in nats, from 0 to 34.5.

    Raises
    ------
    DataError
        If the shapes disagree, a probability is no number, a label is no column, or there is no row.

    Examples
    --------
    >>> row_losses([[0.5, 0.5], [1.0, 0.0]], [0, 0]).round(3).tolist()
    [0.693, 0.0]
    """
    matrix, truth = _checked(probabilities, labels)
    given = matrix[np.arange(len(truth)), truth]
    losses: Floats = np.maximum(-np.log(np.clip(given, CLIP, 1.0)), 0.0)
    return losses


def log_loss(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean of :func:`row_losses`: the multiclass log loss, in nats; lower is better.

    Parameters
    ----------
    probabilities, labels
        As for :func:`row_losses`; at least one row.

    Returns
    -------
    float

    Raises
    ------
    DataError
        If the shapes disagree, a probability is no number, a label is no column, or there is no row.
    """
    return float(np.mean(row_losses(probabilities, labels)))


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows whose likeliest class is the true one.

    Parameters
    ----------
    probabilities
        Shape ``(n_rows, n_classes)``; of equal probabilities the first counts as the likeliest.
    labels
        Shape ``(n_rows,)``, the index of the true class.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    DataError
        If the shapes disagree, a probability is no number, a label is no column, or there is no row.
    """
    matrix, truth = _checked(probabilities, labels)
    return float(np.mean(matrix.argmax(axis=1) == truth))


def group_exact_accuracy(predicted: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> float:
    """Share of groups in which every row is right.

    Parameters
    ----------
    predicted
        Shape ``(n_rows,)``, the index of the predicted class.
    labels
        Shape ``(n_rows,)``, the index of the true class.
    groups
        Shape ``(n_rows,)``, the group of each row, in any order.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    DataError
        If the three lengths differ or are zero, or groups are no ids.

    Examples
    --------
    >>> group_exact_accuracy([0, 1, 0, 1], [0, 1, 1, 1], ["a", "a", "b", "b"])
    0.5
    """
    guess, truth = as_array(predicted, "predicted"), as_array(labels, "labels")
    names = as_array(groups, "groups")
    if not guess.shape == truth.shape == names.shape or guess.ndim != 1 or not len(guess):
        raise DataError(
            f"predicted, labels and groups must be three equally long lists of at least one row; "
            f"their shapes are {guess.shape}, {truth.shape} and {names.shape}."
        )
    wrong = np.bincount(group_codes(names)[0], weights=guess != truth)
    return float(np.mean(wrong == 0))


def auc(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Macro average over classes of the one-versus-rest area under the ROC curve.

    By the rank formula (Mann and Whitney 1947): the share of pairs of a row of the class and a
    row of another class in which the first has the larger probability, ties counted half. Classes
    that no row has, or that every row has, are left out of the average.

    Parameters
    ----------
    probabilities
        Shape ``(n_rows, n_classes)``.
    labels
        Shape ``(n_rows,)``, the index of the true class.

    Returns
    -------
    float
        In [0, 1]; NaN if there is no class to average over.

    Raises
    ------
    DataError
        If the shapes disagree, a probability is no number, a label is no column, or there is no row.

    Examples
    --------
    >>> auc([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], [0, 1, 1])
    1.0
    """
    from scipy.stats import rankdata  # 0.3 s to import, and most callers never rank

    matrix, truth = _checked(probabilities, labels)
    n_rows, n_classes = matrix.shape
    ranks = rankdata(matrix, axis=0)
    member = truth[:, None] == np.arange(n_classes)
    inside = member.sum(axis=0)
    outside = n_rows - inside
    known = (inside > 0) & (outside > 0)
    if not known.any():
        return float("nan")
    above = (ranks * member).sum(axis=0) - inside * (inside + 1) / 2
    return float(np.mean(above[known] / (inside[known] * outside[known])))


def bootstrap_error(
    values: ArrayLike, groups: ArrayLike, seed: int = 0, n_boot: int = 1000
) -> float:
    """Standard error of the mean of a per-row value, by resampling whole groups.

    For the error of a *difference* of two methods pass the per-row difference: the two are scored
    on the same rows, and the paired error is much the smaller one.

    Parameters
    ----------
    values
        Shape ``(n_rows,)``: a loss, a hit, a difference of two losses.
    groups
        Shape ``(n_rows,)``, the group of each row, in any order.
    seed
        Of the resampling; the same seed gives the same error.
    n_boot
        How many times all groups are drawn with replacement.

    Returns
    -------
    float
        Standard deviation of the mean over the draws; NaN with fewer than two groups.

    Raises
    ------
    DataError
        If the two lengths differ or are zero, values are no numbers, or groups are no ids.
    """
    means = _group_draws(values, groups, seed, n_boot)
    return float("nan") if means is None else float(np.std(means, ddof=1))


def bootstrap_interval(
    values: ArrayLike,
    groups: ArrayLike,
    seed: int = 0,
    n_boot: int = 10_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Confidence interval of the mean of a per-row value, by resampling whole groups.

    Its ends are percentiles of the drawn means, which know how skewed the groups are, but no nearer
    to the mean than those of Student's interval, which knows how few they are: percentiles alone
    are a third too narrow on 5 groups.

    Parameters
    ----------
    values, groups, seed
        As for :func:`bootstrap_error`.
    n_boot
        How many times all groups are drawn with replacement; quantiles need more draws than a
        standard deviation does.
    level
        Share of intervals that should hold the true mean, between 0 and 1.

    Returns
    -------
    tuple of float
        Lower and upper end; both NaN with fewer than two groups.

    Raises
    ------
    DataError
        If the two lengths differ or are zero, values are no numbers, or groups are no ids.
    """
    from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

    means = _group_draws(values, groups, seed, n_boot)
    if means is None:
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    n_groups = len(group_codes(groups)[1])
    error = np.std(means, ddof=1) * np.sqrt(n_groups / (n_groups - 1))
    reach = -stdtrit(n_groups - 1, tail) * error
    middle = float(np.mean(as_numbers(values, "values")))
    low, high = np.quantile(means, [tail, 1 - tail])
    return min(float(low), middle - reach), max(float(high), middle + reach)


def _group_draws(values: ArrayLike, groups: ArrayLike, seed: int, n_boot: int) -> Floats | None:
    """Means of a per-row value over groups drawn with replacement, ``(n_boot,)``; None of one group."""
    value, names = as_numbers(values, "values"), as_array(groups, "groups")
    if value.shape != names.shape or value.ndim != 1 or not len(value):
        raise DataError(
            f"values and groups must be two equally long lists of at least one row; "
            f"their shapes are {value.shape} and {names.shape}."
        )
    index, _ = group_codes(names)
    sums, sizes = np.bincount(index, weights=value), np.bincount(index)
    n_groups = len(sums)
    if n_groups < 2:
        return None
    rng = np.random.default_rng(seed)
    step = max(1, 2_000_000 // n_groups)  # keeps a million groups within some 50 MB
    means = []
    for start in range(0, n_boot, step):
        draw = rng.integers(0, n_groups, size=(min(step, n_boot - start), n_groups))
        means.append(sums[draw].sum(axis=1) / sizes[draw].sum(axis=1))
    return np.concatenate(means)


def mean_with_error(
    values: ArrayLike, groups: ArrayLike, seed: int = 0
) -> tuple[float, float | None]:
    """Mean of a per-row value, ``(n_rows,)``, and its :func:`bootstrap_error`; None where that is unknown."""
    error = bootstrap_error(values, groups, seed)
    return float(np.mean(as_numbers(values, "values"))), None if np.isnan(error) else error


def shown_with_error(value: float, error: float | None) -> str:
    """A value and its standard error for people.

    Examples
    --------
    >>> shown_with_error(0.25, 0.012), shown_with_error(0.25, None)
    ('0.2500 ± 0.0120', '0.2500')
    """
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.intp]]:
    matrix, truth = as_numbers(probabilities, "probabilities"), as_array(labels, "labels")
    if matrix.ndim != 2 or truth.shape != matrix.shape[:1] or not len(truth):
        raise DataError(
            f"probabilities must be (n_rows, n_classes) and labels (n_rows,) with at least one "
            f"row; their shapes are {matrix.shape} and {truth.shape}."
        )
    if truth.dtype.kind not in "iu":
        raise DataError(
            f"labels must be whole numbers, the index of a column; they are {truth.dtype}."
        )
    if truth.min() < 0 or truth.max() >= matrix.shape[1]:
        raise DataError(
            f"labels must be from 0 to {matrix.shape[1] - 1}, the index of a column; they are from "
            f"{truth.min()} to {truth.max()}."
        )
    return matrix, truth.astype(np.intp, copy=False)
