"""An approximation of the posterior where the exact programme is too large: belief propagation.

Rows and classes send each other odds until they agree (sum-product on the graph whose row factors
say "exactly one class" and whose class factors say "at most, or exactly, c rows"). For one place a
class its fixed point is the minimum of the Bethe free energy of the permanent, which has no other
minimum (Huang and Jebara 2009; Vontobel 2013). A class with more places weighs the ways to fill
them by elementary symmetric polynomials of the odds of the *other* rows. The messages are made a little
more cautious than that, see :data:`CAUTION`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from stackllm.group.shapes import Floats

MAX_ROUNDS = 200
TOLERANCE = 1e-8

CAUTION = 0.3
"""How far a row's wish leans on the sum of *all* its classes instead of the others only. Plain belief
propagation (0) falls into one assignment in some groups of confident rows and is then sure of wrong
classes; 0.3 was nearest to the exact marginals at every size where both run (docs/LOG.md)."""


def bethe(
    log_weights: Floats, quota: tuple[int, ...], exactly: tuple[bool, ...], damping: float = 0.3
) -> Floats:
    """Approximate posterior class probabilities of groups of one shape.

    Parameters
    ----------
    log_weights
        Shape ``(n_groups, n_rows, n_classes)``, finite.
    quota
        Places a class; together at least ``n_rows``.
    exactly
        A class: must all its places be filled?
    damping
        Share of the old message that is kept in each round, in [0, 1).

    Returns
    -------
    numpy.ndarray
        Shape of ``log_weights``; every row sums to 1.
    """
    n_rows = log_weights.shape[1]
    must = np.asarray(exactly) | (sum(quota) == n_rows)
    places = np.minimum(np.asarray(quota), n_rows + 1)
    result = np.empty_like(log_weights)
    for start in range(0, len(log_weights), 256):
        part = slice(start, start + 256)
        result[part] = _propagate(log_weights[part], places, must, damping)
    return result


def _propagate(
    logs: Floats, places: NDArray[np.int64], must: NDArray[np.bool_], damping: float
) -> Floats:
    offer = np.zeros_like(logs)  # log odds that a class would take this row, as seen by the row
    offer[:, :, places == 0] = -np.inf
    belief = _softmax(logs + offer)
    for _ in range(MAX_ROUNDS):
        wish = _against_the_rest(logs + offer) - offer
        wish[:, :, places == 0] = 0.0
        fresh = _class_messages(wish, places, must)
        with np.errstate(invalid="ignore"):
            offer = np.where(places == 0, -np.inf, damping * offer + (1 - damping) * fresh)
        before, belief = belief, _softmax(logs + offer)
        if np.abs(belief - before).max(initial=0.0) < TOLERANCE:
            break
    return belief


def _against_the_rest(scores: Floats) -> Floats:
    """Per row: log of exp(score of a class) over the others' sum, and a part of the sum of all."""
    everything = scores - logsumexp(scores, axis=-1, keepdims=True)
    n_classes = scores.shape[-1]
    rest = np.stack(
        [
            logsumexp(np.delete(scores, j, axis=-1), axis=-1) if n_classes > 1 else scores[..., j]
            for j in range(n_classes)
        ],
        axis=-1,
    )
    with np.errstate(invalid="ignore"):
        mixed = CAUTION * everything + (1 - CAUTION) * (scores - rest)
        odds: Floats = np.clip(np.nan_to_num(mixed, nan=0.0), -1e5, 1e5)
    return odds


def _class_messages(wish: Floats, places: NDArray[np.int64], must: NDArray[np.bool_]) -> Floats:
    """For each row: log of (ways to fill c - 1 places with the others) / (ways to fill c)."""
    messages = np.zeros_like(wish)
    # classes alike share one pass over the rows
    for c, exact in {(int(c), bool(e)) for c, e in zip(places, must, strict=True) if c > 0}:
        alike = (places == c) & (must == exact)
        messages[:, :, alike] = _leave_one_out(wish[:, :, alike], c, exact)
    return messages


def _leave_one_out(wish: Floats, c: int, exact: bool) -> Floats:
    n_groups, n_rows, n_alike = wish.shape
    before = np.full((n_rows + 1, c + 1, n_groups, n_alike), -np.inf)  # log e_k of the first rows
    after = before.copy()  # log e_k of the rows from here on
    before[0, 0] = after[n_rows, 0] = 0.0
    with np.errstate(invalid="ignore"):
        for i in range(n_rows):
            before[i + 1] = _with_one_more(before[i], wish[:, i])
            j = n_rows - 1 - i
            after[j] = _with_one_more(after[j + 1], wish[:, j])
        result = np.empty_like(wish)
        for i in range(n_rows):
            # e_k of all rows but i, for k = 0..c
            rest = np.stack(
                [
                    logsumexp(before[i, : k + 1] + after[i + 1, k::-1][: k + 1], axis=0)
                    for k in range(c + 1)
                ]
            )
            if exact:
                fewer, full = rest[c - 1], rest[c]
            else:
                fewer, full = logsumexp(rest[:c], axis=0), logsumexp(rest, axis=0)
            result[:, i] = np.clip(np.nan_to_num(fewer - full, nan=0.0), -1e5, 1e5)
    return result


def _with_one_more(ways: Floats, odds: Floats) -> Floats:
    taken = np.full_like(ways, -np.inf)
    taken[1:] = ways[:-1] + odds
    more: Floats = np.logaddexp(ways, taken)
    return more


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    share: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return share
