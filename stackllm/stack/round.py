"""One round: stages one, two and three over the places of one cross-fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stackllm.crossfit.design import CrossFit, Design, Fit
from stackllm.metrics import log_loss
from stackllm.stack.blend import Blend, cross_blend
from stackllm.stack.posteriors import Calibrated, cross_posteriors


@dataclass(frozen=True)
class Round:
    """What one round predicts.

    Parameters
    ----------
    number
        0 before any pseudo-label.
    fits
        The places of its cross-fit.
    posteriors
        Calibrated rows and group posteriors of every member, ``stack`` and ``blend``.
    blend
        The blend's weights.
    loss
        Out-of-fold log loss of the final posteriors.
    """

    number: int
    fits: Sequence[Fit]
    posteriors: dict[str, Calibrated]
    blend: Blend
    loss: float

    @property
    def final(self) -> CrossFit:
        """The posteriors that are submitted: those of the blend of all models."""
        return self.posteriors["blend"].predictions


def finish_round(
    number: int,
    fits: Sequence[Fit],
    members: dict[str, CrossFit],
    posteriors: dict[str, Calibrated],
    stack: CrossFit,
    design: Design,
    quota: int,
) -> Round:
    """Blend members and stack, and take everything through stage three."""
    blend = cross_blend({**members, "stack": stack}, design, quota)
    finished = {
        **posteriors,
        "stack": cross_posteriors(stack, design, quota),
        # its weights are its temperature; to fit another on the same folds would correct twice
        "blend": cross_posteriors(blend.predictions, design, quota, temperature=1.0),
    }
    loss = log_loss(finished["blend"].oof, design.labels)
    return Round(number, fits, finished, blend, loss)
