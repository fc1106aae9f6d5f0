"""Step four: pseudo-labels of test groups, made so that both leaks stay closed.

Which labels stand beside which fold is decided by :class:`stackllm.crossfit.design.Design`; here
they are made from stage three's posteriors and written down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import polars as pl
from annotated_types import Ge, Gt, Le

from stackllm.crossfit.design import CrossFit, Design, Fit
from stackllm.crossfit.targets import Targets
from stackllm.parameters import check


@dataclass(frozen=True)
class PseudoParams:
    """Settings of pseudo-labelling.

    Parameters
    ----------
    rounds
        How often to label and refit; 0 leaves it out.
    labels
        ``"soft"`` trains on every likely label of a row with its probability as weight, ``"hard"``
        on the likeliest one with its probability as weight.
    weight
        Factor on the weight of a test row against a training row.
    min_confidence
        Test rows whose likeliest label is less likely than this are left out.
    """

    rounds: Annotated[int, Ge(0), Le(100)] = 2
    labels: Literal["soft", "hard"] = "soft"
    weight: Annotated[float, Gt(0), Le(1_000_000)] = 1.0
    min_confidence: Annotated[float, Ge(0), Le(1)] = 0.0

    def __post_init__(self) -> None:
        check(self)


_LIKELY = 0.02
"""Soft labels less likely than this are left out and their weight shared by the rest."""


def pseudo_targets(
    posteriors: CrossFit, design: Design, params: PseudoParams, fold: int, part: int
) -> Targets:
    """Labels of one part's test rows by one fold's models.

    Parameters
    ----------
    posteriors
        Stage three of the round before; ``test[fold]`` of a row in ``part`` comes from models that
        never trained on ``part``.
    design
        Folds and parts.
    params
        Settings.
    fold, part
        Which.
    """
    of_part = np.flatnonzero(design.parts == part)
    probabilities = posteriors.test[fold][of_part]
    confident = probabilities.max(axis=1) >= params.min_confidence
    of_part, probabilities = of_part[confident], probabilities[confident]
    if params.labels == "hard":
        rows, labels = np.arange(len(of_part)), probabilities.argmax(axis=1)
        weights = probabilities[rows, labels]
    else:
        likely = np.where(probabilities >= _LIKELY, probabilities, 0.0)
        likely /= np.maximum(likely.sum(axis=1, keepdims=True), 1e-12)
        rows, labels = np.nonzero(likely)
        weights = likely[rows, labels]
    return Targets(
        design.n_train + of_part[rows],
        labels,
        params.weight * weights,
        np.zeros(len(rows), dtype=bool),
        design.n_classes,
        design.classes,
    )


def audit(
    fit: Fit, design: Design, params: PseudoParams, row_ids: pl.Series, classes: tuple[str, ...]
) -> pl.DataFrame:
    """The pseudo-labels that one place of a cross-fit trains on: those and no others.

    Returns
    -------
    polars.DataFrame
        ``row_id, round, fold, part, label, confidence``: one row per label that a test row may have there,
        with its probability among those that were kept. ``fold`` is whose models made it, ``part`` whose model trains
        on it.
    """
    targets = fit.targets.only(~fit.targets.given)
    n = len(targets.rows)
    rows = targets.rows - design.n_train
    return pl.DataFrame(
        {
            "row_id": row_ids.gather(rows),
            "round": np.full(n, fit.round),
            "fold": np.full(n, fit.fold),
            "part": np.full(n, -1 if fit.part is None else fit.part),
            "label": pl.Series(np.array(classes)[targets.labels], dtype=pl.String),
            "confidence": targets.weights / params.weight,
        }
    )
