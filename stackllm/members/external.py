"""Member ``external``: somebody else's out-of-fold and test predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stackllm.crossfit.design import CrossFit, Design
from stackllm.metrics import log_loss
from stackllm.tables.imports import read_predictions


@dataclass(frozen=True)
class ExternalParams:
    """Where an external member's predictions are.

    Parameters
    ----------
    name
        What it is called in tables.
    oof
        CSV or Parquet: id (or, where the training table has none, the row's number from 0) and a
        column a class, for every training row.
    test
        The same for every test row.
    """

    name: str
    oof: str
    test: str


def read_external(
    params: ExternalParams,
    design: Design,
    train_ids: tuple[str, ...],
    test_ids: tuple[str, ...],
    classes: tuple[str, ...],
) -> tuple[CrossFit, list[str]]:
    """Read and check an external member.

    Returns
    -------
    CrossFit
        Its predictions; the same test predictions for every fold.
    list of str
        Warnings: that its out-of-fold predictions look as if they had seen their rows.

    Raises
    ------
    MissingInputError, DataError, StorageError
        With the file, column and row that is wrong.
    """
    oof = read_predictions(Path(params.oof), train_ids, classes)
    test = read_predictions(Path(params.test), test_ids, classes)
    crossfit = CrossFit(oof, np.broadcast_to(test, (design.n_folds, *test.shape)).copy())
    return crossfit, _in_sample_signs(params, oof, test, design)


def _in_sample_signs(
    params: ExternalParams, oof: np.ndarray, test: np.ndarray, design: Design
) -> list[str]:
    """Predictions made by a model that saw the row are far surer there than on the test rows."""
    sure_oof = float(np.median(oof.max(axis=1)))
    sure_test = float(np.median(test.max(axis=1)))
    loss = log_loss(oof, design.labels)
    entropy_test = float(-(test * np.log(np.maximum(test, 1e-15))).sum(axis=1).mean())
    if loss < 0.5 * entropy_test and sure_oof > sure_test:
        return [
            f"external member {params.name}: its OOF log loss is {loss:.3f}, but its test predictions are only sure "
            f"enough for about {entropy_test:.3f}; were its OOF rows in its training data?"
        ]
    return []
