"""One round: stages one, two and three over the places of one cross-fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stackllm.crossfit.design import CrossFit, Design, Fit
from stackllm.metrics import log_loss
from stackllm.stack.blend import Blend, blend_views, cross_blend
from stackllm.stack.posteriors import Calibrated, cross_posteriors, fold_posteriors

BLEND_TEMPERATURE = 1.0
"""The blend's weights are its temperature: to fit another on the same folds would correct twice."""


@dataclass(frozen=True)
class Round:
    """What one round predicts.

    Parameters
    ----------
    number
        0 before any pseudo-label.
    fits
        The places of its cross-fit.
    models
        Row probabilities of every member and of ``stack``, as they came.
    posteriors
        Calibrated rows and group posteriors of every member, ``stack`` and ``blend``.
    blend
        The blend's weights.
    loss
        Out-of-fold log loss of the final posteriors.
    """

    number: int
    fits: Sequence[Fit]
    models: dict[str, CrossFit]
    posteriors: dict[str, Calibrated]
    blend: Blend
    loss: float

    @property
    def final(self) -> CrossFit:
        """The final posteriors: those of the blend of all models."""
        return self.posteriors["blend"].predictions


def finish_round(
    fits: Sequence[Fit],
    members: dict[str, CrossFit],
    posteriors: dict[str, Calibrated],
    stack: CrossFit,
    design: Design,
    quota: int,
) -> Round:
    """Blend members and stack, and take everything through stage three."""
    models = {**members, "stack": stack}
    blend = cross_blend(models, design, quota)
    finished = {
        **posteriors,
        "stack": cross_posteriors(stack, design, quota),
        "blend": cross_posteriors(blend.predictions, design, quota, temperature=BLEND_TEMPERATURE),
    }
    loss = log_loss(finished["blend"].oof, design.labels)
    return Round(fits[0].round, fits, models, finished, blend, loss)


def final_rows(
    views: Mapping[str, np.ndarray], full: Mapping[str, np.ndarray], weights: np.ndarray
) -> np.ndarray:
    """Blended row probabilities of rows that nothing was fitted to, as they are handed out.

    Models that were refitted on all training rows stand in for their member's models of every fold.
    Only here do they predict: pseudo-labels, the stack and every score come from models of a fold,
    which never saw that fold's labels.

    Parameters
    ----------
    views
        Row probabilities by each fold's models, float64 ``(n_folds, n_rows, n_classes)`` by name, in
        the order of the blend's weights.
    full
        Of the same rows by models on all training rows, ``(n_rows, n_classes)`` by member.
    weights
        The blend's, ``(n_folds, n_models)``.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_folds, n_rows, n_classes)``.
    """
    chosen = [
        np.broadcast_to(full[name], view.shape) if name in full else view
        for name, view in views.items()
    ]
    return blend_views(chosen, weights)


def final_posteriors(rows: np.ndarray, groups: np.ndarray, quota: int) -> np.ndarray:
    """Group posteriors of :func:`final_rows`, averaged over the folds: ``(n_rows, n_classes)``."""
    temperatures = np.full(len(rows), BLEND_TEMPERATURE)
    mean: np.ndarray = fold_posteriors(rows, groups, quota, temperatures).mean(axis=0)
    return mean
