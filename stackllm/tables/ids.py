"""Ids: which column holds them, and where each row stands in another table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from stackllm.errors import DataError
from stackllm.tables.columns import called_like_ids, find_column, usual_column
from stackllm.tables.files import check_ids, shown

ID_NAMES = ("id", "row_id")
"""What an id column is called where nobody says otherwise."""

Read = Callable[[Path], pl.DataFrame]
"""Reads a table; one that remembers lets two options name the same pipe."""


@dataclass(frozen=True)
class Rows:
    """Rows that another table is matched to.

    Parameters
    ----------
    ids
        Their ids, text, ``(n_rows,)``, each once; the series is called as their column is.
    source
        The file that they come from, for messages.
    texts
        Their texts, ``(n_rows,)``: what to match a table by that has no ids.
    """

    ids: pl.Series
    source: Path
    texts: pl.Series | None = None


def id_column(
    path: Path,
    frame: pl.DataFrame,
    wanted: str | None = None,
    *,
    beside: Iterable[str] = (),
    rows: Rows | None = None,
) -> str | None:
    """The id column of a table: the one rule for every table and every command.

    It is the column called ``wanted``, as those of ``rows`` are called, ``id`` or ``row_id``, in this
    order; else the only one called so but for case, spaces and the like (``Id``, ``"id "``).

    Parameters
    ----------
    path, frame
        The table.
    wanted
        The setting ``id``. Where ``rows`` are matched, a table may lack it and have another of the names.
    beside
        Columns that are something else.
    rows
        Rows that the table is matched to. None: it defines its own.

    Returns
    -------
    str or None
        None if no column looks like ids: then rows count from 0.

    Raises
    ------
    DataError
        If two columns fit, a column looks like ids under a name that is none of these, or ``wanted``
        is not there.

    Examples
    --------
    >>> id_column(Path("test.csv"), pl.DataFrame({"Question": ["q"], "Id": ["7"]}))
    'Id'
    """
    rest = [name for name in frame.columns if name not in set(beside)]
    if wanted is not None and rows is None:
        return find_column(path, frame.columns, wanted, "ids")
    first = [wanted, rows.ids.name if rows else None]
    names = list(dict.fromkeys([*filter(None, first), *ID_NAMES]))
    usual = usual_column(path, rest, names, "ids")
    if usual is not None:
        return usual
    likely = next((name for name in rest if _looks_like_ids(frame[name], rows)), None)
    if likely is not None:
        named = "" if rows else ", or name it with the setting id,"
        raise DataError(
            f'{path}: column "{likely}" looks like ids, but is not called so. Rename it "{names[0]}"{named} if '
            "it holds the ids; else remove it, and rows count from 0."
        )
    if wanted is not None:
        return find_column(path, frame.columns, wanted, "ids")
    return None


def column_of_codes(frame: pl.DataFrame, beside: Iterable[str]) -> str | None:
    """A column that could hold ids although nothing in its name says so: a short word, never the same twice."""
    for column in frame.drop(list(beside), strict=False):
        if column.dtype != pl.String or len(column) < 2 or column.n_unique() < len(column):
            continue
        if column.str.contains(r"^[\w.:-]{1,40}$").fill_null(False).all():
            return column.name
    return None


def find_rows(
    rows: Rows,
    path: Path,
    frame: pl.DataFrame,
    wanted: str | None = None,
    *,
    beside: Iterable[str] = (),
    surplus: bool = False,
) -> tuple[NDArray[np.intp], bool]:
    """Where each of ``rows`` stands in a table.

    Parameters
    ----------
    rows
        The rows looked for.
    path, frame
        The table.
    wanted, beside
        As in :func:`id_column`.
    surplus
        May the table hold other rows too? Never where rows are matched by their number.

    Returns
    -------
    positions
        ``(n_rows,)``: ``frame[positions]`` has the order of ``rows``.
    by_number
        True if the table has no id column, so that its rows were matched by their number, from 0.

    Raises
    ------
    DataError
        If an id occurs twice, or is missing on either side.
    """
    name = id_column(path, frame, wanted, beside=beside, rows=rows)
    if name is None:
        known = pl.Series(np.arange(frame.height)).cast(pl.String)
    else:
        check_ids(path, frame, name)
        known = frame[name]
    if len(known) == len(rows.ids) and known.equals(rows.ids):
        return np.arange(len(known)), name is None
    right = pl.DataFrame({"id": known, "row": np.arange(len(known))})
    left = pl.DataFrame({"id": rows.ids})
    joined = left.join(right, on="id", how="left", maintain_order="left")["row"]
    n_surplus = len(known) - (len(joined) - joined.null_count())
    if joined.null_count() or (n_surplus and (name is None or not surplus)):
        lacking = rows.ids.filter(joined.is_null())
        others = right.join(left, on="id", how="anti")["id"]
        what = "ids" if name else "row numbers"
        parts = [
            f"{len(some)} {kind} of {here} are not in {there} ({first_few(some)})"
            for some, kind, here, there in (
                (lacking, "ids", rows.source, path),
                (others, what, path, rows.source),
            )
            if len(some)
        ]
        why = "" if name else f" ({path} has no id column, so its rows count from 0)"
        raise DataError(
            f"{' and '.join(parts)}{why}. The two must list the same rows; check the id columns."
        )
    return joined.to_numpy().astype(np.intp), name is None


def first_few(values: Sequence[object] | pl.Series) -> str:
    """The first three of many values, for a message.

    Examples
    --------
    >>> first_few(["a", "b"]), first_few("abcdef")
    ('first: "a", "b"', 'first: "a", "b", "c"')
    """
    return f"first: {', '.join(shown(value) for value in values[:3])}"


def _looks_like_ids(column: pl.Series, rows: Rows | None) -> bool:
    """Is it called like ids and never the same twice, or does it hold the very ids in some order?"""
    if column.dtype != pl.String or len(column) == 0:
        return False
    if called_like_ids(column.name):
        # pandas' own numbers from 0 say no more than the order of the rows does
        return column.n_unique() == len(column) and not _counts(column)
    return (
        rows is not None and len(column) == len(rows.ids) and column.sort().equals(rows.ids.sort())
    )


def _counts(column: pl.Series) -> bool:
    by_pandas = column.name.startswith(("Unnamed: ", "__index_level_", "index"))
    return by_pandas and column.equals(pl.Series(np.arange(len(column))).cast(pl.String))
