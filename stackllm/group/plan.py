"""Which rows belong together, how many places each class has there, and what can be done with it.

Groups of the same size and quotas go through the mathematics side by side, so everything starts
by sorting them into batches of one shape. This is done and checked once for a set of rows; every
method takes the plan and checks nothing again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stackllm.errors import DataError, UsageError
from stackllm.probabilities import Floats, as_array, check_probabilities, group_codes

Quota: TypeAlias = int | ArrayLike | Mapping[Any, ArrayLike]
"""One number for every class, one per class, or a mapping of group id to either."""

How: TypeAlias = Literal["exact", "bethe", "rows"]

MAX_STATES = 2**18
"""Above so many states the exact programme takes seconds per group."""


@dataclass(frozen=True)
class Batch:
    """Groups of one shape, and how their posterior is to be had.

    Parameters
    ----------
    rows
        intp ``(n_groups, n_rows_per_group)``: where the rows of each group stand.
    quota
        Places per class.
    exactly
        Per class: must all its places be filled?
    how
        ``"exact"``, ``"bethe"`` (approximation) or ``"rows"`` (each row on its own).
    reason
        Why so, in words.
    """

    rows: NDArray[np.intp]
    quota: tuple[int, ...]
    exactly: tuple[bool, ...]
    how: How
    reason: str

    @property
    def n_groups(self) -> int:
        """How many groups."""
        return len(self.rows)

    @property
    def is_full(self) -> bool:
        """Does every allowed assignment fill every place?"""
        return self.how != "rows" and sum(self.quota) == self.rows.shape[1]


@dataclass(frozen=True)
class Plan:
    """The groups of a set of rows, sorted by shape; made by :meth:`of`.

    Parameters
    ----------
    batches
        Every row is in one of them, once.
    codes
        intp ``(n_rows,)``: the number of each row's group, in the order of the groups' ids.
    n_classes
        How many classes there are.
    """

    batches: tuple[Batch, ...]
    codes: NDArray[np.intp]
    n_classes: int

    @classmethod
    def of(
        cls,
        groups: ArrayLike,
        n_classes: int,
        quota: Quota = 1,
        *,
        exactly: bool | ArrayLike = False,
        max_states: int = MAX_STATES,
    ) -> Plan:
        """Sort groups by shape and decide for each shape how its posterior is computed.

        Parameters
        ----------
        groups
            Shape ``(n_rows,)``, the group of each row: integers or strings, in any order.
        n_classes
            How many classes there are.
        quota
            Places of every class, of each class, or of each group (a mapping from group id to one
            of the other two).
        exactly
            False: a class stands at most ``quota`` times in a group. True: exactly so often. Bools
            ``(n_classes,)`` say it per class.
        max_states
            Lattices with more states are approximated.

        Raises
        ------
        DataError
            If ``groups`` is no list of ids, or a mapping lacks the quota of a group.
        UsageError
            If a quota is negative, not whole, or has another length than the classes, or
            ``exactly`` is no bool.

        Examples
        --------
        >>> [(b.n_groups, b.how, b.reason) for b in Plan.of(["q1", "q2", "q1", "q1"], 2).batches]
        [(1, 'exact', '3 states'), (1, 'rows', '3 rows for 2 places')]
        """
        codes, names = group_codes(groups)
        if (codes[1:] >= codes[:-1]).all():
            order = np.arange(len(codes))  # as in most files; sorting them again would take longer
        else:
            order = np.argsort(codes, kind="stable")
        sizes = np.bincount(codes, minlength=len(names))
        starts = np.cumsum(sizes) - sizes
        must = _exactly(exactly, n_classes)
        quotas = _quota_matrix(quota, names, n_classes)
        if len(quotas) == 1:
            shapes, shape_of = np.unique(sizes, return_inverse=True)
            keys = [(int(size), tuple(quotas[0].tolist())) for size in shapes]
        else:
            both = np.column_stack([sizes, quotas])
            shapes, shape_of = np.unique(both, axis=0, return_inverse=True)
            keys = [(int(size), tuple(row)) for size, *row in shapes.tolist()]
        batches = []
        for index, (size, row) in enumerate(keys):
            chosen = np.flatnonzero(shape_of == index)
            rows = order[starts[chosen][:, None] + np.arange(size)]
            batches.append(Batch(rows, row, must, *_how(size, row, must, max_states)))
        return cls(tuple(batches), codes, n_classes)

    def part(self, rows: NDArray[np.bool_]) -> Plan:
        """The plan of some whole groups: of ``matrix[rows]`` where this is the plan of ``matrix``.

        Parameters
        ----------
        rows
            bool ``(n_rows,)``: which rows.

        Raises
        ------
        UsageError
            If only a part of a group's rows is chosen.
        """
        moved = np.cumsum(rows) - 1
        batches = []
        for batch in self.batches:
            chosen = rows[batch.rows]
            if (chosen != chosen[:, :1]).any():
                raise UsageError("rows must hold whole groups; a group is in them in part only.")
            if chosen.any():
                fewer = moved[batch.rows[chosen[:, 0]]]
                batches.append(dataclasses.replace(batch, rows=fewer))
        return Plan(tuple(batches), self.codes[rows], self.n_classes)

    @property
    def n_groups(self) -> int:
        """How many groups."""
        return sum(batch.n_groups for batch in self.batches)

    @property
    def is_full(self) -> bool:
        """Is every place of every group filled? A bias per class cancels out there."""
        return all(batch.is_full for batch in self.batches)

    @property
    def alone(self) -> NDArray[np.intp]:
        """The rows, ``(n,)``, whose groups have no allowed assignment: each of them stays on its own."""
        rows = [batch.rows.ravel() for batch in self.batches if batch.how == "rows"]
        return np.concatenate([np.zeros(0, dtype=np.intp), *rows])


def checked(
    probabilities: ArrayLike,
    groups: ArrayLike,
    quota: Quota = 1,
    *,
    exactly: bool | ArrayLike = False,
    max_states: int = MAX_STATES,
) -> tuple[Floats, Plan]:
    """What every method starts from: usable probabilities, and the plan of their groups.

    Parameters
    ----------
    probabilities
        Shape ``(n_rows, n_classes)``, finite, not negative, no row all zero.
    groups, quota, exactly, max_states
        As for :meth:`Plan.of`.

    Returns
    -------
    matrix
        float64 ``(n_rows, n_classes)``; the very array that was given where nothing is to be changed.
    plan
        Of its rows.

    Raises
    ------
    DataError
        If probabilities or groups are not usable, or a mapping lacks the quota of a group.
    UsageError
        If quota or exactly make no sense.
    """
    ids = as_array(groups, "groups")
    matrix = check_probabilities(probabilities, ids)
    return matrix, Plan.of(ids, matrix.shape[1], quota, exactly=exactly, max_states=max_states)


def count_states(n_rows: int, quota: tuple[int, ...]) -> int:
    """How many states the lattice has that ``n_rows`` rows can reach.

    Examples
    --------
    >>> count_states(7, (1,) * 7), count_states(2, (1,) * 30), count_states(4, (2, 2))
    (128, 466, 9)
    """
    ways = [1] + [0] * n_rows
    for limit in quota:
        running = [0]
        for value in ways:
            running.append(running[-1] + value)
        ways = [running[k + 1] - running[max(0, k - limit)] for k in range(n_rows + 1)]
    return sum(ways)


@lru_cache(maxsize=4096)
def _how(
    size: int, quota: tuple[int, ...], must: tuple[bool, ...], max_states: int
) -> tuple[How, str]:
    needed = sum(c for c, m in zip(quota, must, strict=True) if m)
    if size > sum(quota):
        return "rows", f"{size} rows for {sum(quota)} places"
    if size < needed:
        return "rows", f"{size} rows for {needed} places that must be filled"
    states = count_states(size, quota)
    if states > max_states:
        shown = f"{states:,}" if states < 10**15 else f"about 10^{len(str(states)) - 1}"
        return "bethe", f"{shown} states, more than {max_states:,}"
    return "exact", f"{states:,} states"


def _quota_matrix(quota: Quota, names: NDArray[Any], n_classes: int) -> NDArray[np.int64]:
    """Places of each class: ``(1, n_classes)`` if all groups agree, else ``(n_groups, n_classes)``."""
    if not isinstance(quota, Mapping):
        return _quota_row(quota, n_classes)[None]
    keys = names.tolist()
    missing = [key for key in keys if key not in quota]
    if missing:
        raise DataError(
            f"quota names no places for {len(missing)} of {len(keys)} groups (first: {missing[0]!r}). "
            "Add them, or pass one quota for all groups."
        )
    if not keys:
        return np.zeros((0, n_classes), dtype=np.int64)
    return np.stack([_quota_row(quota[key], n_classes) for key in keys])


def _quota_row(quota: int | ArrayLike, n_classes: int) -> NDArray[np.int64]:
    given = as_array(quota, "quota")
    if given.shape not in {(), (n_classes,)}:
        raise UsageError(
            f"quota must be one number, or one per class ({n_classes}); its shape is {given.shape}."
        )
    if given.dtype.kind not in "iuf" or (given < 0).any() or (given != np.floor(given)).any():
        raise UsageError(f"quota must be whole numbers of 0 or more; it is {given.tolist()}.")
    # more than 2**31 places can never matter, and sums of them must not overflow
    return np.broadcast_to(np.minimum(given, 2**31).astype(np.int64), (n_classes,))


def _exactly(exactly: bool | ArrayLike, n_classes: int) -> tuple[bool, ...]:
    given = as_array(exactly, "exactly")
    if given.shape not in {(), (n_classes,)} or given.dtype != np.bool_:
        raise UsageError(
            f"exactly must be True, False, or one of them per class ({n_classes}); "
            f"it is {given.dtype} of shape {given.shape}."
        )
    return tuple(np.broadcast_to(given, (n_classes,)).tolist())
