"""Reading tables: CSV (RFC 4180, UTF-8) and Parquet, every CSV cell as the text that it is."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import polars as pl

from stackllm.errors import DataError, MissingInputError
from stackllm.store.atomic import storage_errors

_BOMS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK": "a ZIP or Excel file",
    b"\x1f\x8b": "gzip",
}


def read_table(path: Path) -> pl.DataFrame:
    """Read a CSV or Parquet file whole.

    Parameters
    ----------
    path
        ``.parquet`` and ``.pq`` files are read as Parquet, everything else as CSV with a header.

    Returns
    -------
    polars.DataFrame
        CSV cells are strings, as they stand (``"007"`` stays ``"007"``), an empty cell is ``""``.

    Raises
    ------
    MissingInputError
        If there is no such file.
    DataError
        If it is no such table: wrong encoding, ragged rows, repeated column names, no rows.
    StorageError
        If it can't be read.
    """
    if not path.exists():
        raise MissingInputError(f"{path}: there is no such file. Check the path.")
    if path.is_dir():
        raise MissingInputError(f"{path}: this is a folder. Name the file inside it.")
    with storage_errors(path, "reading"):
        if path.suffix.lower() in {".parquet", ".pq"}:
            return _read_parquet(path)
        return _read_csv(path)


def _read_parquet(path: Path) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_reason(error)}).") from error
    if not frame.height:
        raise DataError(f"{path}: the table has no rows.")
    return frame


def _read_csv(path: Path) -> pl.DataFrame:
    content = path.read_bytes()
    for mark, kind in _BOMS.items():
        if content.startswith(mark):
            raise DataError(f"{path}: this is {kind}, not CSV text. Save it as UTF-8 CSV.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x}). Save the file as UTF-8."
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path}: line {line} holds a NUL character. Remove it.")
    if not text.strip():
        raise DataError(f"{path}: the file is empty.")
    _check_shape(path, text)
    try:
        frame = pl.read_csv(
            content, infer_schema=False, empty_string_is_null=False, raise_if_empty=True
        )
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(
            f"{path}: not a well-formed CSV ({_reason(error)}). "
            'Quote fields that hold commas, quotes or newlines, and write " as "".'
        ) from error
    frame = frame.fill_null("").filter(pl.any_horizontal(pl.all() != ""))
    if not frame.height:
        raise DataError(f"{path}: the table has a header but no rows.")
    return frame


def _check_shape(path: Path, text: str) -> None:
    """Refuse repeated column names and ragged rows, which polars would mend silently."""
    csv.field_size_limit(sys.maxsize)
    records = csv.reader(io.StringIO(text, newline=""))
    try:
        header = next(records)
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(
                f"{path}: the header names {_quoted(repeated)} more than once. Rename one."
            )
        row = 0
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
        raise DataError(f"{path}: not a well-formed CSV ({error}).") from error


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names[:5]) + (", …" if len(names) > 5 else "")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split())[:160]
