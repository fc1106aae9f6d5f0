"""LightGBM on a feature matrix, reproducible to the bit: one thread, fixed seeds, text models.

The member ``features`` is this on the recipes' columns; stage two is this on everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le

from stackllm.crossfit.targets import Targets
from stackllm.parameters import Share, check


@dataclass(frozen=True)
class BoostingParams:
    """Settings of a LightGBM model.

    Parameters
    ----------
    n_trees
        Boosting rounds; each grows one tree per class.
    learning_rate, n_leaves, min_leaf_rows, l2
        As LightGBM's ``learning_rate``, ``num_leaves``, ``min_data_in_leaf``, ``lambda_l2``.
    feature_share, row_share
        Share of the columns each tree, and of the rows each round, gets to see; two rows or more.
    n_seeds
        Models with other random draws, averaged.
    """

    n_trees: Annotated[int, Ge(1), Le(100_000)] = 200
    learning_rate: Annotated[float, Gt(0), Le(1)] = 0.05
    n_leaves: Annotated[int, Ge(2), Le(131_072)] = 15
    min_leaf_rows: Annotated[int, Ge(0), Le(1_000_000_000)] = 20
    l2: Annotated[float, Ge(0), Le(1e12)] = 1.0
    feature_share: Share = 0.3
    row_share: Share = 0.8
    n_seeds: Annotated[int, Ge(1), Le(1000)] = 1

    def __post_init__(self) -> None:
        check(self)


def fit_boosting(
    features: np.ndarray,
    targets: Targets,
    params: BoostingParams,
    seed: int,
    folder: Path,
    categorical: Sequence[int] = (),
) -> None:
    """Fit ``n_seeds`` models and write ``model_0.txt`` … into ``folder``.

    Parameters
    ----------
    features
        ``(n, n_features)``, one row an entry of ``targets``; NaN means missing.
    targets
        Labels and weights.
    params
        Settings.
    seed
        Seed of the first model; the others count on from it.
    folder
        Where the models go.
    categorical
        Columns that hold the numbers of categories, whose order means nothing.
    """
    import lightgbm

    data = lightgbm.Dataset(
        features,
        targets.labels,
        weight=targets.weights,
        categorical_feature=list(categorical) or "auto",
        params={"verbosity": -1, "num_threads": 1},
    )
    for i in range(params.n_seeds):
        options = {
            "objective": "multiclass",
            "num_class": targets.n_classes,
            "learning_rate": params.learning_rate,
            "num_leaves": params.n_leaves,
            "min_data_in_leaf": params.min_leaf_rows,
            "lambda_l2": params.l2,
            "feature_fraction": params.feature_share,
            # of no row at all LightGBM makes an error of its own
            "bagging_fraction": min(1.0, max(params.row_share, 2 / len(features))),
            "bagging_freq": 1,
            "seed": seed + 1000 * i,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,
            "verbosity": -1,
        }
        model = lightgbm.train(options, data, num_boost_round=params.n_trees)
        (folder / f"model_{i}.txt").write_text(
            model.model_to_string(), encoding="utf-8", newline="\n"
        )


def predict_boosting(features: np.ndarray, folder: Path) -> np.ndarray:
    """Mean probabilities of the models in ``folder``, float64 ``(n_rows, n_classes)``.

    The folder is one that a run wrote and verified: LightGBM crashes on a damaged model file.
    """
    import lightgbm

    predictions = [
        lightgbm.Booster(model_str=path.read_text(encoding="utf-8")).predict(
            features, num_threads=1
        )
        for path in sorted(folder.glob("model_*.txt"))
    ]
    return np.asarray(np.mean(predictions, axis=0), dtype=np.float64)
