"""The exact posterior: a forward-backward programme over the lattice of places already taken.

Rows take places one after the other. A state says how many places of each class are taken; after
``r`` rows exactly ``r`` are, so the states come in layers. With ``w(r, j)`` the weight of row r
for class j::

    F(s + j) += w(r, j) F(s)          forward, layer r to layer r + 1
    B(s)     += w(r, j) B(s + j)      backward
    P(y_r = j) = w(r, j) sum_s F(s) B(s + j) / Z

For one place per class, Z is the permanent of w and the lattice has 2^K states (the subsets, as in
Bellman's and Held and Karp's programmes of 1962); in general prod(c_j + 1).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stackllm.group.tempering import AS_IT_IS, Calibration, log_weights
from stackllm.probabilities import Floats, log_sum

Table = NDArray[np.intp]

_REACH = 600.0
"""Products of weights stay above exp(-600), well inside what a double can hold (exp(-708))."""


@dataclass(frozen=True)
class Layer:
    """The edges between the states after r rows and those after r + 1, in two orders.

    Index ``len(states)``, one past the last state, stands for "no edge" and has weight zero.
    """

    into: Table  # (n_targets, most edges into one): source
    into_class: Table
    out: Table  # (n_sources, n_classes): target


@dataclass(frozen=True)
class Lattice:
    """All layers, which last states are allowed, and how many assignments there are."""

    layers: tuple[Layer, ...]
    sizes: tuple[int, ...]
    last: Floats  # (n_last_states + 1,): 1 where allowed, else 0
    log_count: float

    @property
    def widest(self) -> int:
        """The largest number of edges (padding included) that one step handles."""
        return max(max(t.into.size, t.out.size) for t in self.layers)


def marginals(
    probabilities: Floats,
    quota: tuple[int, ...],
    exactly: tuple[bool, ...],
    calibration: Calibration = AS_IT_IS,
    out: Floats | None = None,
) -> Floats:
    """Posterior class probabilities of groups of one shape.

    Parameters
    ----------
    probabilities
        float64 ``(n_groups, n_rows, n_classes)``, not negative, no row all zero.
    quota
        Places per class; together at least ``n_rows``.
    exactly
        Per class: must all places be filled? Such places are together at most ``n_rows``.
    calibration
        The weights are ``p ** (1 / temperature) * exp(bias)``.
    out
        Where to put the answer, of the shape of ``probabilities``. None: into a new array.

    Returns
    -------
    numpy.ndarray
        float64, the shape of ``probabilities``; every row sums to 1.

    Raises
    ------
    UsageError
        If the bias does not fit the classes.
    """
    n_groups, n_rows, _ = probabilities.shape
    lattice = build(n_rows, tuple(min(c, n_rows) for c in quota), exactly)
    result = np.empty_like(probabilities) if out is None else out

    def fill(parts: list[slice]) -> None:
        space = _Workspace(lattice, 0)
        for part in parts:
            if part.stop - part.start != space.n_groups:
                space = _Workspace(lattice, part.stop - part.start)
            # groups last, so that every step runs over long vectors: (n_rows, n_classes, part)
            space.given[:] = probabilities[part].transpose(1, 2, 0)
            result[part] = _posterior(lattice, calibration, space).transpose(2, 0, 1)

    parts = list(_parts(n_groups, lattice.widest))
    workers = min(4, os.cpu_count() or 1, len(parts) // 2)
    if workers < 2:
        fill(parts)
    else:  # NumPy lets go of the interpreter in every step, so threads are enough
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, [parts[start::workers] for start in range(workers)]))
    return result


@lru_cache(maxsize=16)
def build(n_rows: int, quota: tuple[int, ...], exactly: tuple[bool, ...]) -> Lattice:
    """The lattice of one shape of group (see the module's page)."""
    limits = np.asarray(quota, dtype=np.int64)
    states = np.zeros((1, len(quota)), dtype=np.int64)
    layers, sizes, ways = [], [1], np.zeros(1)
    for _ in range(n_rows):
        source, label = np.nonzero(states < limits)
        reached = states[source]
        reached[np.arange(len(source)), label] += 1
        following, target = _distinct(reached, limits)
        n_from, n_to = len(states), len(following)
        into, into_class = _padded(target, n_to, (source, n_from), (label, 0))
        out = np.full((n_from, len(quota)), n_to, dtype=np.intp)
        out[source, label] = target
        layers.append(Layer(into, into_class, out))
        padded = np.append(ways, -np.inf)[into]
        ways = log_sum(padded, axis=1)
        states = following
        sizes.append(n_to)
    must = np.asarray(exactly, dtype=np.bool_)
    allowed = (states[:, must] == limits[must]).all(axis=1)
    count = np.logaddexp.reduce(ways[allowed]) if allowed.any() else -np.inf
    return Lattice(
        tuple(layers), tuple(sizes), np.append(allowed, False).astype(np.float64), float(count)
    )


def _distinct(
    states: NDArray[np.int64], limits: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Table]:
    """The different states, and which of them each one is."""
    radix = np.cumprod(np.append(1, limits + 1.0))
    if radix[-1] < 2**62:  # one whole number per state: much faster than comparing vectors
        keys = states @ radix[:-1].astype(np.int64)
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        return states[first], which
    following, which = np.unique(states, axis=0, return_inverse=True)
    return following, which.reshape(-1)


def _logs(p: Floats, calibration: Calibration) -> Floats:
    """Log-weights of ``(n_rows, n_classes, n_groups)``."""
    return np.moveaxis(log_weights(np.moveaxis(p, 1, -1), calibration), -1, 1)


def _padded(key: Table, n_keys: int, *values: tuple[Table, int]) -> list[Table]:
    """For each value list a table with a row per key; short rows are filled up with a number."""
    order = np.argsort(key, kind="stable")
    counts = np.bincount(key, minlength=n_keys)
    column = np.arange(len(key)) - np.repeat(np.cumsum(counts) - counts, counts)
    tables = []
    for value, filler in values:
        table = np.full((n_keys, max(1, counts.max(initial=0))), filler, dtype=np.intp)
        table[key[order], column] = value[order]
        tables.append(table)
    return tables


def _parts(n_groups: int, widest: int) -> Iterator[slice]:
    """Slices of groups: small enough for the processor's caches, and large enough that threads do not
    wait for the interpreter between steps."""
    most = min(max(256_000 // widest, 8), 4096)
    step = -(-n_groups // max(1, -(-n_groups // most)))
    step += -step % 8  # whole cache lines; all slices alike, but for the last
    return (slice(start, min(start + step, n_groups)) for start in range(0, n_groups, max(1, step)))


class _Workspace:
    """Arrays for one part of the groups, filled anew for each: fresh memory costs more than sums."""

    def __init__(self, lattice: Lattice, n_groups: int) -> None:
        self.n_groups = n_groups
        self.left = np.empty((lattice.widest, n_groups))
        self.right = np.empty((lattice.widest, n_groups))
        shape = (len(lattice.layers), lattice.layers[0].out.shape[1], n_groups)
        self.given, self.weights, self.marginals = (np.empty(shape) for _ in range(3))
        # the last line of each stays zero: it is where edges that do not exist point to
        self.forward = [np.zeros((size + 1, n_groups)) for size in lattice.sizes]
        self.backward = [np.zeros((size + 1, n_groups)) for size in lattice.sizes]
        self.forward[0][0] = 1.0
        self.backward[-1][:] = lattice.last[:, None]

    def left_of(self, a: Floats, at: Table) -> Floats:
        """``a[at]``, in the workspace: ``(*at.shape, n_groups)``."""
        return _take(a, at, self.left)

    def right_of(self, a: Floats, at: Table) -> Floats:
        """The same in the workspace's other half."""
        return _take(a, at, self.right)


def _take(a: Floats, at: Table, space: Floats) -> Floats:
    taken = space[: at.size].reshape(*at.shape, space.shape[1])
    a.take(at, axis=0, out=taken, mode="clip")
    return taken


def _linear(lattice: Lattice, w: Floats, space: _Workspace) -> tuple[Floats, Floats]:
    forward, backward = space.forward, space.backward
    for r, layer in enumerate(lattice.layers[:-1]):
        before = space.left_of(forward[r], layer.into)
        weights = space.right_of(w[r], layer.into_class)
        np.einsum("tkg,tkg->tg", before, weights, out=forward[r + 1][:-1])
    result = space.marginals
    for r, layer in reversed(list(enumerate(lattice.layers))):
        after = space.left_of(backward[r + 1], layer.out)  # (n_states, n_classes, n_groups)
        np.einsum("sg,sjg->jg", forward[r][:-1], after, out=result[r])
        np.einsum("sjg,jg->sg", after, w[r], out=backward[r][:-1])
    result *= w
    return result, backward[0][0]


def _posterior(lattice: Lattice, calibration: Calibration, space: _Workspace) -> Floats:
    """The posterior of ``space.given``, normalised: ``(n_rows, n_classes, n_groups)``."""
    p = space.given
    if calibration == AS_IT_IS:
        w = np.divide(p, p.max(axis=1, keepdims=True), out=space.weights)
    else:
        w = np.exp(_logs(p, calibration))
    n_groups = w.shape[2]
    unsure = np.full(n_groups, lattice.log_count > _REACH)
    floor = np.exp(-_REACH / len(w))
    if w.min() < floor:
        tiny = w < floor
        w[tiny] = 0.0
        result, total = _linear(lattice, w, space)
        with np.errstate(divide="ignore"):
            # what was put to zero could have changed a probability by this much
            lost = np.exp(min(lattice.log_count, _REACH)) * floor / total
        unsure |= tiny.any(axis=(0, 1)) & ~(lost < 1e-17)
    else:
        result, _ = _linear(lattice, w, space)
    for few in _parts(int(unsure.sum()), 4 * lattice.widest):
        piece = np.flatnonzero(unsure)[few]
        result[:, :, piece] = _logarithmic(lattice, _logs(p[:, :, piece], calibration))
    result /= result.sum(axis=1, keepdims=True)
    return result


def _logarithmic(lattice: Lattice, logs: Floats) -> Floats:
    n_groups = logs.shape[2]
    nothing = np.full((1, n_groups), -np.inf)
    forward = [np.concatenate([np.zeros((1, n_groups)), nothing])]
    with np.errstate(divide="ignore"):
        for r, layer in enumerate(lattice.layers):
            reached = log_sum(forward[r][layer.into] + logs[r][layer.into_class], axis=1)
            forward.append(np.concatenate([reached, nothing]))
        backward = np.repeat(np.log(lattice.last)[:, None], n_groups, axis=1)
        scores = np.empty_like(logs)
        for r, layer in reversed(list(enumerate(lattice.layers))):
            after = backward[layer.out]  # (n_states, n_classes, n_groups)
            scores[r] = log_sum(forward[r][:-1, None] + after, axis=0) + logs[r]
            backward = np.concatenate([log_sum(after + logs[r], axis=1), nothing])
    result: Floats = np.exp(scores - scores.max(axis=1, keepdims=True))
    return result
