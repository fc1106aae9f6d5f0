"""Class probabilities of rows: check, read, write, average."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from stackllm.data.submission import read_submission
from stackllm.errors import DataError
from stackllm.store.atomic import write_file

FLOOR = 1e-9
"""Smallest probability whose logarithm is taken."""


@dataclass(frozen=True)
class Predictions:
    """Probabilities of rows.

    Parameters
    ----------
    row_ids
        Text, ``(n_rows,)``.
    classes
        Label texts, ``(n_classes,)``.
    probabilities
        float64 ``(n_rows, n_classes)``, rows sum to 1.
    """

    row_ids: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: np.ndarray

    def frame(self) -> pl.DataFrame:
        """Table with ``row_id`` and a column a class."""
        columns = {name: self.probabilities[:, j] for j, name in enumerate(self.classes)}
        return pl.DataFrame({"row_id": self.row_ids, **columns})


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Natural logarithm, with probabilities below :data:`FLOOR` raised to it."""
    logs: np.ndarray = np.log(np.maximum(probabilities, FLOOR))
    return logs


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities from scores along the last axis."""
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: np.ndarray = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def log_blend(stack: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Normalised product of powers over the first axis of ``(n_models, n_rows, n_classes)``.

    Weights that sum to 1 give a weighted geometric mean; a smaller sum is flatter, and 0 is uniform.
    """
    return softmax(np.tensordot(weights, log_probabilities(stack), axes=1))


def read_predictions(path: Path, row_ids: tuple[str, ...], classes: tuple[str, ...]) -> np.ndarray:
    """Read somebody's probabilities for known rows.

    Parameters
    ----------
    path
        CSV or Parquet with an id column (``row_id``, ``id``, else the first) and a column a class.
    row_ids
        The rows wanted, in order.
    classes
        The classes wanted, in order.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_rows, n_classes)``.

    Raises
    ------
    MissingInputError, DataError, StorageError
        As :func:`stackllm.data.submission.read_submission`, or if a row is not there.
    """
    submission = read_submission(path, id_names=("row_id", "id"), classes=classes)
    place = {row_id: i for i, row_id in enumerate(submission.frame[submission.id].to_list())}
    absent = [row_id for row_id in row_ids if row_id not in place]
    if absent:
        raise DataError(
            f"{path}: {len(absent)} of {len(row_ids)} rows have no prediction (first: id {absent[0]})."
        )
    probabilities = submission.probabilities[[place[row_id] for row_id in row_ids]]
    normalised: np.ndarray = probabilities / probabilities.sum(axis=1, keepdims=True)
    return normalised


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Publish predictions as Parquet."""
    write_file(path, lambda temporary: predictions.frame().write_parquet(temporary))
