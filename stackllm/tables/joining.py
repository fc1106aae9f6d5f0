"""What belongs to the rows of a submission but stands in other files: groups, labels, quotas."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from stackllm.errors import DataError, MissingInputError, UsageError, did_you_mean
from stackllm.group.plan import Quota
from stackllm.tables.files import check_ids, check_text, read_frame, shown
from stackllm.tables.submission import ID_NAMES, match_classes, plain_digits, suffixes

GROUP_NAMES = ("group", "group_id", "Question", "question", "prompt", "query")
LABEL_NAMES = ("target", "label", "class", "y")

Read = Callable[[Path], pl.DataFrame]
"""Reads a table; one that remembers lets two options name the same pipe."""


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
    source = f'column "{column}" of {path}'
    check_text(path, frame, [column])
    _check_filled(path, frame[column], source)
    return _groups(frame[column], source)


def groups_joined(
    ids: pl.Series,
    sub: Path,
    path: Path,
    column: str | None,
    id_name: str | None,
    read: Read = read_frame,
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
        Its id column. None: of the same name as that of ``ids``, or ``id`` or ``row_id``, whatever their
        case; if no column looks like ids, rows count from 0.
    read
        Reads the table.

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
    frame = read(path)
    found = group_column(frame.columns, column)
    if found is None:
        said = f'no column "{column}"' if column else "no group column"
        raise DataError(
            f"{path}: there is {said}. {did_you_mean(column or 'group', frame.columns)} "
            "Name it with --group COLUMN."
        )
    source = f'column "{found}" of {path}'
    check_text(path, frame, [found])
    _check_filled(path, frame[found], source)
    joined = join_on_id(ids, sub, frame, path, found, id_name)
    if id_column(path, frame, ids, id_name, found) is None:
        source += ", matched by row number"
    return _groups(joined, source)


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
    found = id_column(path, frame, ids, id_name, column)
    if found is None:
        known, what = pl.Series(np.arange(frame.height)).cast(pl.String), "row numbers"
    else:
        check_text(path, frame, [found])
        check_ids(path, frame, found)
        known, what = frame[found], "ids"
    right = pl.DataFrame({"id": known, "value": frame[column]})
    left = pl.DataFrame({"id": ids})
    absent = left.join(right, on="id", how="anti")["id"]
    surplus = right.join(left, on="id", how="anti")["id"]
    if len(absent) or len(surplus):
        parts = [
            f"{len(some)} {kind} of {here} are not in {there} (first: {shown(some[0])})"
            for some, kind, here, there in (
                (absent, "ids", sub, path),
                (surplus, what, path, sub),
            )
            if len(some)
        ]
        why = f" ({path} has no id column, so its rows count from 0)" if found is None else ""
        raise DataError(
            f"{' and '.join(parts)}{why}. The two must list the same rows; check the id columns."
        )
    return left.join(right, on="id", how="left", maintain_order="left")["value"]


def id_column(
    path: Path, frame: pl.DataFrame, ids: pl.Series, wanted: str | None, beside: str
) -> str | None:
    """The id column of a table that is joined to a submission.

    Parameters
    ----------
    path, frame
        The table.
    ids
        The submission's ids; the series' name is the id column's.
    wanted
        ``--id``. A table that has no column of that name may still have one of a usual name.
    beside
        The column that is joined, which is no id.

    Returns
    -------
    str or None
        None if no column looks like ids: then rows count from 0.

    Raises
    ------
    DataError
        If a column looks like ids but its name is another, or two fit, or there is none though one
        is named.
    """
    rest = [name for name in frame.columns if name != beside]
    for known in dict.fromkeys(filter(None, (wanted, ids.name, *ID_NAMES))):
        alike = [name for name in rest if name.lower() == known.lower()]
        if known in alike:
            return known
        if len(alike) == 1:
            return alike[0]
        if alike:
            raise DataError(
                f'{path}: columns "{alike[0]}" and "{alike[1]}" could both hold the ids. '
                "Say which with --id COLUMN."
            )
    likely = next((name for name in rest if _like_ids(frame[name], ids)), None)
    if likely is not None:
        raise DataError(
            f'{path}: column "{likely}" looks like ids, but the id column of the submission is '
            f'"{ids.name}". Give both one name, or remove "{likely}" to match by row number.'
        )
    if wanted is not None:
        raise DataError(
            f'{path}: there is no column "{wanted}". {did_you_mean(wanted, frame.columns)}'
        )
    return None


def _like_ids(column: pl.Series, ids: pl.Series) -> bool:
    """Is it called like ids and never the same twice, or does it hold the very ids in some order?"""
    if column.dtype != pl.String or len(column) == 0:
        return False
    if _LIKE_ID(column.name):
        return column.n_unique() == len(column)
    return len(column) == len(ids) and column.sort().equals(ids.sort())


_LIKE_ID = re.compile(r"(^|[^a-zA-Z])(id|Id|ID)s?$|[a-z](Id|ID)s?$|^(index|idx|key)$").search


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
    text = labels.cast(pl.String).fill_null("")
    distinct = text.unique(maintain_order=True).to_list()
    tables = {kind: table for kind, table in _readings(classes).items() if reading in {None, kind}}
    seen = {kind: [table(label) for label in distinct] for kind, table in tables.items()}
    fitting = {kind: found for kind, found in seen.items() if None not in found}
    if not fitting:
        _refuse(path, text, distinct, seen, classes)
    for label, *found in zip(distinct, *fitting.values(), strict=True):
        if len(set(found)) > 1:
            both = " or ".join(
                f'column "{classes[j or 0]}" by its {kind}'
                for kind, j in zip(fitting, found, strict=True)
            )
            raise DataError(
                f'{path}: label "{label}" can be read as {both}. Say which with --labels '
                f"{'|'.join(fitting)}."
            )
    table = dict(zip(distinct, next(iter(fitting.values())), strict=True))
    return text.replace_strict(table, return_dtype=pl.Int64).to_numpy().astype(np.intp)


def _readings(classes: Sequence[str]) -> dict[str, Callable[[str], int | None]]:
    """Each way to read a label: from its text to a class, or None."""
    names = {name: j for j, name in enumerate(classes)}
    plain = {_plain(name): j for j, name in enumerate(classes)}
    ends = {suffix: j for j, suffix in enumerate(suffixes(classes))}
    places = {str(j): j for j in range(len(classes))}
    if len(plain) < len(classes):
        plain = {}  # "4" and "4.0" are two classes here

    def by_name(label: str) -> int | None:
        return names.get(label, plain.get(_plain(label)))

    return {
        "name": by_name,
        "suffix": lambda label: ends.get(_plain(label), ends.get(plain_digits(_plain(label)))),
        "position": lambda label: places.get(plain_digits(_plain(label))),
    }


def _plain(text: str) -> str:
    """Without spaces around, and whole numbers without a fraction of zeros."""
    return re.sub(r"^(-?[0-9]+)\.0+$", r"\1", text.strip())


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
        A number; numbers separated by commas, one a class; or a file with a column a class and, if
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
                f"--quota {text}: {len(numbers)} numbers for {len(classes)} classes. Give one, or one a class."
            )
        return (numbers[0] if len(numbers) == 1 else np.array(numbers)), text
    path = Path(text)
    if path.suffix.lower() in {".csv", ".parquet", ".pq"} and not path.exists():
        raise MissingInputError(f"{path}: there is no such file. Check the path after --quota.")
    if not text.strip() or not path.exists():
        raise UsageError(
            f"--quota {shown(text)[1:-1]}: neither a whole number, nor {len(classes)} of them separated by "
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
    column = group_column(rest, group) or group_column(rest, None)
    if column is None and len(rest) > 1:
        raise DataError(
            f"{path}: several columns are no class ({', '.join(map(shown, rest[:5]))}). "
            "Say which holds the groups with --group COLUMN."
        )
    column = column or rest[0]
    check_text(path, frame, [column])
    return _by_group(path, frame[column], values, groups), str(path)


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
        check_text(path, frame, [name])
        cells = frame[name].str.strip_chars().str.replace(r"\.0*$", "")
        odd = ~cells.str.contains(r"^[0-9]{1,9}$").fill_null(False)
        if odd.any():
            row = int(odd.arg_max() or 0)
            raise DataError(
                f"{path}: quotas are whole numbers of 0 or more; column {shown(name)} row {row + 1} "
                f"holds {shown(frame[name][row])}. Mend that cell."
            )
        result.append(cells.cast(pl.Int64).to_numpy())
    return np.stack(result, axis=1)


def _refuse(
    path: Path,
    text: pl.Series,
    distinct: list[str],
    seen: dict[str, list[int | None]],
    classes: Sequence[str],
) -> None:
    nearest = min(seen.values(), key=lambda found: found.count(None))
    odd = distinct[nearest.index(None)]
    row = int((text == odd).arg_max() or 0)
    names = ", ".join(f'"{name}"' for name in classes[:8]) + (", …" if len(classes) > 8 else "")
    raise DataError(
        f"{path}: label {shown(odd)} (row {row + 1}) is no class. Labels are column names ({names}), "
        f"their suffixes, or positions from 0 to {len(classes) - 1}, all of one kind."
    )


def _check_filled(path: Path, column: pl.Series, source: str) -> None:
    blank = (column.is_null() | (column == "")).fill_null(True)
    if blank.any():
        raise DataError(
            f"{path}: {blank.sum()} rows have no group (first: row {int(blank.arg_max() or 0) + 1}); "
            f"they come from {source}. Fill them in."
        )


def _groups(column: pl.Series, source: str) -> Groups:
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
