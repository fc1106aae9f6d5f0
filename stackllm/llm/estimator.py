"""The frozen LLM as a scikit-learn transformer, with the cache that runs share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
from sklearn.base import BaseEstimator, TransformerMixin

from stackllm.errors import DataError
from stackllm.llm.encode import EncoderParams, encode
from stackllm.llm.locate import EMBEDDED
from stackllm.tables.frames import from_native
from stackllm.workspace import open_cache


class Encoder(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Texts as pooled layers of a frozen LLM, each text read once and then taken from the cache.

    Parameters
    ----------
    backbone, dtype, depths, max_question_tokens, max_response_tokens
        As in ``[encoder]`` of the settings: which LLM, its precision, the layers that are pooled, and where
        longer texts are cut.
    text, question
        Columns of the response and of its question, where frames are transformed. A frame may lack the question.
    artifacts
        Folder of runs: what is read is kept in ``cache`` below it, where runs find it too.
    n_jobs
        Shards side by side; None: as many as there are cores.
    verbose
        Whether progress is shown, on standard error.

    Notes
    -----
    There is nothing to fit, so nothing can leak from one row into another.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> model = make_pipeline(Encoder(), LogisticRegression())
    """

    def __init__(
        self,
        *,
        backbone: str = EMBEDDED,
        dtype: str = "auto",
        depths: Sequence[float] = EncoderParams.depths,
        max_question_tokens: int = EncoderParams.max_question_tokens,
        max_response_tokens: int = EncoderParams.max_response_tokens,
        text: str = "Response",
        question: str = "Question",
        artifacts: str | Path = "artifacts",
        n_jobs: int | None = None,
        verbose: bool = False,
    ) -> None:
        self.backbone = backbone
        self.dtype = dtype
        self.depths = depths
        self.max_question_tokens = max_question_tokens
        self.max_response_tokens = max_response_tokens
        self.text = text
        self.question = question
        self.artifacts = artifacts
        self.n_jobs = n_jobs
        self.verbose = verbose

    def fit(self, X: Any = None, y: Any = None) -> Self:
        """Check the settings; no text is read."""
        self._params()
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The pooled layers of each text, side by side.

        Parameters
        ----------
        X
            A frame, polars or pandas, or a sequence of texts.

        Returns
        -------
        numpy.ndarray
            float32 ``(n_rows, n_layers * hidden)``.

        Raises
        ------
        UsageError, DataError
            If a setting or the texts make no sense.
        MissingInputError, StorageError
            If the backbone cannot be loaded.
        """
        rows, params = self._rows(X), self._params()
        with open_cache(Path(self.artifacts), n_jobs=self.n_jobs, quiet=not self.verbose) as cache:
            read, _, _ = encode(rows, params, cache)
        pooled: np.ndarray = read.take("pooled").astype(np.float32)
        return pooled

    def __sklearn_is_fitted__(self) -> bool:
        """Always: there is nothing to fit."""
        return True

    def _params(self) -> EncoderParams:
        return EncoderParams(
            self.backbone, self.dtype, tuple(self.depths),  # type: ignore[arg-type]
            self.max_question_tokens, self.max_response_tokens,
        )  # fmt: skip

    def _rows(self, X: Any) -> pl.DataFrame:
        if hasattr(X, "columns"):
            frame = from_native(X, "the frame")
            if self.text not in frame.columns:
                raise DataError(
                    f'the frame has no column "{self.text}" (it has {", ".join(frame.columns)}). '
                    "Name the column of responses with text."
                )
            responses = frame[self.text]
            asked = self.question in frame.columns
            questions = frame[self.question] if asked else pl.Series([""] * frame.height)
        else:
            if isinstance(X, str | bytes) or not isinstance(X, Iterable):
                raise DataError(
                    f"texts must be a list of texts, or a frame, not {type(X).__name__}. Pass [text] for one."
                )
            texts = list(X)
            odd = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
            if odd is not None:
                raise DataError(
                    f"entry {odd} is no text but {type(texts[odd]).__name__}. Pass texts."
                )
            responses, questions = pl.Series(texts, dtype=pl.String), pl.Series([""] * len(texts))
        response, question = (
            column.cast(pl.String).fill_null("") for column in (responses, questions)
        )
        if not len(response):
            raise DataError("there are no texts. Pass one or more.")
        return pl.DataFrame({"group_id": question, "question": question, "response": response})
