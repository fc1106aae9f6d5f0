"""Stage three as a scikit-learn estimator: any classifier, plus what the groups tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from stackllm.crossfit.folds import inner_folds
from stackllm.group.calibration import fit_temperature
from stackllm.group.plan import Floats, Quota, group_codes
from stackllm.group.posterior import posterior


class GroupPosterior(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier whose probabilities respect how often a class stands in one group.

    Parameters
    ----------
    estimator
        Any classifier with ``predict_proba``. None: logistic regression.
    quota
        Places each class has in a group: one number, one a class in the order of ``classes_``, or a
        mapping from group id to either. A mapping must name the groups of every call, those of
        ``fit`` only where the temperature is fitted.
    temperature
        Divides the log-probabilities. None: fitted on out-of-fold predictions of the training
        rows, split by group.
    exactly
        Must all places be filled? False: a class has at most its quota.
    cv
        Folds for the temperature, 2 or more; only used where it is fitted.
    random_state
        Seed of those folds.

    Attributes
    ----------
    estimator_
        The classifier, fitted on all rows.
    classes_
        Labels, in the order of the columns of ``predict_proba``.
    temperature_
        What the log-probabilities are divided by.
    n_features_in_
        Number of features seen by ``fit``.

    Notes
    -----
    ``fit``, ``predict`` and ``predict_proba`` take ``groups`` as metadata and ask for it when routing
    is on. Without groups each row is a group of its own, and the answer is the calibrated classifier's.

    Examples
    --------
    >>> import numpy as np
    >>> X, y = np.array([[0.0], [1.0], [0.2], [1.1]]), ["a", "b", "a", "b"]
    >>> model = GroupPosterior(temperature=1.0).fit(X, y, groups=[0, 0, 1, 1])
    >>> model.predict([[0.9], [2.0]], groups=["new", "new"]).tolist()
    ['a', 'b']
    """

    __metadata_request__fit = {"groups": True}  # noqa: RUF012
    __metadata_request__predict = {"groups": True}  # noqa: RUF012
    __metadata_request__predict_proba = {"groups": True}  # noqa: RUF012

    def __init__(
        self,
        estimator: Any = None,
        *,
        quota: Quota = 1,
        temperature: float | None = None,
        exactly: bool = False,
        cv: int = 5,
        random_state: int = 0,
    ) -> None:
        self.estimator = estimator
        self.quota = quota
        self.temperature = temperature
        self.exactly = exactly
        self.cv = cv
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: ArrayLike | None = None) -> GroupPosterior:
        """Fit the classifier, and the temperature on its out-of-fold predictions.

        Parameters
        ----------
        X
            Shape ``(n_rows, n_features)``.
        y
            Shape ``(n_rows,)``, labels.
        groups
            Shape ``(n_rows,)``. None: every row is a group of its own.

        Returns
        -------
        GroupPosterior
            Itself.
        """
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=None, ensure_all_finite=False)
        check_classification_targets(y)
        self.classes_, labels = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"the labels have {len(self.classes_)} class; a classifier needs two or more classes."
            )
        names = self._names(groups, X.shape[0])
        self.estimator_ = clone(self._base()).fit(X, y)
        self.temperature_ = (
            self._fitted_temperature(X, y, labels, names)
            if self.temperature is None
            else float(self.temperature)
        )
        return self

    def predict_proba(self, X: Any, groups: ArrayLike | None = None) -> Floats:
        """Posterior class probabilities, rows that sum to 1.

        Parameters
        ----------
        X
            Shape ``(n_rows, n_features)``.
        groups
            Shape ``(n_rows,)``. None: every row is a group of its own.

        Returns
        -------
        numpy.ndarray
            Shape ``(n_rows, n_classes)``, columns in the order of ``classes_``.
        """
        check_is_fitted(self)
        X = validate_data(
            self, X, accept_sparse="csr", dtype=None, reset=False, ensure_all_finite=False
        )
        rows = self.estimator_.predict_proba(X)
        return posterior(
            rows,
            self._names(groups, X.shape[0]),
            self.quota,
            temperature=self.temperature_,
            exactly=self.exactly,
        )

    def predict(self, X: Any, groups: ArrayLike | None = None) -> NDArray[Any]:
        """The likeliest label of each row by the posterior; parameters as for ``predict_proba``."""
        best = self.predict_proba(X, groups).argmax(axis=1)
        labels: NDArray[Any] = self.classes_[best]
        return labels

    def _names(self, groups: ArrayLike | None, n_rows: int) -> NDArray[Any]:
        """The group of each row, by the id that a quota may name it with."""
        if groups is None:
            if isinstance(self.quota, Mapping):
                raise ValueError("quota goes by group, so groups=… must say the group of each row.")
            return np.arange(n_rows)
        group_codes(groups)
        names = np.asarray(groups)
        if len(names) != n_rows:
            raise ValueError(f"groups has {len(names)} entries for {n_rows} rows.")
        return names

    def _base(self) -> Any:
        return LogisticRegression() if self.estimator is None else self.estimator

    def _fitted_temperature(
        self,
        X: Any,
        y: NDArray[Any],
        labels: NDArray[np.intp],
        names: NDArray[Any],
    ) -> float:
        """On out-of-fold predictions; 1 where no split leaves every class to learn from."""
        codes, distinct = group_codes(names)
        if len(distinct) < 2:
            return 1.0
        folds = inner_folds(codes.astype(str), self.cv, self.random_state)
        oof = np.empty((len(labels), len(self.classes_)))
        for fold in range(int(folds.max()) + 1):
            rest, own = folds != fold, folds == fold
            if len(np.unique(labels[rest])) < len(self.classes_):
                return 1.0
            oof[own] = clone(self._base()).fit(X[rest], y[rest]).predict_proba(X[own])
        return fit_temperature(oof, names, labels, self.quota, exactly=self.exactly)

    def __sklearn_tags__(self) -> Any:
        """The tags of the classifier inside: what it takes, this takes."""
        from sklearn.utils import get_tags

        tags = super().__sklearn_tags__()
        inner = get_tags(self._base())
        tags.input_tags.sparse = inner.input_tags.sparse
        tags.input_tags.allow_nan = inner.input_tags.allow_nan
        return tags
