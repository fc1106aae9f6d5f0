"""Texts that a spreadsheet would run as formulas, made harmless."""

from __future__ import annotations

import polars as pl

_FORMULA = r"^[\s\x00-\x1f]*[=+\-@|%]|^[\t\r\n]"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


def spreadsheet_safe(frame: pl.DataFrame) -> pl.DataFrame:
    """Put an apostrophe before each text and column name that a spreadsheet would run.

    Parameters
    ----------
    frame
        Any table; its numbers, and texts that are numbers, stay as they are.

    Returns
    -------
    polars.DataFrame
        The same shape.

    See https://owasp.org/www-community/attacks/CSV_Injection.

    Examples
    --------
    >>> spreadsheet_safe(pl.DataFrame({"id": ["=1+1", "-5", "a=b"]}))["id"].to_list()
    ["'=1+1", '-5', 'a=b']
    """
    columns = []
    for column in frame:
        if column.dtype == pl.String:
            risky = column.str.contains(_FORMULA) & ~column.str.contains(_NUMBER)
            column = pl.select(pl.when(risky).then("'" + column).otherwise(column)).to_series()
        columns.append(column)
    names = pl.Series(frame.columns, dtype=pl.String)
    risky = names.str.contains(_FORMULA)
    return pl.DataFrame(
        columns, schema=[f"'{n}" if r else n for n, r in zip(names, risky, strict=True)]
    )
