"""Submissions: read anybody's table of probabilities, and refuse what makes no sense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import polars as pl

from stackllm.errors import DataError, did_you_mean
from stackllm.probabilities import Floats
from stackllm.tables.columns import called_like_ids, find_column, usual_column, written_by_pandas
from stackllm.tables.files import check_ids, check_text, read_frame, shown
from stackllm.tables.ids import ID_NAMES

SUM_TOLERANCE = 1e-3
"""Rows that sum to 1 within this were rounded; further off, something else happened."""


ReadNumbers = Callable[[Path, Callable[[list[str]], list[str]]], pl.DataFrame]
"""Reads a table of which some columns are numbers, as :func:`~stackllm.tables.files.read_frame` does."""


@dataclass(frozen=True)
class Submission:
    """A checked file of probabilities.

    Parameters
    ----------
    path
        Where it came from.
    frame
        The table as read: ids and groups are text, classes are numbers, columns in their order.
    id
        Name of the id column.
    classes
        Names of the class columns, in their order.
    probabilities
        Shape ``(n_rows, n_classes)``, finite, not negative, no row all zero.
    """

    path: Path
    frame: pl.DataFrame
    id: str
    classes: tuple[str, ...]
    probabilities: Floats

    def replaced(self, probabilities: Floats) -> pl.DataFrame:
        """The same table with other probabilities, ``(n_rows, n_classes)``."""
        return self.frame.with_columns(
            pl.Series(name, np.ascontiguousarray(probabilities[:, j]))
            for j, name in enumerate(self.classes)
        )


def read_submission(
    path: Path,
    *,
    id_name: str | None = None,
    id_names: Sequence[str] = ID_NAMES,
    group: Callable[[Sequence[str]], str | None] = lambda header: None,
    beside: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    renormalise: bool = False,
    advice: str = "Scale each row to sum to 1.",
    read: ReadNumbers = read_frame,
) -> Submission:
    """Read and check a CSV or Parquet file with an id column and a column per class.

    Parameters
    ----------
    path
        The file.
    id_name
        Its id column. None: the first of ``id_names`` that is there, else the only one called so but for
        case, spaces and the like, else the first column, unless that holds probabilities.
    id_names
        Usual names of an id column.
    group
        Finds in a header the column of groups, which is no class.
    beside
        Names of other columns that are no classes.
    classes
        The class columns, in the order wanted. None: every column that is nothing else.
    renormalise
        Take rows whatever they sum to.
    advice
        What to do about rows that do not sum to 1, in the caller's words.
    read
        Reads the table.

    Returns
    -------
    Submission

    Raises
    ------
    MissingInputError
        If the file is not there.
    DataError
        If it is no such table; the message names the column and the first rows. A column that is no
        probability where the others are (an index, an id, a length) is never taken for a class.
    StorageError
        If it cannot be read.
    """

    def numbers(header: list[str]) -> list[str]:
        if classes is not None:
            return match_classes(path, header, classes)
        aside = {_id_of(path, header, id_name, id_names), group(header), *beside}
        names = [name for name in header if name not in aside]
        for name in filter(written_by_pandas, names):
            _refuse_index(path, name)
        return names

    frame = read(path, numbers)
    id_column = _id_of(path, frame.columns, id_name, id_names)
    names = numbers(frame.columns)
    if len(names) < 2:
        raise DataError(
            f'{path}: {len(names)} class columns beside the id column "{id_column}"; two or more are '
            "needed. Separate columns by commas, and give each class one."
        )
    if classes is None:
        check_text(path, frame, [name for name in frame.columns if name not in names])
    check_text(path, frame, names, "number")
    check_ids(path, frame, id_column)
    matrix = np.ascontiguousarray(frame.select(names).to_numpy(), dtype=np.float64)
    _check_values(path, frame, id_column, names, matrix)
    if id_name is None and id_column not in id_names:
        _check_first_column(path, frame[id_column], classes or ())
    if classes is None:
        _check_classes(path, names, matrix)
    if not renormalise:
        _check_sums(path, frame, id_column, names, matrix, advice)
    return Submission(path, frame, id_column, tuple(names), matrix)


def match_classes(path: Path, header: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The columns of ``header`` that hold ``classes``.

    They have the same names, or one beginning before them all (``target_3`` holds 3), or the same
    suffix, as long as no two columns share it.

    Raises
    ------
    DataError
        If a class has no column, or could have two.
    """
    lacking = [name for name in classes if name not in header]
    if not lacking:
        return list(classes)
    beginnings = sorted(
        name.removesuffix(classes[0]) for name in header if name.endswith(classes[0])
    )
    whole = [start for start in beginnings if all(start + name in header for name in classes)]
    if len(whole) > 1:
        raise DataError(
            f'{path}: class "{classes[0]}" could be column "{whole[0]}{classes[0]}" or '
            f'"{whole[1]}{classes[0]}". Remove or rename the columns that are not meant.'
        )
    if whole:
        return [whole[0] + name for name in classes]
    wanted, held = [_suffix(name) for name in classes], [_suffix(name) for name in header]
    if len(set(wanted)) == len(wanted) and all(held.count(suffix) == 1 for suffix in wanted):
        return [header[held.index(suffix)] for suffix in wanted]
    lacking = [
        name for name, end in zip(classes, wanted, strict=True) if end not in held
    ] or lacking
    raise DataError(
        f'{path}: {len(lacking)} class columns are not there (first: "{lacking[0]}"). '
        f"{did_you_mean(lacking[0], header)}"
    )


def suffixes(names: Sequence[str]) -> list[str]:
    """What tells column names apart: the number at the end, else the part after the last ``_``.

    Returns
    -------
    list of str
        The names themselves if their suffixes are not all different.

    Examples
    --------
    >>> suffixes(["target_0", "target_10"]), suffixes(["llm1", "llm2"]), suffixes(["is_a", "is_b"])
    (['0', '10'], ['1', '2'], ['a', 'b'])
    >>> suffixes(["target_01", "target_10"])
    ['1', '10']
    """
    result = [_suffix(name) for name in names]
    return result if len(set(result)) == len(result) else list(names)


def plain_digits(text: str) -> str:
    """A whole number without leading zeros; any other text as it is.

    Examples
    --------
    >>> plain_digits("007"), plain_digits("00"), plain_digits("a1")
    ('7', '0', 'a1')
    """
    return (text.lstrip("0") or "0") if text.isascii() and text.isdigit() else text


def _suffix(name: str) -> str:
    stem = name.rstrip("0123456789")
    return plain_digits(name[len(stem) :]) if stem != name else name.rsplit("_", 1)[-1] or name


def _id_of(path: Path, header: Sequence[str], name: str | None, usual: Sequence[str]) -> str:
    if name is not None:
        return find_column(path, header, name, "ids")
    result = usual_column(path, header, usual, "ids") or header[0]
    if written_by_pandas(result):
        _refuse_index(path, result)
    return result


def _refuse_index(path: Path, name: str) -> NoReturn:
    raise DataError(
        f'{path}: column "{name}" is the index that pandas writes beside a table, and no class. Remove it '
        f'(df.to_csv("{path.as_posix()}", index=False) leaves it out), or rename it "id" if it holds the ids.'
    )


def _check_first_column(path: Path, ids: pl.Series, classes: Sequence[str]) -> None:
    """No name said that these are ids: refuse probabilities, which a table without ids begins with."""
    values = ids.cast(pl.Float64, strict=False)
    fractions = values.is_between(0, 1) & (values != values.floor())
    if ids.name in classes or (values.null_count() == 0 and fractions.any()):
        raise DataError(
            f'{path}: no column is called "id", and the first, "{ids.name}", holds probabilities. Add a '
            'column "id".'
        )


def _check_classes(path: Path, names: Sequence[str], matrix: Floats) -> None:
    """Refuse a column that is no class, be it that rows are scaled and would hide it.

    What sums to 1 is a table of classes, whatever they are called. Elsewhere a column is odd without
    which all rows would sum to 1 (or 100), or that holds whole numbers under a name of ids, or numbers
    above 1 where all others are probabilities. (Scores and counts are as large in other columns.)
    """
    total = matrix @ np.ones(matrix.shape[1])
    ids = [j for j, name in enumerate(names) if called_like_ids(name)]
    if (np.abs(total - 1) <= SUM_TOLERANCE).all():
        # an id of 0 in every row adds nothing
        unused = [j for j in ids if not matrix[:, j].any()]
        if unused:
            _refuse_class(path, names[unused[0]], "it is called like ids and holds 0 in every row")
        return
    whole_numbers = (matrix == np.floor(matrix)).all(axis=0)
    for j, name in enumerate(names):
        others = np.delete(whole_numbers, j)
        # among whole numbers a sum of 1 is chance, and a column of zeros changes no sum
        for whole in (1.0, 100.0) if not others.all() else (100.0,):
            rest = np.abs(total - matrix[:, j] - whole)
            if len(others) > 1 and matrix[:, j].any() and (rest <= SUM_TOLERANCE * whole).all():
                _refuse_class(path, name, f"all rows sum to {whole:.0f} without it")
    for j in ids:
        if whole_numbers[j]:
            _refuse_class(path, names[j], "it is called like ids and holds whole numbers")
    odd = (matrix.max(axis=0) > 1) & (whole_numbers | (matrix.min(axis=0) > 1))
    rest, fractions = matrix[:, ~odd], ~whole_numbers[~odd]
    if len(matrix) > 1 and odd.any() and fractions.any() and rest.max() <= 1:
        name = names[int(odd.argmax())]
        _refuse_class(path, name, "it holds numbers above 1, and the others from 0 to 1")


def _refuse_class(path: Path, name: str, why: str) -> NoReturn:
    raise DataError(
        f"{path}: column {shown(name)} looks like no class: {why}. Remove it, or name it with the setting "
        "group or the setting id if it holds groups or ids; if it is a class, scale each row to sum to 1."
    )


def _check_values(
    path: Path, frame: pl.DataFrame, id_name: str, names: list[str], matrix: Floats
) -> None:
    # a sum is NaN or infinite if any part is, so one number tells that all is well
    with np.errstate(over="ignore"):
        total = matrix.sum()
    if np.isfinite(total) and matrix.min() >= 0:
        zero = ~matrix.any(axis=1)
        if zero.any():
            row = int(zero.argmax())
            raise DataError(
                f"{path}: {zero.sum()} rows are all zero (first: row {row + 1}, id "
                f"{shown(frame[id_name][row])}). Give every row a probability."
            )
        return
    bad = ~np.isfinite(matrix) | (matrix < 0)
    if not bad.any():  # finite numbers whose sum is not
        row, column = divmod(int(matrix.argmax()), matrix.shape[1])
        raise DataError(
            f"{path}: numbers as large as {matrix.max():.3g} are no probabilities (row {row + 1}, id "
            f"{shown(frame[id_name][row])}, column {shown(names[column])}). Write numbers from 0 to 1."
        )
    row, column = np.argwhere(bad)[0].tolist()
    empty = frame[names[column]][row] is None
    said = "an empty cell" if empty else f"{matrix[row, column]}"
    raise DataError(
        f"{path}: {bad.any(axis=1).sum()} rows hold something that is no probability (first: row "
        f"{row + 1}, id {shown(frame[id_name][row])}, column {shown(names[column])}: {said}). "
        "Probabilities are numbers from 0 to 1."
    )


def _check_sums(
    path: Path, frame: pl.DataFrame, id_name: str, names: list[str], matrix: Floats, advice: str
) -> None:
    total = matrix @ np.ones(matrix.shape[1])
    off = np.abs(total - 1) > SUM_TOLERANCE
    if off.any():
        row = int(off.argmax())
        raise DataError(
            f"{path}: {off.sum()} rows do not sum to 1 (first: row {row + 1}, id "
            f"{shown(frame[id_name][row])}, sum {total[row]:.6g}). {advice}"
        )
