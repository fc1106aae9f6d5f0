"""One rule for the id column of every table, and one join."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import DataError
from stackllm.tables.contest import TableParams, read_new, read_training
from stackllm.tables.ids import Rows, find_rows, id_column

PATH = Path("other.csv")


def frame(*names):
    return pl.DataFrame({name: ["7", "5", "6"] for name in names})


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        (["Question", "id"], None, "id"),
        (["id", "Id", "row_id"], None, "id"),
        (["Id", "row_id"], None, "row_id"),
        (["ID"], None, "ID"),
        (["id "], None, "id "),
        (["Row ID"], None, "Row ID"),
        (["key", "id"], "key", "key"),
    ],
)
def test_the_exact_name_comes_first_then_the_only_one_that_is_nearly_it(names, wanted, expected):
    assert id_column(PATH, frame(*names), wanted) == expected


@pytest.mark.parametrize(
    ("names", "wanted", "said"),
    [
        (
            ["Id", "ID"],
            None,
            r'columns "Id" and "ID" could both hold the ids\. Rename the right one "id"',
        ),
        (["Key"], "key", r'no column "key"\. Did you mean "Key"'),
        (
            ["test_id"],
            None,
            r'column "test_id" looks like ids, but is not called so\. Rename it "id"',
        ),
        (["Unnamed: 0"], None, 'column "Unnamed: 0" looks like ids'),
        (["promptId"], None, 'column "promptId" looks like ids'),
    ],
)
def test_what_cannot_be_told_is_named(names, wanted, said):
    with pytest.raises(DataError, match=said):
        id_column(PATH, frame(*names), wanted)


def test_columns_that_hold_no_ids_are_none():
    repeated = pl.DataFrame({"prompt_id": ["1", "1"], "index": ["0", "1"], "text": ["a", "b"]})
    assert id_column(PATH, repeated) is None
    assert id_column(PATH, frame("id"), beside=["id"]) is None
    with pytest.raises(DataError, match='column "test_id" looks like ids'):
        id_column(PATH, pl.DataFrame({"test_id": ["0", "1"]}))


def test_a_table_that_is_matched_is_known_by_the_name_or_the_ids_of_the_rows():
    rows = Rows(pl.Series("key", ["5", "6", "7"]), Path("sub.csv"))
    assert id_column(PATH, frame("id", "key"), rows=rows) == "key"
    assert id_column(PATH, frame("KEY"), rows=rows) == "KEY"
    assert id_column(PATH, frame("Id"), "key", rows=rows) == "Id"
    with pytest.raises(DataError, match=r'column "sample" looks like ids.*Rename it "key"'):
        id_column(PATH, frame("sample"), rows=rows)


names = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=9, unique=True)


@given(names, st.randoms())
def test_rows_are_found_wherever_they_stand(ids, random):
    shuffled = random.sample(ids, len(ids))
    rows, other = (
        Rows(pl.Series("id", ids), Path("sub.csv")),
        pl.DataFrame({"id": shuffled, "v": shuffled}),
    )
    positions, by_number = find_rows(rows, PATH, other)
    assert other["v"][positions].to_list() == ids
    assert not by_number
    if len(ids) > 1:
        few = Rows(pl.Series("id", ids[1:]), Path("sub.csv"))
        positions, _ = find_rows(few, PATH, other, surplus=True)
        assert other["v"][positions].to_list() == ids[1:]
        with pytest.raises(DataError, match=r"1 ids of other\.csv are not in sub\.csv"):
            find_rows(few, PATH, other)
        with pytest.raises(DataError, match=r"1 ids of sub\.csv are not in other\.csv"):
            find_rows(rows, PATH, other.filter(pl.col("id") != ids[0]), surplus=True)


def test_rows_without_ids_are_matched_by_their_number_only_where_all_are_there():
    rows = Rows(pl.Series("id", ["2", "0", "1"]), Path("sub.csv"))
    positions, by_number = find_rows(rows, PATH, pl.DataFrame({"v": ["a", "b", "c"]}))
    assert (positions.tolist(), by_number) == ([2, 0, 1], True)
    with pytest.raises(DataError, match=r"1 row numbers of other\.csv are not in sub\.csv"):
        find_rows(rows, PATH, pl.DataFrame({"v": ["a"] * 4}), surplus=True)


def test_an_id_that_occurs_twice_is_refused():
    rows = Rows(pl.Series("id", ["1", "2"]), Path("sub.csv"))
    with pytest.raises(DataError, match=r"1 ids occur more than once.*rows 1 and 3"):
        find_rows(rows, PATH, pl.DataFrame({"id": ["1", "2", "1"]}), surplus=True)


@pytest.mark.parametrize("name", ["id", "Id", "ID", "id ", "row_id", "Row Id"])
def test_a_tables_ids_go_into_the_submission_under_their_own_name(tmp_path, name):
    (tmp_path / "train.csv").write_text("Question,Response,target\nq a,x,0\nq a,y,1\n")
    (tmp_path / "test.csv").write_text(f"{name},Question,Response\n907,q b,x\n906,q b,y\n")
    params = TableParams(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"))
    table, new = read_training(params), read_new(tmp_path / "test.csv", params)
    for rows in (table.test_rows(), new.rows):
        assert (rows.ids.name, rows.ids.to_list()) == (name, ["907", "906"])
    assert table.notes == table.warnings == new.warnings == ()


def test_rows_that_are_numbered_are_said_and_a_column_of_codes_named(tmp_path):
    (tmp_path / "train.csv").write_text("Question,Response,target\nq a,x,0\nq a,y,1\n")
    (tmp_path / "test.csv").write_text("code,Question,Response\ns9,q b,x\ns7,q b,y\n")
    params = TableParams(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"))
    table = read_training(params)
    assert table.test["row_id"].to_list() == ["0", "1"]
    assert "no id column, so rows are numbered from 0" in table.notes[0]
    assert 'column "code" has another value in each of them' in table.warnings[0]
    named = read_training(TableParams(params.train, params.test, id="code"))
    assert named.test["row_id"].to_list() == ["s9", "s7"]
    assert named.notes == named.warnings == ()


@pytest.mark.parametrize("role", ["Question", "Response", "target"])
@pytest.mark.parametrize("change", [str.upper, str.lower, lambda name: f" {name}"])
def test_a_column_called_nearly_so_is_named_and_never_taken(tmp_path, role, change):
    header = ["Question", "Response", "target"]
    if change(role) == role:
        return
    other = [change(name) if name == role else name for name in header]
    (tmp_path / "train.csv").write_text(f"{','.join(other)}\nq a,x,0\nq a,y,1\n")
    (tmp_path / "test.csv").write_text("id,Question,Response\n907,q b,x\n906,q b,y\n")
    params = TableParams(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"))
    with pytest.raises(DataError, match=f'no column "{role}". Did you mean "{change(role)}"'):
        read_training(params)


def test_positions_are_whole_numbers():
    rows = Rows(pl.Series("id", ["1"]), Path("sub.csv"))
    assert (
        find_rows(
            rows, PATH, frame("id").with_columns(id=pl.Series(["1", "2", "3"])), surplus=True
        )[0].dtype
        == np.intp
    )


def test_a_name_that_is_not_there_is_told_with_all_columns():
    frame = pl.DataFrame({"id": ["1"], "Question": ["q"]})
    with pytest.raises(DataError, match='There are: "id", "Question"'):
        id_column(Path("t.csv"), frame, "nope", beside=["Question"])
    assert id_column(Path("t.csv"), frame, "Question", beside=["Question"]) == "Question"
