"""Member ``lexical``: TF-IDF of n-grams of one or more views of the text, logistic regression.

N-grams are hashed, so counting needs no vocabulary and happens once for all rows; what is learnt
(which n-grams to keep, their weights) is learnt from a fit's own rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
from annotated_types import Ge, Le, Len
from scipy.sparse import csr_matrix, hstack

from stackllm.crossfit.targets import Targets
from stackllm.members.inputs import Inputs, View
from stackllm.members.linear import class_probabilities, logistic
from stackllm.parameters import check
from stackllm.recipes.views import edges, skeleton
from stackllm.store.records import read_json, write_json

VERSION = 1


@dataclass(frozen=True)
class LexicalParams:
    """Settings of the lexical member.

    Parameters
    ----------
    views
        Views of the text, side by side: ``words``, ``characters``, ``skeleton`` (function words,
        punctuation and layout, with the subject masked), ``edges`` (how a response opens and closes).
    c
        Inverse strength of the L2 penalty.
    min_rows
        An n-gram counts only if it occurs in so many training rows.
    max_iter
        Bound on the optimiser's steps.
    """

    views: Annotated[tuple[View, ...], Len(1, 100)] = ("words", "characters")
    c: Annotated[float, Ge(1e-9), Le(1e9)] = 30.0
    min_rows: Annotated[int, Ge(1), Le(1_000_000_000)] = 2
    max_iter: Annotated[int, Ge(1), Le(1_000_000)] = 200

    def __post_init__(self) -> None:
        check(self)


def count_ngrams(texts: pl.Series, view: str) -> csr_matrix:
    """Hashed n-gram counts of one view of texts.

    Parameters
    ----------
    texts
        ``(n_rows,)``.
    view
        ``"words"``: words and pairs of words. ``"characters"``: runs of 2 to 4 characters.
        ``"skeleton"``: runs of 1 to 4 tokens of :func:`~stackllm.recipes.views.skeleton`.
        ``"edges"``: :func:`~stackllm.recipes.views.edges`.

    Returns
    -------
    scipy.sparse.csr_matrix
        float32 ``(n_rows, 2**18)``, a column per hash.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    known: dict[str, dict[str, Any]] = {
        "words": {"token_pattern": r"\w+|[^\w\s]", "ngram_range": (1, 2)},
        "characters": {"analyzer": "char", "ngram_range": (2, 4)},
        "skeleton": {"tokenizer": skeleton, "token_pattern": None, "ngram_range": (1, 4)},
        "edges": {"analyzer": edges},
    }
    vectoriser = HashingVectorizer(
        n_features=2**18,
        alternate_sign=False,
        norm=None,
        lowercase=False,
        dtype=np.float32,
        **known[view],
    )
    matrix: csr_matrix = vectoriser.transform(texts.to_list())
    matrix.sort_indices()
    return matrix


def fit(inputs: Inputs, targets: Targets, params: LexicalParams, seed: int, folder: Path) -> None:
    """Fit on ``targets`` and write the model's arrays into ``folder``."""
    rows = np.unique(targets.rows)
    place = np.searchsorted(rows, targets.rows)
    pieces = []
    for view in params.views:
        counts = inputs.counts[view][rows]
        seen = np.bincount(counts.indices, minlength=counts.shape[1])
        chosen = np.flatnonzero(seen >= params.min_rows).astype(np.int32)
        if not len(chosen):  # texts without n-grams: the bias alone
            chosen = np.zeros(1, np.int32)
        idf = (np.log((1 + len(rows)) / (1 + seen[chosen])) + 1).astype(np.float32)
        np.save(folder / f"{view}_kept.npy", chosen)
        np.save(folder / f"{view}_idf.npy", idf)
        pieces.append(_tfidf(counts, chosen, idf))
        del counts
    features = hstack(pieces, format="csr")
    pieces.clear()
    if not np.array_equal(rows, targets.rows):  # rows with several labels
        features = features[place]
    weights, bias = logistic(features, targets, params.c, params.max_iter)
    np.save(folder / "weights.npy", weights)
    np.save(folder / "bias.npy", bias)
    write_json(folder / "views.json", params.views)


def predict(inputs: Inputs, rows: np.ndarray, folder: Path) -> np.ndarray:
    """Probabilities of ``rows``, float64 ``(len(rows), n_classes)``."""
    views = read_json(folder / "views.json")
    pieces = [
        _tfidf(
            inputs.counts[view][rows],
            np.load(folder / f"{view}_kept.npy", allow_pickle=False),
            np.load(folder / f"{view}_idf.npy", allow_pickle=False),
        )
        for view in views
    ]
    weights = np.load(folder / "weights.npy", allow_pickle=False)
    bias = np.load(folder / "bias.npy", allow_pickle=False)
    return class_probabilities(hstack(pieces, format="csr"), weights, bias)


def _tfidf(counts: csr_matrix, chosen: np.ndarray, idf: np.ndarray) -> csr_matrix:
    """Sublinear TF-IDF of the kept n-grams; rows have length 1."""
    matrix = counts[:, chosen].astype(np.float32)
    matrix.data = (1 + np.log(matrix.data)) * idf[matrix.indices]
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    matrix.data /= np.repeat(np.maximum(length, 1e-12), np.diff(matrix.indptr))
    return matrix
