"""Stacking of anybody's classifiers with groups: better than its members, and no label reaches a row it scores."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

from stackllm import DataError, GroupStack, UsageError, metrics, posterior

K = 3


def contest(n_groups, signal, seed):
    """Rows in groups of one row per class, each class in both of two halves of the columns a little."""
    draw = np.random.default_rng(seed)
    y = np.concatenate([draw.permutation(K) for _ in range(n_groups)])
    X = draw.normal(size=(len(y), 8))
    X[:, :K] += signal * np.eye(K)[y]
    X[:, 4 : 4 + K] += signal * np.eye(K)[y]
    return X, y, np.repeat(np.arange(n_groups), K)


class Half(LogisticRegression):
    """Sees half of the columns."""

    def __init__(self, first=0):
        super().__init__()
        self.first = first

    def fit(self, X, y, **more):
        return super().fit(X[:, self.first : self.first + 4], y, **more)

    def predict_proba(self, X):
        return super().predict_proba(X[:, self.first : self.first + 4])


MEMBERS = [("left", Half(0)), ("right", Half(4)), ("bell", GaussianNB())]


def test_it_is_better_than_each_member_with_its_posterior_and_than_rows_alone():
    X, y, groups = contest(150, 1.0, 0)
    new, truth, asked = contest(300, 1.0, 1)
    stack = GroupStack(MEMBERS, LogisticRegression(C=0.05, max_iter=500)).fit(X, y, groups=groups)
    ours = metrics.row_losses(stack.predict_proba(new, groups=asked), truth)
    for _, member in MEMBERS[:2]:  # the third sees all that there is
        theirs = posterior(clone(member).fit(X, y).predict_proba(new), asked)
        gain, error = metrics.mean_with_error(metrics.row_losses(theirs, truth) - ours, asked)
        assert gain > 2 * error, member
    alone = metrics.row_losses(stack.predict_proba(new, groups=np.arange(len(new))), truth)
    assert alone.mean() > ours.mean()
    inside = metrics.row_losses(stack.oof_, y)
    error = np.hypot(metrics.bootstrap_error(inside, groups), metrics.bootstrap_error(ours, asked))
    assert abs(inside.mean() - ours.mean()) < 3 * error  # what it says of itself is so


def test_no_member_knows_the_labels_of_the_fold_that_it_predicts():
    """One learns its rows by heart: with other labels in a fold it says of that fold what it said before."""
    X, y, groups = contest(40, 0.5, 2)
    members = [("heart", KNeighborsClassifier(1)), ("bell", GaussianNB())]
    final = LogisticRegression(C=0.01, max_iter=1000)
    stack = GroupStack(members, final, cv=4).fit(X, y, groups=groups)
    fold = np.flatnonzero(stack.folds_ == 1)
    other = y.copy()
    other[fold] = (y[fold] + 1) % K
    changed = GroupStack(members, final, cv=4).fit(X, other, groups=groups)
    rest = stack.folds_ != 1
    assert np.abs(changed.oof_[rest] - stack.oof_[rest]).max() > 1e-3
    for name, _ in members:
        of_fold = [it.members_[name][1].predict_proba(X[fold]) for it in (stack, changed)]
        np.testing.assert_array_equal(*of_fold)
    for group in np.unique(groups):
        assert len(np.unique(stack.folds_[groups == group])) == 1


def test_labels_keep_their_type_and_the_default_final_is_the_recipes():
    X, y, groups = contest(30, 2.0, 3)
    names = np.array(["llama", "mistral", "qwen"])[y]
    stack = GroupStack(MEMBERS[:2], cv=3).fit(X, names, groups=[f"q{g}" for g in groups])
    assert type(stack.final_[0]).__name__ == "LGBMClassifier"
    assert stack.score(X, names, groups=groups) > 0.8
    p = stack.predict_proba(X[:K], groups=["new"] * K)
    np.testing.assert_allclose(p.sum(axis=0), 1, atol=1e-6)  # each class once in a whole group
    np.testing.assert_allclose(p.sum(axis=1), 1)


def test_bad_calls_are_one_sentence():
    X, y, groups = contest(10, 1.0, 4)
    for members, said in (
        ([], "pairs of a name and a classifier"),
        ([GaussianNB()], "pairs of a name and a classifier"),
        ([MEMBERS[0], MEMBERS[0]], "two members are called 'left'"),
        ([("svm", LinearSVC())], "'svm' .LinearSVC. gives no probabilities"),
    ):
        with pytest.raises(UsageError, match=said):
            GroupStack(members).fit(X, y, groups=groups)
    stack = GroupStack(MEMBERS)
    with pytest.raises(DataError, match="one id per row"):
        stack.fit(X, y, groups=groups[:-1])
    with pytest.raises(DataError, match="y has 29 entries for 30 rows"):
        stack.fit(X, y[:-1], groups=groups)
    with pytest.raises(DataError, match="one label only"):
        stack.fit(X, np.zeros(30, int), groups=groups)
    with pytest.raises(DataError, match="10 groups cannot be split into 20 folds"):
        GroupStack(MEMBERS, cv=20).fit(X, y, groups=groups)
