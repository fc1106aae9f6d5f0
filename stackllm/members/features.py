"""Member ``features``: LightGBM on the recipes' columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stackllm.crossfit.targets import Targets
from stackllm.members.boosting import BoostingParams, fit_boosting, predict_boosting
from stackllm.members.inputs import Inputs, categorical

VERSION = 1


def fit(inputs: Inputs, targets: Targets, params: BoostingParams, seed: int, folder: Path) -> None:
    """Fit on ``targets`` and write the models into ``folder``."""
    codes = categorical(inputs.names)
    fit_boosting(inputs.blocks[targets.rows], targets, params, seed, folder, codes)


def predict(inputs: Inputs, rows: np.ndarray, folder: Path) -> np.ndarray:
    """Probabilities of ``rows``, float64 ``(len(rows), n_classes)``."""
    return predict_boosting(inputs.blocks[rows], folder)
