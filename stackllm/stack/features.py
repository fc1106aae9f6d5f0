"""What stage two reads: members' out-of-fold logits, their posteriors, recipes, forms in the group."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from stackllm.members.inputs import categorical
from stackllm.probabilities import log_probabilities
from stackllm.recipes.within import centre

_LEFT_OUT = "standing_"
"""Ranks and z-scores of single features: member ``features`` has made of them what can be made, and
as noise they cost stage two 0.01 of log loss (docs/LOG.md)."""


def stack_features(
    members: Mapping[str, np.ndarray],
    posteriors: Mapping[str, np.ndarray],
    blocks: np.ndarray,
    names: tuple[str, ...],
    groups: np.ndarray,
) -> np.ndarray:
    """Feature matrix of stage two, of rows as the models of one fold see them.

    In training these are the out-of-fold rows above the test rows as *that* fold's members predict
    them (:meth:`~stackllm.crossfit.design.CrossFit.fold`): each kind of row carries predictions of a
    single model, and no label of the fold reaches its stack through the test rows.

    Parameters
    ----------
    members, posteriors
        Row probabilities and group posteriors of each member by name, float64
        ``(n_rows, n_classes)`` each, the same names in the same order.
    blocks, names
        Recipe columns, float64 ``(n_rows, n_columns)``, and what they are called.
    groups
        Group number of each row, int ``(n_rows,)``.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_rows, n_features)``: per member log-probabilities, the same centred within
        the group, log-posteriors; then their means over the members; then the recipe columns.
    """
    logits = [log_probabilities(matrix) for matrix in members.values()]
    certain = [log_probabilities(posteriors[name]) for name in members]
    pieces = []
    for logit, sure in zip(logits, certain, strict=True):
        pieces += [logit, centre(logit, groups), sure]
    mean = np.mean(logits, axis=0)
    pieces += [mean, centre(mean, groups), np.mean(certain, axis=0), blocks[:, _used(names)]]
    return np.hstack(pieces)


def stack_categorical(n_features: int, names: tuple[str, ...]) -> list[int]:
    """Places of category numbers in a matrix of :func:`stack_features` with so many columns."""
    used = [names[i] for i in _used(names)]
    return [n_features - len(used) + i for i in categorical(used)]


def _used(names: tuple[str, ...]) -> list[int]:
    return [i for i, name in enumerate(names) if not name.startswith(_LEFT_OUT)]
