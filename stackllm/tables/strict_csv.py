"""CSV by RFC 4180: what can be read two ways is refused, so that every reader reads the same.

polars is fast, but where quotes stand oddly it reads other cells than Python's ``csv``, Excel or
pandas, and says nothing. So bytes are looked at first: where every quote opens a field, closes one
or is doubled, and every row has as many separators, all parsers agree and polars reads. Anything
else goes through ``csv`` in its strict mode, which takes it or names the row.

See https://www.rfc-editor.org/rfc/rfc4180.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import polars as pl
from numpy.typing import NDArray

from stackllm.errors import DataError
from stackllm.tables.foreign import anew, rewritten

POLARS_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)

_FIELD = r'(?:"(?:[^"]++|"")*+"|[^",\r\n]*+)'
_STRICT_RECORD = re.compile(rf"{_FIELD}(?:,{_FIELD})*+(?:\r?\n)?")
_ODD_QUOTE = re.compile(r'\\"|""|(?:^|,)\s+"')
"""In a record that is not strict: quotes that somebody meant as quoting, but not as RFC 4180 does."""

_LONGEST_HEADER = 2**20
_BATCH = 50_000
_CHUNK = 2**20
_COMMA, _QUOTE, _NEWLINE, _RETURN = b',"\n\r'
_NO_MARKS = bytes(set(range(256)) - set(b",\n"))


def _table_of(members: bytes) -> NDArray[np.bool_]:
    """Which of the 256 bytes are among ``members``."""
    return np.isin(np.arange(256), np.frombuffer(members, np.uint8))


_IS_MARK = _table_of(b',"\n\r')
# a quote beside a quote: the two of a doubled pair
_MAY_OPEN_AFTER, _MAY_CLOSE_BEFORE = _table_of(b',\n"'), _table_of(b',\n\r"')


def read_header(path: Path, content: bytes) -> list[str]:
    """Column names of the first record.

    Raises
    ------
    DataError
        If it is not well-formed.
    """
    lines = _Lines(content[:_LONGEST_HEADER], errors="ignore")
    try:
        header: list[str] = next(lines.records)
    except StopIteration:
        header = []
    except csv.Error as error:
        if len(content) > _LONGEST_HEADER:
            raise DataError(
                f"{path}: the header is longer than a megabyte. Check the quotes of the first line."
            ) from error
        raise DataError(
            f'{path}: the header is not well-formed ({_said(error)}). Inside quotes, write " as "".'
        ) from error
    if lines.end_bare:
        raise DataError(
            f"{path}: lines end in a bare carriage return, as on old Macs. "
            + rewritten(path, 'eol_char="\\r", infer_schema=False')
        )
    if _odd_quote("".join(lines.raw)):
        raise DataError(
            f"{path}: the header is not well-formed (a quote inside an unquoted name). Put the whole name in "
            'quotes, without a space before them, and write " inside it as "".'
        )
    if not header:
        raise DataError(
            f"{path}: the first line is empty; a header is needed there. Remove the empty lines."
        )
    if sum(map(len, header)) > _LONGEST_HEADER // 2:
        raise DataError(f"{path}: the header is longer than a megabyte. Check the first line.")
    return header


def read_records(
    path: Path, content: bytes, header: Sequence[str], numbers: Sequence[str]
) -> pl.DataFrame:
    """The rows below the header; empty lines are none.

    Parameters
    ----------
    path
        The file, for messages.
    content
        Its bytes: UTF-8 without a mark and without NUL.
    header
        Its column names.
    numbers
        Columns that should hold numbers.

    Returns
    -------
    polars.DataFrame
        Text as ``csv.reader(strict=True)`` reads it. The columns of ``numbers`` are Float64 (an empty
        cell is null) if all their cells are numbers, and may be text else.

    Raises
    ------
    DataError
        With the row (from 1) and the line of what can be read two ways, is empty, or has too many or
        too few fields.
    """
    text: dict[str, Any] = dict.fromkeys(header, pl.String)
    floats = {name: pl.Float64 if name in numbers else pl.String for name in header}
    counts = _counts(content, len(header))
    if counts is not None:
        records, blank = counts
        for types in (floats, text) if numbers else (text,):
            frame = _by_polars(content, types)
            if frame is None or frame.height != records + blank - 1:
                continue
            empty = _empty_rows(frame)
            if empty.sum() == blank:
                return frame.filter(~empty) if blank else frame
    return _by_csv(path, content, header)


def _counts(content: bytes, width: int) -> tuple[int, int] | None:
    """Records and empty lines of a file that every parser reads alike, None for any other.

    Alike means that no quote and no carriage return can be read two ways, and that every record has
    ``width`` fields.
    """
    end = b"" if content.endswith(b"\n") else b"\n"
    # each record's commas and its newline, in a row: quickly where no quote hides any
    plain = b'"' not in content and (
        b"\r" not in content or content.count(b"\r") == content.count(b"\r\n")
    )
    if plain and width > 1:
        marks = content.translate(None, _NO_MARKS) + end
        if marks == _even(marks, width):
            return len(marks) // width, 0
    scanned = _scan(content)
    if scanned is None:
        return None
    marks, blank = scanned[0] + end, scanned[1]
    if marks != _even(marks, width) or (width == 1 and blank):
        return None  # polars takes an empty line for an empty cell where there is one column only
    return len(marks) // width, blank


def _even(marks: bytes, width: int) -> bytes:
    return (b"," * (width - 1) + b"\n") * (len(marks) // width)


def _scan(content: bytes) -> tuple[bytes, int] | None:
    """Commas and newlines outside quotes, without those of empty lines, and the number of these.

    None if a quote neither opens a field, nor closes one, nor is doubled, or if a carriage return
    outside quotes has no newline.
    """
    marks, blank = [], 0
    inside = np.uint8(0)  # 1 if the byte before the chunk is inside quotes
    for start in range(0, len(content), _CHUNK):
        # two bytes before and one after, so that every byte has its neighbours
        before_it = content[max(start - 2, 0) : start].rjust(2, b"\n")
        chunk = content[start : start + _CHUNK + 1]
        last = b"," if start + _CHUNK >= len(content) else b""  # ends a field, but not a "\r\n"
        window = np.frombuffer(before_it + chunk + last, np.uint8)
        at = np.flatnonzero(_IS_MARK[window[2:-1]]) + 2
        byte, before, after = window[at], window[at - 1], window[at + 1]
        quote, newline = byte == _QUOTE, byte == _NEWLINE
        depth = (np.cumsum(quote, dtype=np.uint8) + inside) & 1
        quoted = depth == 1  # after this byte
        fine = np.where(
            quote,
            np.where(quoted, _MAY_OPEN_AFTER[before], _MAY_CLOSE_BEFORE[after]),
            quoted | (byte != _RETURN) | (after == _NEWLINE),
        )
        if not fine.all():
            return None
        empty = newline & ~quoted
        empty &= (before == _NEWLINE) | ((before == _RETURN) & (window[at - 2] == _NEWLINE))
        marks.append(byte[(newline | (byte == _COMMA)) & ~quoted & ~empty].tobytes())
        blank += int(empty.sum())
        inside = depth[-1] if len(depth) else inside
    return None if inside else (b"".join(marks), blank)


def _empty_rows(frame: pl.DataFrame) -> pl.Series:
    empty = [
        pl.col(name) == "" if kind == pl.String else pl.col(name).is_null()
        for name, kind in frame.schema.items()
    ]
    return frame.select(pl.all_horizontal(empty)).to_series()


def _by_polars(content: bytes, types: dict[str, Any]) -> pl.DataFrame | None:
    # the header is left out: polars would undo neither its quotes nor repeated names as csv does
    header = _Lines(content[:_LONGEST_HEADER], errors="ignore")
    next(header.records)  # a quoted name may hold newlines
    try:
        return pl.read_csv(
            content,
            has_header=False,
            skip_lines=header.records.line_num,
            schema=types,
            empty_string_is_null=False,
        )
    except POLARS_ERRORS:
        return None


class _Lines:
    """Strict records of a CSV, and the raw lines of the last one."""

    def __init__(self, content: bytes, errors: str = "strict") -> None:
        # Windows counts the limit in 32 bits
        csv.field_size_limit(2**31 - 1)
        self.raw: list[str] = []
        self._text = io.TextIOWrapper(io.BytesIO(content), "utf-8", errors, newline="")
        self.records: Any = csv.reader(self._fed(), strict=True)

    def _fed(self) -> Iterator[str]:
        for line in self._text:
            self.raw.append(line)
            yield line

    @property
    def end_bare(self) -> bool:
        """Does the last record end in a carriage return without a newline?"""
        return self.raw[-1].endswith("\r")


def _by_csv(path: Path, content: bytes, header: Sequence[str]) -> pl.DataFrame:
    lines = _Lines(content)
    next(lines.records)
    rows = _checked(path, lines, len(header))
    batches = []
    while batch := list(islice(rows, _BATCH)):
        batches.append(pl.DataFrame(batch, dict.fromkeys(header, pl.String), orient="row"))
    return pl.concat(batches) if batches else pl.DataFrame(schema=dict.fromkeys(header, pl.String))


def _checked(path: Path, lines: _Lines, width: int) -> Iterator[list[str]]:
    """Records without empty lines; what is wrong raises a sentence with its row and line."""
    row = 1
    while True:
        lines.raw.clear()
        where = f"line {lines.records.line_num + 1}"
        try:
            cells = next(lines.records)
        except StopIteration:
            return
        except csv.Error as error:
            _refuse_quotes(path, row, f"{_said(error)}, {where}", "".join(lines.raw))
        if lines.end_bare:
            raise DataError(
                f"{path}: row {row} has a bare carriage return outside quotes ({where}). Quote texts "
                f'that hold one (in pandas: df.to_csv("{path.as_posix()}", index=False, quoting=1)).'
            )
        raw = "".join(lines.raw)
        if _odd_quote(raw):
            _refuse_quotes(path, row, f"a quote inside an unquoted field, {where}", raw)
        if not cells:
            continue
        if len(cells) != width:
            raise DataError(
                f"{path}: row {row} has {len(cells)} fields and the header {width} ({where}). "
                f"{_about_width(cells, width)}"
            )
        if width > 1 and not any(cells):
            raise DataError(f"{path}: row {row} is empty ({where}). Remove it.")
        yield cells
        row += 1


def _odd_quote(raw: str) -> bool:
    """Does a record hold a quote that somebody may have meant in another way?"""
    return bool('"' in raw and not _STRICT_RECORD.fullmatch(raw) and _ODD_QUOTE.search(raw))


def _about_width(cells: Sequence[str], width: int) -> str:
    if len(cells) < width:
        return "Fill it up: an empty cell still needs its comma."
    if not any(cells[width:]):
        return "Remove the commas at the end of the lines."
    return "Quote fields that hold commas or newlines, and write decimals with a point."


def _refuse_quotes(path: Path, row: int, why: str, raw: str) -> NoReturn:
    source = path.as_posix()
    step = (
        f'Put the whole text in quotes and write each " inside it as "", as df.to_csv("{source}", '
        "index=False) does in pandas."
    )
    if '\\"' in raw:
        step = (
            'Inside quotes, " is written "" and not \\". In pandas: '
            f'pd.read_csv("{source}", escapechar="\\\\", dtype=str, na_filter=False)'
            f'.to_csv("{anew(path)}", index=False)'
        )
    raise DataError(f"{path}: row {row} is not well-formed CSV ({why}). {step}")


def _said(error: csv.Error) -> str:
    """What is wrong, in words that need no knowledge of Python's parser."""
    said = str(error)
    if "expected after" in said:
        return "text after a closing quote"
    if "end of data" in said:
        return "a quote is opened and never closed"
    return said
