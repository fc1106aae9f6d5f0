"""Two sets of predictions: the paired difference, its interval, and what is matched and refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import stackllm
from stackllm import metrics
from stackllm.cli import cli
from stackllm.errors import DataError, MissingInputError, UsageError

N_GROUPS, N_CLASSES = 40, 3
LABELS = np.tile(np.arange(N_CLASSES), N_GROUPS)
GROUPS = np.repeat([f"q{i:02d}" for i in range(N_GROUPS)], N_CLASSES)


def predictions(strength: float, seed: int) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(size=(len(LABELS), N_CLASSES))
    scores[np.arange(len(LABELS)), LABELS] += strength
    powers = np.exp(scores)
    return powers / powers.sum(axis=1, keepdims=True)


WEAK, STRONG = predictions(0.5, 0), predictions(2.5, 1)


def frame(probabilities: np.ndarray, prefix: str = "target_") -> pl.DataFrame:
    columns = {f"{prefix}{j}": probabilities[:, j] for j in range(N_CLASSES)}
    return pl.DataFrame({"id": [f"r{i}" for i in range(len(probabilities))], **columns})


def truth() -> pl.DataFrame:
    ids = [f"r{i}" for i in range(len(LABELS))]
    return pl.DataFrame({"id": ids, "Question": GROUPS, "target": LABELS})


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 4, 2, 3)])
def test_the_bootstrap_is_that_over_all_ways_to_draw_groups(sizes) -> None:
    """Every one of the 4^4 draws by itself is the oracle."""
    groups = np.repeat(np.arange(4), sizes)
    values = np.random.default_rng(0).normal(size=len(groups)) + groups
    means = np.array(
        [
            np.concatenate([values[groups == group] for group in draw]).mean()
            for draw in itertools.product(range(4), repeat=4)
        ]
    )
    error = metrics.bootstrap_error(values, groups, n_boot=40_000)
    assert error == pytest.approx(means.std(), rel=0.01)
    low, high = metrics.bootstrap_interval(values, groups, n_boot=40_000, level=0.5)
    # inside of which Student's interval of 4 groups must be, and which it may widen
    reach = 0.7649 * means.std() * np.sqrt(4 / 3)
    expected = np.quantile(means, [0.25, 0.75])
    assert low == pytest.approx(min(expected[0], values.mean() - reach), abs=0.02)
    assert high == pytest.approx(max(expected[1], values.mean() + reach), abs=0.02)


@pytest.mark.parametrize("n_groups", [4, 15, 60])
def test_nineteen_of_twenty_intervals_hold_the_mean(n_groups) -> None:
    rng = np.random.default_rng(n_groups)
    groups = np.repeat(np.arange(n_groups), 2)
    n_tables, held = 300, 0
    for _ in range(n_tables):
        values = np.repeat(rng.normal(size=n_groups), 2) + rng.normal(size=2 * n_groups)
        low, high = metrics.bootstrap_interval(values, groups, n_boot=400)
        held += low <= 0 <= high
    assert abs(held / n_tables - 0.95) < 3.5 * np.sqrt(0.95 * 0.05 / n_tables)


def test_percentiles_and_the_normal_interval_agree_on_many_groups() -> None:
    groups = np.repeat(np.arange(500), 3)
    values = np.random.default_rng(1).normal(size=1500)
    low, high = metrics.bootstrap_interval(values, groups)
    error = metrics.bootstrap_error(values, groups)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_an_interval_of_one_group_is_not_known() -> None:
    assert np.isnan(metrics.bootstrap_interval([1.0, 2.0], ["a", "a"])).all()


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_the_difference_is_that_of_the_log_losses_and_turns_with_the_sides(seed, n_groups) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.arange(5 * n_groups) % n_groups)
    labels = rng.integers(0, 3, len(groups))
    a, b = rng.dirichlet(np.ones(3), (2, len(groups)))
    one = stackllm.compare(a, b, truth=labels, groups=groups)
    two = stackllm.compare(b, a, truth=labels, groups=groups)
    expected = metrics.log_loss(b, labels) - metrics.log_loss(a, labels)
    assert one.difference == pytest.approx(expected) == pytest.approx(-two.difference)
    assert one.interval == pytest.approx((-two.interval[1], -two.interval[0]), abs=1e-12)
    assert one.error == two.error
    weighted = (one.groups["difference"] * one.groups["n_rows"]).sum() / len(groups)
    assert weighted == pytest.approx(one.difference)
    sizes = one.groups["difference"].abs()
    assert sizes.to_list() == sorted(sizes, reverse=True)
    assert one.changed.height == (a.argmax(axis=1) != b.argmax(axis=1)).sum()


def test_verdicts() -> None:
    noisy = predictions(0.5, 7)
    told = stackllm.compare(WEAK, noisy, truth=LABELS, groups=GROUPS)
    assert told.verdict == "noise"
    assert "the interval holds 0. About " in told.sentence
    needed = int(told.sentence.split("About ")[1].split()[0].replace(",", ""))
    assert needed > N_GROUPS
    better = stackllm.compare(WEAK, STRONG, truth=LABELS, groups=GROUPS)
    assert better.verdict == "b is better"
    assert better.sentence.startswith("B is better: its log loss is lower by 0.")
    assert stackllm.compare(STRONG, WEAK, truth=LABELS, groups=GROUPS).verdict == "a is better"
    assert stackllm.compare(WEAK, WEAK, truth=LABELS, groups=GROUPS).verdict == "same"
    alone = stackllm.compare(WEAK, STRONG, truth=LABELS, groups=np.zeros(len(LABELS)))
    assert (alone.verdict, alone.error, alone.interval) == ("unknown", None, None)
    assert "one group only" in str(alone)


def test_stage_three_is_told_where_groups_and_quotas_are_known() -> None:
    told = stackllm.compare(WEAK, STRONG, truth=LABELS, groups=GROUPS)
    assert told.scores["measure"].to_list() == ["log loss", "posterior", "accuracy"]
    with_stage_three = stackllm.posterior(WEAK, GROUPS)
    beside = stackllm.compare(with_stage_three, STRONG, truth=LABELS, groups=GROUPS)
    # a posterior is known by its sums, and not taken through stage three twice
    posterior = beside.scores.row(1, named=True)
    assert posterior["a"] == pytest.approx(metrics.log_loss(with_stage_three, LABELS))
    assert posterior["b"] == pytest.approx(told.scores["b"][1])
    verdict = stackllm.compare(
        STRONG, stackllm.posterior(STRONG, GROUPS), truth=LABELS, groups=GROUPS
    )
    assert verdict.verdict == "b is better"
    uneven = np.where(np.arange(len(LABELS)) == 0, 1, LABELS)
    unknown = stackllm.compare(WEAK, STRONG, truth=uneven, groups=GROUPS)
    assert "posterior" not in unknown.scores["measure"]
    known = stackllm.compare(WEAK, STRONG, truth=uneven, groups=GROUPS, quota=2)
    assert "posterior" in known.scores["measure"]


def test_rows_are_matched_by_id_and_classes_by_name(tmp_path) -> None:
    plain = stackllm.compare(WEAK, STRONG, truth=LABELS, groups=GROUPS)
    order = np.random.default_rng(0).permutation(len(LABELS))
    other = frame(STRONG, "").select("id", "2", "0", "1")[order]
    frame(WEAK).write_csv(tmp_path / "a.csv")
    other.write_parquet(tmp_path / "b.parquet")
    truth()[order[::-1]].write_csv(tmp_path / "truth.csv")
    told = stackllm.compare(
        tmp_path / "a.csv", tmp_path / "b.parquet", truth=tmp_path / "truth.csv"
    )
    assert told.scores["measure"].to_list() == plain.scores["measure"].to_list()
    numbers = [it.scores.drop("measure").to_numpy() for it in (told, plain)]
    np.testing.assert_allclose(*numbers, rtol=1e-6)
    assert told.groups["group"].to_list() == plain.groups["group"].to_list()
    assert told.groups["row_ids"][0].split()[0].startswith("r")
    assert stackllm.compare(frame(WEAK), other, truth=truth()).scores.equals(told.scores)


def test_labels_groups_and_folds_may_stand_in_the_frames_themselves() -> None:
    both = [
        frame(it, "").with_columns(label=pl.Series(LABELS), group=pl.Series(GROUPS), fold=pl.lit(1))
        for it in (WEAK, STRONG)
    ]
    told = stackllm.compare(*both)
    assert told.n_groups == N_GROUPS
    assert told.verdict == "b is better"


def test_rows_that_one_lacks_are_left_out_and_told() -> None:
    told = stackllm.compare(frame(WEAK)[6:], frame(STRONG)[:90], truth=truth())
    assert (told.n_rows, told.n_groups) == (84, 28)
    assert told.notes[0] == (
        'A has 30 rows that the other lacks (first: "r90", "r91", "r92"): left out'
    )
    assert told.notes[1].startswith("B has 6 rows")


def test_without_groups_each_row_is_one_and_that_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = stackllm.compare(frame(WEAK), frame(STRONG), truth=truth().drop("Question"))
    assert told.n_groups == len(LABELS)
    assert "nothing tells which rows belong together" in told.notes[0]
    table = truth().drop("target")
    assert (
        stackllm.compare(
            frame(WEAK), frame(STRONG), truth=truth().drop("Question"), groups=table
        ).n_groups
        == N_GROUPS
    )


@pytest.mark.parametrize(
    ("a", "b", "more", "kind", "said"),
    [
        (WEAK, WEAK[:9], {"truth": LABELS}, DataError, r"A is \(120, 3\) and B \(9, 3\)"),
        (frame(WEAK), frame(STRONG).with_columns(id=pl.col("id") + "x"), {"truth": truth()}, DataError, "no row in common"),
        (frame(WEAK), frame(STRONG), {}, UsageError, "labels with the setting truth"),
        (WEAK, STRONG, {"truth": LABELS[:5]}, DataError, r"one label per row \(120\)"),
        (WEAK, STRONG, {"truth": LABELS, "groups": [1, 2]}, DataError, r"one per row \(120\); there are 2"),
        (WEAK, STRONG, {"truth": LABELS + 4}, DataError, "is no class"),
        (WEAK[:0], STRONG, {"truth": LABELS}, DataError, "at least one row"),
        (-WEAK, STRONG, {"truth": LABELS}, DataError, "not negative"),
        ("nothing", STRONG, {"truth": LABELS}, MissingInputError, "no such file, and no such run"),
        (frame(WEAK), frame(STRONG).rename({"target_0": "target_9"}), {"truth": truth()}, DataError, "class columns are not there"),
        (frame(WEAK), frame(STRONG).with_columns(target_3=pl.lit(0.0)), {"truth": truth()}, DataError, r'B has 4 classes and A 3'),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(a, b, more, kind, said, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=said):
        stackllm.compare(a, b, **more)


def test_the_command_writes_the_groups_and_says_the_same_twice(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    frame(WEAK).write_csv("a.csv")
    frame(STRONG).write_csv("b.csv")
    truth().write_csv("truth.csv")
    words = ["compare", "a.csv", "b.csv", "--truth", "truth.csv"]
    done = CliRunner().invoke(cli, [*words, "-o", "groups.csv", "--top", "2"])
    assert done.exit_code == 0, done.output
    assert "B is better" in done.output
    assert max(map(len, done.output.splitlines())) <= 120
    written = pl.read_csv("groups.csv")
    assert written.columns == ["group", "n_rows", "a", "b", "difference", "row_ids"]
    assert written.height == N_GROUPS
    told = [CliRunner().invoke(cli, [*words, "--json"]).stdout for _ in range(2)]
    assert told[0] == told[1]
    content = json.loads(told[0])
    assert content["verdict"] == "b is better"
    assert len(content["differ_most"]) == 5
    assert (
        sum(content["changed"][it] for it in ("right_in_b", "right_in_a", "wrong_in_both"))
        == (content["changed"]["rows"])
    )
    piped = CliRunner().invoke(cli, [*words, "-o", "-"])
    assert piped.stdout.startswith("group,n_rows,a,b,")
    assert "B is better" in piped.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.csv", "b.csv", "-o", "a.csv"], "would replace it"),
        (["a.csv", "b.csv", "-o", "-", "--json"], "both want the standard output"),
    ],
)
def test_where_the_groups_cannot_go(words, said, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    frame(WEAK).write_csv("a.csv")
    frame(STRONG).write_csv("b.csv")
    done = CliRunner().invoke(cli, ["compare", *words, "--truth", "a.csv"])
    assert said in str(done.exception)


def test_comparing_loads_nothing_heavy() -> None:
    code = (
        "import stackllm, sys; stackllm.compare([[.9, .1]], [[.5, .5]], truth=[0], groups=['q']);"
        "print([it for it in ('torch', 'transformers', 'sklearn', 'lightgbm', 'pydantic') if it in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
