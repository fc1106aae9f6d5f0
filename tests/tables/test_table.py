import dataclasses
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import DataError, MissingInputError
from stackllm.tables.contest import TableParams, read_training, sort_classes
from stackllm.tables.files import read_frame

TRAIN = "Question,Response,target\nq1,a,0\nq1,b,1\nq2,c,0\nq2,d,1\n"
TEST = "id,Question,Response\n007,q3,x\n008,q3,y\n"


@pytest.fixture
def contest(tmp_path):
    def write(train=TRAIN, test=TEST, **options):
        (tmp_path / "train.csv").write_bytes(train if isinstance(train, bytes) else train.encode())
        (tmp_path / "test.csv").write_bytes(test if isinstance(test, bytes) else test.encode())
        return TableParams(
            train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"), **options
        )

    return write


def test_kaggle_layout_needs_no_configuration(contest):
    table = read_training(contest())
    assert table.classes == ("0", "1")
    assert table.train["row_id"].to_list() == ["0", "1", "2", "3"]
    assert table.test["row_id"].to_list() == ["007", "008"]
    assert table.train["label"].to_list() == [0, 1, 0, 1]
    assert table.train["group_id"].n_unique() == 2
    assert "label" not in table.rows().columns
    assert table.notes == table.warnings == ()


def test_parquet_and_csv_give_the_same_table(contest, tmp_path):
    params = contest()
    for name in ("train", "test"):
        read_frame(tmp_path / f"{name}.csv").write_parquet(tmp_path / f"{name}.parquet")
    other = TableParams(train=str(tmp_path / "train.parquet"), test=str(tmp_path / "test.parquet"))
    assert read_training(other).train.equals(read_training(params).train)
    assert read_training(other).test.equals(read_training(params).test)


def test_bom_crlf_and_newlines_in_fields_are_read(contest):
    train = (
        b'\xef\xbb\xbfQuestion,Response,target\r\n"q,1","a\r\n\r\nb",0\r\n"q,1","say ""x""",1\r\n'
    )
    table = read_training(contest(train, TEST))
    assert table.train["response"].to_list() == ["a\r\n\r\nb", 'say "x"']
    assert table.train["question"].to_list() == ["q,1", "q,1"]


def test_empty_lines_are_no_rows(contest):
    table = read_training(contest("Question,Response,target\nq,a,0\n\nq,b,1\n\n", TEST))
    assert table.train["response"].to_list() == ["a", "b"]


def test_parquet_may_hold_further_columns_of_any_type(contest, tmp_path):
    params = contest("Question,Response,target\nq,a,0\nq,b,1\n", TEST)
    wide = read_frame(Path(params.train)).with_columns(vector=pl.Series([[1.0, 2.0], [3.0]]))
    wide.write_parquet(tmp_path / "wide.parquet")
    table = read_training(dataclasses.replace(params, train=str(tmp_path / "wide.parquet")))
    assert table.train["response"].to_list() == ["a", "b"]


def test_other_column_names_and_string_labels(contest):
    train = "prompt,answer,author\np,a,zoe\np,b,adam\n"
    test = "key,prompt,answer\nk1,r,a\nk2,r,b\n"
    table = read_training(
        contest(train, test, group="prompt", text="answer", target="author", id="key")
    )
    assert table.classes == ("adam", "zoe")
    assert table.id_name == "key"


def test_all_problems_are_reported_at_once(contest):
    train = "Question,Respons,target\nq1,a,0\n"
    test = "id,Question,Response\n1,q3,x\n1,q3,y\n2,,z\n"
    with pytest.raises(DataError) as caught:
        read_training(contest(train, test))
    report = str(caught.value)
    assert 'no column "Response". Did you mean "Respons"?' in report
    assert "1 ids occur more than once" in report
    assert "rows 1 and 2" in report
    assert '1 rows have no group in column "Question" (first: row 3)' in report


def test_missing_labels_name_their_row(contest):
    with pytest.raises(DataError, match=r'1 rows have no label in "target" \(first: row 2\)'):
        read_training(contest(TRAIN.replace("q1,b,1", "q1,b,"), TEST))


def test_near_identical_questions_are_one_group_and_said(contest):
    table = read_training(
        contest(TRAIN.replace("q1,b", "What is Rust?,b").replace("q1,a", "what  is rust,a"), TEST)
    )
    assert table.train["group_id"].n_unique() == 2
    (warning,) = table.warnings
    assert "1 groups are spelt in several ways" in warning
    assert '"what is rust" and "What is Rust?"' in warning


def test_broken_quotas_and_empty_texts_are_counted(contest):
    table = read_training(contest(TRAIN.replace("q2,d,1", "q2,,0"), TEST + "009,q3,z\n010,q4,\n"))
    text = "\n".join(table.notes)
    assert "1 of 2 groups do not hold every class 1×" in text
    assert "1 of 2 groups have fewer than 2 rows" in text
    assert "1 of 2 groups have more than 2 rows" in text
    assert 'train.csv: 1 of 4 rows have no text in "Response"' in text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is empty"),
        (b"Question,Response,target\n", "a header but no row"),
        (b"Question,Response,Response\nq,a,0\n", 'the header names "Response" more than once'),
        (b"Question,Response,target\nq,a,0\nq,b\n", "row 2 has 2 fields and the header 3"),
        (b"Question,Response,target\nq,a,0\n,,\n", "row 2 is empty"),
        (b"Question,Response,target\nq,a\xff,0\n", "line 2 is not UTF-8"),
        ("Question\n".encode("utf-16"), "this is UTF-16"),
        (b"Question,Response,target\nq,a\0,0\n", "line 2 holds a NUL"),
        (b'Question,Response,target\nq,"a,0\n', "a quote is opened and never closed, line 2"),
        (b"PK\x03\x04", "a ZIP archive"),
    ],
)
def test_bad_files_get_a_sentence(contest, content, sentence):
    with pytest.raises(DataError, match=sentence):
        read_training(contest(content, TEST))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(MissingInputError, match=r"no such file. Run in the folder"):
        read_training(TableParams(train=str(tmp_path / "no.csv"), test=str(tmp_path / "no2.csv")))
    with pytest.raises(MissingInputError, match="this is a folder"):
        read_frame(tmp_path)


def test_one_label_only_is_refused(contest):
    with pytest.raises(DataError, match="holds one label only"):
        read_training(contest(TRAIN.replace(",1\n", ",0\n"), TEST))


def test_classes_are_sorted_as_numbers_or_text():
    assert sort_classes(["10", "9", "-1"]) == ("-1", "9", "10")
    assert sort_classes(["b", "10", "a"]) == ("10", "a", "b")


cell = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=20)


@given(st.lists(st.tuples(cell, cell), min_size=1, max_size=8))
def test_any_cell_survives_csv(tmp_path_factory, rows):
    rows = [(f"x{a}", f"{b}y") for a, b in rows]
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    pl.DataFrame(rows, schema=["a", "b"], orient="row").write_csv(path)
    assert read_frame(path).rows() == rows
