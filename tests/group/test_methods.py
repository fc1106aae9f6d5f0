from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackllm import assign, optimise, posterior
from stackllm.errors import UsageError
from stackllm.group.blend import BlendParams
from stackllm.group.calibration import fit_temperature
from stackllm.group.fitting import choose_method, fit_method
from stackllm.group.optimise import METHODS, Method
from stackllm.group.tempering import Calibration
from stackllm.metrics import log_loss


def predictions(n_groups: int, n_classes: int = 5, sharpness: float = 1.0, seed: int = 0):
    """Calibrated probabilities (at sharpness 1) of groups that hold each class once."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([rng.permutation(n_classes) for _ in range(n_groups)])
    logits = rng.normal(size=(len(labels), n_classes))
    logits[np.arange(len(labels)), labels] += 2.0
    p = np.exp(2.0 * sharpness * logits)  # 2 x: the likelihood ratio of unit normals 2 apart
    return p / p.sum(axis=1, keepdims=True), np.repeat(np.arange(n_groups), n_classes), labels


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_assignment_is_the_likeliest_of_all(seed, places, n_rows) -> None:
    rng = np.random.default_rng(seed)
    n_classes = 3
    n_rows = min(n_rows, places * n_classes)
    p = rng.dirichlet(np.ones(n_classes), n_rows)
    answer = assign(p, np.zeros(n_rows, int), places)
    rows = np.arange(n_rows)
    allowed = [
        np.prod(p[rows, list(a)])
        for a in itertools.product(range(n_classes), repeat=n_rows)
        if max(np.bincount(a)) <= places
    ]
    assert np.bincount(answer).max() <= places
    assert np.prod(p[rows, answer]) == pytest.approx(max(allowed))


def test_assignment_fills_what_must_be_filled_and_keeps_overfull_groups() -> None:
    p = np.array([[0.9, 0.1], [0.9, 0.1]])
    assert assign(p, [0, 0], 2).tolist() == [0, 0]
    assert sorted(assign(p, [0, 0], [2, 1], exactly=[False, True]).tolist()) == [0, 1]
    assert assign(np.vstack([p, p]), [0] * 4).tolist() == [0] * 4


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_sinkhorn_fills_the_quotas_of_full_groups(seed, places) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(4), 4 * places)
    answer = optimise(p, np.zeros(len(p), int), places, method="sinkhorn")
    assert answer.sum(axis=0) == pytest.approx(places, abs=1e-6)
    assert answer.sum(axis=1) == pytest.approx(1, abs=1e-12)
    part = optimise(p[:3], np.zeros(3, int), places, method="sinkhorn")
    assert (part.sum(axis=0) <= places + 1e-6).all()


def test_sinkhorn_scales_rows_and_columns_and_nothing_else() -> None:
    p, groups, _ = predictions(1)
    ratio = np.log(optimise(p, groups, method="sinkhorn") / p)
    ratio -= ratio[:, :1]
    assert ratio - ratio[:1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_the_fitted_temperature_undoes_a_sharpening(sharpness: float) -> None:
    p, groups, labels = predictions(1500, sharpness=sharpness)
    temperature = fit_temperature(p, groups, labels)
    assert temperature == pytest.approx(sharpness, rel=0.08)
    fitted = log_loss(posterior(p, groups, temperature=temperature), labels)
    for other in (0.8 * temperature, 1.25 * temperature):
        assert fitted < log_loss(posterior(p, groups, temperature=other), labels)
    assert fit_temperature(p, groups, labels) == temperature


def test_a_bias_is_found_where_places_stay_free_and_only_there() -> None:
    p, groups, labels = predictions(600)
    tilt = np.array([2.0, 1.0, 1.0, 1.0, 0.5])
    fitted = fit_method("posterior+bias", p * tilt, groups, labels).calibration
    assert fitted == Calibration(fit_temperature(p * tilt, groups, labels))
    chosen = np.random.default_rng(0).random(len(labels)) < 0.5
    answer = fit_method(
        "posterior+bias", (p * tilt)[chosen], groups[chosen], labels[chosen]
    ).calibration
    expected = -np.log(tilt) + np.log(tilt).mean()
    assert np.array(answer.bias) == pytest.approx(expected, abs=0.2)


def blend(p, groups, params: BlendParams) -> np.ndarray:
    return optimise(p, groups, method=Method("blend", blend=params))


def test_blend_of_weight_zero_changes_nothing_and_of_one_is_the_assignment() -> None:
    p, groups, _ = predictions(20)
    assert blend(p, groups, BlendParams()) == pytest.approx(p)
    hard = blend(p, groups, BlendParams(weight=1.0))
    assert np.array_equal(hard.argmax(axis=1), assign(p, groups))
    assert hard.max(axis=1) == pytest.approx(1)


def test_the_blend_that_is_fitted_is_no_worse_than_a_fine_grid() -> None:
    p, groups, labels = predictions(150)
    answer = log_loss(optimise(p, groups, method=fit_method("blend", p, groups, labels)), labels)
    grid = [
        log_loss(blend(p, groups, BlendParams(w, up, down)), labels)
        for w, up, down in itertools.product(np.linspace(0, 1, 9), repeat=3)
    ]
    assert answer <= min(grid) + 1e-3


def test_no_method_beats_the_posterior_on_calibrated_predictions() -> None:
    p, groups, labels = predictions(1500)
    losses = {
        name: log_loss(optimise(p, groups, method=fit_method(name, p, groups, labels)), labels)
        for name in METHODS
    }
    assert min(losses, key=losses.__getitem__) == "posterior"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_rows_that_sum_to_one_and_leaves_its_input_alone(name) -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 60)
    p[::7] = np.eye(4)[0]
    groups = np.sort(rng.integers(0, 14, 60))
    before = p.copy()
    answer = optimise(p, groups, method=name)
    assert np.isfinite(answer).all()
    assert answer.sum(axis=1) == pytest.approx(1, abs=1e-9)
    assert np.array_equal(p, before)


def test_a_temperature_is_taken_over_what_the_method_says() -> None:
    p, groups, _ = predictions(5)
    method = Method("posterior", Calibration(3.0))
    assert optimise(p, groups, method=method, temperature=2.0) == pytest.approx(
        posterior(p, groups, temperature=2.0)
    )


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match='Did you mean "posterior"'):
        optimise([[0.5, 0.5]], [0], method="posterior ")


def test_cross_validation_finds_the_posterior_and_its_gain_holds_on_fresh_groups() -> None:
    p, groups, labels = predictions(300, sharpness=2.0)
    report = choose_method(p, groups, labels)
    assert report.candidate == "posterior"
    assert report.helps
    fresh, fresh_groups, truth = predictions(1000, sharpness=2.0, seed=1)
    after = log_loss(optimise(fresh, fresh_groups, method=report.method), truth)
    gain = log_loss(fresh, truth) - after
    assert gain == pytest.approx(report.gain, abs=4 * report.gain_error)


def test_where_groups_tell_nothing_no_method_helps_and_nothing_changes() -> None:
    rng = np.random.default_rng(0)
    p, _, labels = predictions(200)
    groups = np.arange(len(labels))  # each row alone: nothing to learn from others
    report = choose_method(p, groups, labels, method="assignment")
    assert (report.candidate, report.method.name, report.helps) == ("none", "none", False)
    assert np.array_equal(optimise(p, groups, method=report.method), p)
    shuffled = rng.permutation(labels)  # labels that break the quotas
    assert not choose_method(np.full((1000, 5), 0.2), np.arange(1000) // 5, shuffled).helps


def test_fitting_needs_two_groups() -> None:
    p, groups, labels = predictions(1)
    with pytest.raises(UsageError, match="two groups or more"):
        choose_method(p, groups, labels)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_coefficients_outside_0_to_1_are_refused(value) -> None:
    with pytest.raises(UsageError, match="weight must be from 0 to 1"):
        BlendParams(weight=value)


@pytest.mark.parametrize("n_sure", [2, 3])
def test_sinkhorn_goes_on_until_the_columns_fit(n_sure) -> None:
    p = np.vstack([np.eye(4)[[0] * n_sure], np.full((4 - n_sure, 4), 0.25)])
    answer = optimise(p, np.zeros(4, int), method="sinkhorn", exactly=True)
    assert answer.sum(axis=0) == pytest.approx(1, abs=1e-6)


def test_the_choice_on_few_groups_is_not_the_one_that_fits_them_best() -> None:
    p, groups, labels = predictions(6, n_classes=4)
    report = choose_method(p, groups, labels)
    assert report.scores["blend"] > report.scores["posterior"]
    assert report.gain == pytest.approx(report.before - report.scores[report.candidate])
