"""Stable digests of parameters, arrays, frames and files: what a unit's key is made of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl

from stackllm.store.atomic import storage_errors

LATER = MappingProxyType({"later": True})
"""Metadata of a dataclass's field that units were stored without: at its default they are found again."""


def digest(*parts: Any) -> str:
    """SHA-256 of JSON-like values, dataclasses, arrays and frames, the same on every machine.

    Parameters
    ----------
    *parts
        None, bool, int, float, str, bytes, paths, lists, tuples, dicts, dataclasses, numpy arrays
        or polars frames.

    Returns
    -------
    str
        64 hexadecimal digits.

    Examples
    --------
    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    state = hashlib.sha256()
    for part in parts:
        state.update(_encode(part))
        state.update(b"\0")
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises
    ------
    StorageError
        If the file can't be read.
    """
    with storage_errors(path, "reading"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode(part: Any) -> bytes:
    if isinstance(part, np.ndarray):
        if part.dtype.hasobject:
            return digest(*part.tolist()).encode()
        head = f"{part.dtype.str}{part.shape}".encode()
        return head + hashlib.sha256(np.ascontiguousarray(part).tobytes()).digest()
    if isinstance(part, pl.DataFrame):
        columns = [(name, str(dtype)) for name, dtype in part.schema.items()]
        return digest(columns, *(_series_bytes(column) for column in part)).encode()
    if isinstance(part, bytes):
        return part
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return _encode({"is": type(part).__name__, **_fields(part)})
    return json.dumps(part, sort_keys=True, ensure_ascii=True, default=_plain).encode()


def _fields(part: Any) -> dict[str, Any]:
    """What a dataclass holds; not what came :data:`LATER` and is at its default, as it was before it came."""
    values = {field: getattr(part, field.name) for field in dataclasses.fields(part)}
    return {
        field.name: value
        for field, value in values.items()
        if not (field.metadata.get("later") and value == _default(field))
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _series_bytes(column: pl.Series) -> bytes:
    """Content of a column, independent of how it is chunked in memory."""
    nulls = column.is_null().to_numpy().tobytes()
    if column.dtype == pl.String:
        lengths = column.str.len_bytes().fill_null(0).to_numpy().astype("<u8").tobytes()
        text = "".join(column.fill_null("").to_list()).encode()
        return nulls + lengths + hashlib.sha256(text).digest()
    return nulls + hashlib.sha256(np.ascontiguousarray(column.to_numpy()).tobytes()).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"no stable digest for {type(value).__name__}")
