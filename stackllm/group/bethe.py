"""An approximation of the posterior where the exact programme is too large: belief propagation.

Rows and classes send each other odds until they agree (sum-product on the graph whose row factors
say "exactly one class" and whose class factors say "at most, or exactly, c rows"). For one place per
class its fixed point is the minimum of the Bethe free energy of the permanent, which has no other
minimum (Huang and Jebara 2009; Vontobel 2013). A class with more places weighs the ways to fill
them by elementary symmetric polynomials of the odds of the *other* rows. The messages are made a little
more cautious than that, see :data:`CAUTION`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from stackllm.group.tempering import LEAST
from stackllm.probabilities import Floats, log_sum, softmax

MAX_ROUNDS = 200
TOLERANCE = 1e-8
DAMPING = 0.3
"""Share of the old message that stays in each round."""

CAUTION = 0.3
"""How far a row's wish leans on the sum of *all* its classes instead of the others only. Plain belief
propagation (0) falls into one assignment in some groups of confident rows and is then sure of wrong
classes; 0.3 was nearest to the exact marginals at every size where both run (docs/LOG.md)."""


def bethe(log_weights: Floats, quota: tuple[int, ...], exactly: tuple[bool, ...]) -> Floats:
    """Approximate posterior class probabilities of groups of one shape.

    Parameters
    ----------
    log_weights
        float64 ``(n_groups, n_rows, n_classes)``, finite.
    quota
        Places per class; together at least ``n_rows``.
    exactly
        Per class: must all its places be filled?

    Returns
    -------
    numpy.ndarray
        float64, the shape of ``log_weights``; every row sums to 1.
    """
    n_rows = log_weights.shape[1]
    log_weights = np.maximum(log_weights, LEAST)
    must = np.asarray(exactly) | (sum(quota) == n_rows)
    limits = np.minimum(np.asarray(quota), n_rows + 1)
    result = np.empty_like(log_weights)
    for start in range(0, len(log_weights), 256):
        part = slice(start, start + 256)
        result[part] = _propagate(log_weights[part], limits, must)
    return result


def _propagate(logs: Floats, limits: NDArray[np.int64], must: NDArray[np.bool_]) -> Floats:
    offer = np.zeros_like(logs)  # log odds that a class would take this row, as seen by the row
    offer[:, :, limits == 0] = -np.inf
    belief = softmax(logs + offer)
    for _ in range(MAX_ROUNDS):
        wish = _against_the_rest(logs + offer) - offer
        wish[:, :, limits == 0] = 0.0
        fresh = _class_messages(wish, limits, must)
        with np.errstate(invalid="ignore"):
            offer = np.where(limits == 0, -np.inf, DAMPING * offer + (1 - DAMPING) * fresh)
        before, belief = belief, softmax(logs + offer)
        if np.abs(belief - before).max(initial=0.0) < TOLERANCE:
            break
    return belief


def _against_the_rest(scores: Floats) -> Floats:
    """Per row: log of exp(score of a class) over the others' sum, and a part of the sum of all."""
    everything = scores - logsumexp(scores, axis=-1, keepdims=True)
    rest = _of_the_others(scores, -1) if scores.shape[-1] > 1 else scores
    with np.errstate(invalid="ignore"):
        mixed = CAUTION * everything + (1 - CAUTION) * (scores - rest)
        odds: Floats = np.clip(np.nan_to_num(mixed, nan=0.0), -1e5, 1e5)
    return odds


def _of_the_others(logs: Floats, axis: int) -> Floats:
    """For each entry the log of the sum of all *other* entries: taking it off the whole would cancel."""
    logs = np.moveaxis(logs, axis, 0)
    before = np.full_like(logs, -np.inf)
    after = before.copy()
    before[1:] = np.logaddexp.accumulate(logs[:-1], axis=0)
    after[:-1] = np.logaddexp.accumulate(logs[:0:-1], axis=0)[::-1]
    others: Floats = np.moveaxis(np.logaddexp(before, after), 0, axis)
    return others


def _class_messages(wish: Floats, limits: NDArray[np.int64], must: NDArray[np.bool_]) -> Floats:
    """For each row: log of (ways to fill c - 1 places with the others) / (ways to fill c)."""
    messages = np.zeros_like(wish)
    # classes alike share one pass over the rows
    for c, exact in {(int(c), bool(e)) for c, e in zip(limits, must, strict=True) if c > 0}:
        alike = (limits == c) & (must == exact)
        messages[:, :, alike] = _leave_one_out(wish[:, :, alike], c, exact)
    return messages


def _leave_one_out(wish: Floats, c: int, exact: bool) -> Floats:
    """:func:`_class_messages` of classes alike: ``(n_groups, n_rows, n_alike)``."""
    n_rows = wish.shape[1]
    if not exact and c >= n_rows:
        return np.zeros_like(wish)  # there is a place for each row, whatever the others do
    if c == 1:
        others = _of_the_others(wish, 1)
        ratio = -others if exact else -np.logaddexp(0.0, others)
        return np.clip(ratio, -1e5, 1e5)
    result = np.empty_like(wish)
    step = max(1, 2_000_000 // (n_rows * (c + 1) * wish.shape[2]))
    for start in range(0, len(wish), step):
        part = slice(start, start + step)
        result[part] = _ratio(wish[part], c, exact)
    return result


def _ratio(wish: Floats, c: int, exact: bool) -> Floats:
    n_groups, n_rows, n_alike = wish.shape
    before = np.full((n_rows, c + 1, n_groups, n_alike), -np.inf)  # log e_k of the rows before
    after = before.copy()  # log e_k of the rows behind
    before[0, 0] = after[-1, 0] = 0.0
    for i in range(n_rows - 1):
        before[i + 1] = _with_one_more(before[i], wish[:, i])
        j = n_rows - 1 - i
        after[j - 1] = _with_one_more(after[j], wish[:, j])
    if not exact:  # up to k places instead of k: then one product gives the sum over all k
        after = np.logaddexp.accumulate(after, axis=1)
    # e_k of all rows but one is the sum of e_l before times e_(k - l) behind
    full = log_sum(before + after[:, ::-1], axis=1)
    fewer = log_sum(before[:, :c] + after[:, c - 1 :: -1], axis=1)
    with np.errstate(invalid="ignore"):
        ratio = np.clip(np.nan_to_num(fewer - full, nan=0.0), -1e5, 1e5)
    return np.ascontiguousarray(ratio.transpose(1, 0, 2))


def _with_one_more(ways: Floats, odds: Floats) -> Floats:
    taken = np.full_like(ways, -np.inf)
    taken[1:] = ways[:-1] + odds
    more: Floats = np.logaddexp(ways, taken)
    return more
