"""Files that are no UTF-8 CSV separated by commas: what they are, and how to make one of them.

Every sentence ends in a step that works: where polars, which is here anyway, reads such a file, it is
a line of Python to copy. It writes another file, so that nothing is lost if it was the wrong step.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from stackllm.errors import DataError

_SHEET = 'Save it as "CSV UTF-8 (comma delimited)" there'
_UNPACK = "Unpack it, and name the CSV file that was in it"
_KINDS: Sequence[tuple[bytes, str, str]] = (
    (b"\xff\xfe\0\0", "UTF-32 text", "utf-32"),
    (b"\0\0\xfe\xff", "UTF-32 text", "utf-32"),
    (b"\xff\xfe", "UTF-16 text", "utf-16"),
    (b"\xfe\xff", "UTF-16 text", "utf-16"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file", _SHEET),
    (b"PK\x03\x04", "a ZIP archive", _UNPACK),
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"BZh", "a bzip2 file", _UNPACK),
    (b"\xfd7zXZ", "an xz file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", _UNPACK),
    (b"7z\xbc\xaf", "a 7-Zip archive", _UNPACK),
)
_TAB = "\t"
_MARK = b"\xef\xbb\xbf"
_BEGINNING = 2**20
_EXCEL_LINE = re.compile(r'"?sep=(.)"?\s*\Z', re.IGNORECASE)


def csv_text(path: Path, content: bytes) -> bytes:
    """The bytes of a CSV file without its byte-order mark.

    Parameters
    ----------
    path
        The file, for messages.
    content
        Its bytes.

    Raises
    ------
    DataError
        If it is another kind of file: Excel, an archive, a web page, JSON, another encoding, or
        separated by something else than commas. The message says how to make a CSV of it.
    """
    _check_kind(path, content)
    while content.startswith(_MARK):  # some writers add a second one
        content = content.removeprefix(_MARK)
    _check_encoding(path, content)
    _check_separator(path, content)
    return content


def rewritten(path: Path, options: str) -> str:
    """The next step: Python that reads the file with ``options`` of polars and writes a good one."""
    return (
        f'Write it anew: import polars as pl; pl.read_csv("{path.as_posix()}", {options})'
        f'.write_csv("{anew(path)}")'
    )


def anew(path: Path) -> str:
    """A name for the good file, beside the other."""
    return path.with_name(f"{path.stem}.new.csv").as_posix()


def has_decimal_comma(cell: str) -> bool:
    """Is it a number as Excel writes it where decimals have a comma?"""
    return re.fullmatch(r"\s*[+-]?\d*,\d+\s*", cell) is not None


def _check_kind(path: Path, content: bytes) -> None:
    for mark, kind, step in _KINDS:
        if content.startswith(mark):
            if mark == b"PK\x03\x04" and (b"xl/workbook" in content or b"opendocument" in content):
                kind, step = "a spreadsheet (a ZIP or Excel file)", _SHEET
            if step.startswith("utf"):
                raise DataError(
                    f"{path}: this is {kind}, not UTF-8. "
                    + rewritten(path, f'encoding="{step}", infer_schema=False')
                )
            raise DataError(f"{path}: this is {kind}, not CSV. {step}.")
    start = content[:100].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise DataError(
            f"{path}: this is a web page, not CSV. Download the file itself; you may have to sign in first."
        )
    if start.startswith((b'{"', b'[{"')):
        read = "read_json" if start.startswith(b"[") else "read_ndjson"
        raise DataError(
            f"{path}: this is JSON, not CSV. Write it anew: import polars as pl; "
            f'pl.{read}("{path.as_posix()}").write_csv("{anew(path)}")'
        )


def _check_encoding(path: Path, content: bytes) -> None:
    if b"\0" in content:
        for encoding, first in (("utf-16-le", 1), ("utf-16-be", 0)):
            if not any(content[first:40:2]):  # every other byte is 0
                raise DataError(
                    f"{path}: this is UTF-16 text, not UTF-8. "
                    + rewritten(path, f'encoding="{encoding}", infer_schema=False')
                )
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise DataError(
            f"{path}: line {line} holds a NUL byte, which no text does. Remove it, or save the table as "
            "UTF-8 CSV once more."
        )
    if not content.isascii():
        try:
            content.decode()
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise DataError(
                f"{path}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x}). If it comes from "
                "Windows: " + rewritten(path, 'encoding="cp1252", infer_schema=False')
            ) from error


def _check_separator(path: Path, content: bytes) -> None:
    text = content[:_BEGINNING].decode(errors="ignore")
    first, _, rest = text.partition("\n")
    excel = _EXCEL_LINE.match(first)
    if excel:
        skipped, text, separator = ", skip_lines=1", rest, excel[1]
        said = f'the first line "{first.strip()}" is for Excel only'
        if separator == ",":
            raise DataError(f"{path}: {said}. Remove that line.")
    else:
        skipped, separator = "", _separator(text)
        mark = "tabs" if separator == _TAB else f'"{separator}"'
        said = f"columns are separated by {mark}, not by commas"
    if separator == ",":
        return
    options = f'separator="{repr(separator)[1:-1]}"{skipped}'
    header, cells = [*_two(text, separator), [], []][:2]
    if any(map(has_decimal_comma, cells)):
        said += ", and decimals are written with one"
        # numbers are told from texts by all rows; ids are kept as they stand
        options += f', decimal_comma=True, infer_schema_length=None, schema_overrides={{"{header[0]}": pl.String}}'
    else:
        options += ", infer_schema=False"
    raise DataError(f"{path}: {said}. {rewritten(path, options)}")


def _separator(text: str) -> str:
    """A comma, unless the first two records fall into columns only at something else."""
    widths = {mark: [len(cells) for cells in _two(text, mark)] for mark in (",", ";", _TAB, "|")}
    even = [mark for mark, held in widths.items() if held and held[0] > 1 and len(set(held)) == 1]
    return next(iter(even), ",")


def _two(text: str, separator: str) -> list[list[str]]:
    """The first two records, or fewer if they make no sense with this separator."""
    try:
        return list(
            islice(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), 2)
        )
    except csv.Error:
        return []
