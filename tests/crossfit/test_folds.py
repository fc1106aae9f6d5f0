import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.crossfit.folds import check_folds, group_folds
from stackllm.errors import DataError, UsageError

sizes = st.lists(st.integers(1, 9), min_size=5, max_size=60)


@given(sizes, st.integers(2, 5), st.integers(0, 3))
def test_groups_stay_whole_and_folds_are_balanced(sizes, n_folds, seed):
    groups = np.repeat([f"g{i}" for i in range(len(sizes))], sizes)
    folds = group_folds(groups, n_folds, seed)
    assert len(set(zip(groups, folds, strict=True))) == len(sizes)
    loads = np.bincount(folds, minlength=n_folds)
    assert loads.min() > 0
    assert loads.max() - loads.min() <= max(sizes)


@given(sizes, st.integers(0, 3), st.randoms())
def test_folds_do_not_depend_on_row_order(sizes, seed, random):
    groups = np.repeat([f"g{i}" for i in range(len(sizes))], sizes)
    order = list(range(len(groups)))
    random.shuffle(order)
    assert (group_folds(groups[order], 3, seed) == group_folds(groups, 3, seed)[order]).all()


def test_seeds_give_other_folds():
    groups = np.repeat(np.arange(50).astype(str), 3)
    assert (group_folds(groups, 5, 0) != group_folds(groups, 5, 1)).any()


def test_too_few_groups_or_folds_are_refused():
    with pytest.raises(DataError, match="2 groups cannot be split into 3 folds"):
        group_folds(np.array(["a", "b"]), 3, 0)
    with pytest.raises(UsageError, match="n_folds must be 2 or more, not 1"):
        group_folds(np.array(["a", "b"]), 1, 0)


def test_checks_are_loud():
    groups = np.array(["a", "a", "b", "b"])
    with pytest.raises(DataError, match="a group stands in two folds"):
        check_folds(np.array([0, 1, 1, 1]), groups, np.array([0, 1, 0, 1]), 2)
    with pytest.raises(DataError, match="class number 1 stands in fold 1 only"):
        check_folds(np.array([0, 0, 1, 1]), groups, np.array([0, 0, 0, 1]), 2)
