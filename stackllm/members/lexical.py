"""Member ``lexical``: TF-IDF of n-grams of one or more views of the text, logistic regression.

N-grams are hashed, so counting needs no vocabulary and happens once for all rows; what is learnt
(which n-grams to keep, their weights) is learnt from a fit's own rows.
"""

from __future__ import annotations

from collections import Counter
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

_BUCKETS = 2**18


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
    matrix: csr_matrix = _vectoriser(view).transform(texts.to_list())
    matrix.sort_indices()
    return matrix


def _vectoriser(view: str) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    known: dict[str, dict[str, Any]] = {
        "words": {"token_pattern": r"\w+|[^\w\s]", "ngram_range": (1, 2)},
        "characters": {"analyzer": "char", "ngram_range": (2, 4)},
        "skeleton": {"tokenizer": skeleton, "token_pattern": None, "ngram_range": (1, 4)},
        "edges": {"analyzer": edges},
    }
    return HashingVectorizer(
        n_features=_BUCKETS,
        alternate_sign=False,
        norm=None,
        lowercase=False,
        dtype=np.float32,
        **known[view],
    )


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
    pieces = [_tfidf(inputs.counts[view][rows], *_learnt(folder, view)) for view in _views(folder)]
    weights = np.load(folder / "weights.npy", allow_pickle=False)
    bias = np.load(folder / "bias.npy", allow_pickle=False)
    return class_probabilities(hstack(pieces, format="csr"), weights, bias)


def telltale(text: str, folder: Path) -> pl.DataFrame:
    """What each n-gram of a text adds to the score of each class.

    Parameters
    ----------
    text
        A response.
    folder
        Where :func:`fit` wrote the model.

    Returns
    -------
    polars.DataFrame
        ``view, ngram`` and a float64 column per class, called by its number: what the n-gram adds to the score of
        the class above the mean over classes. Summed, and with the bias, they are the model's scores above their
        mean. N-grams that share a bucket of the hash share what it adds.
    """
    from sklearn.feature_extraction import FeatureHasher

    weights = np.load(folder / "weights.npy", allow_pickle=False).astype(np.float64)
    weights -= weights.mean(axis=0)  # (n_classes, n_features), the views side by side
    hasher = FeatureHasher(_BUCKETS, input_type="string", alternate_sign=False)
    tables, start = [], 0
    for view in _views(folder):
        chosen, idf = _learnt(folder, view)
        counted = Counter(_vectoriser(view).build_analyzer()(text))
        row = _tfidf(count_ngrams(pl.Series([text]), view), chosen, idf).toarray()[0]
        buckets = hasher.transform([[ngram] for ngram in counted]).indices if counted else []
        place = np.searchsorted(chosen, buckets).clip(max=len(chosen) - 1)
        counts = np.array([*counted.values()], dtype=np.float64) * (chosen[place] == buckets)
        shares = counts / np.maximum(np.bincount(place, counts, len(chosen)), 1.0)[place]
        added = (shares * row[place])[:, None] * weights[:, start + place].T
        table = pl.DataFrame(added, schema=[str(j) for j in range(len(weights))])
        named = {"view": [view] * len(counted), "ngram": [*counted]}
        tables.append(pl.DataFrame(named, schema=dict.fromkeys(named, pl.String)).hstack(table))
        start += len(chosen)
    return pl.concat(tables)


def _views(folder: Path) -> list[str]:
    views: list[str] = read_json(folder / "views.json")
    return views


def _learnt(folder: Path, view: str) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of a view that a model keeps, and their inverse document frequencies."""
    chosen, idf = (
        np.load(folder / f"{view}_{name}.npy", allow_pickle=False) for name in ("kept", "idf")
    )
    return chosen, idf


def _tfidf(counts: csr_matrix, chosen: np.ndarray, idf: np.ndarray) -> csr_matrix:
    """Sublinear TF-IDF of the kept n-grams; rows have length 1."""
    matrix = counts[:, chosen].astype(np.float32)
    matrix.data = (1 + np.log(matrix.data)) * idf[matrix.indices]
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    matrix.data /= np.repeat(np.maximum(length, 1e-12), np.diff(matrix.indptr))
    return matrix
