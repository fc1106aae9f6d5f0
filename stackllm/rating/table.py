"""What an LLM answered, as a table for people: a row per row and question, with who answered what.

It knows no labels: it is made of what was asked and of what came back, before anything learns from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from stackllm.rating.answers import Answers, Cost
from stackllm.rating.question import Asked
from stackllm.rating.refusal import count_reasons
from stackllm.store.atomic import write_file
from stackllm.tables.spreadsheet import spreadsheet_safe

SCHEMA = {
    "set": pl.String, "row_id": pl.String, "group_id": pl.String, "question": pl.String, "block": pl.String,
    "answer": pl.String, "rating": pl.Float64, "entropy": pl.Float64, "probability": pl.Float64,
    "logodds": pl.Float64, "partners": pl.String, "measured": pl.Boolean, "status": pl.String,
    "reply": pl.String, "model": pl.String, "prompt": pl.String,
}  # fmt: skip
"""Columns of the table; see :func:`ratings_table`."""

_OF_THE_ROW = ("set", "row_id", "group_id", "question")


@dataclass(frozen=True)
class Rated:
    """One question that an asked recipe asks, and its answers.

    Parameters
    ----------
    asked
        The question.
    places
        Which answer counts for which row; see :func:`~stackllm.rating.question.list_cases`.
    answers
        The answers, a case each.
    columns
        The features that they become, a row per row; see :func:`~stackllm.rating.question.make_columns`.
    recipe
        Name of the recipe: that of the question's block, but in a rubric.
    cost
        What the whole recipe took.
    """

    asked: Asked
    places: list[tuple[int, int, int]]
    answers: Answers
    columns: pl.DataFrame
    recipe: str
    cost: Cost


def ratings_table(rated: Sequence[Rated], rows: pl.DataFrame) -> pl.DataFrame:
    """All answers to all questions about rows, in the order of the rows.

    Parameters
    ----------
    rated
        From :func:`~stackllm.rating.ask.ask`.
    rows
        ``set, row_id, group_id, question, …``: the rows that were asked about, in the same order, and
        which table each is of.

    Returns
    -------
    polars.DataFrame
        ``n_rows * n_questions`` rows, those of one row next to each other. ``set, row_id, group_id, question``
        are the row's; ``block`` says what was asked, as feature columns are called. ``answer`` is the
        likeliest answer and ``probability`` its own, ``rating`` the expected one, ``entropy`` in nats;
        ``logodds`` of being preferred to the ``partners``, whose ids stand there. ``measured`` tells
        probabilities that were read from token scores from an answer that was said. ``status`` is ``ok``,
        or why there is no answer; ``reply`` what came, ``model`` who answered, ``prompt`` the digest of
        what was shown. What makes no sense for a question, or is not there, is null.
    """
    shown = rows.select(_OF_THE_ROW).with_row_index("row")
    parts = [
        pl.concat(
            [shown, _answers(it, rows["row_id"]).with_columns(order=pl.lit(i))], how="horizontal"
        )
        for i, it in enumerate(rated)
    ]
    if not parts:
        return pl.DataFrame(schema=SCHEMA)
    return pl.concat(parts).sort("row", "order").select(*SCHEMA)


def write_ratings(table: pl.DataFrame, path: Path) -> None:
    """Publish ratings at ``path`` as CSV for people, and beside it as Parquet for programs.

    The CSV is for a spreadsheet to open, and its texts are anybody's: those that one would run as formulas
    get an apostrophe there, whatever the setting ``csv_safe`` says of files that are to be uploaded.
    """
    write_file(path, spreadsheet_safe(table).write_csv)
    write_file(path.with_suffix(".parquet"), table.write_parquet)


def _answers(rated: Rated, ids: pl.Series) -> pl.DataFrame:
    """Columns of :data:`SCHEMA` from ``block`` on, a row per row."""
    make = _of_comparison if rated.asked.kind == "comparison" else _of_one
    known = {"block": [rated.asked.block] * len(ids), **make(rated, ids)}
    return pl.DataFrame(
        {
            name: known.get(name, pl.Series([None] * len(ids), dtype=kind))
            for name, kind in SCHEMA.items()
            if name not in _OF_THE_ROW
        },
        schema_overrides=SCHEMA,
    ).with_columns(pl.col(pl.Float64).fill_nan(None))


def _of_one(rated: Rated, _: pl.Series) -> dict[str, object]:
    """Of a rating or category: each row has one answer."""
    answers, columns = rated.answers, rated.columns
    cases = [case for _, case, _ in rated.places]  # in the order of the rows
    likely = np.where(np.isfinite(answers.probabilities), answers.probabilities, 0.0)
    best, ok = likely.argmax(axis=1), [status == "ok" for status in answers.status]
    logs = np.log(np.maximum(answers.probabilities, 1e-300))
    per_case = pl.DataFrame(
        {
            "answer": [
                rated.asked.answers[i] if is_ok else None for i, is_ok in zip(best, ok, strict=True)
            ],
            "probability": np.where(ok, likely.max(axis=1, initial=0.0), np.nan),
            "entropy": np.abs((answers.probabilities * logs).sum(axis=1)),  # never -0.0
            "measured": [
                it if is_ok else None for it, is_ok in zip(answers.measured, ok, strict=True)
            ],
            "status": [_valid(it) for it in answers.status],
            "reply": [_valid(it) or None for it in answers.texts],
            "model": [_valid(it) or None for it in answers.models],
            "prompt": answers.prompts,
        },
        schema_overrides=SCHEMA,
    )
    rating = {"rating": columns["expected"]} if "expected" in columns.columns else {}
    return {**per_case[cases].to_dict(), **rating}


def _of_comparison(rated: Rated, ids: pl.Series) -> dict[str, object]:
    """Of a comparison: each row stands in several, and shares each with another row."""
    answers, texts = rated.answers, ids.to_list()
    cases: list[list[int]] = [[] for _ in texts]
    partners: list[dict[str, None]] = [{} for _ in texts]
    # what was seen first and what was seen second stand next to each other
    for (first, case, _), (second, _, _) in zip(rated.places[::2], rated.places[1::2], strict=True):
        for row, other in ((first, second), (second, first)):
            cases[row].append(case)
            partners[row][texts[other]] = None

    def joined(values: Sequence[str]) -> list[str | None]:
        return [_several(dict.fromkeys(_valid(values[i]) for i in own)) for own in cases]

    ok = (rated.columns["ok"] == 1).to_list()
    counts = [Counter(answers.status[case] for case in own) for own in cases]
    return {
        "logodds": rated.columns["logodds"],
        "partners": [_several(others) for others in partners],
        "measured": [
            any(answers.measured[case] for case in own) if is_ok else None
            for own, is_ok in zip(cases, ok, strict=True)
        ],
        "status": [
            "ok" if is_ok else _valid(said_of(why) or "no other response in its group")
            for why, is_ok in zip(counts, ok, strict=True)
        ],
        "model": joined(answers.models),
        "prompt": joined(answers.prompts),
    }


def said_of(reasons: Counter[str]) -> str:
    """Reasons with how often each was given; see :func:`~stackllm.rating.refusal.count_reasons`.

    Examples
    --------
    >>> said_of(Counter({"refusal": 2, "empty": 1}))
    '2 refusal, 1 empty'
    """
    return count_reasons(reasons.elements())


def _several(texts: dict[str, None]) -> str | None:
    return ", ".join(filter(None, texts)) or None


def _valid(text: str) -> str:
    """The text without halves of characters, which JSON can bring and no file can hold."""
    return text.encode("utf-8", "replace").decode()
