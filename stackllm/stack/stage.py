"""Stage two: LightGBM on top of stage one, cross-fitted, and a blend beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stackllm.crossfit.design import CrossFit, Design, Fit
from stackllm.engine.local import Engine, Task
from stackllm.members.boosting import BoostingParams, fit_boosting, predict_boosting
from stackllm.members.inputs import Inputs
from stackllm.members.stage import fit_key, gather
from stackllm.stack.features import stack_categorical, stack_features
from stackllm.store.digest import digest
from stackllm.store.units import make_unit

VERSION = 1


def cross_fit_stack(
    members: dict[str, CrossFit],
    posteriors: dict[str, CrossFit],
    inputs: Inputs,
    fits: Sequence[Fit],
    design: Design,
    params: BoostingParams,
    seed: int,
    engine: Engine,
) -> CrossFit:
    """Fit stage two at every place of a cross-fit.

    Parameters
    ----------
    members, posteriors
        Row probabilities of stage one of this round, and their group posteriors.
    inputs
        Label-free matrices; the recipe columns are read.
    fits
        Places; those of one fold read the same matrix.
    design
        Folds and parts.
    params, seed
        Settings of LightGBM.
    engine
        Runs the units.
    """
    number = fits[0].round
    matrices = {
        fold: stack_features(
            {name: member.fold(fold) for name, member in members.items()},
            {name: member.fold(fold) for name, member in posteriors.items()},
            inputs.blocks,
            inputs.names,
            design.groups,
        )
        for fold in range(design.n_folds)
    }
    codes = stack_categorical(matrices[0].shape[1], inputs.names)
    keys = {fold: digest(matrix) for fold, matrix in matrices.items()}
    stored = engine.ensure(
        f"stack inputs, round {number}",
        [
            Task(
                make_unit(f"stack/inputs/round{number}_fold{fold}", VERSION, keys[fold]),
                _store_matrix,
                (matrix,),
                here=True,
            )
            for fold, matrix in matrices.items()
        ],
    )
    tasks = [
        Task(
            make_unit(
                f"stack/models/{fit.name}",
                VERSION,
                keys[fit.fold],
                fit_key(fit),
                codes,
                params=(params, seed),
            ),
            fit_stack,
            (stored[fit.fold], fit, params, seed, codes),
        )
        for fit in fits
    ]
    return gather(design, fits, engine.ensure(f"stack, round {number}", tasks))


def fit_stack(
    folder: Path, matrix: Path, fit: Fit, params: BoostingParams, seed: int, codes: Sequence[int]
) -> None:
    """Fit one stack, and write its models and predictions into ``folder``."""
    features = np.load(matrix / "features.npy", mmap_mode="r", allow_pickle=False)
    fit_boosting(features[fit.targets.rows], fit.targets, params, seed, folder, codes)
    np.save(folder / "predictions.npy", predict_boosting(features[fit.predict], folder))


def _store_matrix(folder: Path, matrix: np.ndarray) -> None:
    np.save(folder / "features.npy", matrix)
