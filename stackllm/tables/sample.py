"""Sample submissions: whose columns and order of rows a submission copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from stackllm.errors import DataError
from stackllm.probabilities import Floats
from stackllm.tables.files import read_frame
from stackllm.tables.ids import Rows, find_rows, first_few, id_column
from stackllm.tables.submission import match_classes


@dataclass(frozen=True)
class SampleLayout:
    """How a submission is laid out.

    Parameters
    ----------
    ids
        Ids in their order, text, ``(n_rows,)``; the series is called as the column is to be.
    rows
        ``(n_rows,)``: which row of the test table each of them is.
    classes
        Column of each class, in the classes' order.
    columns
        All columns, ids included, in the order in which they are written.
    """

    ids: pl.Series
    rows: NDArray[np.intp]
    classes: tuple[str, ...]
    columns: tuple[str, ...]

    def filled(self, probabilities: Floats) -> pl.DataFrame:
        """The submission of probabilities of the test rows, ``(n_rows, n_classes)``, in the table's order."""
        matrix = probabilities[self.rows]
        classes = {name: matrix[:, j] for j, name in enumerate(self.classes)}
        return pl.DataFrame({self.ids.name: self.ids, **classes}).select(self.columns)


def plain_layout(rows: Rows, names: Sequence[str]) -> SampleLayout:
    """The layout where there is no sample: the rows' ids and a column ``target_<class>`` per class."""
    ids, classes = rows.ids, tuple(f"target_{name}" for name in names)
    return SampleLayout(ids, np.arange(len(ids)), classes, (ids.name, *classes))


def read_sample(path: Path, rows: Rows, names: Sequence[str]) -> SampleLayout:
    """Read a sample submission and hold it to the test rows and the classes.

    Parameters
    ----------
    path
        CSV or Parquet with a column per class and an id column: the one that holds the test rows' ids,
        whatever it is called. Columns of text that are neither are left out of the submission.
    rows
        The rows of the submission.
    names
        Names of the classes.

    Raises
    ------
    MissingInputError, DataError, StorageError
        With the ids or the class that one of them lacks.
    """
    frame = read_frame(path)
    wanted = rows.ids.sort()
    holds_ids = [column.name for column in frame if column.sort().equals(wanted)]
    name = holds_ids[0] if len(holds_ids) == 1 else id_column(path, frame, rows=rows)
    header = [column for column in frame.columns if column != name]
    classes = match_classes(path, header, names)
    surplus = [
        column
        for column in header
        if column not in classes and frame[column].cast(pl.Float64, strict=False).null_count() == 0
    ]
    if surplus:
        raise DataError(
            f"{path}: {len(surplus)} columns of numbers are none of the {len(names)} classes of the "
            f"training table ({first_few(surplus)}). Remove them, or use the training table that they belong to."
        )
    positions, _ = find_rows(rows, path, frame, name, beside=header)
    order = np.argsort(positions)  # from the sample's rows to the table's
    ids = rows.ids[order]
    columns = [column for column in frame.columns if column in {name, *classes}]
    if name is None:
        return SampleLayout(ids, order, tuple(classes), (ids.name, *columns))
    return SampleLayout(ids.rename(name), order, tuple(classes), tuple(columns))
