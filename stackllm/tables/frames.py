"""Frames that people hold, of polars, pandas and others: read into ours, and given back in their kind."""

from __future__ import annotations

from typing import Any

import polars as pl

from stackllm.errors import DataError, UsageError


def from_native(frame: Any, what: str) -> pl.DataFrame:
    """A frame of anybody's as polars, columns as they are.

    Parameters
    ----------
    frame
        Any eager frame that narwhals knows: polars, pandas, pyarrow, Modin, cuDF.
    what
        What it is called in a sentence, such as ``"the training frame"``.

    Raises
    ------
    UsageError
        If it is no such frame.
    DataError
        If a column is not named by text.
    """
    import narwhals as nw

    if isinstance(frame, pl.DataFrame):
        return frame
    try:
        known = nw.from_native(frame, eager_only=True)
    except TypeError:
        raise UsageError(
            f"{what} must be a frame of polars or pandas, not {type(frame).__name__}."
        ) from None
    odd = next((name for name in known.columns if not isinstance(name, str)), None)
    if odd is not None:
        raise DataError(f"{what}: the column {odd!r} is not named by text. Rename it.")
    return pl.DataFrame([_column(known[name], name) for name in known.columns])


def like_native(frame: pl.DataFrame, example: Any) -> Any:
    """A frame in the kind of another: the inverse of :func:`from_native`."""
    import narwhals as nw

    if isinstance(example, pl.DataFrame):
        return frame
    columns: dict[str, Any] = {
        name: frame[name].to_numpy() if frame[name].dtype.is_numeric() else frame[name].to_list()
        for name in frame.columns
    }
    backend = nw.from_native(example, eager_only=True).implementation
    return nw.from_dict(columns, backend=backend).to_native()


def _column(column: Any, name: str) -> pl.Series:
    """A column without a detour over Arrow, which need not be installed; NaN among texts is a missing text."""
    values, missing = column.to_list(), column.is_null().to_list()
    if not any(isinstance(value, str) for value in values):  # a NaN of numbers stays one
        missing = [
            gone and not isinstance(value, float)
            for value, gone in zip(values, missing, strict=True)
        ]
    known = [None if gone else value for value, gone in zip(values, missing, strict=True)]
    return pl.Series(name, known, strict=False)
