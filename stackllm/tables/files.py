"""Tables on disk: CSV (RFC 4180, UTF-8) and Parquet, read as text and numbers, written whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from stackllm.errors import DataError, MissingInputError, StorageError
from stackllm.store.atomic import storage_errors, write_file

_POLARS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
_MAGIC = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a ZIP or Excel file",
    b"\x1f\x8b": "a gzip file",
}
_LONGEST_HEADER = 2**20


def read_table(path: Path) -> pl.DataFrame:
    """Read a CSV or Parquet file, every CSV cell as the text that it is.

    Parameters
    ----------
    path
        The file; Parquet is known by its first bytes.

    Returns
    -------
    polars.DataFrame
        Text columns (``"007"`` stays ``"007"``); an empty cell of a CSV is ``""``.

    Raises
    ------
    MissingInputError, DataError, StorageError
        As :func:`read_frame`; a row without a single filled cell is refused too.
    """
    content, header = _opened(path)
    if _is_parquet(content):
        return _parquet(path, content, lambda names: [])
    _check_records(path, content, header)
    frame = _frame(path, content, header, lambda names: [])
    return frame.filter(pl.any_horizontal(pl.all() != ""))  # empty lines are no rows


def read_frame(
    path: Path, numbers: Callable[[list[str]], list[str]] = lambda header: []
) -> pl.DataFrame:
    """Read a CSV or Parquet file: text as it stands, and numbers where they are expected.

    Parameters
    ----------
    path
        The file; Parquet is known by its first bytes.
    numbers
        Says which columns of the header hold numbers. They come as Float64, all others as text.

    Returns
    -------
    polars.DataFrame
        At least one row.

    Raises
    ------
    MissingInputError, DataError, StorageError
        In one sentence.
    """
    return _frame(path, *_opened(path), numbers)


def _frame(
    path: Path, content: bytes, header: list[str], numbers: Callable[[list[str]], list[str]]
) -> pl.DataFrame:
    if _is_parquet(content):
        return _parquet(path, content, numbers)
    wanted = numbers(header)
    types: dict[str, Any] = {name: pl.Float64 if name in wanted else pl.String for name in header}
    try:
        frame = _parsed(content, types)
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{path}: there is a header but no row below it.") from error
    except _POLARS:
        frame = _patient(path, content, header, wanted)
    if frame.height and frame.tail(1).select(pl.all_horizontal(pl.all().is_null())).item():
        frame = frame.head(-1)  # an empty line at the end
    if not frame.height:
        raise DataError(f"{path}: there is a header but no row below it.")
    return frame


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
                f'{path}: column "{name}" holds {held.base_type()}, not {kind}. Write one {kind} a row.'
            )


def check_ids(path: Path, frame: pl.DataFrame, name: str) -> None:
    """Refuse ids that are missing or occur twice.

    Raises
    ------
    DataError
        With the first rows.
    """
    ids = frame[name]
    blank = (ids.is_null() | (ids == "")).fill_null(True)
    if blank.any():
        raise DataError(
            f'{path}: {blank.sum()} rows have no id in column "{name}" '
            f"(first: row {_first(blank) + 1}). Fill them in."
        )
    # different hashes mean different ids, and numbers are counted faster than texts
    if ids.hash().n_unique() < len(ids) and ids.n_unique() < len(ids):
        twice = ids.filter(ids.is_duplicated())
        rows = " and ".join(str(i + 1) for i in (ids == twice[0]).arg_true().to_list()[:3])
        raise DataError(
            f'{path}: {twice.n_unique()} ids occur more than once in column "{name}" (first: '
            f"{shown(twice[0])}, rows {rows}). Remove the duplicates or pass --id COLUMN."
        )


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
            raise StorageError("standard output: it is closed. Name a file with -o.")
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
        except _POLARS as error:
            raise StorageError(
                f"{path}: writing failed: {_reason(error)}. Free some space or name another place."
            ) from error


def _content(path: Path) -> bytes:
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


def _opened(path: Path) -> tuple[bytes, list[str]]:
    content = _content(path)
    if _is_parquet(content):
        return content, _parquet_header(path, content)
    for mark, kind in _MAGIC.items():
        if content.startswith(mark):
            raise DataError(f"{path}: this is {kind}, not CSV. Save it as UTF-8 CSV.")
    content = content.removeprefix(b"\xef\xbb\xbf")
    _check_text(path, content)
    return content, _header(path, content)


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep the panics that a damaged Parquet file causes off the terminal: Rust prints them itself."""
    if sys.stderr is None:  # closed from the start: number 2 may be a file of somebody else's
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _is_parquet(content: bytes) -> bool:
    return content.startswith(b"PAR1")


def _parquet_header(path: Path, content: bytes) -> list[str]:
    try:
        with _hushed():
            return list(pl.read_parquet_schema(io.BytesIO(content)))
    except _POLARS as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({_reason(error)}). Write it anew."
        ) from error


def _check_text(path: Path, content: bytes) -> None:
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise DataError(f"{path}: line {line} holds a NUL byte. Save the file as UTF-8 CSV.")
    if not content.isascii():
        try:
            content.decode()
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise DataError(
                f"{path}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x}). "
                "Save the file as UTF-8."
            ) from error
    if b"\n" not in content and b"\r" in content:
        raise DataError(f"{path}: lines end in a bare carriage return. Save it with newlines.")


def _header(path: Path, content: bytes) -> list[str]:
    start = content[:_LONGEST_HEADER].decode(errors="ignore")
    csv.field_size_limit(sys.maxsize)
    try:
        header = next(csv.reader(io.StringIO(start, newline="")))
    except (csv.Error, StopIteration) as error:
        raise DataError(f"{path}: the first line is no CSV header ({error}).") from error
    if not header:
        raise DataError(f"{path}: the first line is empty; a header is needed there.")
    if sum(map(len, header)) > _LONGEST_HEADER // 2:
        raise DataError(f"{path}: the header is longer than a megabyte. Check the first line.")
    if any(not name.strip() for name in header):
        place = [not name.strip() for name in header].index(True)
        raise DataError(f"{path}: column {place + 1} of the header has no name. Name it.")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: the header names {shown(twice[0])} more than once. Rename or remove one."
        )
    return header


def _parsed(content: bytes, types: dict[str, Any]) -> pl.DataFrame:
    # the header is left out: polars would undo neither its quotes nor repeated names as csv does
    start = csv.reader(io.StringIO(content[:_LONGEST_HEADER].decode(errors="ignore"), newline=""))
    next(start)  # a quoted name may hold newlines
    return pl.read_csv(
        content,
        has_header=False,
        skip_lines=start.line_num,
        schema=types,
        empty_string_is_null=False,
    )


def _patient(path: Path, content: bytes, header: list[str], wanted: list[str]) -> pl.DataFrame:
    """Read numbers as text first, to take those with spaces around, and to name the ones that aren't."""
    try:
        frame = _parsed(content, dict.fromkeys(header, pl.String))
    except _POLARS as error:
        _check_records(path, content, header)
        raise DataError(
            f"{path}: not a well-formed CSV ({_reason(error)}). "
            'Quote fields that hold commas, quotes or newlines, and write " as "".'
        ) from error
    for name in wanted:
        cells = frame[name]
        values = cells.str.strip_chars().cast(pl.Float64, strict=False)
        odd = values.is_null() & cells.is_not_null() & (cells != "")
        if odd.any():
            first = _first(odd)
            raise DataError(
                f"{path}: {odd.sum()} cells of column {shown(name)} are no numbers (first: row "
                f"{first + 1}, {shown(cells[first])}). Mend them, or remove the column if it is no class."
            )
        frame = frame.with_columns(values.alias(name))
    return frame


def _check_records(path: Path, content: bytes, header: list[str]) -> None:
    """Refuse empty records and those with another number of fields than the header."""
    row = 0
    records = csv.reader(io.StringIO(content.decode(), newline=""))
    next(records)
    try:
        for cells in records:
            row += bool(cells)
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}: row {row} has {len(cells)} fields and the header {len(header)}. "
                    "Quote fields that hold commas or newlines."
                )
            if len(cells) > 1 and not any(cells):
                raise DataError(f"{path}: row {row} is empty. Remove it.")
    except csv.Error as error:
        raise DataError(f"{path}: row {row + 1} is not well-formed ({error}).") from error


def _parquet(path: Path, content: bytes, numbers: Callable[[list[str]], list[str]]) -> pl.DataFrame:
    try:
        with _hushed():
            frame = pl.read_parquet(io.BytesIO(content))
    except _POLARS as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({_reason(error)}). Write it anew."
        ) from error
    if not frame.height:
        raise DataError(f"{path}: the table has no rows.")
    wanted = numbers(frame.columns)
    try:
        return frame.select(
            pl.col(name)
            if kind.is_nested() or kind == pl.Object
            else pl.col(name).cast(pl.Float64 if name in wanted else pl.String)
            for name, kind in frame.schema.items()
        )
    except _POLARS as error:
        raise DataError(
            f"{path}: a column that should hold numbers or text does not ({_reason(error)})."
        ) from error


def _first(mask: pl.Series) -> int:
    return int(mask.arg_max() or 0)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split())[:160]
