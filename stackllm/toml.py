"""Reading TOML files that people write: one reader, one set of sentences."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from stackllm.errors import DataError, MissingInputError
from stackllm.store.atomic import storage_errors


def read_toml(path: Path, next_step: str = "Check the setting config.") -> dict[str, Any]:
    """A TOML file in UTF-8, with or without a byte-order mark.

    Parameters
    ----------
    path
        The file.
    next_step
        What to do if it is not there.

    Raises
    ------
    MissingInputError
        If it is not there.
    DataError
        If it is a folder, no TOML or not UTF-8.
    StorageError
        If the system refuses to read it.
    """
    with storage_errors(path, "reading"):
        if path.is_dir():
            raise DataError(f"{path}: this is a folder, not a TOML file. {next_step}")
        if not path.exists():
            raise MissingInputError(f"{path}: there is no such file. {next_step}")
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")  # Windows marks its files
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 (byte {error.start + 1} is 0x{content[error.start]:02x}). "
            "Save it as UTF-8."
        ) from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also whole numbers without end
        raise DataError(f"{path}: not a TOML file ({error}). {_mend(text, str(error))}") from error


def _mend(text: str, message: str) -> str:
    """What to do about the line that a parser's message names."""
    at = re.search(r"line (\d+)", message)
    lines = text.splitlines()
    line = lines[int(at.group(1)) - 1] if at and int(at.group(1)) <= len(lines) else ""
    quoted = re.search(r'"([^"]*\\[^"]*)"?', line)
    if quoted:
        whole = quoted.group(1).strip()
        forward = re.sub(r"\\+", "/", whole)
        return (
            f"A backslash in double quotes begins an escape. Write it in single quotes, '{whole}', "
            f'or with forward slashes, "{forward}".'
        )
    return f"Mend that line: {line.strip():.80}" if line.strip() else "Mend it."
