"""Class probabilities of rows: check, read, write, average."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from stackllm.data.files import read_table
from stackllm.errors import DataError, did_you_mean
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


def log_average(stack: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Normalised geometric mean over the first axis of ``(n_models, n_rows, n_classes)``."""
    return softmax(np.average(log_probabilities(stack), axis=0, weights=weights))


def label_columns(columns: list[str], classes: tuple[str, ...]) -> list[str] | None:
    """Which columns hold which class: by name, else by a common prefix (``target_3`` ↔ ``3``).

    Returns
    -------
    list[str] or None
        Column of each class, in the order of ``classes``; None if they do not match.
    """
    if set(classes) <= set(columns):
        return list(classes)
    for prefix in {name[: -len(classes[0])] for name in columns if name.endswith(classes[0])}:
        if all(prefix + label in columns for label in classes):
            return [prefix + label for label in classes]
    return None


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
        With the file, column and first row that is wrong.
    """
    frame = read_table(path)
    id_name = next((name for name in ("row_id", "id") if name in frame.columns), frame.columns[0])
    columns = label_columns([name for name in frame.columns if name != id_name], classes)
    if columns is None:
        raise DataError(
            f'{path}: no column for class "{classes[0]}". {did_you_mean(classes[0], frame.columns)}'
        )
    ids = frame[id_name].cast(pl.String)
    if ids.is_duplicated().any():
        raise DataError(
            f'{path}: id {ids.filter(ids.is_duplicated())[0]} occurs more than once in "{id_name}".'
        )
    place = {row_id: i for i, row_id in enumerate(ids.to_list())}
    absent = [row_id for row_id in row_ids if row_id not in place]
    if absent:
        raise DataError(
            f"{path}: {len(absent)} of {len(row_ids)} rows have no prediction (first: id {absent[0]})."
        )
    values = frame.select(pl.col(columns).cast(pl.Float64, strict=False)).to_numpy()
    probabilities = values[[place[row_id] for row_id in row_ids]].astype(np.float64)
    check_probabilities(path, probabilities, row_ids)
    return probabilities


def check_probabilities(path: Path, probabilities: np.ndarray, row_ids: tuple[str, ...]) -> None:
    """Refuse what is no probability.

    Raises
    ------
    DataError
        If a value is not a number from 0 to 1, or a row does not sum to 1 within 1e-4.
    """
    bad = ~np.isfinite(probabilities) | (probabilities < 0) | (probabilities > 1)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise DataError(
            f"{path}: {int(bad.any(axis=1).sum())} rows hold something that is no probability "
            f"(first: id {row_ids[row]}, class number {column}: {probabilities[row, column]})."
        )
    off = np.abs(probabilities.sum(axis=1) - 1) > 1e-4
    if off.any():
        row = int(np.flatnonzero(off)[0])
        raise DataError(
            f"{path}: {int(off.sum())} rows do not sum to 1 (first: id {row_ids[row]} sums to "
            f"{probabilities[row].sum():.6g}). Normalise them."
        )


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Publish predictions as Parquet."""
    write_file(path, lambda temporary: predictions.frame().write_parquet(temporary))
