"""Predictions that somebody else made, for rows that we know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stackllm.probabilities import Floats
from stackllm.tables.ids import ID_NAMES, Rows, find_rows
from stackllm.tables.submission import read_submission


def read_predictions(path: Path, rows: Rows, classes: Sequence[str]) -> Floats:
    """Read somebody's probabilities for known rows.

    Parameters
    ----------
    path
        CSV or Parquet with an id column, as in :func:`~stackllm.tables.ids.id_column`, and a column
        per class. It may list other rows too.
    rows
        The rows wanted, in order.
    classes
        The classes wanted, in order.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_rows, n_classes)``, rows sum to 1.

    Raises
    ------
    MissingInputError, DataError, StorageError
        As :func:`stackllm.tables.submission.read_submission`, or if a row is not there.
    """
    submission = read_submission(path, id_names=(rows.ids.name, *ID_NAMES), classes=classes)
    positions, _ = find_rows(rows, path, submission.frame, submission.id, surplus=True)
    probabilities = submission.probabilities[positions]
    normalised: Floats = probabilities / probabilities.sum(axis=1, keepdims=True)
    return normalised
