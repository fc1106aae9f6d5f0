"""Members on planted signals, and that what is saved is what predicts."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from stackllm.crossfit.design import CrossFit, Design, join
from stackllm.crossfit.targets import Targets
from stackllm.errors import UsageError
from stackllm.group.plan import Plan
from stackllm.group.posterior import posterior_of
from stackllm.members import frozen, lexical, linear
from stackllm.members.external import ExternalParams, read_external
from stackllm.members.frozen import FrozenParams
from stackllm.members.inputs import VIEWS, Inputs, load_inputs, save_inputs
from stackllm.members.lexical import LexicalParams
from stackllm.members.registry import DEFAULT_MEMBERS, KINDS
from stackllm.metrics import accuracy, log_loss
from stackllm.probabilities import softmax
from stackllm.stack.blend import climb, cross_blend
from stackllm.stack.posteriors import cross_posteriors
from stackllm.tables.ids import Rows

N_GROUPS, N_CLASSES = 60, 3
LABELS = np.tile(np.arange(N_CLASSES), N_GROUPS)
GROUPS = np.repeat(np.arange(N_GROUPS), N_CLASSES)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Every matrix carries the label, faintly."""
    draw = np.random.default_rng(0)
    n = len(LABELS)
    embedding = draw.normal(size=(n, 12)).astype(np.float32)
    embedding[:, 0] += 2 * LABELS
    blocks = draw.normal(size=(n, 5))
    blocks[:, 1] += 2 * LABELS
    blocks[::7, 2] = np.nan
    counts = {}
    for view in VIEWS:
        dense = draw.poisson(0.3, size=(n, 40))
        dense[np.arange(n), LABELS] += draw.poisson(1.5, size=n)
        counts[view] = csr_matrix(dense.astype(np.float32))
    names = ("text_a", "text_b", "likelihood_c", "within_d", "overlap_e")
    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder, Inputs(GROUPS, embedding, blocks, names, counts))
    return load_inputs(folder)


def targets(rows, labels=LABELS):
    every = np.ones(len(rows))
    return Targets(rows, labels[rows], every, every > 0, N_CLASSES)


@pytest.mark.parametrize("member", DEFAULT_MEMBERS, ids=lambda member: member.name)
def test_members_learn_and_repeat_themselves(inputs, member, tmp_path):
    kind = KINDS[member.kind]
    train, test = np.flatnonzero(GROUPS < 40), np.flatnonzero(GROUPS >= 40)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    kind.fit(inputs, targets(train), member.params, 0, tmp_path / "a")
    kind.fit(inputs, targets(train), member.params, 0, tmp_path / "b")
    probabilities = kind.predict(inputs, test, tmp_path / "a")
    assert np.array_equal(probabilities, kind.predict(inputs, test, tmp_path / "b"))
    assert probabilities.shape == (60, N_CLASSES)
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert log_loss(probabilities, LABELS[test]) < np.log(N_CLASSES)
    assert accuracy(probabilities, LABELS[test]) > 0.5
    assert {path.suffix for path in (tmp_path / "a").iterdir()} <= {".npy", ".json", ".txt"}


@settings(max_examples=25, deadline=None)
@given(text=st.text(alphabet="ab c.,!\n", max_size=30))
def test_what_ngrams_add_is_the_score(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("telltale")
    draw = np.random.default_rng(1)
    texts = ["".join(draw.choice(list("ab c.,!\n"), 20)) for _ in range(12)] + [text]
    counts = {view: lexical.count_ngrams(pl.Series(texts), view) for view in VIEWS}
    groups = np.arange(13)
    inputs = Inputs(groups, np.zeros((13, 0)), np.zeros((13, 0)), (), counts)
    params = LexicalParams(views=("words", "edges"))
    lexical.fit(inputs, targets(groups[:12], np.tile([0, 1, 2], 4)), params, 0, folder)
    added = lexical.telltale(text, folder)
    bias = np.load(folder / "bias.npy").astype(np.float64)
    scores = added.drop("view", "ngram").sum().to_numpy().ravel() + bias - bias.mean()
    logs = np.log(lexical.predict(inputs, groups[12:], folder)[0])
    np.testing.assert_allclose(scores, logs - logs.mean(), atol=1e-4)


@pytest.mark.parametrize("member", DEFAULT_MEMBERS[:4], ids=lambda member: member.name)
def test_a_class_without_training_rows_is_all_but_impossible(inputs, member, tmp_path):
    kind = KINDS[member.kind]
    train = np.flatnonzero((GROUPS < 40) & (LABELS != 1))
    kind.fit(inputs, targets(train), member.params, 0, tmp_path)
    probabilities = kind.predict(inputs, np.arange(120, 180), tmp_path)
    assert (probabilities[:, 1] < 1e-6).all()
    assert np.allclose(probabilities.sum(axis=1), 1)


def test_pseudo_labels_choose_no_setting(inputs, tmp_path, monkeypatch):
    """Every pseudo-label here is class 2 and no given one is: class 2 must never be scored."""
    scored = []

    def spy(probabilities, labels):
        scored.append(set(labels.tolist()))
        return log_loss(probabilities, labels)

    monkeypatch.setattr(linear, "log_loss", spy)
    rows = np.flatnonzero(LABELS < 2)
    given = targets(rows)
    guessed = np.arange(120, 180)
    pseudo = Targets(guessed, np.full(60, 2), np.ones(60), np.zeros(60, dtype=bool), N_CLASSES)
    frozen.fit(inputs, join(given, pseudo), FrozenParams(), 0, tmp_path)
    assert scored == [{0, 1}] * len(FrozenParams().c)


@pytest.mark.parametrize("n_given", [1, 2, 3])
def test_a_penalty_is_chosen_on_given_labels_however_few(inputs, monkeypatch, n_given):
    """A fifth of all groups may hold pseudo-labels alone; the split is of groups with given labels."""
    judged = []
    monkeypatch.setattr(
        linear, "log_loss", lambda p, labels: judged.append(len(labels)) or log_loss(p, labels)
    )
    rows = np.arange(len(LABELS))
    given = n_given > GROUPS
    both = Targets(rows, LABELS, np.ones(len(rows)), given, N_CLASSES)
    features = np.asarray(inputs.embedding)
    for seed in range(10):
        chosen = linear.choose_penalty(features, GROUPS, both, (1.0, 0.1), 50, seed)
        assert chosen in (1.0, 0.1)
        assert n_given > 1 or chosen == 0.1  # nothing to judge by: the strongest
    assert set(judged) <= {N_CLASSES}  # one group at a time, and never none
    assert len(judged) == (20 if n_given > 1 else 0)


def test_a_weight_is_worth_as_many_copies(inputs, tmp_path):
    kind, params = KINDS["frozen"], FrozenParams(c=(0.1,))
    rows = np.arange(90)
    doubled = np.concatenate([rows, rows[:30]])
    weights = np.where(rows < 30, 2.0, 1.0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    kind.fit(
        inputs, Targets(rows, LABELS[rows], weights, weights > 0, 3), params, 0, tmp_path / "a"
    )
    kind.fit(inputs, targets(doubled), params, 0, tmp_path / "b")
    test = np.arange(90, 180)
    np.testing.assert_allclose(
        kind.predict(inputs, test, tmp_path / "a"),
        kind.predict(inputs, test, tmp_path / "b"),
        atol=2e-2,
    )


def test_centred_member_sees_the_group(inputs, tmp_path):
    """A shift of a whole group's embedding does not move the centred half of the features."""
    from stackllm.members.frozen import _features

    shifted = Inputs(
        inputs.groups, inputs.embedding + 5, inputs.blocks, inputs.names, inputs.counts
    )
    plain, moved = _features(inputs, True), _features(shifted, True)
    half = plain.shape[1] // 2
    np.testing.assert_allclose(plain[:, half:], moved[:, half:], atol=1e-4)
    assert not np.allclose(plain[:, :half], moved[:, :half])


def test_a_bound_on_the_steps_is_no_warning(recwarn):
    draw = np.random.default_rng(0)
    rows, labels = np.arange(60), draw.integers(0, 3, 60)
    targets = Targets(rows, labels, np.ones(60), np.ones(60, dtype=bool), 3)
    weights, _ = linear.logistic(draw.normal(size=(60, 5)), targets, 1e9, 1)
    assert np.isfinite(weights).all()
    assert not [it for it in recwarn if "converge" in str(it.message)]


@pytest.mark.parametrize("n_present", [1, 2, 3])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_of_more_features_than_rows_the_head_is_the_same(n_present, intercept, c, monkeypatch):
    """Against scikit-learn to its end on all columns; some rows twice, with weights, one class absent."""
    monkeypatch.setattr(linear, "_TOLERANCE", 1e-6)
    draw = np.random.default_rng(0)
    features = (draw.normal(size=(80, 300)) * draw.exponential(2, size=300)).astype(np.float32)
    features[:, 7] = 0
    rows = np.r_[np.arange(50), np.arange(20)]
    labels = np.r_[np.arange(50), np.arange(20) + 1] % n_present
    known = Targets(rows, labels, draw.uniform(0.2, 1, 70), np.ones(70, dtype=bool), 4)
    groups = np.repeat(np.arange(16), 5)
    chosen, weights, bias = linear.fit_head(features, groups, known, (c,), 500, 0, intercept)
    assert chosen == c
    assert (weights.shape, bias.shape) == ((4, 300), (4,))
    assert (bias[n_present:] == -30).all()
    probabilities = linear.class_probabilities(features, weights, bias)[:, :n_present]
    if n_present == 1:
        assert np.allclose(probabilities, 1)
        return
    exact = LogisticRegression(C=c, tol=1e-9, max_iter=10_000, fit_intercept=intercept)
    exact.fit(features.astype(float)[rows], labels, sample_weight=known.weights)
    np.testing.assert_allclose(probabilities, exact.predict_proba(features), atol=0.01)


def test_more_features_than_rows_choose_the_penalty_that_all_columns_choose():
    draw = np.random.default_rng(1)
    features = draw.normal(size=(len(LABELS), 500)).astype(np.float32)
    features[:, :9] += LABELS[:, None]
    candidates = (1e-9, 0.003, 1e9)
    every = targets(np.arange(len(LABELS)))
    plain = linear.choose_penalty(features, GROUPS, every, candidates, 300, 0)
    assert plain == 0.003
    assert linear.fit_head(features, GROUPS, every, candidates, 300, 0)[0] == plain


def test_unknown_views_are_refused():
    with pytest.raises(UsageError, match=r'views, entry 1, must be .* Did you mean "words"\?'):
        LexicalParams(views=("wrds",))


@pytest.fixture(scope="module")
def design():
    folds = GROUPS[:120] % 4
    return Design(LABELS[:120], folds, GROUPS[120:] % 2, GROUPS, N_CLASSES)


def noisy(design, strength, seed):
    draw = np.random.default_rng(seed)
    scores = draw.normal(size=(design.n_folds + 1, len(LABELS), N_CLASSES))
    scores[:, np.arange(len(LABELS)), LABELS] += strength
    soft = np.exp(scores)
    soft /= soft.sum(axis=2, keepdims=True)
    return CrossFit(soft[0, :120], soft[1:, 120:])


def test_no_label_of_a_fold_moves_its_posterior_or_blend(design):
    """Turn one fold's labels round: what is predicted for that fold must not change."""
    models = {"a": noisy(design, 1.0, 0), "b": noisy(design, 0.5, 1)}
    turned = design.labels.copy()
    own = design.folds == 2
    turned[own] = (turned[own] + 1) % N_CLASSES
    other = Design(turned, design.folds, design.parts, design.groups, N_CLASSES)
    before, after = (cross_posteriors(models["a"], d, 1) for d in (design, other))
    for kind in ("rows", "predictions"):
        one, two = getattr(before, kind), getattr(after, kind)
        assert np.array_equal(one.oof[own], two.oof[own])
        assert np.array_equal(one.test[2], two.test[2])
        assert not np.array_equal(one.oof[~own], two.oof[~own])
    first, second = (cross_blend(models, d, 1).predictions for d in (design, other))
    assert np.array_equal(first.oof[own], second.oof[own])
    assert np.array_equal(first.test[2], second.test[2])


def test_the_blend_is_no_worse_than_its_best_model_and_leaves_noise_out(design):
    models = {
        "good": noisy(design, 1.5, 0),
        "fair": noisy(design, 1.0, 1),
        "noise": noisy(design, 0, 2),
    }
    blend = cross_blend(models, design, 1)
    assert (blend.weights >= 0).all()
    shares = blend.weights.mean(axis=0) / blend.weights.mean(axis=0).sum()
    weights = dict(zip(blend.names, shares, strict=True))
    assert weights["noise"] < 0.15 < weights["fair"] < weights["good"]
    losses = {
        name: log_loss(cross_posteriors(model, design, 1).oof, design.labels)
        for name, model in {**models, "blend": blend.predictions}.items()
    }
    assert losses["blend"] < losses["good"]


def climbed_over_all(logs, plan, labels):
    """The climb that tries every model at every step."""
    counts, total = np.zeros(len(logs)), np.zeros_like(logs[0])

    def loss_of(scores):
        return log_loss(posterior_of(softmax(scores), plan), labels)

    loss, entry = loss_of(total), 0.5 * np.log(plan.n_groups) / len(labels)
    while counts.sum() < 60:
        tried = np.array([loss_of(total + 0.1 * added) for added in logs])
        best = np.argmin(tried + entry * (counts == 0))
        if tried[best] >= loss - max(1e-6, entry * (counts[best] == 0)):
            break
        counts[best] += 1
        total, loss = total + 0.1 * logs[best], tried[best]
    return 0.1 * counts, loss


@pytest.mark.parametrize("n_models", [1, 20, 30])
def test_the_climb_is_that_over_all_models_and_of_many_as_good(design, n_models):
    logs = np.log([noisy(design, 0.2 + 0.05 * i, i).oof for i in range(n_models)])
    plan = Plan.of(design.train_groups, N_CLASSES)
    weights = climb(logs, plan, design.labels)
    expected, least = climbed_over_all(logs, plan, design.labels)
    if n_models <= 20:
        assert weights.tolist() == expected.tolist()
    total = np.tensordot(weights, logs, axes=1)
    assert log_loss(posterior_of(softmax(total), plan), design.labels) < least + 0.005


def test_models_that_know_nothing_blend_to_chance():
    rng = np.random.default_rng(5)
    groups, labels = np.repeat(np.arange(40), 3), np.tile([0, 1, 2], 40)
    plan = Plan.of(groups, 3)
    flat = np.log(np.full((1, 120, 3), 1 / 3))
    assert climb(flat, plan, labels).tolist() == [0.0]
    wrong = np.log(rng.dirichlet(np.ones(3) * 0.3, (4, 120)) * (1 - np.eye(3)[labels]) + 0.01)
    assert climb(wrong, plan, labels).tolist() == [0.0] * 4


def test_a_blend_makes_up_for_the_scale_of_a_model(design):
    calm = noisy(design, 1.0, 0)
    sharp = CrossFit(*(p**3 / (p**3).sum(axis=-1, keepdims=True) for p in (calm.oof, calm.test)))
    of_calm, of_sharp = (
        cross_blend({"model": model}, design, 1).weights.mean() for model in (calm, sharp)
    )
    assert of_calm == pytest.approx(3 * of_sharp, rel=0.15)


def test_external_members_are_checked_and_in_sample_ones_warned_of(design, tmp_path):
    ids = [str(i) for i in range(120)], [f"t{i}" for i in range(60)]
    rows = [Rows(pl.Series("id", some), Path("train.csv")) for some in ids]
    classes = ("0", "1", "2")

    def write(name, rows, probabilities):
        lines = [
            ",".join([i, *(repr(float(x)) for x in p)])
            for i, p in zip(rows, probabilities, strict=True)
        ]
        (tmp_path / name).write_text("id,p_0,p_1,p_2\n" + "\n".join(lines) + "\n")
        return str(tmp_path / name)

    honest = noisy(design, 1.0, 0)
    test = write("test.csv", ids[1], honest.test[0])
    params = ExternalParams("x", write("oof.csv", ids[0], honest.oof), test)
    read, warnings = read_external(params, design, *rows, classes)
    assert np.allclose(read.oof, honest.oof)
    assert read.test.shape == (4, 60, 3)
    assert warnings == []
    cheating = np.full((120, 3), 0.005)
    cheating[np.arange(120), design.labels] = 0.99
    params = ExternalParams("x", write("in.csv", ids[0], cheating), test)
    _, warnings = read_external(params, design, *rows, classes)
    assert "Were its OOF rows in its training data?" in warnings[0]
