"""Tables on disk: CSV (RFC 4180, UTF-8) and Parquet, read as text and numbers, written whole or not at all."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import polars as pl

from stackllm.engine.libraries import errors_to
from stackllm.errors import DataError, MissingInputError, StorageError, first_line
from stackllm.store.atomic import storage_errors, write_file
from stackllm.tables.foreign import csv_text, has_decimal_comma
from stackllm.tables.strict_csv import POLARS_ERRORS, read_header, read_records


def read_frame(
    path: Path,
    numbers: Callable[[list[str]], list[str]] = lambda header: [],
    index: str | None = None,
) -> pl.DataFrame:
    """Read a CSV or Parquet file: text as it stands, and numbers where they are expected.

    Parameters
    ----------
    path
        The file; Parquet is known by its first bytes.
    numbers
        Says which columns of the header hold numbers. They come as Float64, all others as text.
    index
        What to call the first column of a CSV where it has no name, as pandas writes its index. None:
        that is refused.

    Returns
    -------
    polars.DataFrame
        At least one row. Text of a CSV stays as it is (``"007"``, ``" x"``), and an empty cell is ``""``;
        an empty number is null. Names of columns stay as they are.

    Raises
    ------
    MissingInputError, DataError, StorageError
        In one sentence.
    """
    content = read_content(path)
    if content.startswith(b"PAR1"):
        return _parquet(path, content, numbers)
    content = csv_text(path, content)
    header = read_header(path, content)
    if index is not None and not header[0].strip():
        header = [index, *header[1:]]
    _check_names(path, header)
    wanted = numbers(header)
    frame = read_records(path, content, header, wanted)
    if not frame.height:
        raise DataError(f"{path}: there is a header but no row below it. Write the rows, too.")
    return _with_numbers(path, frame, wanted)


def check_text(path: Path, frame: pl.DataFrame, names: Iterable[str], kind: str = "text") -> None:
    """Refuse columns that hold lists, structs or the like where a text (or a number) is needed.

    Raises
    ------
    DataError
        With the first such column.
    """
    for name in names:
        held = frame.schema[name]
        if held.is_nested() or held == pl.Object:
            raise DataError(
                f'{path}: column "{name}" holds {held.base_type()}, not {kind}. Write one {kind} per row.'
            )


def check_ids(path: Path, frame: pl.DataFrame, name: str) -> None:
    """Refuse ids that are missing or occur twice.

    Raises
    ------
    DataError
        With the first rows.
    """
    check_text(path, frame, [name])
    ids = frame[name]
    refuse_blank(path, (ids.is_null() | (ids == "")).fill_null(True), f'id in column "{name}"')
    # different hashes mean different ids, and numbers are counted faster than texts
    if ids.hash().n_unique() < len(ids) and ids.n_unique() < len(ids):
        twice = ids.filter(ids.is_duplicated())
        rows = " and ".join(str(i + 1) for i in (ids == twice[0]).arg_true().to_list()[:3])
        raise DataError(
            f'{path}: {twice.n_unique()} ids occur more than once in column "{name}" (first: '
            f"{shown(twice[0])}, rows {rows}). Remove the duplicates, or take another column for the ids."
        )


def refuse_blank(path: Path, blank: pl.Series, what: str, step: str = "Fill them in.") -> None:
    """Refuse a table of which some rows lack what each needs.

    Parameters
    ----------
    path
        The table's file.
    blank
        Bool ``(n_rows,)``: which rows lack it.
    what
        What they lack, and where: ``'id in column "Id"'``.
    step
        What to do.

    Raises
    ------
    DataError
        With their number and the first of them.
    """
    if blank.any():
        raise DataError(
            f"{path}: {blank.sum()} rows have no {what} (first: row {first_row(blank)}). {step}"
        )


def first_row(mask: pl.Series) -> int:
    """Which row, counted from 1, is the first where a mask, bool ``(n_rows,)``, holds."""
    return int(mask.arg_max() or 0) + 1


def write_frame(frame: pl.DataFrame, target: Path | None) -> None:
    """Write a table, whole or not at all.

    Parameters
    ----------
    frame
        The table; floats are written so that they read back the same.
    target
        A ``.parquet`` file, any other file for CSV, or None for CSV on the standard output.

    Raises
    ------
    StorageError
        If it cannot be written; what stood at ``target`` before is still there then.
    """
    if target is None:
        if sys.stdout is None:
            raise StorageError(
                "standard output: it is closed. Name a file with the setting output."
            )
        with _writing(Path("standard output")):
            sys.stdout.buffer.write(frame.write_csv().encode())
            sys.stdout.buffer.flush()
        return
    write: Callable[[Any], None] = (
        frame.write_parquet if target.suffix.lower() in {".parquet", ".pq"} else frame.write_csv
    )
    with _writing(target):
        place = Path(os.path.realpath(target))
        try:
            kind = place.stat().st_mode  # a ring of links is an error of the system's here
        except FileNotFoundError:
            kind = stat.S_IFREG
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            with target.open("wb") as file:  # a pipe or a device must not be replaced by a file
                write(file)
            return
        write_file(place, lambda temporary: _write_whole(write, temporary))


def _write_whole(write: Callable[[Any], None], temporary: Path) -> None:
    try:
        name = str(temporary)
        name.encode()
    except UnicodeEncodeError:  # polars takes no name that is not UTF-8
        with temporary.open("wb") as file:
            write(file)
    else:
        write(name)


def shown(value: object) -> str:
    """A cell in a message: quoted, and not longer than a line bears.

    Examples
    --------
    >>> shown("x" * 100)
    '"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…"'
    """
    text = " ".join(str(value).split())
    return f'"{text[:40]}…"' if len(text) > 40 else f'"{text}"'


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what polars and the system say of a failed write into one sentence."""
    with storage_errors(path, "writing"):
        try:
            yield
        except POLARS_ERRORS as error:
            raise StorageError(
                f"{path}: writing failed: {first_line(error)}. Free some space or name another place."
            ) from error


def read_content(path: Path) -> bytes:
    """The bytes of a file that is not empty.

    Raises
    ------
    MissingInputError, DataError, StorageError
        In one sentence.
    """
    if path.is_dir():
        raise MissingInputError(f"{path}: this is a folder. Name the file inside it.")
    try:
        with storage_errors(path, "reading"):
            content = path.read_bytes()
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise MissingInputError(f"{path}: there is no such file. Check the path.") from error
        raise
    if not content or content.isspace():
        raise DataError(f"{path}: the file is empty.")
    return content


def _check_names(path: Path, header: Sequence[str]) -> None:
    nameless = [not name.strip() for name in header]
    if nameless[0]:
        raise DataError(
            f"{path}: column 1 of the header has no name; pandas writes its index so. Name it if it holds "
            f'the ids, else remove it (in pandas: df.to_csv("{path.as_posix()}", index=False)).'
        )
    if any(nameless):
        raise DataError(
            f"{path}: column {nameless.index(True) + 1} of the header has no name. Name it, or remove it "
            "(a comma at the end of every line makes such a column)."
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: the header names {shown(twice[0])} more than once. Rename or remove one."
        )


def _with_numbers(path: Path, frame: pl.DataFrame, wanted: Sequence[str]) -> pl.DataFrame:
    """Take numbers with spaces around, and name cells that are none."""
    for name in wanted:
        cells = frame[name]
        if cells.dtype == pl.Float64:
            continue
        values = cells.str.strip_chars().cast(pl.Float64, strict=False)
        odd = values.is_null() & (cells != "")
        if odd.any():
            first = cells[first_row(odd) - 1]
            step = (
                "Write decimals with a point."
                if has_decimal_comma(first)
                else "Mend them, or remove the column if it is no class."
            )
            raise DataError(
                f"{path}: {odd.sum()} cells of column {shown(name)} are no numbers (first: row "
                f"{first_row(odd)}, {shown(first)}). {step}"
            )
        frame = frame.with_columns(values.alias(name))
    return frame


def _parquet(path: Path, content: bytes, numbers: Callable[[list[str]], list[str]]) -> pl.DataFrame:
    try:
        # Rust prints the panics that a damaged file causes itself
        with nullcontext() if sys.stderr is None else errors_to(Path(os.devnull)):
            frame = pl.read_parquet(io.BytesIO(content))
    except POLARS_ERRORS as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({first_line(error)}). Write it anew."
        ) from error
    if not frame.height:
        raise DataError(f"{path}: the table has no rows. Write the rows, too.")
    _check_names(path, frame.columns)
    return as_read(path, frame, numbers)


def as_read(
    path: Path, frame: pl.DataFrame, numbers: Callable[[list[str]], list[str]] = lambda header: []
) -> pl.DataFrame:
    """A table as :func:`read_frame` would give it: columns of numbers as Float64, all others as text.

    Parameters
    ----------
    path
        What it is called in messages.
    frame
        The table.
    numbers
        As in :func:`read_frame`.

    Raises
    ------
    DataError
        If a column of numbers or text can't be made one.
    """
    wanted = numbers(frame.columns)
    try:
        return frame.select(
            pl.col(name)
            if kind.is_nested() or kind == pl.Object
            else pl.col(name).cast(pl.Float64 if name in wanted else pl.String)
            for name, kind in frame.schema.items()
        )
    except POLARS_ERRORS as error:
        raise DataError(
            f"{path}: a column that should hold numbers or text does not ({first_line(error)})."
        ) from error
