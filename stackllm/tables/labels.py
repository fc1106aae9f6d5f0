"""Labels of the test rows, where somebody has them: for scoring, never for fitting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from stackllm.errors import DataError, did_you_mean
from stackllm.tables.files import check_text, read_table


def read_truth(path: Path, row_ids: tuple[str, ...], classes: tuple[str, ...]) -> np.ndarray:
    """Class index of each row.

    Parameters
    ----------
    path
        Table with an id column (``id``, ``row_id``, else the first) and a label column
        (``target``, ``label``, else the only other one).
    row_ids, classes
        Rows and classes in their order.

    Returns
    -------
    numpy.ndarray
        int64 ``(n_rows,)``.

    Raises
    ------
    MissingInputError, DataError, StorageError
        With the file, column and first row that is wrong.
    """
    frame = read_table(path)
    id_name = next((name for name in ("id", "row_id") if name in frame.columns), frame.columns[0])
    others = [name for name in frame.columns if name != id_name]
    label = next((name for name in ("target", "label") if name in others), None)
    if label is None and len(others) != 1:
        raise DataError(
            f'{path}: there is no label column "target". {did_you_mean("target", frame.columns)}'
        )
    check_text(path, frame, (id_name, label or others[0]))
    pairs = frame.select(pl.col(id_name, label or others[0]).cast(pl.String))
    known = dict(pairs.iter_rows())
    absent = [row_id for row_id in row_ids if row_id not in known]
    if absent:
        raise DataError(
            f"{path}: {len(absent)} of {len(row_ids)} rows have no label (first: id {absent[0]})."
        )
    index = {name: i for i, name in enumerate(classes)}
    unseen = [row_id for row_id in row_ids if known[row_id] not in index]
    if unseen:
        raise DataError(
            f'{path}: label "{known[unseen[0]]}" of id {unseen[0]} is none of the {len(classes)} classes of the '
            f"training table. {did_you_mean(str(known[unseen[0]]), classes)}"
        )
    return np.array([index[known[row_id]] for row_id in row_ids], dtype=np.int64)
