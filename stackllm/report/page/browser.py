"""The groups of a run, the hardest first, with what was said of their rows, as far as a page has room."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from stackllm.metrics import row_losses
from stackllm.report.page.finished import Finished
from stackllm.report.page.telltales import marks, scores_of

MAX_TEXT = 1_200
"""Letters of a response that are shown."""

MAX_QUESTION = 200

TEXT_BYTES = 1_300_000
"""Responses with their marks, all together."""

CELLS = 160_000
"""Probabilities, before and after, all together."""

MAX_GROUPS = 3_000

N_WORDS, MAX_WORD = 16, 32
"""Words that are told of a class, and letters of each."""

_PARTS = 1000
"""Probabilities are told in so many parts."""


Heard = list[tuple[int, pl.DataFrame]]
"""Class of a row, and what its n-grams add for whom."""


def groups(run: Finished) -> tuple[dict[str, Any], Heard]:
    """The groups, the hardest first.

    Returns
    -------
    dict
        ``groups``: of each ``group, question, fold, rows, raw, posterior`` (mean log losses), and of as many as
        there is room for ``members``, its rows: ``id, label, before, after`` (in thousandths), ``text, length,
        marks``. ``total``: how many groups there are.
    list
        What the n-grams of the responses that are shown add; see :func:`voices`.
    """
    design = run.design
    labels, codes = design.labels, design.train_groups
    raw, posterior = row_losses(run.raw, labels), row_losses(run.posterior, labels)
    numbers, place, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    losses = [np.bincount(place, values) / sizes for values in (raw, posterior)]
    order = np.lexsort((numbers, -losses[0], -losses[1]))[:MAX_GROUPS]
    rows_of = np.split(np.argsort(place, kind="stable"), np.cumsum(sizes)[:-1])
    told, cells, room = [], CELLS, TEXT_BYTES
    heard: Heard = []
    for i in order:
        rows = rows_of[i]
        first = int(rows[0])
        entry: dict[str, Any] = {
            "group": run.groups[first],
            "question": _question(run, first),
            "fold": int(design.folds[first]),
            "rows": len(rows),
            "raw": float(losses[0][i]),
            "posterior": float(losses[1][i]),
        }
        cells -= 2 * len(rows) * design.n_classes
        if cells >= 0:
            members = [_row(run, int(row), heard if room > 0 else None) for row in rows]
            room -= sum(_size(member) for member in members)
            entry["members"] = members
        told.append(entry)
    return {"groups": told, "total": len(numbers)}, heard


def _row(run: Finished, row: int, heard: Heard | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "id": visible(run.ids[row], 40),
        "label": int(run.design.labels[row]),
        "before": _parts(run.raw[row]),
        "after": _parts(run.posterior[row]),
    }
    if run.table is None or heard is None:
        return told
    response: str = run.table.train["response"][row]
    text = visible(response, MAX_TEXT)
    told |= {"text": text, "length": len(response), "marks": []}
    fold = int(run.design.folds[row])
    if fold in run.lexical:
        seen = response[: MAX_TEXT - 1]
        scores = scores_of(response[:MAX_TEXT], run.lexical[fold])
        heard.append((told["label"], scores))
        told["marks"] = marks(seen, scores)
    return told


def voices(run: Finished, heard: Heard) -> list[dict[str, Any]]:
    """Of each class the length of its responses, and the words that speak most for it where it spoke.

    Parameters
    ----------
    run
        The run; without its texts, there is nothing to tell.
    heard
        From :func:`groups`: of models that did not see the response.

    Returns
    -------
    list of dict
        ``class, rows, length`` (median, in characters) and ``words``, each with what it ``adds`` to the score of
        the class in the mean of its responses, and in how many ``rows`` of these it stands.
    """
    if run.table is None:
        return []
    lengths = run.table.train["response"].str.len_chars().to_numpy()
    told = []
    for j in range(len(run.classes)):
        of = run.design.labels == j
        spoken = [
            scores.filter(pl.col("view") == "words").select("ngram", adds=str(j))
            for label, scores in heard
            if label == j
        ]
        words: list[dict[str, Any]] = []
        if spoken:
            table = (
                pl.concat(spoken)
                .group_by("ngram", maintain_order=True)
                .agg(pl.sum("adds"), rows=pl.len())
            )
            strongest = table.filter((pl.col("rows") > 1) & (pl.col("adds") > 0)).sort(
                ["adds", "ngram"], descending=[True, False]
            )
            words = [
                {"word": visible(ngram, MAX_WORD), "adds": adds / len(spoken), "rows": rows}
                for ngram, adds, rows in strongest.head(N_WORDS).iter_rows()
            ]
        told.append(
            {"rows": int(of.sum()), "length": float(np.median(lengths[of])), "words": words}
        )
    return told


def _question(run: Finished, row: int) -> str:
    if run.table is None:
        return ""
    return visible(
        " ".join(run.table.train["question"][row][: 4 * MAX_QUESTION].split()), MAX_QUESTION
    )


def visible(text: str, longest: int) -> str:
    r"""A text cut to so many letters, with pictures for characters that nobody sees; letters keep their places.

    Examples
    --------
    >>> visible("a\0b, and much more", 6)
    'a␀b, …'
    """
    shown = text if len(text) <= longest else text[: longest - 1] + "…"
    return shown.translate(_PICTURES)


_PICTURES = {
    **{i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    # what turns the direction of writing would turn the page's own words, too
    **dict.fromkeys([0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
}  # fmt: skip


def _parts(probabilities: np.ndarray) -> list[int]:
    parts: list[int] = np.rint(probabilities * _PARTS).astype(int).tolist()
    return parts


def _size(row: dict[str, Any]) -> int:
    """Bytes of a response and its marks, about."""
    return len(row.get("text", "").encode()) + 16 * len(row.get("marks", ()))
