"""One reader of labels: for the training table, and for every truth."""

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import DataError
from stackllm.tables.contest import TableParams, read_training
from stackllm.tables.ids import Rows
from stackllm.tables.labels import plain_label, read_labels, read_truth

ROWS = Rows(pl.Series("id", ["7", "8", "9"]), Path("test.csv"))
NUMBERS = ("0", "1", "2")


@pytest.fixture
def truth(tmp_path):
    def write(text):
        (tmp_path / "truth.csv").write_text(text)
        return tmp_path / "truth.csv"

    return write


@pytest.mark.parametrize(
    "text",
    [
        "id,target\n7,2\n8,0\n9,1\n",
        "Id,Target\n9,1\n8,0\n7,2\n",
        "row_id,label,Usage\n7,2,Public\n8,0,Public\n9,1,Private\n",
        "id,author\n7,2\n8,0\n9,1\n",
        "id,target\n7,2.0\n8,0.0\n9,1.0\n",
        "id,target\n7,target_2\n8,target_0\n9,target_1\n",
        "id,target\n7, 02 \n8,00\n9,01\n",
        "id,target\n5,0\n7,2\n8,0\n9,1\n",
    ],
)
def test_whatever_a_truth_looks_like_it_says_the_same(truth, text):
    assert read_truth(truth(text), ROWS, NUMBERS).labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,target\n7,2\n8,0\n9,1\n7,0\n", r"1 ids occur more than once .*rows 1 and 4"),
        ("id,target\n7,2\n8,0\n", r'1 ids of test\.csv are not in .*first: "9"'),
        ("id,target\n7,2\n8,0\n9,3\n", r'label "3" \(row 3\) is no class'),
        ("id,target\n7,2\n8,0\n9,\n", r'1 rows have no label in "target" \(first: row 3\)'),
        ("id,a,b\n7,2,2\n8,0,0\n9,1,1\n", r'no column is named like a label\. .*"target"'),
        ("target\n2\n0\n1\n", r"3 ids of test\.csv are not in .* has no id column"),
    ],
)
def test_a_truth_that_cannot_be_meant_is_refused(truth, text, said):
    with pytest.raises(DataError, match=said):
        read_truth(truth(text), ROWS, NUMBERS)


def test_a_column_of_the_training_tables_name_comes_first(truth):
    path = truth("id,label,author\n7,0,2\n8,0,0\n9,0,1\n")
    assert read_truth(path, ROWS, NUMBERS, usual=("author", "label")).labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("classes", "labels", "expected"),
    [
        (("zoe", "adam"), ["adam", "zoe"], [1, 0]),
        (("zoe", "adam"), ["1", "0"], [1, 0]),
        (("zoe", "adam"), ["class_adam", "class_zoe"], [1, 0]),
        (("target_1", "target_2"), ["2", "1"], [1, 0]),
        (("target_01", "target_02"), ["2.0", "1.0"], [1, 0]),
        (("1", "2"), ["2", "1"], [1, 0]),
        (("1", "2", "3"), ["1", "2"], [0, 1]),
        (("4", "4.0"), ["4.0", "4"], [0, 0]),
        (("-1", "1"), ["1", "-1"], [1, 0]),
    ],
)
def test_labels_name_classes_by_name_first(classes, labels, expected):
    assert read_labels(Path("x"), pl.Series(labels), classes).tolist() == expected


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (NUMBERS, ["10", "11", "12"]),
        (NUMBERS, ["-0.5"]),
        (("1", "2"), ["-1", "-2"]),
        (("a", "b"), ["xa", "xc"]),
    ],
)
def test_what_only_ends_like_a_class_is_none(classes, labels):
    with pytest.raises(DataError, match="is no class"):
        read_labels(Path("x"), pl.Series(labels), classes)


def test_two_readings_that_differ_are_shown_and_one_can_be_chosen():
    labels, classes = pl.Series(["1", "2"]), ("target_1", "target_2", "target_3")
    with pytest.raises(
        DataError,
        match=r'label "1" can be read as class "target_1" by its suffix or class "target_2"',
    ):
        read_labels(Path("x"), labels, classes)
    assert read_labels(Path("x"), labels, classes, "suffix").tolist() == [0, 1]
    assert read_labels(Path("x"), labels, classes, "position").tolist() == [1, 2]


@given(
    st.integers(-(10**20), 10**20),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from(["", " ", "\t"]),
)
def test_a_whole_number_has_one_spelling(number, zeros, behind, space):
    sign, digits = ("-" if number < 0 else ""), str(abs(number))
    spelt = f"{space}{sign}{'0' * zeros}{digits}{'.' + '0' * behind if behind else ''}{space}"
    assert plain_label(spelt) == str(number)


def test_spellings_of_a_number_are_one_class_in_the_training_table(tmp_path):
    def classes(*labels):
        rows = "".join(f"q {i},x,{label}\n" for i, label in enumerate(labels))
        (tmp_path / "train.csv").write_text(f"Question,Response,target\n{rows}")
        (tmp_path / "test.csv").write_text("id,Question,Response\n7,q b,x\n")
        table = read_training(TableParams(str(tmp_path / "train.csv"), str(tmp_path / "test.csv")))
        return table.classes, table.train["label"].to_list()

    assert classes("0.0", "1.0", "10.0", "2.0") == (("0", "1", "2", "10"), [0, 1, 3, 2])
    assert classes("6", "6.0", " 6 ", "7") == (("6", "7"), [0, 0, 0, 1])
    assert classes("v1.0", "v1") == (("v1", "v1.0"), [1, 0])
    with pytest.raises(DataError, match=r'1 rows have no label in "target" \(first: row 2\)'):
        classes("0.0", "nan", "1.0")
