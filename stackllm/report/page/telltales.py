"""Where in a response its tell-tale n-grams stand, and for which class they speak."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from stackllm.members.lexical import telltale
from stackllm.predict import Model, unit_folders

N_MARKS = 24
"""Words that are marked in a response at most."""

_WORD = re.compile(r"\w+|[^\w\s]")
_IN_TEXT = {"words", "characters"}
_LEVELS = (0.66, 0.33)
"""Shares of the strongest mark from which a mark is strong, and plain; below it is faint."""

_NOTHING = 1e-9
"""What sums of floats leave where nothing speaks for anybody."""

Mark = tuple[int, int, int, int]
"""Start and end in the text, class, strength (1 to 3)."""


def lexical_models(model: Model) -> dict[int, list[Path]]:
    """Folders of models that saw no row of a fold, by fold: verified once for all rows.

    One of each member stands for those of all parts and rounds of a fold, which differ little and take as long.
    Members that read masked views only are left out: their n-grams stand nowhere in a response.
    """
    folders: dict[int, list[Path]] = {}
    for member in model.content["members"]:
        if member["kind"] != "lexical" or _IN_TEXT.isdisjoint(member["params"]["views"]):
            continue
        for fold, folder in dict(
            reversed([*unit_folders(model, "places", member["name"])])
        ).items():
            folders.setdefault(fold, []).append(folder)
    return folders


def scores_of(text: str, folders: Sequence[Path]) -> pl.DataFrame:
    """What n-grams add, averaged over models; as :func:`~stackllm.members.lexical.telltale` gives it."""
    tables = [telltale(text, folder) for folder in folders]
    return pl.concat(tables).group_by("view", "ngram", maintain_order=True).mean()


def marks(text: str, scores: pl.DataFrame) -> list[Mark]:
    """The words of a text that speak most for a class.

    Each n-gram's worth is spread over the letters where it stands, in as many places as it does, and summed
    by word. N-grams of views that mask the text (``skeleton``, ``edges``) stand nowhere in it and are not shown.

    Parameters
    ----------
    text
        The response.
    scores
        From :func:`scores_of`.

    Returns
    -------
    list
        Marks in the order of the text, at most :data:`N_MARKS`.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    if not words or not scores.height:
        return []
    places = {"words": _word_places(text, words), "characters": _character_places(text)}
    spans = [
        (i, *span)
        for i, (view, ngram) in enumerate(scores.select("view", "ngram").iter_rows())
        for span in places.get(view, {}).get(ngram, ())
    ]
    if not spans:
        return []
    which, starts, ends = np.array(spans).T
    worth = scores.drop("view", "ngram").to_numpy()[which]  # (n_spans, n_classes)
    worth /= (np.bincount(which)[which] * (ends - starts))[:, None]
    steps = np.zeros((len(text) + 1, worth.shape[1]))
    np.add.at(steps, starts, worth)
    np.subtract.at(steps, ends, worth)
    until = np.vstack([np.zeros(worth.shape[1]), steps.cumsum(axis=0).cumsum(axis=0)])
    totals = np.array([until[end] - until[start] for start, end in words])
    classes, strengths = totals.argmax(axis=1), totals.max(axis=1)
    n_marks = min(N_MARKS, 2 + len(words) // 4)  # where everything is marked, nothing is
    strongest = np.argsort(-strengths, kind="stable")[:n_marks]
    top = strengths[strongest[0]]
    if top < _NOTHING:
        return []
    return [
        (*words[i], int(classes[i]), 3 - int(sum(strengths[i] < share * top for share in _LEVELS)))
        for i in sorted(strongest)
        if strengths[i] > 0.1 * top
    ]


def _word_places(
    text: str, words: Sequence[tuple[int, int]]
) -> Mapping[str, list[tuple[int, int]]]:
    """Where each word and pair of words stands."""
    places: dict[str, list[tuple[int, int]]] = {}
    for i, (start, end) in enumerate(words):
        places.setdefault(text[start:end], []).append((start, end))
        if i:
            before, until = words[i - 1]
            places.setdefault(f"{text[before:until]} {text[start:end]}", []).append((before, end))
    return places


def _character_places(text: str) -> Mapping[str, list[tuple[int, int]]]:
    """Where each run of 2 to 4 characters stands; runs of white space count as one space, as the member has it."""
    letters, at = [], []
    for match in re.finditer(r"\s\s+|.", text, flags=re.DOTALL):
        letters.append(" " if len(match[0]) > 1 else match[0])
        at.append(match.span())
    joined = "".join(letters)
    places: dict[str, list[tuple[int, int]]] = {}
    for size in (2, 3, 4):
        for i in range(len(joined) - size + 1):
            places.setdefault(joined[i : i + size], []).append((at[i][0], at[i + size - 1][1]))
    return places
