"""What is needed last is checked first: sample submissions and outside predictions."""

import pickle
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from stackllm.errors import DataError
from stackllm.tables.contest import TableParams, read_training
from stackllm.tables.ids import Rows
from stackllm.tables.imports import read_outside, read_predictions
from stackllm.tables.sample import plain_layout, read_sample


@pytest.fixture
def table(tmp_path):
    (tmp_path / "train.csv").write_text("Question,Response,target\nq a,x,0\nq a,y,1\n")
    (tmp_path / "test.csv").write_text("Id,Question,Response\n907,q b,x\n906,q b,y\n")
    return read_training(TableParams(str(tmp_path / "train.csv"), str(tmp_path / "test.csv")))


P = np.array([[0.9, 0.1], [0.2, 0.8]])


def test_without_a_sample_the_submission_has_the_tests_ids_under_their_name(table):
    frame = plain_layout(table.test_rows(), table.classes).filled(P)
    assert frame.rows(named=True) == [
        {"Id": "907", "target_0": 0.9, "target_1": 0.1},
        {"Id": "906", "target_0": 0.2, "target_1": 0.8},
    ]


@pytest.mark.parametrize("name", ["Id", "id", "ID_code", "anything"])
def test_a_samples_names_and_orders_are_copied(table, tmp_path, name):
    (tmp_path / "sample.csv").write_text(f"target_1,Usage,{name},target_0\n0,a,906,1\n0,b,907,1\n")
    frame = read_sample(tmp_path / "sample.csv", table.test_rows(), table.classes).filled(P)
    assert frame.columns == ["target_1", name, "target_0"]
    assert frame.rows() == [(0.8, "906", 0.2), (0.1, "907", 0.9)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "Id,target_0,target_1\n907,0,1\n905,0,1\n",
            r'1 ids of .*test\.csv are not in .*first: "906".*"905"',
        ),
        ("Id,target_0,target_1\n907,0,1\n", r"1 ids of .*test\.csv are not in .*sample\.csv"),
        ("Id,target_0,target_1\n907,0,1\n906,0,1\n905,0,1\n", r"1 ids of .*sample\.csv are not in"),
        ("Id,target_0\n907,0\n906,0\n", r'class columns are not there \(first: "1"\)'),
        (
            "Id,target_0,target_1,target_2\n907,0,1,0\n906,0,1,0\n",
            r'none of the 2 classes.*"target_2"',
        ),
        ("Id,target_0,target_1\n907,0,1\n907,0,1\n", "1 ids occur more than once"),
    ],
)
def test_a_sample_of_something_else_says_which_ids_and_which_class(table, tmp_path, text, said):
    (tmp_path / "sample.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        read_sample(tmp_path / "sample.csv", table.test_rows(), table.classes)


def test_outside_predictions_come_in_the_order_of_the_rows(tmp_path):
    (tmp_path / "oof.csv").write_text("ID,p_1,p_0\n6,0.1,0.9\n5,0.5,0.5\n7,0.75,0.25\n")
    rows = Rows(pl.Series("id", ["7", "6"]), Path("train.csv"))
    probabilities, notes = read_predictions(tmp_path / "oof.csv", rows, ("0", "1"))
    assert probabilities.tolist() == [[0.25, 0.75], [0.9, 0.1]]
    assert notes == ()
    absent = Rows(pl.Series("id", ["7", "4"]), Path("train.csv"))
    with pytest.raises(DataError, match=r'1 ids of train\.csv are not in .*first: "4"'):
        read_predictions(tmp_path / "oof.csv", absent, ("0", "1"))


def test_one_long_text_beside_many_short_ones_takes_little_room(tmp_path):
    ids = ["x" * 1_000_000, *map(str, range(100_000)), None]  # 400 GB as an array of texts
    held = {"id": ids, "oof": np.full((len(ids), 2), 0.5)}
    (tmp_path / "oof.pkl").write_bytes(pickle.dumps(held))
    assert read_outside(tmp_path / "oof.pkl", ("0", "1")).frame["id"].to_list() == ids
