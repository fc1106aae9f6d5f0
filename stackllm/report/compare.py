"""Two models on the same rows: the paired difference over groups, its interval, and what it means in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from stackllm.metrics import (
    bootstrap_error,
    bootstrap_interval,
    mean_with_error,
    row_losses,
    shown_with_error,
)
from stackllm.optim.request import Columns
from stackllm.probabilities import Floats
from stackllm.report.sides import Pair, Predictions, read_pair
from stackllm.report.text import aligned

Verdict = Literal["a is better", "b is better", "noise", "same", "unknown"]

_SEEN = 2.8
"""A difference of so many standard errors is told from noise four times in five (1.96 + 0.84)."""

_MANY = 1e7


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` finds. Differences are B minus A: of losses, below 0 where B is better.

    Parameters
    ----------
    a, b
        What the two are called.
    n_rows, n_groups
        On how much they were compared.
    scores
        A row per measure: ``measure, a, a_se, b, b_se, difference, error, low, high``: means over rows
        with standard errors, and the paired difference with its error and 95% interval over groups.
        The first is the log loss of what was compared; then, where they are known and something else,
        that of the row probabilities (``row by row``) and of the group posteriors (``posterior``);
        then ``accuracy``.
    verdict
        Whether the log losses differ.
    sentence
        The same in words, with how much.
    groups
        A row per group, those that differ most first: ``group, n_rows, a, b, difference, row_ids``, of
        mean log losses.
    changed
        A row per row whose likeliest class is another one: ``row_id, group, label, a, b``, class names.
    notes
        What a reader should know: rows left out, folds that differ.
    """

    a: str
    b: str
    n_rows: int
    n_groups: int
    scores: pl.DataFrame
    verdict: Verdict
    sentence: str
    groups: pl.DataFrame
    changed: pl.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """Mean log loss of B minus that of A, in nats."""
        return float(self.scores["difference"][0])

    @property
    def error(self) -> float | None:
        """Its standard error over groups; None with a single group."""
        error: float | None = self.scores["error"][0]
        return error

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its 95% interval; None with a single group."""
        low, high = self.scores["low"][0], self.scores["high"][0]
        return None if low is None else (low, high)

    def summary(self, n_shown: int = 5) -> dict[str, Any]:
        """The same for programs, with the first ``n_shown`` groups and rows."""
        return {
            "a": self.a,
            "b": self.b,
            "rows": self.n_rows,
            "groups": self.n_groups,
            "scores": self.scores.to_dicts(),
            "verdict": self.verdict,
            "sentence": self.sentence,
            "differ_most": self.groups.head(n_shown).to_dicts(),
            "changed": {**self._changes(), "first": self.changed.head(n_shown).to_dicts()},
            "notes": list(self.notes),
        }

    def told(self, n_shown: int = 5) -> str:
        """The same for people, with the first ``n_shown`` groups."""
        lines = [f"A: {self.a}", f"B: {self.b}", f"{self.n_rows:,} rows, {self.n_groups:,} groups"]
        changes = self._changes()
        lines += [
            *self.notes,
            "",
            _scores_told(self.scores),
            "",
            self.sentence,
            f"the likeliest class changed in {changes['rows']:,} of {self.n_rows:,} rows: right in B only "
            f"{changes['right_in_b']:,}, right in A only {changes['right_in_a']:,}, wrong in both "
            f"{changes['wrong_in_both']:,}",
        ]
        shown = self.groups.head(n_shown).filter(pl.col("difference") != 0)
        if shown.height:
            lines += ["", _groups_told(shown)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.told()

    def _changes(self) -> dict[str, int]:
        of = self.changed
        right_in_a, right_in_b = (int((of[it] == of["label"]).sum()) for it in ("a", "b"))
        return {
            "rows": of.height,
            "right_in_b": right_in_b,
            "right_in_a": right_in_a,
            "wrong_in_both": of.height - right_in_a - right_in_b,
        }


def compare(
    a: Predictions,
    b: Predictions,
    *,
    truth: Any = None,
    groups: Any = None,
    quota: int | str | None = None,
    columns: Columns | None = None,
    project: Mapping[str, Any] | None = None,
    artifacts: str | Path = "artifacts",
    seed: int = 0,
) -> Comparison:
    """Compare two runs, models of runs, files or tables of predictions, paired over groups.

    Parameters
    ----------
    a, b
        Each a run or model (``"demo"``, ``"demo/lexical"``, ``"demo/round1"``, ``":raw"`` behind it for its
        rows before stage three), a file of predictions (an id column, a column per class), a frame of
        polars or pandas with the same, or an array ``(n_rows, n_classes)``. Rows are matched by id,
        those of arrays by position; classes by name.
    truth
        Labels: a file, or class indices or names ``(n_rows,)`` of array or frame. None where one of the two
        is a run: then out-of-fold predictions are compared. With it, a run's test predictions are.
    groups
        Where no run tells them: a file with ids and groups, or the group of each row ``(n_rows,)``. None:
        the files' own group column, that of ``truth``, or the project's test table; else each row is
        a group of its own.
    quota
        How often each class stands in a group, as of ``stackllm optim``. None: the run's or project's,
        else what the labels show, where that is the same in all groups.
    columns
        What columns of files are called. None: the usual names.
    project
        What ``[data]`` of the settings says of the project's tables. None: nothing.
    artifacts
        Folder of runs.
    seed
        Of the bootstrap.

    Returns
    -------
    Comparison

    Raises
    ------
    MissingInputError
        If there is no such run, model or file.
    DataError
        If the two have no row in common, other classes, or other labels of the same rows.
    UsageError
        If nothing tells the labels.
    StorageError
        If a file cannot be read.

    Examples
    --------
    >>> sure, unsure = [[0.9, 0.1], [0.2, 0.8]] * 4, [[0.6, 0.4], [0.4, 0.6]] * 4
    >>> told = compare(sure, unsure, truth=[0, 1] * 4, groups=[*"qrstuvwx"])
    >>> round(told.difference, 3), told.verdict
    (0.347, 'a is better')
    """
    pair = read_pair(
        a, b, truth, groups, quota, columns or Columns(), project or {}, Path(artifacts)
    )
    given = (pair.a.given, pair.b.given)
    losses = tuple(row_losses(matrix, pair.labels) for matrix in given)
    hits = tuple((matrix.argmax(axis=1) == pair.labels).astype(np.float64) for matrix in given)
    measures = {"log loss": losses}
    for name, views in (("row by row", pair.rows), ("posterior", pair.posteriors)):
        if views is not None:
            measures[name] = tuple(row_losses(matrix, pair.labels) for matrix in views)
    measures["accuracy"] = hits
    scores = pl.DataFrame(
        [
            {"measure": name, **_paired(one, other, pair.codes, seed)}
            for name, (one, other) in measures.items()
        ],
        schema_overrides=dict.fromkeys(
            ("a_se", "b_se", "difference", "error", "low", "high"), pl.Float64
        ),
    )
    by_group = _by_group(pair, *losses)
    verdict, sentence = _judged(pair, scores.row(0, named=True))
    return Comparison(
        pair.a.name,
        pair.b.name,
        len(pair.labels),
        by_group.height,
        scores,
        verdict,
        sentence,
        by_group,
        _changed(pair, *given),
        pair.notes,
    )


def _paired(a: Floats, b: Floats, codes: np.ndarray, seed: int) -> dict[str, float | None]:
    """Means, errors and paired difference of two values per row, ``(n_rows,)``."""
    told: dict[str, float | None] = {}
    for name, values in (("a", a), ("b", b)):
        told[name], told[f"{name}_se"] = mean_with_error(values, codes, seed)
    difference = b - a
    error = bootstrap_error(difference, codes, seed)
    low, high = bootstrap_interval(difference, codes, seed)
    ends = {"error": error, "low": low, "high": high}
    return (
        told
        | {"difference": float(difference.mean())}
        | {name: None if math.isnan(value) else value for name, value in ends.items()}
    )


def _judged(pair: Pair, score: Mapping[str, Any]) -> tuple[Verdict, str]:
    """Whether a difference is one, and the sentence that says so."""
    difference, error, low, high = (score[it] for it in ("difference", "error", "low", "high"))
    size, n_groups = abs(difference), len(np.unique(pair.codes))
    if np.allclose(pair.a.given, pair.b.given, rtol=0, atol=1e-9):  # but for rounding in a file
        return "same", "same: both predict the same."
    if error is None:
        return "unknown", "unknown: one group only, and nothing tells how much groups differ."
    told = f"{shown_with_error(size, error)}, paired over {n_groups:,} groups"
    if not low <= 0 <= high:
        better: Verdict = "b is better" if difference < 0 else "a is better"
        return better, f"{better[0].upper()}{better[1:]}: its log loss is lower by {told}."
    sentence = f"noise: they differ by {told}, and the interval holds 0"
    needed = (_SEEN * error / size) ** 2 * n_groups if size > 0 else math.inf
    if needed <= n_groups:
        return "noise", f"{sentence}, if barely."
    if needed > _MANY:
        return "noise", f"{sentence}. No contest has the groups to show a difference so small."
    return "noise", f"{sentence}. About {_rounded(needed)} groups would show one of that size."


def _rounded(number: float) -> str:
    """Two leading digits: more would claim to know more."""
    digits = max(0, len(str(math.ceil(number))) - 2)
    return f"{math.ceil(number / 10**digits) * 10**digits:,}"


def _by_group(pair: Pair, a: Floats, b: Floats) -> pl.DataFrame:
    rows = pl.DataFrame(
        {"code": pair.codes, "group": pair.groups, "row_id": pair.ids, "a": a, "b": b}
    )
    return (
        rows.group_by("code", maintain_order=True)
        .agg(
            pl.col("group").first(),
            pl.len().alias("n_rows"),
            pl.col("a", "b").mean(),
            (pl.col("b").mean() - pl.col("a").mean()).alias("difference"),
            pl.col("row_id").str.join(" ").alias("row_ids"),
        )
        .sort(pl.col("difference").abs(), descending=True, maintain_order=True)
        .drop("code")
    )


def _changed(pair: Pair, a: Floats, b: Floats) -> pl.DataFrame:
    names = np.array(pair.classes)
    first, second = a.argmax(axis=1), b.argmax(axis=1)
    rows = {
        "row_id": pair.ids,
        "group": pair.groups,
        "label": pl.Series(names[pair.labels]),
        "a": pl.Series(names[first]),
        "b": pl.Series(names[second]),
    }
    return pl.DataFrame(rows).filter(pl.Series(first != second))


def _scores_told(scores: pl.DataFrame) -> str:
    lines = [["", "A", "B", "B - A", "95% interval"]]
    for row in scores.iter_rows(named=True):
        error, low, high = row["error"], row["low"], row["high"]
        lines.append(
            [
                row["measure"],
                shown_with_error(row["a"], row["a_se"]),
                shown_with_error(row["b"], row["b_se"]),
                f"{row['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}"),
                "" if low is None else f"{low:+.4f} to {high:+.4f}",
            ]
        )
    return aligned(lines)


def _groups_told(groups: pl.DataFrame) -> str:
    lines = [["groups that differ most", "A", "B", "B - A", "rows"]]
    for row in groups.iter_rows(named=True):
        name = " ".join(row["group"].split())
        ids = row["row_ids"]
        lines.append(
            [
                name if len(name) <= 32 else f"{name[:31]}…",
                *(f"{row[it]:.4f}" for it in ("a", "b")),
                f"{row['difference']:+.4f}",
                ids if len(ids) <= 30 else f"{ids[:29]}…",
            ]
        )
    return aligned(lines, left=(0, 4))
