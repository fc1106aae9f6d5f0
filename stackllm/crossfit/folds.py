"""The only place where rows are ever split: by group, seeded, balanced, checked."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike

from stackllm.errors import DataError, UsageError
from stackllm.probabilities import as_array


def group_folds(groups: ArrayLike, n_folds: int = 5, seed: int = 0) -> np.ndarray:
    """Deal whole groups to folds of nearly equal numbers of rows.

    The order in which groups are dealt comes from a digest of the seed and the group's id, so it
    depends neither on the order of the rows nor on the machine. Large groups are dealt first, each
    to the fold that has fewest rows.

    Parameters
    ----------
    groups
        Group id of each row, ``(n_rows,)``, text or whole numbers.
    n_folds
        Number of folds, 2 or more.
    seed
        Any integer.

    Returns
    -------
    numpy.ndarray
        int32 ``(n_rows,)`` with values from 0 to ``n_folds - 1``.

    Raises
    ------
    UsageError
        If ``n_folds`` is below 2.
    DataError
        If there are fewer groups than folds, or groups are no list.

    Examples
    --------
    >>> group_folds(["a", "a", "b", "c", "c", "b"], n_folds=3).tolist()
    [1, 1, 2, 0, 0, 2]
    """
    groups = as_array(groups, "groups")
    if groups.ndim != 1:
        raise DataError(f"groups must be (n_rows,), not {groups.shape}.")
    if n_folds < 2:
        raise UsageError(f"n_folds must be 2 or more, not {n_folds}.")
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < n_folds:
        raise DataError(
            f"{len(names)} groups cannot be split into {n_folds} folds. Use fewer folds or check the group column."
        )
    dealt = sorted(range(len(names)), key=lambda g: (-sizes[g], _shuffle_key(seed, str(names[g]))))
    loads = [0] * n_folds
    fold_of = np.empty(len(names), dtype=np.int32)
    for group in dealt:
        fold = loads.index(min(loads))
        fold_of[group] = fold
        loads[fold] += int(sizes[group])
    result: np.ndarray = fold_of[codes]
    return result


def check_folds(folds: np.ndarray, groups: np.ndarray, labels: np.ndarray, n_classes: int) -> None:
    """Make sure that folds can be trusted.

    Parameters
    ----------
    folds, groups, labels
        Fold, group id and class index of each training row, ``(n_rows,)``.
    n_classes
        Number of classes.

    Raises
    ------
    DataError
        If a group stands in two folds, a fold is empty, or a class is missing from the rows that
        train the model of some fold.
    """
    if len(set(zip(groups.tolist(), folds.tolist(), strict=True))) != len(set(groups.tolist())):
        raise DataError("a group stands in two folds. Remove the stored folds and run again.")
    for fold in range(int(folds.max()) + 1):
        if not (folds == fold).any():
            raise DataError(f"fold {fold} has no rows. Use fewer folds.")
        absent = sorted(set(range(n_classes)) - set(labels[folds != fold].tolist()))
        if absent:
            raise DataError(
                f"class number {absent[0]} stands in fold {fold} only, so no model could learn it there. "
                "Use fewer folds or give more groups with that class."
            )


def inner_folds(groups: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """Folds inside a training set, int32 ``(n_rows,)``, for choosing a setting; as :func:`group_folds`."""
    return group_folds(groups, min(n_folds, len(np.unique(groups))), seed)


def _shuffle_key(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()
