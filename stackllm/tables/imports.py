"""Predictions that somebody else made, for rows that we know."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stackllm.errors import DataError
from stackllm.tables.submission import read_submission


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
        As :func:`stackllm.tables.submission.read_submission`, or if a row is not there.
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
