"""Quotas: how often each class may stand in a group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from stackllm.errors import DataError, MissingInputError, UsageError
from stackllm.group.plan import Quota
from stackllm.tables.files import check_text, first_row, read_frame, shown
from stackllm.tables.groups import Groups, group_codes, group_column
from stackllm.tables.ids import Read
from stackllm.tables.submission import match_classes


def read_quota(
    text: str,
    classes: Sequence[str],
    groups: Groups,
    *,
    group: str | None = None,
    read: Read = read_frame,
) -> tuple[Quota, str]:
    """The quota that an option names, and how to call it.

    Parameters
    ----------
    text
        A number; numbers separated by commas, one per class; or a file with a column per class and, if
        it is meant by group, a column of groups.
    classes
        Names of the class columns.
    groups
        The groups that a file by group must name.
    group
        The file's column of groups, if it is called so. None: one of the usual names, else the only one
        that is no class.
    read
        Reads the file.

    Returns
    -------
    tuple
        The quota (a mapping goes by group code) and a description.

    Raises
    ------
    UsageError
        If it is neither numbers nor a file.
    MissingInputError
        If it looks like a file's name, and there is no such file.
    DataError
        If the file's numbers are not whole, or a group is missing or named twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() and len(part) < 10 for part in parts):
        numbers = [int(part) for part in parts]
        if len(numbers) not in {1, len(classes)}:
            raise UsageError(
                f"quota {text}: {len(numbers)} numbers for {len(classes)} classes. Give one, or one per class."
            )
        return (numbers[0] if len(numbers) == 1 else np.array(numbers)), text
    path = Path(text)
    if path.suffix.lower() in {".csv", ".parquet", ".pq"} and not path.exists():
        raise MissingInputError(
            f"{path}: there is no such file. Check the path in the setting quota."
        )
    if not text.strip() or not path.exists():
        raise UsageError(
            f"quota {shown(text)[1:-1]}: neither a whole number, nor {len(classes)} of them separated by "
            "commas, nor a file that exists."
        )
    frame = read(path)
    columns = match_classes(path, frame.columns, classes)
    values = _whole(path, frame, columns)
    rest = [name for name in frame.columns if name not in columns]
    if not rest:
        if len(values) != 1:
            raise DataError(
                f"{path}: {len(values)} rows and no column of groups. Add one, or keep one row for all."
            )
        return values[0], str(path)
    column = group_column(path, rest, group) or group_column(path, rest, None)
    if column is None and len(rest) > 1:
        raise DataError(
            f"{path}: several columns are no class ({', '.join(map(shown, rest[:5]))}). "
            "Say which holds the groups with the setting group."
        )
    column = column or rest[0]
    check_text(path, frame, [column])
    return _by_group(path, frame[column], values, groups), str(path)


def _by_group(
    path: Path, names: pl.Series, values: NDArray[np.int64], groups: Groups
) -> dict[int, NDArray[np.int64]]:
    row_of: dict[int, int] = {}
    for row, code in enumerate(group_codes(groups, names)):
        if code is not None and row_of.setdefault(code, row) != row:
            raise DataError(
                f"{path}: group {shown(names[row])} stands in more than one row. Keep one."
            )
    absent = [name for code, name in enumerate(groups.names) if code not in row_of]
    if absent:
        raise DataError(
            f"{path}: {len(absent)} of {len(groups.names)} groups have no quota (first: {shown(absent[0])}). "
            "Add a row for each."
        )
    return {code: values[row] for code, row in row_of.items()}


def _whole(path: Path, frame: pl.DataFrame, columns: list[str]) -> NDArray[np.int64]:
    result = []
    for name in columns:
        check_text(path, frame, [name])
        cells = frame[name].str.strip_chars().str.replace(r"\.0*$", "")
        odd = ~cells.str.contains(r"^[0-9]{1,9}$").fill_null(False)
        if odd.any():
            row = first_row(odd)
            raise DataError(
                f"{path}: quotas are whole numbers of 0 or more; column {shown(name)} row {row} "
                f"holds {shown(frame[name][row - 1])}. Mend that cell."
            )
        result.append(cells.cast(pl.Int64).to_numpy())
    return np.stack(result, axis=1)
