"""The two leaks of pseudo-labelling, checked over every model of every round."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stackllm.crossfit.design import CrossFit, Design
from stackllm.crossfit.pseudo import PseudoParams, pseudo_targets


def make_design(n_train_groups, n_test_groups, n_folds, n_parts, n_classes, seed=0):
    draw = np.random.default_rng(seed)
    folds = np.repeat(np.arange(n_train_groups) % n_folds, n_classes)
    parts = np.repeat(np.arange(n_test_groups) % n_parts, n_classes)
    labels = np.concatenate([draw.permutation(n_classes) for _ in range(n_train_groups)])
    groups = np.repeat(np.arange(n_train_groups + n_test_groups), n_classes)
    return Design(labels, folds, parts, groups, n_classes)


designs = st.builds(
    make_design,
    st.integers(6, 10), st.integers(4, 8), st.integers(2, 4), st.integers(2, 3), st.integers(2, 3),
    st.integers(0, 5),
)  # fmt: skip


class Taint:
    """Plays rounds with models that do nothing but remember which labels they have touched.

    A prediction is stood for by the set of training labels and of pseudo-labelled rows that went
    into the model that made it, through however many rounds.
    """

    def __init__(self, design):
        self.design = design
        self.saw_labels: dict[tuple[int, int], set[int]] = {}
        self.direct: dict[tuple[int, int], list[set[int]]] = {}

    def play(self, rounds):
        design = self.design
        test = range(len(design.parts))
        truth = {fold: set(np.flatnonzero(design.folds != fold)) for fold in range(design.n_folds)}
        source = {(fold, row): truth[fold] for fold in truth for row in test}
        for number in range(rounds + 1):
            fits = design.first_fits() if number == 0 else design.next_fits(number, self.pseudo)
            made = {}
            for fit in fits:
                own = set(fit.targets.rows[fit.targets.rows < design.n_train])
                borrowed = set(
                    fit.targets.rows[fit.targets.rows >= design.n_train] - design.n_train
                )
                labels = own.union(*(source[fit.fold, row] for row in borrowed))
                yield fit, own, borrowed, labels
                for row in fit.predict[fit.predict >= design.n_train] - design.n_train:
                    made.setdefault((fit.fold, row), set()).update(labels)
            source = made

    def pseudo(self, fold, part):
        uniform = np.full((self.design.n_folds, len(self.design.parts), self.design.n_classes), 1.0)
        posteriors = CrossFit(np.empty((0, self.design.n_classes)), uniform / self.design.n_classes)
        return pseudo_targets(posteriors, self.design, PseudoParams(), fold, part)


@settings(deadline=None)
@given(designs)
def test_no_model_predicts_a_row_whose_label_it_trained_on(design):
    for fit, own, borrowed, _ in Taint(design).play(2):
        predicted = set(fit.predict)
        assert not predicted & own
        assert not {row - design.n_train for row in predicted} & borrowed
        trained_groups = design.groups[fit.targets.rows]
        assert not set(design.groups[fit.predict]) & set(trained_groups)


@settings(deadline=None)
@given(designs)
def test_no_label_of_a_fold_reaches_its_score_through_pseudo_labels(design):
    for fit, _, _, labels in Taint(design).play(2):
        scored = set(np.flatnonzero(design.folds == fit.fold))
        assert not labels & scored


@settings(deadline=None)
@given(designs)
def test_every_row_is_predicted_by_the_right_number_of_models(design):
    n_parts = design.parts.max() + 1
    for number in (0, 1):
        fits = design.first_fits() if number == 0 else design.next_fits(1, Taint(design).pseudo)
        count = np.zeros(len(design.groups), dtype=int)
        for fit in fits:
            count[fit.predict] += 1
        expected_train = 1 if number == 0 else n_parts
        expected_test = design.n_folds * (1 if number == 0 else n_parts - 1)
        assert (count[: design.n_train] == expected_train).all()
        assert (count[design.n_train :] == expected_test).all()


def test_gather_averages_and_keeps_folds_apart():
    design = make_design(6, 4, 3, 2, 2)
    fits = design.next_fits(1, Taint(design).pseudo)
    predictions = [np.full((len(fit.predict), 2), 10.0 * fit.fold + fit.part) for fit in fits]
    gathered = design.gather(fits, predictions)
    assert (gathered.oof[:, 0] == 10.0 * design.folds + 0.5).all()
    for fold in range(3):
        assert (gathered.test[fold, :, 0] == 10.0 * fold + (1 - design.parts)).all()


def test_hard_and_soft_labels():
    design = make_design(6, 4, 3, 2, 2)
    test = np.tile([[0.9, 0.1], [0.005, 0.995]], (4, 1))
    posteriors = CrossFit(np.empty((0, 2)), np.stack([test] * 3))
    soft = pseudo_targets(posteriors, design, PseudoParams(labels="soft"), 0, 0)
    hard = pseudo_targets(posteriors, design, PseudoParams(labels="hard"), 0, 0)
    part = np.flatnonzero(design.parts == 0)
    assert set(soft.rows) == set(hard.rows) == set(part + design.n_train)
    assert hard.labels.tolist() == [0, 1] * (len(part) // 2)
    assert hard.weights.tolist() == [0.9, 0.995] * (len(part) // 2)
    first = soft.rows == soft.rows[0]
    assert soft.labels[first].tolist() == [0, 1]
    assert soft.weights[first].tolist() == [0.9, 0.1]
    totals = np.bincount(soft.rows - design.n_train, soft.weights, minlength=len(design.parts))
    assert np.allclose(totals[part], 1)
    sure = pseudo_targets(posteriors, design, PseudoParams(min_confidence=0.95, weight=0.5), 0, 0)
    assert len(sure.rows) == len(part) // 2
    assert (sure.weights == 0.5).all()
