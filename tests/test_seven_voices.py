"""The shipped sample hangs together: files, questions and voices."""

from pathlib import Path

import polars as pl
import pytest

SAMPLE = Path(__file__).parents[1] / "examples" / "seven_voices"
N_VOICES = 7
LABELS = list(range(N_VOICES))


@pytest.fixture(scope="module")
def train() -> pl.DataFrame:
    return pl.read_csv(SAMPLE / "train.csv")


@pytest.fixture(scope="module")
def test() -> pl.DataFrame:
    return pl.read_csv(SAMPLE / "test.csv")


@pytest.fixture(scope="module")
def solution() -> pl.DataFrame:
    return pl.read_csv(SAMPLE / "solution.csv")


@pytest.fixture(scope="module")
def questions() -> list[str]:
    return (SAMPLE / "questions.txt").read_text(encoding="utf-8").splitlines()


def test_columns_and_sizes_are_those_of_the_contest(train, test, solution):
    assert train.columns == ["Question", "Response", "target"]
    assert test.columns == ["id", "Question", "Response"]
    assert solution.columns == ["id", "target"]
    assert (train.height, test.height, solution.height) == (280, 140, 140)


def test_no_question_is_written_twice(questions):
    normal = [" ".join(question.lower().split()) for question in questions]
    assert len(set(normal)) == len(normal) == 60
    assert all(question == question.strip() != "" for question in questions)


def test_train_and_test_share_no_question_and_leave_none_out(train, test, questions):
    in_train, in_test = set(train["Question"]), set(test["Question"])
    assert (len(in_train), len(in_test)) == (40, 20)
    assert in_train | in_test == set(questions)


def test_every_voice_answers_every_question_once(train, test, solution):
    truth = test.join(solution, on="id", validate="1:1")
    for table in (train, truth):
        labels = table.group_by("Question").agg(pl.col("target").sort())["target"]
        assert labels.to_list() == [LABELS] * len(labels)


def test_no_response_is_empty(train, test):
    for table in (train, test):
        assert table["Response"].null_count() == 0
        assert table["Response"].str.strip_chars().str.len_chars().min() > 0


def test_ids_are_the_same_in_all_three_test_files(test, solution):
    submission = pl.read_csv(SAMPLE / "sample_submission.csv")
    assert test["id"].to_list() == list(range(test.height))
    assert solution["id"].to_list() == submission["id"].to_list() == test["id"].to_list()


def test_sample_submission_is_uniform():
    submission = pl.read_csv(SAMPLE / "sample_submission.csv")
    assert submission.columns == ["id", *(f"target_{label}" for label in LABELS)]
    assert submission.drop("id").to_numpy() == pytest.approx(1 / N_VOICES)


def test_row_order_does_not_tell_the_label(train, test, solution):
    """Shuffled rows put a label's mean position near the middle; sorted ones are far off."""
    for table in (train, test.join(solution, on="id", maintain_order="left")):
        position = table.with_row_index("position").group_by("target").agg(pl.mean("position"))
        middle = (table.height - 1) / 2
        assert (position["position"] - middle).abs().max() < table.height / 5
        neighbours = table.filter(pl.col("Question") == pl.col("Question").shift())
        assert neighbours.height < table.height / 10
