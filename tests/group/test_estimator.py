from __future__ import annotations

import warnings

import numpy as np
import polars as pl
import pytest
import scipy.sparse
import sklearn
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    PredefinedSplit,
    cross_val_predict,
    cross_val_score,
    cross_validate,
)
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from stackllm import GroupPosterior, posterior
from stackllm.crossfit.folds import inner_folds
from stackllm.errors import DataError, UsageError
from stackllm.group.calibration import fit_temperature
from stackllm.group.tempering import Calibration, tempered
from stackllm.metrics import log_loss

ALONE = "ignore:GroupPosterior (got no|was fitted with) groups:UserWarning"
NAMES = np.array(["d", "c", "b", "a"])


# All of scikit-learn's checks apply; it skips by itself what needs SCIPY_ARRAY_API or pandas. None of
# them passes groups, so all of them meet the warning.
@pytest.mark.filterwarnings(ALONE)
@parametrize_with_checks([GroupPosterior(), GroupPosterior(GaussianNB(), temperature=2.0)])
def test_scikit_learns_own_checks(estimator, check) -> None:
    check(estimator)


def grouped(n_groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, class numbers and groups; each group holds each of four classes once."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([rng.permutation(4) for _ in range(n_groups)])
    centres = np.random.default_rng(99).normal(size=(4, 3))
    return centres[y] + rng.normal(size=(len(y), 3)), y, np.repeat(np.arange(n_groups), 4)


def expected(X, y, groups, X_new, new, quota=1) -> np.ndarray:
    """What GroupPosterior of a logistic regression must answer, put together by hand."""
    folds = PredefinedSplit(
        inner_folds(np.unique(groups, return_inverse=True)[1].astype(str), 5, 0)
    )
    oof = cross_val_predict(LogisticRegression(), X, y, cv=folds, method="predict_proba")
    rows = LogisticRegression().fit(X, y).predict_proba(X_new)
    if new is None:
        return tempered(rows, Calibration(fit_temperature(oof, np.arange(len(y)), y)))
    return posterior(rows, new, quota, temperature=fit_temperature(oof, groups, y, quota))


def by_hand(X, y, groups, cv=4) -> np.ndarray:
    """The same for each fold of a cross-validation by groups."""
    answer = np.empty((len(y), 4))
    for rest, inside in GroupKFold(cv).split(X, y, groups):
        answer[inside] = expected(X[rest], y[rest], groups[rest], X[inside], groups[inside])
    return answer


def test_it_is_the_posterior_of_a_classifier_at_the_temperature_of_its_oof() -> None:
    X, y, groups = grouped(60)
    X_new, _, new = grouped(20, seed=1)
    model = GroupPosterior().fit(X, NAMES[y], groups=groups)
    order = np.argsort(NAMES)
    right = expected(X, np.argsort(order)[y], groups, X_new, new)
    assert model.predict_proba(X_new, groups=new) == pytest.approx(right, abs=1e-6)
    assert model.predict_log_proba(X_new, groups=new) == pytest.approx(np.log(right), abs=1e-4)
    assert model.predict(X_new, groups=new).tolist() == np.sort(NAMES)[right.argmax(1)].tolist()
    assert model.classes_.tolist() == ["a", "b", "c", "d"]


def test_groups_make_a_classifier_better() -> None:
    X, y, groups = grouped(150)
    X_new, y_new, new = grouped(100, seed=1)
    model = GroupPosterior().fit(X, y, groups=groups)
    with pytest.warns(UserWarning, match="asked without"):
        alone = model.predict_proba(X_new)
    assert log_loss(model.predict_proba(X_new, groups=new), y_new) < 0.8 * log_loss(alone, y_new)
    accuracy = np.mean(model.predict(X_new, groups=new) == y_new)
    assert accuracy > np.mean(alone.argmax(axis=1) == y_new)
    assert model.score(X_new, y_new, groups=new) == accuracy
    weight = np.arange(len(y_new))
    right = model.predict(X_new, groups=new) == y_new
    assert model.score(X_new, y_new, weight, groups=new) == pytest.approx(
        np.average(right, weights=weight)
    )


def test_asked_without_groups_it_is_the_row_calibrated_classifier_and_says_so() -> None:
    X, y, groups = grouped(60)
    X_new, _, _ = grouped(20, seed=1)
    quota = dict.fromkeys(range(60), 1)
    model = GroupPosterior(LogisticRegression(C=100), quota=quota).fit(X, y, groups=groups)
    assert model.row_temperature_ != model.temperature_
    with pytest.warns(UserWarning, match=r"asked without.*group_column="):
        answer = model.predict_proba(X_new)
    plain = LogisticRegression(C=100).fit(X, y).predict_proba(X_new)
    calibrated = tempered(plain, Calibration(model.row_temperature_))
    assert answer == pytest.approx(calibrated, abs=1e-12)
    folds = PredefinedSplit(inner_folds(groups.astype(str), 5, 0))
    oof = cross_val_predict(LogisticRegression(C=100), X, y, cv=folds, method="predict_proba")
    assert model.row_temperature_ == pytest.approx(fit_temperature(oof, np.arange(len(y)), y))


def test_fitted_without_groups_it_says_so_and_still_takes_them_later() -> None:
    X, y, groups = grouped(50)
    plain = LogisticRegression().fit(X, y).predict_proba(X)
    with pytest.warns(UserWarning, match=r"no groups to fit with.*group_column="):
        model = GroupPosterior(temperature=1.0).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.predict_proba(X) == pytest.approx(plain)
        assert model.predict_proba(X, groups=groups) == pytest.approx(posterior(plain, groups))
    with pytest.warns(UserWarning, match="no groups to fit with"):
        cross_val_predict(GroupPosterior(), X, y, groups=groups, cv=GroupKFold(5))


@pytest.mark.parametrize("kind", ["array", "frame", "sparse"])
def test_a_column_of_groups_reaches_every_tool_of_scikit_learn(kind) -> None:
    X, y, groups = grouped(60)
    with_groups = np.column_stack([X[:, :1], groups, X[:, 1:]])
    column: int | str = 1
    if kind == "frame":
        with_groups, column = (
            pl.DataFrame(with_groups, schema=["a", "question", "b", "c"]),
            "question",
        )
    elif kind == "sparse":
        with_groups = scipy.sparse.csr_array(with_groups)
    model = GroupPosterior(group_column=column)
    cv = list(GroupKFold(4).split(X, y, groups))
    right = by_hand(X, y, groups)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        answer = cross_val_predict(model, with_groups, y, cv=cv, method="predict_proba")
        scores = cross_val_score(model, with_groups, y, cv=cv, scoring="neg_log_loss")
        shares = cross_val_score(model, with_groups, y, cv=cv)
        search = GridSearchCV(
            GroupPosterior(LogisticRegression(), group_column=column),
            {"estimator__C": [1e-6, 1.0], "quota": [1, 2]},
            scoring="neg_log_loss",
            cv=cv,
        ).fit(with_groups, y)
    assert answer == pytest.approx(right, abs=1e-6)
    assert scores == pytest.approx([-log_loss(right[rows], y[rows]) for _, rows in cv], abs=1e-6)
    assert shares == pytest.approx([np.mean(right[r].argmax(1) == y[r]) for _, r in cv])
    assert search.best_params_ == {"estimator__C": 1.0, "quota": 1}
    assert search.best_score_ == pytest.approx(scores.mean(), abs=1e-6)
    fitted = clone(model).fit(with_groups, y)
    assert fitted.n_features_in_ == 3
    if kind == "frame":
        assert fitted.feature_names_in_.tolist() == ["a", "b", "c"]
    else:
        assert not hasattr(fitted, "feature_names_in_")


def test_groups_are_routed_to_every_method_even_inside_a_pipeline() -> None:
    X, y, groups = grouped(60)
    X_new, y_new, new = grouped(20, seed=1)
    scaled = StandardScaler().fit(X)
    right = expected(scaled.transform(X), y, groups, scaled.transform(X_new), new)
    pipe = make_pipeline(StandardScaler(), GroupPosterior())
    with sklearn.config_context(enable_metadata_routing=True), warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        pipe.fit(X, NAMES[::-1][y], groups=groups)
        assert pipe.predict_proba(X_new, groups=new) == pytest.approx(right, abs=1e-6)
        assert pipe.predict_log_proba(X_new, groups=new) == pytest.approx(np.log(right), abs=1e-4)
        best = right.argmax(axis=1)
        assert pipe.predict(X_new, groups=new).tolist() == NAMES[::-1][best].tolist()
        assert pipe.score(X_new, NAMES[::-1][y_new], groups=new) == np.mean(best == y_new)


def test_groups_are_routed_through_cross_validation_and_searches() -> None:
    X, y, groups = grouped(60)
    right = by_hand(X, y, groups)
    accuracy = [
        np.mean(right[rows].argmax(axis=1) == y[rows])
        for _, rows in GroupKFold(4).split(X, y, groups)
    ]
    with sklearn.config_context(enable_metadata_routing=True), warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        told = cross_validate(
            GroupPosterior(), X, y, cv=GroupKFold(4), params={"groups": groups}, error_score="raise"
        )
        search = GridSearchCV(
            GroupPosterior(LogisticRegression()), {"estimator__C": [1e-9, 1.0]}, cv=GroupKFold(4)
        ).fit(X, y, groups=groups)
        nested = GroupPosterior(
            GridSearchCV(LogisticRegression(), {"C": [1e-9, 1.0]}, cv=GroupKFold(3)),
            temperature=1.0,
        ).fit(X, y, groups=groups)
    assert told["test_score"] == pytest.approx(accuracy)
    assert search.best_params_ == {"estimator__C": 1.0}
    assert search.best_score_ == pytest.approx(np.mean(accuracy))
    assert nested.estimator_.best_params_ == {"C": 1.0}


@pytest.mark.parametrize("routing", [False, True])
def test_other_metadata_goes_to_the_classifier_inside(routing) -> None:
    X, y, groups = grouped(30)
    weight = np.where(groups < 15, 1.0, 0.0)
    inner = LogisticRegression()
    with sklearn.config_context(enable_metadata_routing=routing):
        if routing:
            inner.set_fit_request(sample_weight=True)
        model = GroupPosterior(inner, cv=30).fit(X, y, groups=groups, sample_weight=weight)
        half = LogisticRegression().fit(X[:60], y[:60])
    assert model.estimator_.coef_ == pytest.approx(half.coef_, abs=1e-3)


def test_what_x_is_is_left_to_the_classifier_inside() -> None:
    rng = np.random.default_rng(0)
    words = {"x": "delve crucial", "y": "sure hey", "z": "hence therefore"}
    labels, groups = np.tile(list(words), 30), np.repeat(np.arange(30), 3)
    texts = [" ".join(rng.choice((words[name] + " of to the and").split(), 4)) for name in labels]
    pipe = make_pipeline(TfidfVectorizer(), LogisticRegression())
    model = GroupPosterior(pipe).fit(texts, labels, groups=groups)
    right = posterior(
        clone(pipe).fit(texts, labels).predict_proba(texts),
        groups,
        temperature=model.temperature_,
    )
    assert model.predict_proba(texts, groups=groups) == pytest.approx(right)
    assert not hasattr(model, "n_features_in_")

    frame = pl.DataFrame({"text": texts, "length": [len(text) for text in texts], "q": groups})
    by_name = make_pipeline(
        make_column_transformer((TfidfVectorizer(), "text"), remainder="drop"), LogisticRegression()
    )
    model = GroupPosterior(by_name, group_column="q").fit(frame, pl.Series(labels))
    assert model.predict_proba(frame) == pytest.approx(right, abs=1e-9)
    assert model.feature_names_in_.tolist() == ["text", "length"]
    inside_out = CalibratedClassifierCV(GroupPosterior(by_name, group_column="q"), cv=3)
    assert inside_out.fit(frame, labels).predict(frame[:3]).shape == (3,)


@pytest.mark.parametrize("kind", ["frame", "series"])
def test_pandas_frames_too(kind) -> None:
    pd = pytest.importorskip("pandas")
    X, y, groups = grouped(30)
    frame = pd.DataFrame(X, columns=["a", "b", "c"], index=np.arange(len(y))[::-1])
    right = GroupPosterior().fit(X, y, groups=groups).predict_proba(X, groups=groups)
    if kind == "series":
        model = GroupPosterior().fit(frame, pd.Series(y), groups=pd.Series(groups))
        answer = model.predict_proba(frame, groups=pd.Series(groups))
    else:
        frame["q"] = groups
        answer = GroupPosterior(group_column="q").fit(frame, y).predict_proba(frame)
    assert answer == pytest.approx(right)


def test_a_quota_by_group_goes_by_the_ids_of_the_groups() -> None:
    X, y, groups = grouped(30)
    quota = {f"q{g}": [4, 0, 0, 0] if g == 7 else 1 for g in range(30)}
    ids = np.array([f"q{g}" for g in groups])
    model = GroupPosterior(quota=quota).fit(X, y, groups=ids)
    assert model.predict(X[groups == 7], groups=["q7"] * 4).tolist() == [0] * 4
    assert model.predict(X[groups < 2], groups=ids[groups < 2]).shape == (8,)
    with pytest.raises(DataError, match="no places for 1 of 1 groups \\(first: 'new'\\)"):
        model.predict(X[:2], groups=["new", "new"])


@pytest.mark.parametrize(
    ("options", "groups", "said"),
    [
        ({}, [1, 2, 3], "groups has 3 entries for 20 rows"),
        ({}, [[1], [1, 2]], "equally long"),
        ({}, [None] * 20, "groups is None in row 0"),
        ({"quota": -1}, [0] * 20, "whole numbers of 0 or more"),
        ({"quota": {0: 1}}, [1] * 20, "no places for 1 of 1 groups"),
        ({"temperature": -1.0}, [0] * 20, "temperature must be between"),
        ({"group_column": "question"}, None, "'question', and X has no such column"),
        ({"group_column": 3}, None, r"3, and X has no such column. It has: \[0, 1, 2\]"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_fitted(options, groups, said) -> None:
    X, y, _ = grouped(5)

    class Never(LogisticRegression):
        def fit(self, X, y, sample_weight=None):
            raise AssertionError("fitted")

    with pytest.raises((DataError, UsageError), match=said):
        GroupPosterior(Never(), **options).fit(X, y, groups=groups)


@pytest.mark.parametrize("inner", [LinearSVC(), make_pipeline(StandardScaler(), LinearSVC())])
def test_a_classifier_without_probabilities_is_sent_to_one_that_gives_them(inner) -> None:
    X, y, groups = grouped(20)
    with pytest.raises(UsageError, match=r"no probabilities.*CalibratedClassifierCV"):
        GroupPosterior(inner).fit(X, y, groups=groups)
    model = GroupPosterior(CalibratedClassifierCV(inner)).fit(X, y, groups=groups)
    assert model.predict_proba(X, groups=groups).shape == (80, 4)
