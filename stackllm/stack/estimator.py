"""Stacking for classifiers of one's own, with groups: what scikit-learn's StackingClassifier cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils import _safe_indexing
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _num_samples, check_is_fitted, column_or_1d

from stackllm.crossfit.design import CrossFit, Design
from stackllm.crossfit.folds import check_folds, group_folds
from stackllm.errors import DataError, UsageError
from stackllm.probabilities import Floats, as_array
from stackllm.stack.features import stack_features
from stackllm.stack.posteriors import cross_posteriors, fold_posteriors


class GroupStack(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Members cross-fitted by group, a final classifier on what they say of a row and its group, and exact posteriors.

    Parameters
    ----------
    members
        Pairs of a name and a classifier with ``predict_proba``; each gets ``X`` as it comes.
    final
        The classifier on top; None: LightGBM with the recipe's settings. It reads, per member, log-probabilities, the same
        centred within the group, and log-posteriors, and their means over the members.
    quota
        How often each class stands in one group.
    cv
        Folds of groups.
    random_state
        Seed of the folds, and of the default final classifier.

    Attributes
    ----------
    classes_
        Labels, in the order of the columns of ``predict_proba``.
    oof_
        Posteriors of the training rows by models that did not see their group, float64 ``(n_rows, n_classes)``.
    folds_
        Fold of each training row, int32 ``(n_rows,)``.

    Notes
    -----
    Each fold has members, temperatures and a final classifier of its own, none of which saw its labels; new rows get
    the mean of all folds.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.naive_bayes import GaussianNB
    >>> X, y = np.array([[0.0], [1.0]] * 6), ["a", "b"] * 6
    >>> groups = np.repeat(np.arange(6), 2)
    >>> members = [("line", LogisticRegression()), ("bell", GaussianNB())]
    >>> stack = GroupStack(members, LogisticRegression(), cv=3).fit(X, y, groups=groups)
    >>> stack.predict([[0.9], [0.4]], groups=["new", "new"]).tolist()
    ['b', 'a']
    """

    __metadata_request__fit = {"groups": True}  # noqa: RUF012
    __metadata_request__predict = {"groups": True}  # noqa: RUF012
    __metadata_request__predict_proba = {"groups": True}  # noqa: RUF012
    __metadata_request__score = {"groups": True}  # noqa: RUF012

    def __init__(
        self,
        members: Sequence[tuple[str, Any]],
        final: Any = None,
        *,
        quota: int = 1,
        cv: int = 5,
        random_state: int = 0,
    ) -> None:
        self.members = members
        self.final = final
        self.quota = quota
        self.cv = cv
        self.random_state = random_state

    def fit(self, X: Any, y: ArrayLike, groups: ArrayLike) -> Self:
        """Cross-fit the members, and the final classifier on top.

        Parameters
        ----------
        X
            ``n_rows`` of whatever the members take.
        y
            Labels, ``(n_rows,)``.
        groups
            Group of each row, ``(n_rows,)``, integers or strings.

        Raises
        ------
        DataError
            If labels or groups do not fit ``X``, there are fewer groups than folds, or a class stands in one fold only.
        UsageError
            If members are no pairs, two have one name, or one gives no probabilities.
        """
        self._check_members()
        labels = column_or_1d(y, warn=True)
        check_classification_targets(labels)
        self.classes_, truth = np.unique(labels, return_inverse=True)
        codes = _codes(X, groups)
        if len(truth) != len(codes):
            raise DataError(f"y has {len(truth)} entries for {len(codes)} rows.")
        if len(self.classes_) < 2:
            raise DataError(
                f"y holds one label only ({self.classes_[0]!r}). Two or more are needed."
            )
        self.folds_ = group_folds(codes, self.cv, self.random_state)
        check_folds(self.folds_, codes, truth, len(self.classes_))
        design = Design(
            truth.astype(np.int64), self.folds_, np.zeros(0, np.int32), codes, len(self.classes_),
            tuple(map(str, self.classes_)),
        )  # fmt: skip
        self.members_, oof = {}, {}
        for name, member in self.members:
            self.members_[name], oof[name] = self._cross_fit(member, X, truth)
        posteriors = {name: cross_posteriors(it, design, self.quota) for name, it in oof.items()}
        self.temperatures_ = {name: it.temperatures for name, it in posteriors.items()}
        features = stack_features(
            {name: it.oof for name, it in oof.items()},
            {name: it.oof for name, it in posteriors.items()},
            np.zeros((len(truth), 0)), (), codes,
        )  # fmt: skip
        self.final_, on_top = self._cross_fit(self._final(), features, truth)
        calibrated = cross_posteriors(on_top, design, self.quota)
        self.final_temperatures_, self.oof_ = calibrated.temperatures, calibrated.oof
        return self

    def predict_proba(self, X: Any, groups: ArrayLike) -> Floats:
        """Posteriors of the rows of whole groups.

        Parameters
        ----------
        X
            ``n_rows`` of whatever the members take.
        groups
            Group of each row, ``(n_rows,)``.

        Returns
        -------
        numpy.ndarray
            float64 ``(n_rows, n_classes)``, columns in the order of ``classes_``.

        Raises
        ------
        DataError
            If groups are not one id per row.
        """
        check_is_fitted(self)
        codes = _codes(X, groups)
        views = {
            name: np.stack([self._rows(model, X) for model in models])
            for name, models in self.members_.items()
        }
        posteriors = {
            name: fold_posteriors(view, codes, self.quota, self.temperatures_[name])
            for name, view in views.items()
        }
        on_top = np.stack(
            [
                self._rows(
                    final,
                    stack_features(
                        {name: view[fold] for name, view in views.items()},
                        {name: view[fold] for name, view in posteriors.items()},
                        np.zeros((len(codes), 0)), (), codes,
                    ),
                )
                for fold, final in enumerate(self.final_)
            ]
        )  # fmt: skip
        finals = fold_posteriors(on_top, codes, self.quota, self.final_temperatures_)
        posterior: Floats = finals.mean(axis=0)
        return posterior

    def predict(self, X: Any, groups: ArrayLike) -> np.ndarray:
        """The likeliest label of each row, ``(n_rows,)``."""
        likeliest: np.ndarray = self.predict_proba(X, groups).argmax(axis=1)
        return np.take(self.classes_, likeliest)

    def score(self, X: Any, y: ArrayLike, groups: ArrayLike) -> float:
        """Accuracy of :meth:`predict` on labels ``(n_rows,)``."""
        return float(np.mean(self.predict(X, groups) == as_array(y, "y")))

    def _cross_fit(self, model: Any, X: Any, truth: np.ndarray) -> tuple[list[Any], CrossFit]:
        """A model per fold, and what each says of the fold that it did not see."""
        n_folds = int(self.folds_.max()) + 1
        oof, models = np.empty((len(truth), len(self.classes_))), []
        for fold in range(n_folds):
            rest, inside = np.flatnonzero(self.folds_ != fold), np.flatnonzero(self.folds_ == fold)
            models.append(clone(model).fit(_safe_indexing(X, rest), truth[rest]))
            oof[inside] = self._rows(models[-1], _safe_indexing(X, inside))
        return models, CrossFit(oof, np.zeros((n_folds, 0, len(self.classes_))))

    @staticmethod
    def _rows(model: Any, X: Any) -> Floats:
        rows: Floats = np.asarray(model.predict_proba(X), dtype=np.float64)
        return rows

    def _final(self) -> Any:
        if self.final is not None:
            return self.final
        from lightgbm import LGBMClassifier

        return LGBMClassifier(
            n_estimators=150, learning_rate=0.05, num_leaves=7, colsample_bytree=0.2, n_jobs=1, verbose=-1,
            random_state=self.random_state,
        )  # fmt: skip

    def _check_members(self) -> None:
        pairs = list(self.members)
        if not pairs or not all(isinstance(it, tuple) and len(it) == 2 for it in pairs):
            raise UsageError(
                'members must be pairs of a name and a classifier, [("name", classifier), …].'
            )
        names = [name for name, _ in pairs]
        for name, member in pairs:
            if names.count(name) > 1:
                raise UsageError(f"two members are called {name!r}. Give each a name of its own.")
            if not hasattr(member, "predict_proba"):
                raise UsageError(
                    f"the member {name!r} ({type(member).__name__}) gives no probabilities (predict_proba). "
                    "Wrap it in CalibratedClassifierCV."
                )


def _codes(X: Any, groups: ArrayLike) -> np.ndarray:
    """Number of each row's group."""
    ids = as_array(groups, "groups")
    if ids.shape != (_num_samples(X),):
        raise DataError(
            f"groups must be one id per row: their shape is {ids.shape} for {_num_samples(X)} rows."
        )
    codes: np.ndarray = np.unique(ids, return_inverse=True)[1]
    return codes
