"""What stage two reads: members' out-of-fold logits, their posteriors, recipes, forms in the group."""

from __future__ import annotations

import numpy as np

from stackllm.crossfit.design import CrossFit
from stackllm.members.inputs import categorical
from stackllm.probabilities import log_probabilities
from stackllm.recipes.within import centre

_LEFT_OUT = "standing_"
"""Ranks and z-scores of single features: member ``features`` has made of them what can be made, and
as noise they cost stage two 0.01 of log loss (docs/LOG.md)."""


def stack_features(
    fold: int,
    members: dict[str, CrossFit],
    posteriors: dict[str, CrossFit],
    blocks: np.ndarray,
    names: tuple[str, ...],
    groups: np.ndarray,
) -> np.ndarray:
    """Feature matrix of stage two for the models of one fold.

    Test rows carry the predictions of that fold's members only, as training rows carry those of a
    single model each: no label of the fold reaches its stack through the test rows, and both kinds
    of rows are alike.

    Parameters
    ----------
    fold
        Which fold's stack reads it.
    members, posteriors
        Row probabilities and group posteriors of each member.
    blocks, names
        Recipe columns ``(n_rows, n_columns)`` and what they are called.
    groups
        Group number of each row, ``(n_rows,)``.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_rows, n_features)``: per member log-probabilities, the same centred within
        the group, log-posteriors; then their means over the members; then the recipe columns.
    """
    kept = _kept(names)
    pieces = []
    logits = [log_probabilities(member.fold(fold)) for member in members.values()]
    certain = [log_probabilities(member.fold(fold)) for member in posteriors.values()]
    for logit, sure in zip(logits, certain, strict=True):
        pieces += [logit, centre(logit, groups), sure]
    mean = np.mean(logits, axis=0)
    pieces += [mean, centre(mean, groups), np.mean(certain, axis=0), blocks[:, kept]]
    return np.hstack(pieces)


def stack_categorical(n_features: int, names: tuple[str, ...]) -> list[int]:
    """Places of category numbers in a matrix of :func:`stack_features` with so many columns."""
    own = [names[i] for i in _kept(names)]
    return [n_features - len(own) + i for i in categorical(own)]


def _kept(names: tuple[str, ...]) -> list[int]:
    return [i for i, name in enumerate(names) if not name.startswith(_LEFT_OUT)]
