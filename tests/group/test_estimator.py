from __future__ import annotations

import numpy as np
import pytest
import sklearn
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_validate
from sklearn.naive_bayes import GaussianNB
from sklearn.utils.estimator_checks import parametrize_with_checks

from stackllm import GroupPosterior
from stackllm.metrics import log_loss


@parametrize_with_checks(
    [GroupPosterior(), GroupPosterior(GaussianNB(), temperature=2.0)],
)
def test_scikit_learns_own_checks(estimator, check) -> None:
    check(estimator)


def grouped(n_groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.concatenate([rng.permutation(4) for _ in range(n_groups)])
    centres = np.random.default_rng(99).normal(size=(4, 3))
    return centres[y] + rng.normal(size=(len(y), 3)), y, np.repeat(np.arange(n_groups), 4)


def test_groups_make_a_classifier_better_and_labels_come_back_as_given() -> None:
    X, y, groups = grouped(150)
    X_new, y_new, new = grouped(100, seed=1)
    names = np.array(["d", "c", "b", "a"])
    model = GroupPosterior().fit(X, names[y], groups=groups)
    truth = np.searchsorted(model.classes_, names[y_new])
    alone = log_loss(model.predict_proba(X_new), truth)
    assert log_loss(model.predict_proba(X_new, groups=new), truth) < 0.8 * alone
    found = model.predict(X_new, groups=new)
    assert set(found) <= set(names)
    assert np.mean(found == names[y_new]) > np.mean(model.predict(X_new) == names[y_new])


def test_without_groups_it_is_the_classifier_itself() -> None:
    X, y, _ = grouped(50)
    plain = LogisticRegression().fit(X, y).predict_proba(X)
    assert GroupPosterior(temperature=1.0).fit(X, y).predict_proba(X) == pytest.approx(plain)


def test_groups_are_routed_through_cross_validation() -> None:
    X, y, groups = grouped(80)
    with sklearn.config_context(enable_metadata_routing=True):
        told = cross_validate(
            GroupPosterior(), X, y, cv=GroupKFold(4), params={"groups": groups}, error_score="raise"
        )
        scorer = sklearn.metrics.make_scorer(
            sklearn.metrics.log_loss, response_method="predict_proba", greater_is_better=False
        )
        assert (
            cross_validate(
                GroupPosterior(), X, y, cv=GroupKFold(4), params={"groups": groups}, scoring=scorer
            )["test_score"].mean()
            < 0
        )
    assert len(told["test_score"]) == 4


def test_a_group_list_of_another_length_is_refused() -> None:
    X, y, _ = grouped(5)
    with pytest.raises(ValueError, match="groups has 3 entries for 20 rows"):
        GroupPosterior().fit(X, y, groups=[1, 2, 3])


def test_a_quota_by_group_goes_by_the_ids_of_the_groups() -> None:
    X, y, groups = grouped(30)
    quota = {10 * g: [4, 0, 0, 0] if g == 7 else 1 for g in range(30)}
    model = GroupPosterior(temperature=1.0, quota=quota).fit(X, y, groups=10 * groups)
    found = model.predict(X[groups == 7], groups=np.full(4, 70))
    assert found.tolist() == [0] * 4
    with pytest.raises(ValueError, match="quota goes by group"):
        model.predict(X)
