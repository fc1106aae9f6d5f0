"""Stage three as a scikit-learn estimator: any classifier, plus what the groups tell."""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from sklearn import get_config
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.utils import _safe_indexing, assert_all_finite, get_tags, indexable
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_method_params,
    _num_samples,
    check_is_fitted,
    column_or_1d,
)

from stackllm.crossfit.folds import inner_folds
from stackllm.errors import DataError, UsageError
from stackllm.group.calibration import fit_temperature, temperature_of
from stackllm.group.plan import Plan, Quota
from stackllm.group.posterior import posterior_of
from stackllm.group.tempering import Calibration, tempered
from stackllm.probabilities import Floats, as_array, check_probabilities

_WAY_OUT = (
    "Pass groups=…. Where scikit-learn makes the call and passes none on (cross_val_predict, scorers by name, "
    "searches), keep the groups in a column of X and name it: GroupPosterior(…, group_column=…)."
)


class GroupPosterior(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier whose probabilities respect how often a class stands in one group.

    Parameters
    ----------
    estimator
        Any classifier with ``predict_proba``; ``X`` is its own affair: arrays, sparse matrices, lists
        of texts, frames with named columns. None: logistic regression.
    quota
        Places each class has in a group: one number, one per class in the order of ``classes_``, or a
        mapping from group id to either. A mapping must name the groups of every call.
    temperature
        Divides the log-probabilities. None: fitted on out-of-fold predictions of the training
        rows, split by group; once for groups and once for rows alone.
    exactly
        Must all places be filled? False: a class has at most its quota. Bools ``(n_classes,)`` say it
        per class.
    group_column
        The column of ``X`` that holds each row's group, by its name or number; the classifier does
        not see it. It is used wherever no ``groups`` are passed. None: there is no such column.
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
        What the log-probabilities of grouped rows are divided by.
    row_temperature_
        The same for rows without groups.
    grouped_
        Whether ``fit`` got groups.
    n_features_in_, feature_names_in_
        What the classifier inside saw, if it says so.

    Notes
    -----
    Groups come from ``groups``, or from ``group_column``. Without both the quota tells nothing: the
    answer is that of the classifier with calibrated rows, and a warning says so.

    ``fit``, ``predict``, ``predict_proba``, ``predict_log_proba`` and ``score`` ask for ``groups`` when
    scikit-learn's metadata routing is on; other metadata goes to the classifier inside, if that asks
    for it. What scikit-learn itself passes on to no predictor (``cross_val_predict``, scorers by name)
    only ``group_column`` reaches.

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
    __metadata_request__predict_log_proba = {"groups": True}  # noqa: RUF012
    __metadata_request__score = {"groups": True}  # noqa: RUF012

    def __init__(
        self,
        estimator: Any = None,
        *,
        quota: Quota = 1,
        temperature: float | None = None,
        exactly: bool | ArrayLike = False,
        group_column: str | int | None = None,
        cv: int = 5,
        random_state: int = 0,
    ) -> None:
        self.estimator = estimator
        self.quota = quota
        self.temperature = temperature
        self.exactly = exactly
        self.group_column = group_column
        self.cv = cv
        self.random_state = random_state

    def fit(self, X: Any, y: ArrayLike, groups: ArrayLike | None = None, **params: Any) -> Self:
        """Fit the classifier, and the temperatures on its out-of-fold predictions.

        Parameters
        ----------
        X
            ``n_rows`` of whatever the classifier takes.
        y
            Shape ``(n_rows,)``, labels.
        groups
            Shape ``(n_rows,)``, integers or strings. None: those of ``group_column``; without that
            every row stands alone.
        **params
            Other metadata for the classifier's ``fit``, such as ``sample_weight``.

        Returns
        -------
        GroupPosterior
            Itself.

        Raises
        ------
        DataError
            If there is one label only, or groups are not one id per row, or a mapping lacks the quota
            of a group.
        UsageError
            If quota, exactly, temperature, cv or ``group_column`` make no sense, or the classifier
            gives no probabilities.
        ValueError
            Whatever else scikit-learn or the classifier say of ``X`` and ``y``.
        """
        if not hasattr(self._inner(), "predict_proba"):
            raise UsageError(
                f"{type(self._inner()).__name__} gives no probabilities (predict_proba). Wrap it: "
                "GroupPosterior(CalibratedClassifierCV(…))."
            )
        labels = column_or_1d(y, warn=True)
        assert_all_finite(labels, input_name="y")
        check_classification_targets(labels)
        self.classes_, truth = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(
                f"the labels have {len(self.classes_)} class; a classifier needs two or more classes."
            )
        X, groups = self._apart(X, groups)
        X, labels = indexable(X, labels)
        fixed = None if self.temperature is None else Calibration(self.temperature)
        # made before anything is fitted, so that a quota that makes no sense is told at once
        plan = None if groups is None else self._plan(groups)
        if plan is None:
            warnings.warn(
                "GroupPosterior got no groups to fit with, so each row stands alone, its quota tells nothing, and "
                f"this is the classifier with calibrated probabilities. {_WAY_OUT}",
                stacklevel=2,
            )
        params = self._routed("fit", groups, params)
        self.estimator_ = clone(self._inner()).fit(X, labels, **params)
        self.grouped_ = plan is not None
        self.temperature_ = self.row_temperature_ = fixed.temperature if fixed else 1.0
        codes = np.arange(len(truth)) if plan is None else plan.codes
        oof = None if fixed else self._out_of_fold(X, labels, truth, codes, params)
        if oof is not None:
            self.row_temperature_ = fit_temperature(oof, np.arange(len(truth)), truth)
            self.temperature_ = temperature_of(oof, plan, truth) if plan else self.row_temperature_
        return self

    def predict_proba(self, X: Any, groups: ArrayLike | None = None, **params: Any) -> Floats:
        """Posterior class probabilities.

        Parameters
        ----------
        X
            ``n_rows`` of whatever the classifier takes.
        groups
            Shape ``(n_rows,)``, integers or strings: whole groups, in any order. None: those of
            ``group_column``; without that the answer is that of rows alone.
        **params
            Other metadata for the classifier's ``predict_proba``.

        Returns
        -------
        numpy.ndarray
            float64 ``(n_rows, n_classes)``, columns in the order of ``classes_``; every row sums to 1.

        Raises
        ------
        DataError
            If groups are not one id per row, or a mapping lacks the quota of a group.
        UsageError
            If there is no such ``group_column``.
        ValueError
            Whatever the classifier says of ``X``, and ``NotFittedError`` before :meth:`fit`.
        """
        check_is_fitted(self)
        X, groups = self._apart(X, groups)
        plan = None if groups is None else self._plan(groups)
        params = self._routed("predict_proba", groups, params)
        rows = self.estimator_.predict_proba(X, **params)
        matrix = check_probabilities(rows, np.arange(len(rows)) if plan is None else plan.codes)
        if plan is not None:
            return posterior_of(matrix, plan, Calibration(self.temperature_))
        if self.grouped_:
            warnings.warn(
                "GroupPosterior was fitted with groups and is asked without, so its quota tells nothing, and the "
                f"answer is that of the classifier with calibrated probabilities. {_WAY_OUT}",
                stacklevel=2,
            )
        return tempered(matrix, Calibration(self.row_temperature_))

    def predict_log_proba(self, X: Any, groups: ArrayLike | None = None, **params: Any) -> Floats:
        """Natural logarithm of :meth:`predict_proba`, which see, ``(n_rows, n_classes)``; -inf where that is 0."""
        with np.errstate(divide="ignore"):
            logs: Floats = np.log(self.predict_proba(X, groups, **params))
        return logs

    def predict(self, X: Any, groups: ArrayLike | None = None, **params: Any) -> NDArray[Any]:
        """The likeliest label of each row, ``(n_rows,)``, by :meth:`predict_proba`, which see."""
        best = self.predict_proba(X, groups, **params).argmax(axis=1)
        labels: NDArray[Any] = self.classes_[best]
        return labels

    def score(
        self,
        X: Any,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        **params: Any,
    ) -> float:
        """Accuracy of :meth:`predict`, which see, on labels ``(n_rows,)`` with weights ``(n_rows,)``."""
        predicted = self.predict(X, groups, **params)
        return float(accuracy_score(y, predicted, sample_weight=sample_weight))

    @property
    def n_features_in_(self) -> int:
        """Number of features that the classifier inside saw."""
        return int(self.estimator_.n_features_in_)

    @property
    def feature_names_in_(self) -> NDArray[np.str_]:
        """Names of the features that the classifier inside saw, ``(n_features_in_,)``."""
        names: NDArray[np.str_] = self.estimator_.feature_names_in_
        return names

    def get_metadata_routing(self) -> MetadataRouter:
        """Who asks for which metadata: this estimator for groups, the classifier inside for its own."""
        mapping = MethodMapping().add(caller="fit", callee="fit")
        for caller in ("predict", "predict_proba", "predict_log_proba", "score"):
            mapping.add(caller=caller, callee="predict_proba")
        router = MetadataRouter(owner=self).add_self_request(self)
        return router.add(estimator=self._inner(), method_mapping=mapping)

    def _inner(self) -> Any:
        return LogisticRegression() if self.estimator is None else self.estimator

    def _apart(self, X: Any, groups: ArrayLike | None) -> tuple[Any, NDArray[Any] | None]:
        """What the classifier sees, and the group of each row by the id that a quota may name it with."""
        if self.group_column is not None:
            X, column = _without(X, self.group_column)
            groups = column if groups is None else groups
        if groups is None:
            return X, None
        ids = as_array(groups, "groups")
        if ids.ndim == 1 and len(ids) != _num_samples(X):
            raise DataError(f"groups has {len(ids)} entries for {_num_samples(X)} rows.")
        return X, ids

    def _plan(self, groups: NDArray[Any]) -> Plan:
        return Plan.of(groups, len(self.classes_), self.quota, exactly=self.exactly)

    def _routed(
        self, method: str, groups: ArrayLike | None, params: dict[str, Any]
    ) -> dict[str, Any]:
        """What of the metadata the classifier inside gets."""
        if not get_config()["enable_metadata_routing"]:
            return params
        routed = process_routing(self, method, groups=groups, **params)
        return dict(routed["estimator"][method])

    def _out_of_fold(
        self,
        X: Any,
        labels: NDArray[Any],
        truth: NDArray[np.intp],
        codes: NDArray[np.intp],
        params: dict[str, Any],
    ) -> Floats | None:
        """Out-of-fold predictions ``(n_rows, n_classes)``; None where no split leaves all classes to learn."""
        if codes.max() == codes.min():
            return None
        folds = inner_folds(codes, self.cv, self.random_state)
        oof = np.empty((len(truth), len(self.classes_)))
        for fold in range(int(folds.max()) + 1):
            rest, inside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            if len(np.unique(truth[rest])) < len(self.classes_):
                return None
            model = clone(self._inner()).fit(
                _safe_indexing(X, rest), labels[rest], **_check_method_params(X, params, rest)
            )
            oof[inside] = model.predict_proba(_safe_indexing(X, inside))
        return oof

    def __sklearn_tags__(self) -> Any:
        """The tags of the classifier inside: what it takes, this takes."""
        tags, inner = super().__sklearn_tags__(), get_tags(self._inner())
        tags.input_tags, tags.classifier_tags = inner.input_tags, inner.classifier_tags
        return tags


def _without(X: Any, column: str | int) -> tuple[Any, ArrayLike]:
    """A table without one of its columns, and that column."""
    if isinstance(column, str):
        columns = list(getattr(X, "columns", []))
    else:
        columns = list(range(X.shape[1])) if len(getattr(X, "shape", ())) == 2 else []
    if column not in columns:
        raise UsageError(
            f"group_column is {column!r}, and X has no such column. It has: {columns[:20]}."
        )
    values = _safe_indexing(X, column, axis=1)
    rest = _safe_indexing(X, [name for name in columns if name != column], axis=1)
    return rest, values.toarray().ravel() if issparse(values) else values
