"""Member ``frozen``: a linear head on a frozen LLM's pooled layers and the response's own features.

With ``centred`` every feature stands a second time, less its mean within the group: what all
answers to a question share says nothing about who wrote which.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le, Len

from stackllm.crossfit.targets import Targets
from stackllm.members.inputs import Inputs
from stackllm.members.linear import class_probabilities, fit_head
from stackllm.parameters import check
from stackllm.recipes.within import centre
from stackllm.store.records import read_json, write_json

VERSION = 2

_BLOCKS = ("text_", "likelihood_")


@dataclass(frozen=True)
class FrozenParams:
    """Settings of the frozen member.

    Parameters
    ----------
    centred
        Whether features also stand centred within the group.
    c
        Inverse strengths of the L2 penalty to choose from, by log loss on held-out groups of the
        training rows. The first of equals wins.
    max_iter
        Bound on the optimiser's steps.
    """

    centred: bool = False
    c: Annotated[tuple[Annotated[float, Ge(1e-9), Le(1e9)], ...], Len(1, 1000)] = (
        0.0003, 0.001, 0.003, 0.01,
    )  # fmt: skip
    max_iter: Annotated[int, Ge(1), Le(1_000_000)] = 300

    def __post_init__(self) -> None:
        check(self)


def fit(inputs: Inputs, targets: Targets, params: FrozenParams, seed: int, folder: Path) -> None:
    """Fit on ``targets`` and write the model's arrays into ``folder``."""
    rows, entries = np.unique(targets.rows, return_inverse=True)
    features = _features(inputs, params.centred)[rows]
    mean, scale = _standardisation(features)
    chosen, weights, bias = fit_head(
        _standardise(features, mean, scale),
        inputs.groups[rows],
        replace(targets, rows=entries),
        params.c,
        params.max_iter,
        seed,
    )
    for name, array in {"mean": mean, "scale": scale, "weights": weights, "bias": bias}.items():
        np.save(folder / f"{name}.npy", array)
    write_json(folder / "head.json", {"c": chosen, "centred": params.centred})


def predict(inputs: Inputs, rows: np.ndarray, folder: Path) -> np.ndarray:
    """Probabilities of ``rows``, float64 ``(len(rows), n_classes)``."""
    mean, scale, weights, bias = (
        np.load(folder / f"{name}.npy", allow_pickle=False)
        for name in ("mean", "scale", "weights", "bias")
    )
    centred = read_json(folder / "head.json")["centred"]
    features = _standardise(_features(inputs, centred)[rows], mean, scale)
    return class_probabilities(features, weights, bias)


def _features(inputs: Inputs, centred: bool) -> np.ndarray:
    """Embedding and own features, float32 ``(n_rows, n_features)``; NaN where not measured."""
    columns = [i for i, name in enumerate(inputs.names) if name.startswith(_BLOCKS)]
    features = np.hstack([inputs.embedding, inputs.blocks[:, columns].astype(np.float32)])
    if centred:
        features = np.hstack([features, centre(np.nan_to_num(features), inputs.groups)])
    return features


def _standardisation(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = np.asarray(np.nanmean(features, axis=0, dtype=np.float64), dtype=np.float32)
    scale = np.asarray(np.nanstd(features, axis=0, dtype=np.float64), dtype=np.float32)
    scale[~(np.isfinite(scale) & (scale > 1e-6))] = np.inf
    return np.nan_to_num(mean), scale


def _standardise(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Features of mean 0 and deviation 1, within 8 deviations; what was not measured is the mean."""
    standardised: np.ndarray = features - mean
    standardised /= scale
    np.nan_to_num(standardised, copy=False)  # in place: such a matrix may be of GiB
    return np.clip(standardised, -8, 8, out=standardised)
