"""Member ``external``: somebody else's out-of-fold and test predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stackllm.crossfit.design import CrossFit, Design
from stackllm.metrics import log_loss
from stackllm.parameters import FileName, Name, check
from stackllm.tables.ids import Rows
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
        column per class, for every training row.
    test
        The same for every test row.
    """

    name: Name
    oof: FileName
    test: FileName

    def __post_init__(self) -> None:
        check(self)


def read_external(
    params: ExternalParams, design: Design, train: Rows, test: Rows, classes: tuple[str, ...]
) -> tuple[CrossFit, list[str]]:
    """An external member's predictions, and whether they look as if they had seen their rows.

    Parameters
    ----------
    params
        Where they are.
    design
        Folds and labels.
    train, test, classes
        The rows and classes that they must hold.

    Returns
    -------
    CrossFit
        Its predictions; the same test predictions for every fold.
    list of str
        Warnings.

    Raises
    ------
    MissingInputError, DataError, StorageError
        With the file, column and row that is wrong.
    """
    oof = read_predictions(Path(params.oof), train, classes)
    new = read_predictions(Path(params.test), test, classes)
    crossfit = CrossFit(oof, np.broadcast_to(new, (design.n_folds, *new.shape)).copy())
    return crossfit, _in_sample_signs(params, oof, new, design)


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
