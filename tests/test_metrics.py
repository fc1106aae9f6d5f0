from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as oracle

from stackllm import metrics
from stackllm.errors import DataError


def scored(seed: int, n_rows: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(n_classes), n_rows), rng.integers(0, n_classes, n_rows)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 6))
def test_log_loss_and_accuracy_equal_scikit_learns(seed: int, n_rows: int, n_classes: int) -> None:
    p, y = scored(seed, n_rows, n_classes)
    classes = list(range(n_classes))
    assert metrics.log_loss(p, y) == pytest.approx(oracle.log_loss(y, p, labels=classes))
    assert metrics.accuracy(p, y) == pytest.approx(oracle.accuracy_score(y, p.argmax(axis=1)))
    assert metrics.row_losses(p, y).mean() == pytest.approx(metrics.log_loss(p, y))


def test_certain_and_wrong_costs_the_clip_and_no_more() -> None:
    p = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert metrics.row_losses(p, [1, 0]).tolist() == pytest.approx([-np.log(1e-15), 0.0])


@given(st.integers(0, 2**32 - 1), st.integers(4, 60), st.booleans())
def test_auc_is_the_macro_average_of_scikit_learns_one_versus_rest(
    seed: int, n_rows: int, rounded: bool
) -> None:
    p, y = scored(seed, n_rows, 4)
    if rounded:
        p = p.round(1)
    each = [oracle.roc_auc_score(y == c, p[:, c]) for c in range(4) if 0 < np.sum(y == c) < n_rows]
    assert metrics.auc(p, y) == pytest.approx(np.mean(each)) if each else True


def test_auc_skips_classes_that_do_not_occur_and_is_nan_when_none_is_left() -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])
    assert metrics.auc(p, [0, 1]) == 1.0
    assert np.isnan(metrics.auc(p, [1, 1]))


def test_a_group_is_exact_only_if_all_its_rows_are() -> None:
    groups = np.array(["b", "a", "b", "a", "c"])
    assert metrics.group_exact_accuracy([0, 1, 2, 0, 1], [0, 1, 2, 1, 1], groups) == 2 / 3


def test_bootstrap_error_matches_the_textbook_error_of_a_mean_of_group_means() -> None:
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(400), 5)
    values = rng.normal(size=400)[groups] + rng.normal(size=2000)
    means = values.reshape(400, 5).mean(axis=1)
    expected = means.std(ddof=1) / np.sqrt(400)
    assert metrics.bootstrap_error(values, groups, n_boot=4000) == pytest.approx(expected, rel=0.06)


def test_bootstrap_error_of_rows_that_move_together_is_larger_than_that_of_single_rows() -> None:
    rng = np.random.default_rng(6)
    values = np.repeat(rng.normal(size=100), 7)
    groups = np.repeat(np.arange(100), 7)
    apart = metrics.bootstrap_error(values, np.arange(700))
    together = metrics.bootstrap_error(values, groups)
    assert together > 2 * apart


def test_bootstrap_error_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(7)
    values, groups = rng.normal(size=60), np.repeat(np.arange(12), 5)
    shuffled = rng.permutation(60)
    assert metrics.bootstrap_error(values, groups, seed=3) == pytest.approx(
        metrics.bootstrap_error(values[shuffled], groups[shuffled], seed=3)
    )
    assert metrics.bootstrap_error(values, groups, 3) != metrics.bootstrap_error(values, groups, 4)
    assert np.isnan(metrics.bootstrap_error(values, np.zeros(60)))


@pytest.mark.parametrize(
    ("labels", "said"),
    [([0, 2], "from 0 to 1"), ([0, -1], "from 0 to 1"), ([0.0, 1.0], "float64"), ([0], "shapes")],
)
def test_labels_that_are_no_columns_are_refused(labels: list[float], said: str) -> None:
    with pytest.raises(DataError, match=said):
        metrics.log_loss([[0.5, 0.5], [0.5, 0.5]], labels)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: metrics.log_loss([[0.5, 0.5]], ["a"]), "labels must be whole numbers"),
        (lambda: metrics.accuracy([["x", "y"]], [0]), "probabilities must be numbers"),
        (lambda: metrics.auc([[0.5, 0.5], [1.0]], [0, 1]), "rows are equally long"),
        (lambda: metrics.bootstrap_error([1.0, 2.0], ["a", None]), "groups is None in row 1"),
        (lambda: metrics.bootstrap_error(["x", "y"], [0, 1]), "values must be numbers"),
        (lambda: metrics.group_exact_accuracy([0, 1], [0, 1], [0.0, np.nan]), "nan in row 1"),
    ],
)
def test_what_is_no_number_or_no_id_is_refused(call, said: str) -> None:
    with pytest.raises(DataError, match=said):
        call()


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(DataError, match=r"shapes are \(2,\) and \(1,\)"):
        metrics.bootstrap_error([1.0, 2.0], ["a"])
    with pytest.raises(DataError, match="equally long"):
        metrics.group_exact_accuracy([1], [1, 1], [0])
