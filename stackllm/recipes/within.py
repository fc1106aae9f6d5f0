"""Aggregates within a group, computed from that group's own rows and nothing else.

Nothing is learnt, so a question never seen before gets real values.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl


def aggregate(frame: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
    """What a group's values are, and how far a row's stands from its group's greatest.

    Parameters
    ----------
    frame
        With ``row_id``, ``group_id`` and numeric ``columns``.
    columns
        What to aggregate.

    Returns
    -------
    polars.DataFrame
        ``row_id`` and, for each column, ``_mean, _median, _min, _max, _std`` (the group's),
        ``_gap`` (to the group's greatest, 0 or more) and ``_share`` (of the group's sum of
        magnitudes).
    """
    return _forms(frame, columns, _group_forms)


def standing(frame: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
    """Where a row stands in its group.

    Parameters
    ----------
    frame, columns
        As for :func:`aggregate`.

    Returns
    -------
    polars.DataFrame
        ``row_id`` and, for each column, ``_rank`` (1 is the smallest, ties averaged) and
        ``_zscore`` (0 where the group does not vary).
    """
    return _forms(frame, columns, _standing_forms)


def centre(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each row less its group's mean.

    Parameters
    ----------
    values
        ``(n_rows, n_columns)``.
    groups
        Group id of each row, ``(n_rows,)``.

    Returns
    -------
    numpy.ndarray
        ``(n_rows, n_columns)``, the dtype of ``values``.
    """
    _, codes, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(codes, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sums = np.add.reduceat(values[order], starts, axis=0)
    result: np.ndarray = values - (sums / counts[:, None]).astype(values.dtype)[codes]
    return result


def _forms(
    frame: pl.DataFrame,
    columns: list[str],
    forms: Callable[[str], dict[str, pl.Expr]],
) -> pl.DataFrame:
    return frame.select(
        "row_id",
        *(
            expression.over("group_id").alias(f"{name}_{form}")
            for name in columns
            for form, expression in forms(name).items()
        ),
    )


def _group_forms(name: str) -> dict[str, pl.Expr]:
    column = pl.col(name)
    return {
        "mean": column.mean(),
        "median": column.median(),
        "min": column.min(),
        "max": column.max(),
        "std": column.std(ddof=0),
        "gap": column.max() - column,
        "share": (column.abs() / column.abs().sum()).fill_nan(0.0),
    }


def _standing_forms(name: str) -> dict[str, pl.Expr]:
    column = pl.col(name)
    spread = column.std(ddof=0)
    return {
        "rank": column.rank("average"),
        "zscore": pl.when(spread > 1e-12).then((column - column.mean()) / spread).otherwise(0.0),
    }
