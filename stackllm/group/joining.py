"""What belongs to the rows of a submission but stands in other files: groups, labels, quotas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from stackllm.data.files import check_ids, read_frame, shown
from stackllm.data.submission import ID_NAMES, match_classes, suffixes
from stackllm.errors import DataError, UsageError, did_you_mean
from stackllm.group.shapes import Quota

GROUP_NAMES = ("group", "group_id", "Question", "question", "prompt", "query")
LABEL_NAMES = ("target", "label", "class", "y")


@dataclass(frozen=True)
class Groups:
    """The group of each row.

    Parameters
    ----------
    codes
        Shape ``(n_rows,)``, which of ``names`` each row belongs to.
    names
        The groups' texts.
    source
        Where they come from, in words.
    """

    codes: NDArray[np.intp]
    names: tuple[str, ...]
    source: str


def group_column(header: Sequence[str], wanted: str | None) -> str | None:
    """The group column of a table: the one wanted, else one of the usual names, else None."""
    if wanted is not None:
        return wanted if wanted in header else None
    return next((name for name in GROUP_NAMES if name in header), None)


def groups_within(path: Path, frame: pl.DataFrame, column: str) -> Groups:
    """Groups from a column of the table itself.

    Raises
    ------
    DataError
        If a row has no group.
    """
    return _groups(path, frame[column], f'column "{column}" of {path}')


def groups_joined(
    ids: pl.Series, sub: Path, path: Path, column: str | None, id_name: str | None
) -> Groups:
    """Groups from another table, joined on the id.

    Parameters
    ----------
    ids
        Ids of the rows, text; the series' name is the id column's.
    sub
        Where they come from, for messages.
    path
        The other table.
    column
        Its group column. None: one of the usual names.
    id_name
        Its id column. None: of the same name as that of ``ids``, or ``id`` or ``row_id``, else rows
        count from 0.

    Returns
    -------
    Groups

    Raises
    ------
    MissingInputError
        If the file or a column is not there.
    DataError
        If ids are missing on either side, or a row has no group.
    """
    frame = read_frame(path)
    found = group_column(frame.columns, column)
    if found is None:
        said = f'no column "{column}"' if column else "no group column"
        raise DataError(
            f"{path}: there is {said}. {did_you_mean(column or 'group', frame.columns)} "
            "Name it with --group COLUMN."
        )
    joined = join_on_id(ids, sub, frame, path, found, id_name)
    return _groups(path, joined, f'column "{found}" of {path}')


def join_on_id(
    ids: pl.Series, sub: Path, frame: pl.DataFrame, path: Path, column: str, id_name: str | None
) -> pl.Series:
    """A column of ``frame`` in the order of ``ids``.

    Raises
    ------
    MissingInputError
        If there is no column ``id_name``.
    DataError
        If an id occurs twice, or is missing on either side.
    """
    known = _other_ids(ids.name, path, frame, id_name)
    right = pl.DataFrame({"id": known, "value": frame[column]})
    left = pl.DataFrame({"id": ids})
    absent = left.join(right, on="id", how="anti")["id"]
    surplus = right.join(left, on="id", how="anti")["id"]
    if len(absent) or len(surplus):
        parts = [
            f"{len(some)} ids of {here} are not in {there} (first: {shown(some[0])})"
            for some, here, there in ((absent, sub, path), (surplus, path, sub))
            if len(some)
        ]
        raise DataError(
            f"{' and '.join(parts)}. The two must list the same rows; check the id columns."
        )
    return left.join(right, on="id", how="left", maintain_order="left")["value"]


def label_column(path: Path, header: Sequence[str], wanted: str | None, id_name: str) -> str:
    """The column of labels: the one wanted, one of the usual names, or the only one but the id.

    Raises
    ------
    MissingInputError
        If it cannot be told.
    """
    if wanted is not None and wanted not in header:
        raise DataError(f'{path}: there is no column "{wanted}". {did_you_mean(wanted, header)}')
    rest = [name for name in header if name != id_name]
    found = wanted or next((name for name in LABEL_NAMES if name in header), None)
    if found is None and len(rest) == 1:
        found = rest[0]
    if found is None:
        raise DataError(
            f"{path}: no column is named like a label. {did_you_mean('target', header)} "
            "Name it with --target COLUMN."
        )
    return found


def read_labels(
    path: Path, labels: pl.Series, classes: Sequence[str], reading: str | None = None
) -> NDArray[np.intp]:
    """Labels as class indices: column names, their suffixes, or positions from 0.

    Parameters
    ----------
    path
        Where they come from, for messages.
    labels
        Text, one a row.
    classes
        Names of the class columns.
    reading
        ``name``, ``suffix`` or ``position``. None: whichever fits; if several fit and differ, that
        is an error.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_rows,)``.

    Raises
    ------
    DataError
        If a label fits no class, or two readings differ.
    """
    text = (
        labels.cast(pl.String).fill_null("").str.strip_chars().str.replace(r"^(-?\d+)\.0+$", "$1")
    )
    distinct = text.unique(maintain_order=True).to_list()
    tables = {
        "name": {name: j for j, name in enumerate(classes)},
        "suffix": {suffix: j for j, suffix in enumerate(suffixes(classes))},
        "position": {str(j): j for j in range(len(classes))},
    }
    if reading is not None:
        tables = {reading: tables[reading]}
    fitting = {kind: table for kind, table in tables.items() if all(x in table for x in distinct)}
    if not fitting:
        _refuse(path, text, distinct, tables, classes)
    for label in distinct:
        seen = {kind: table[label] for kind, table in fitting.items()}
        if len(set(seen.values())) > 1:
            both = " or ".join(f'column "{classes[j]}" by its {kind}' for kind, j in seen.items())
            raise DataError(
                f'{path}: label "{label}" can be read as {both}. Say which with --labels '
                f"{'|'.join(seen)}."
            )
    table = next(iter(fitting.values()))
    return text.replace_strict(table, return_dtype=pl.Int64).to_numpy().astype(np.intp)


def read_quota(text: str, classes: Sequence[str], groups: Groups) -> tuple[Quota, str]:
    """The quota that an option names, and how to call it.

    Parameters
    ----------
    text
        A number; numbers separated by commas, one a class; or a file with a column a class and, if
        it is meant by group, a column of groups.
    classes
        Names of the class columns.
    groups
        The groups that a file by group must name.

    Returns
    -------
    tuple
        The quota (a mapping goes by group code) and a description.

    Raises
    ------
    UsageError
        If it is neither numbers nor a file.
    DataError
        If the file's numbers are not whole, or a group is missing or named twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() and len(part) < 10 for part in parts):
        numbers = [int(part) for part in parts]
        if len(numbers) not in {1, len(classes)}:
            raise UsageError(
                f"--quota {text}: {len(numbers)} numbers for {len(classes)} classes. Give one, or one a class."
            )
        return (numbers[0] if len(numbers) == 1 else np.array(numbers)), text
    path = Path(text)
    if not path.exists():
        raise UsageError(
            f"--quota {shown(text)[1:-1]}: neither a whole number, nor {len(classes)} of them separated by "
            "commas, nor a file that exists."
        )
    frame = read_frame(path)
    columns = match_classes(path, frame.columns, classes)
    values = _whole(path, frame, columns)
    rest = [name for name in frame.columns if name not in columns]
    if not rest:
        if len(values) != 1:
            raise DataError(
                f"{path}: {len(values)} rows and no column of groups. Add one, or keep one row for all."
            )
        return values[0], str(path)
    return _by_group(path, frame[group_column(rest, None) or rest[0]], values, groups), str(path)


def _by_group(
    path: Path, names: pl.Series, values: NDArray[np.int64], groups: Groups
) -> dict[int, NDArray[np.int64]]:
    if names.is_duplicated().any():
        first = names.filter(names.is_duplicated())[0]
        raise DataError(f"{path}: group {shown(first)} stands in more than one row. Keep one.")
    row_of = {name: i for i, name in enumerate(names.to_list())}
    absent = [name for name in groups.names if name not in row_of]
    if absent:
        raise DataError(
            f"{path}: {len(absent)} of {len(groups.names)} groups have no quota (first: {shown(absent[0])}). "
            "Add a row for each."
        )
    return {code: values[row_of[name]] for code, name in enumerate(groups.names)}


def _whole(path: Path, frame: pl.DataFrame, columns: list[str]) -> NDArray[np.int64]:
    result = []
    for name in columns:
        cells = frame[name].str.strip_chars()
        odd = ~cells.str.contains(r"^\d{1,9}$").fill_null(False)
        if odd.any():
            row = int(odd.arg_max() or 0)
            raise DataError(
                f"{path}: quotas are whole numbers of 0 or more; column {shown(name)} row {row + 1} "
                f"holds {shown(cells[row])}."
            )
        result.append(cells.cast(pl.Int64).to_numpy())
    return np.stack(result, axis=1)


def _refuse(
    path: Path,
    text: pl.Series,
    distinct: list[str],
    tables: dict[str, dict[str, int]],
    classes: Sequence[str],
) -> None:
    nearest = max(tables.values(), key=lambda table: sum(label in table for label in distinct))
    odd = next(label for label in distinct if label not in nearest)
    row = int((text == odd).arg_max() or 0)
    names = ", ".join(f'"{name}"' for name in classes[:8]) + (", …" if len(classes) > 8 else "")
    raise DataError(
        f"{path}: label {shown(odd)} (row {row + 1}) is no class. Labels are column names ({names}), "
        f"their suffixes, or positions from 0 to {len(classes) - 1}, all of one kind."
    )


def _groups(path: Path, column: pl.Series, source: str) -> Groups:
    blank = (column.is_null() | (column == "")).fill_null(True)
    if blank.any():
        raise DataError(
            f"{path}: {blank.sum()} rows have no group (first: row {int(blank.arg_max() or 0) + 1}); "
            f"they come from {source}. Fill them in."
        )
    # neighbours mostly share a group, so comparing them first leaves far fewer texts to look up
    runs = column.rle_id()
    firsts = pl.DataFrame({"name": column.filter(runs.diff().fill_null(1) != 0)})
    names = firsts["name"].unique(maintain_order=True)
    table = pl.DataFrame({"name": names, "code": np.arange(len(names))})
    code_of_run = firsts.join(table, on="name", how="left", maintain_order="left")[
        "code"
    ].to_numpy()
    codes = code_of_run[runs.to_numpy()].astype(np.intp, copy=False)
    return Groups(codes, tuple(names.to_list()), source)


def _other_ids(name: str, path: Path, frame: pl.DataFrame, wanted: str | None) -> pl.Series:
    if wanted is not None and wanted in frame.columns:
        found: str | None = wanted
    else:
        found = next((known for known in (name, *ID_NAMES) if known in frame.columns), None)
    if found is None:
        return pl.Series("id", np.arange(frame.height)).cast(pl.String)
    check_ids(path, frame, found)
    return frame[found]
