from __future__ import annotations

import functools
import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stackllm import assign, optimise, posterior
from stackllm.errors import DataError, UsageError
from stackllm.group.lattice import _logarithmic, _logs, build
from stackllm.group.plan import Plan, count_states
from stackllm.group.tempering import Calibration


@functools.cache
def every_way(n_rows: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """All ways to give rows classes, ``(n_ways, n_rows)``, and how often each class stands in them."""
    ways = np.array(list(itertools.product(range(n_classes), repeat=n_rows)), dtype=np.uint8)
    counts = np.stack([(ways == j).sum(axis=1) for j in range(n_classes)], axis=1)
    return ways, counts


def brute_force(p: np.ndarray, quota: np.ndarray, exactly: np.ndarray) -> np.ndarray:
    """Marginals by going through every way to deal the rows out, all of them at once."""
    n_rows, n_classes = p.shape
    ways, counts = every_way(n_rows, n_classes)
    allowed = (counts <= quota).all(axis=1) & (counts == quota)[:, exactly].all(axis=1)
    ways = ways[allowed]
    weight = np.prod(p[np.arange(n_rows), ways], axis=1)
    total = np.stack([np.bincount(way, weight, n_classes) for way in ways.T])
    return total / weight.sum()


@st.composite
def groups_with_quotas(draw, max_rows: int = 8, max_classes: int = 5):
    n_classes = draw(st.integers(1, max_classes))
    quota = np.array(draw(st.lists(st.integers(0, 4), min_size=n_classes, max_size=n_classes)))
    assume(quota.sum() > 0)
    n_rows = draw(st.integers(1, min(max_rows, int(quota.sum()))))
    must = np.array(draw(st.lists(st.booleans(), min_size=n_classes, max_size=n_classes)))
    assume(quota[must].sum() <= n_rows)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    p = rng.dirichlet(np.full(n_classes, draw(st.sampled_from([0.1, 1.0, 10.0]))), n_rows)
    return np.maximum(p, 1e-9), quota, must


@given(groups_with_quotas())
@settings(max_examples=200, deadline=None)
def test_marginals_are_those_of_every_way_to_deal_the_rows_out(case) -> None:
    p, quota, must = case
    answer = posterior(p, np.zeros(len(p), int), quota, exactly=must)
    assert answer == pytest.approx(brute_force(p, quota, must), abs=1e-9)


@pytest.mark.parametrize("quota", [(1, 2, 2, 2, 1), (3, 0, 4, 1, 2), (8, 8, 8, 8, 8)])
def test_the_largest_size_that_brute_force_reaches(quota) -> None:
    p = np.random.default_rng(8).dirichlet(np.ones(5), 8)
    answer = posterior(p, np.zeros(8, int), quota)
    assert answer == pytest.approx(brute_force(p, np.array(quota), np.zeros(5, bool)), abs=1e-9)


@pytest.mark.slow
def test_every_quota_pattern_of_up_to_3_classes_and_6_rows() -> None:
    rng = np.random.default_rng(0)
    for quota in itertools.product(range(4), repeat=3):
        for n_rows in range(1, min(6, sum(quota)) + 1):
            p = rng.dirichlet(np.ones(3), n_rows)
            answer = posterior(p, np.zeros(n_rows, int), quota)
            expected = brute_force(p, np.array(quota), np.zeros(3, bool))
            assert answer == pytest.approx(expected, abs=1e-9), (quota, n_rows)


@given(groups_with_quotas(max_rows=6), st.floats(0.2, 5.0), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_temperature_and_bias_are_a_power_and_a_factor(case, temperature, seed) -> None:
    p, quota, must = case
    bias = np.random.default_rng(seed).normal(size=p.shape[1])
    answer = posterior(
        p, np.zeros(len(p), int), quota, exactly=must, temperature=temperature, bias=bias
    )
    expected = brute_force(p ** (1 / temperature) * np.exp(bias), quota, must)
    assert answer == pytest.approx(expected, abs=1e-9)


@given(groups_with_quotas(max_rows=6))
@settings(max_examples=60, deadline=None)
def test_arithmetic_in_logs_gives_the_same(case) -> None:
    p, quota, must = case
    lattice = build(len(p), tuple(np.minimum(quota, len(p)).tolist()), tuple(must.tolist()))
    logs = _logs(p[:, :, None], Calibration())
    answer = _logarithmic(lattice, logs)[:, :, 0]
    answer /= answer.sum(axis=1, keepdims=True)
    assert answer == pytest.approx(brute_force(p, quota, must), abs=1e-9)


@given(groups_with_quotas(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_rows_and_classes_permuted_permute_the_answer(case, random) -> None:
    p, quota, must = case
    rows, classes = list(range(len(p))), list(range(p.shape[1]))
    random.shuffle(rows)
    random.shuffle(classes)
    groups = np.zeros(len(p), int)
    answer = posterior(p, groups, quota, exactly=must)
    moved = posterior(p[rows][:, classes], groups, quota[classes], exactly=must[classes])
    assert moved == pytest.approx(answer[rows][:, classes], abs=1e-12)


@given(groups_with_quotas())
@settings(max_examples=100, deadline=None)
def test_as_temperature_goes_to_zero_the_likeliest_assignment_is_left(case) -> None:
    p, quota, must = case
    groups = np.zeros(len(p), int)
    best = assign(p, groups, quota, exactly=must)
    cold = posterior(p, groups, quota, exactly=must, temperature=1e-4)
    given_ = cold[np.arange(len(p)), best]
    gap = np.sort(cold, axis=1)
    certain = gap[:, -1] > 0.999  # a tie between two assignments leaves a row undecided
    assert given_[certain] == pytest.approx(1, abs=1e-3)


@given(groups_with_quotas())
@settings(max_examples=60, deadline=None)
def test_columns_never_exceed_their_quota_and_fill_it_where_they_must(case) -> None:
    p, quota, must = case
    filled = posterior(p, np.zeros(len(p), int), quota, exactly=must).sum(axis=0)
    assert (filled <= quota + 1e-9).all()
    assert filled[must] == pytest.approx(quota[must], abs=1e-9)


EXTREMES = {
    "two rows sure of the same class": ([[1, 0], [1, 0]], [[0.5, 0.5], [0.5, 0.5]]),
    "the surer of two sure rows": ([[1, 1e-300], [1, 1e-20]], [[1, 0], [0, 1]]),
    "certainties that agree": ([[1, 0], [0, 1]], [[1, 0], [0, 1]]),
    "one certainty decides the rest": ([[0.5, 0.5], [0, 1]], [[1, 0], [0, 1]]),
    "a smallest double": ([[1, 5e-324], [0.5, 0.5]], [[1, 0], [0, 1]]),
    "three sure rows, one place": (
        [[1, 0, 0], [1, 0, 0], [1, 0, 0]],
        [[1 / 3, 1 / 3, 1 / 3]] * 3,
    ),
}


@pytest.mark.parametrize(("p", "expected"), EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("temperature", [1.0, 0.05, 20.0])
def test_certainties_even_contradictory_ones_give_sensible_numbers(
    p, expected, temperature
) -> None:
    answer = posterior(p, [0] * len(p), temperature=temperature)
    assert np.isfinite(answer).all()
    assert answer.sum(axis=1) == pytest.approx(1, abs=1e-12)
    if temperature == 1.0:
        assert answer == pytest.approx(np.array(expected), abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_zeros_and_tiny_values_among_others_are_exact_where_a_clean_assignment_exists(
    seed, n_rows
) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(n_rows), n_rows)
    p[rng.random(p.shape) < 0.4] = 0
    p[rng.random(p.shape) < 0.2] = 1e-300
    p[np.arange(n_rows), rng.permutation(n_rows)] += 0.1
    p /= p.sum(axis=1, keepdims=True)
    answer = posterior(p, np.zeros(n_rows, int))
    if n_rows <= 6:
        expected = brute_force(p, np.ones(n_rows, int), np.zeros(n_rows, bool))
        assert answer == pytest.approx(expected, abs=1e-9)
    assert answer.sum(axis=0) == pytest.approx(1, abs=1e-9)


def test_groups_of_all_sizes_in_one_file_are_answered_as_if_each_stood_alone() -> None:
    rng = np.random.default_rng(3)
    groups = rng.integers(0, 40, 200)
    p = rng.dirichlet(np.ones(5), 200)
    together = posterior(p, groups, 2)
    for group in np.unique(groups):
        rows = groups == group
        assert together[rows] == pytest.approx(posterior(p[rows], groups[rows], 2), abs=1e-12)


def test_many_groups_in_threads_are_answered_as_few_are() -> None:
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(7), 7 * 9000)
    groups = np.repeat(np.arange(9000), 7)
    whole = posterior(p, groups)
    parts = [posterior(p[i : i + 7000], groups[i : i + 7000]) for i in range(0, len(p), 7000)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_a_group_with_more_rows_than_places_keeps_its_tempered_rows() -> None:
    p = np.array([[0.8, 0.2], [0.6, 0.4], [0.9, 0.1]])
    answer = posterior(p, ["q"] * 3, temperature=2.0)
    root = np.sqrt(p)
    assert answer == pytest.approx(root / root.sum(axis=1, keepdims=True))
    (batch,) = Plan.of(["q"] * 3, 2).batches
    assert (batch.how, batch.reason) == ("rows", "3 rows for 2 places")


def test_a_row_alone_keeps_its_probabilities() -> None:
    p = np.array([[0.7, 0.2, 0.1]])
    assert posterior(p, ["q"]) == pytest.approx(p)
    assert posterior(p, ["q"], [1, 0, 1]) == pytest.approx(np.array([[0.875, 0, 0.125]]))


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_part_of_a_plan_is_the_plan_of_that_part(seed, n_rows, by_group) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 9, n_rows)
    quota = {g: rng.integers(0, 4, 3) for g in range(9)} if by_group else 2
    plan = Plan.of(groups, 3, quota, exactly=[True, False, False])
    rows = np.isin(groups, rng.integers(0, 9, 4))
    expected = Plan.of(groups[rows], 3, quota, exactly=[True, False, False])
    part = plan.part(rows)
    assert (part.n_groups, part.n_classes, part.is_full) == (
        len(np.unique(groups[rows])),
        3,
        expected.is_full,
    )
    assert part.alone.tolist() == expected.alone.tolist()
    for one, other in zip(part.batches, expected.batches, strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert (one.quota, one.exactly, one.how) == (other.quota, other.exactly, other.how)
    assert np.array_equal(np.unique(part.codes, return_inverse=True)[1], expected.codes)


def test_a_part_of_a_plan_holds_whole_groups() -> None:
    with pytest.raises(UsageError, match="whole groups"):
        Plan.of(["a", "b", "a"], 2).part(np.array([True, True, False]))


def test_quotas_by_group_and_ids_of_any_kind() -> None:
    p = np.array([[0.7, 0.3], [0.6, 0.4], [0.7, 0.3], [0.6, 0.4]])
    answer = posterior(p, ["a", "a", "b", "b"], {"a": 1, "b": [2, 0]})
    assert answer[2:] == pytest.approx(np.array([[1, 0], [1, 0]]))
    assert answer[:2] == pytest.approx(posterior(p[:2], [7, 7]))


def test_exact_only_where_it_can_be_and_named_otherwise() -> None:
    assert count_states(18, (1,) * 18) == 2**18
    sizes = {n: Plan.of(np.zeros(n, int), n).batches[0].how for n in (18, 19)}
    assert sizes == {18: "exact", 19: "bethe"}


@pytest.mark.parametrize(
    ("n_classes", "places", "confidence", "temperatures"),
    [
        (7, 1, 1.0, (1.0, 0.8, 0.6, 0.5)),
        (12, 1, 1.0, (1.0, 0.8, 0.6, 0.5)),
        (12, 1, 2.0, (1.0, 0.8, 0.6, 0.5)),
        (4, 3, 2.0, (1.0, 0.8, 0.6, 0.5)),
        (3, 8, 1.0, (1.0, 0.8, 0.6, 0.5)),
        (7, 1, 3.0, (1.0,)),  # of few very confident rows a Sinkhorn tuned to them is as good
        (3, 8, 3.0, (1.0,)),
    ],
)
def test_belief_propagation_is_nearer_to_the_exact_marginals_than_sinkhorn(
    n_classes, places, confidence, temperatures
) -> None:
    rng = np.random.default_rng(places)
    labels = np.tile(np.repeat(np.arange(n_classes), places), 12)
    scores = rng.normal(size=(len(labels), n_classes))
    scores[np.arange(len(labels)), labels] += confidence
    p = np.exp(confidence * scores)
    groups = np.repeat(np.arange(12), n_classes * places)
    exact = posterior(p, groups, places)
    near = np.abs(posterior(p, groups, places, max_states=0) - exact).mean()
    tempered = [optimise(p, groups, places, method="sinkhorn", temperature=t) for t in temperatures]
    assert near < 0.015
    assert near < min(np.abs(balanced - exact).mean() for balanced in tempered)


@pytest.mark.parametrize("exactly", [False, True])
def test_belief_propagation_is_exact_for_one_row_and_finite_for_contradictions(exactly) -> None:
    p = np.array([[0.7, 0.2, 0.1]])
    assert posterior(p, [0], 1, max_states=0) == pytest.approx(p)
    sure = np.eye(30)[np.zeros(30, int)]
    answer = posterior(sure, np.zeros(30, int), exactly=exactly)
    assert np.isfinite(answer).all()
    assert answer.sum(axis=1) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("p", "groups", "said"),
    [
        ([[np.nan, 1]], [0], r"first: row 0, counted from 0: \[nan, 1.0\]"),
        ([[0.5, 0.5], [np.inf, 0]], [0, 0], "first: row 1"),
        ([[-0.1, 1.1]], [0], "not negative"),
        ([[0.0, 0.0]], [0], "not all zero"),
        ([[0.5, 0.5]], [0, 1], r"\(1, 2\) and \(2,\)"),
        ([0.5, 0.5], [0, 1], "n_rows, n_classes"),
        ([[0.5, 0.5]] * 2, ["a", None], "groups is None in row 1"),
        ([[0.5, 0.5]] * 2, [1.0, np.nan], "groups is nan in row 1"),
        ([[0.5, 0.5]] * 2, np.array([np.nan, np.nan], object), "groups is nan in row 0"),
        ([[0.5, 0.5]] * 2, np.array(["a", 1], object), "they are int, str"),
    ],
)
def test_unusable_probabilities_are_refused(p, groups, said) -> None:
    with pytest.raises(DataError, match=said):
        posterior(p, groups)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quota": -1}, "whole numbers of 0 or more"),
        ({"quota": 1.5}, "whole numbers of 0 or more"),
        ({"quota": [1, 1, 1]}, r"one per class \(2\)"),
        ({"temperature": 0.0}, "temperature must be between"),
        ({"temperature": float("nan")}, "temperature must be between"),
        ({"bias": [1.0]}, "bias must be 2 finite numbers"),
        ({"exactly": [True]}, "exactly must be True, False"),
    ],
)
def test_options_without_sense_are_refused(options, said) -> None:
    with pytest.raises(UsageError, match=said):
        posterior([[0.5, 0.5]], [0], **options)


def test_a_quota_mapping_must_name_every_group() -> None:
    with pytest.raises(DataError, match="no places for 1 of 2 groups \\(first: 'b'\\)"):
        posterior([[0.5, 0.5]] * 2, ["a", "b"], {"a": 1})


@pytest.mark.parametrize("n", [8, 14])
def test_belief_propagation_splits_what_several_rows_are_sure_of(n) -> None:
    sure = np.arange(n)
    sure[:5] = [0, 0, 2, 2, 2]
    p = np.eye(n)[sure]
    answer = posterior(p, np.zeros(n, int), max_states=0)
    assert np.abs(answer - posterior(p, np.zeros(n, int))).max() < 0.05


def test_belief_propagation_with_many_places_is_fast_enough() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(7), 210)
    start = time.process_time()
    posterior(p, np.zeros(210, int), 30)
    assert time.process_time() - start < 4  # it was 11 s


def test_groups_in_a_small_type_and_things_that_are_no_numbers() -> None:
    groups = np.repeat(np.arange(-100, 50, dtype=np.int8), 2)
    p = np.random.default_rng(0).dirichlet(np.ones(2), 300)
    assert np.array_equal(posterior(p, groups), posterior(p, groups.astype(int)))
    assert posterior(p[:1], [2**63]) == pytest.approx(p[:1])
    with pytest.raises(DataError, match="probabilities must be numbers"):
        posterior([["x", "y"]], [0])
    with pytest.raises(DataError, match="equally long"):
        posterior([[0.5, 0.5], [1.0]], [0, 0])
    with pytest.raises(UsageError, match="temperature must be between"):
        posterior(p[:1], [0], temperature=None)
