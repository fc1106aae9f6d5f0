"""Which texts are one question: nothing that a reader would keep apart is joined, by `run` or by `optim`."""

import hashlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import DataError
from stackllm.tables import groups as module
from stackllm.tables.contest import TableParams, read_training
from stackllm.tables.groups import (
    group_codes,
    group_column,
    group_ids,
    groups_within,
    normalise,
    reading,
)

SAME = [
    ("What is Rust?", "what is rust"),
    ("What is Rust?", "WHAT IS RUST"),
    ("What is Rust?", "What Is  Rust ?"),
    ("What is Rust?", "what\n is\trust ?!"),
    ("What is Rust?", "What is\xa0Rust？"),
    ("Is it fine", "Is it ﬁne."),
    ("Où est le café ?", "Où est le cafe\u0301 ?"),
    ("Summarise the following:", "summarise the following"),
    ("Wait… what is it", "Wait... what is it"),
    ("Should I go", "should i go?"),
]
APART = [
    ("How much is 10² pounds?", "How much is 102 pounds?"),
    ("Is H₂O wet?", "Is H2O wet?"),
    ("What is ½ of it?", "What is 1⁄2 of it?"),
    ("See item ① there", "See item 1 there"),
    ("Is ℝ a field?", "Is R a field?"),
    ("How many Mb are it?", "How many MB are it?"),
    ("Is 5 mg much?", "Is 5 Mg much?"),
    ("Is 5mW much?", "Is 5MW much?"),
    ("What is C?", "What is c?"),
    ("What does pH mean?", "What does PH mean?"),
    ("What is 5!", "What is 5?"),
    ("What is (n+1)!", "What is (n+1)?"),
    ("Is C++ fast?", "Is C fast?"),
    ("Is .NET fast?", "Is NET fast?"),
    ("Is it -5 there?", "Is it 5 there?"),
    ("Are the Maße right?", "Are the Masse right?"),
    ("q1X", "Q1x"),
    ("Q7", "q7"),
    ("Q7?", "q7"),
]


def one_group(first, second):
    ids = group_ids(pl.Series([first, second]))
    codes = groups_within(Path("x"), pl.DataFrame({"g": [first, second]}), "g").codes
    assert (ids[0] == ids[1]) == (codes[0] == codes[1])
    return bool(ids[0] == ids[1])


@pytest.mark.parametrize(("first", "second"), SAME)
def test_what_no_reader_minds_makes_no_group(first, second):
    assert one_group(first, second)


@pytest.mark.parametrize(("first", "second"), APART)
def test_what_a_reader_keeps_apart_is_kept_apart(first, second):
    assert not one_group(first, second)


def test_a_question_has_the_same_id_in_every_process_and_table():
    assert group_ids(pl.Series(["What is Rust?"])).to_list() == [
        hashlib.sha256(b"what is rust").hexdigest()[:16]
    ]


texts = st.lists(
    st.text(st.sampled_from("aA Bcß²2①½Ⅷé\u0301\xa0\n?!.:-+µ１"), max_size=8),
    min_size=1,
    max_size=12,
)


@given(texts)
def test_groups_are_what_normalising_and_reading_both_call_one(some):
    """The oracle compares every pair; ids, and the codes of `optim`, must part texts the same way."""
    filled = [f"{text}x" for text in some]
    key = [(normalise(text), reading(text)) for text in filled]
    expected = [[a == b for b in key] for a in key]
    ids = group_ids(pl.Series(filled)).to_list()
    assert [[a == b for b in ids] for a in ids] == expected
    groups = groups_within(Path("x"), pl.DataFrame({"g": filled}), "g")
    codes = groups.codes.tolist()
    assert [[a == b for b in codes] for a in codes] == expected
    first_spelt = [text for i, text in enumerate(filled) if key[i] not in key[:i]]
    assert list(groups.names) == first_spelt


@given(st.lists(st.text(), min_size=1))
def test_many_texts_are_normalised_at_once_as_one_by_one(some):
    expected = [normalise(text) for text in some]
    assert module._normalised(pl.Series(some, dtype=pl.String)).to_list() == expected


@given(st.text(), st.text(alphabet=" \t\n.?!", max_size=4))
def test_normalising_twice_changes_nothing_more(text, tail):
    assert normalise(normalise(text)) == normalise(text)
    if normalise(text).strip(" .?!…:;,"):
        assert normalise(text + tail) == normalise(text)


def write(folder, name, questions):
    pl.DataFrame(
        {
            "id": [str(i) for i in range(2 * len(questions))],
            "Question": [q for q in questions for _ in range(2)],
            "qid": [f"{'qQ'[i % 2]}{i // 2}" for i in range(len(questions)) for _ in range(2)],
            "Response": "x",
            "target": ["0", "1"] * len(questions),
        }
    ).write_csv(folder / name)


def test_run_and_optim_see_the_same_groups(tmp_path):
    questions = [text for pair in (*SAME, *APART) for text in pair]
    write(tmp_path, "train.csv", ["Where am I?", "Who is there?"])
    write(tmp_path, "test.csv", questions)
    paths = {"train": str(tmp_path / "train.csv"), "test": str(tmp_path / "test.csv")}
    frame = pl.read_csv(tmp_path / "test.csv", infer_schema=False)
    for column, exact, expected in (
        ("Question", "normalised", None),
        ("Question", "exact", len(set(questions))),
        ("qid", "normalised", len(questions)),
    ):
        params = TableParams(**paths, group=column, question="Question", same_question=exact)
        table = read_training(params)
        groups = groups_within(Path("test.csv"), frame, column, exact)
        assert table.test["group_id"].n_unique() == len(groups.names)
        assert expected is None or len(groups.names) == expected
        assert bool(table.warnings) == bool(groups.merged) == (expected is None)


def test_ids_with_spaces_are_ids_where_the_question_is_another_column(tmp_path):
    for name in ("train.csv", "test.csv"):
        write(tmp_path, name, ["Where am I?", "Who is there?"])
        frame = pl.read_csv(tmp_path / name).with_columns(qid="Item " + pl.col("qid"))
        frame.with_columns(pl.col("qid").replace({"Item Q0": "item q0"})).write_csv(tmp_path / name)
    paths = {"train": str(tmp_path / "train.csv"), "test": str(tmp_path / "test.csv")}
    apart = read_training(TableParams(**paths, group="qid", question="Question"))
    assert (apart.test["group_id"].n_unique(), apart.warnings) == (2, ())
    joined = read_training(TableParams(**paths, group="qid"))
    assert joined.test["group_id"].n_unique() == 1
    assert '(such as "Item q0" and "item q0")' in joined.warnings[0]


def test_other_texts_find_their_group():
    groups = groups_within(Path("x"), pl.DataFrame({"g": ["Who am I?", "Who are you?"]}), "g")
    assert group_codes(groups, pl.Series(["who are you", None, "who am i", "q"])) == [
        1,
        None,
        0,
        None,
    ]
    exact = groups_within(Path("x"), pl.DataFrame({"g": ["Who am I?", "who am i"]}), "g", "exact")
    assert group_codes(exact, pl.Series(["who am i", "Who am i"])) == [1, None]


def test_codes_follow_first_appearance_whatever_the_order_of_rows():
    names = np.array(["b c", "a c", "b c", "B c", "a c"])
    groups = groups_within(Path("x"), pl.DataFrame({"g": names}), "g")
    assert groups.codes.tolist() == [0, 1, 0, 2, 1]
    assert groups.names == ("b c", "a c", "B c")


def test_a_column_called_nearly_like_groups_is_named():
    with pytest.raises(DataError, match=r'column "question " looks like the groups\. Rename it "Q'):
        group_column(Path("x"), ["id", "question "], None)
    assert group_column(Path("x"), ["id", "prompt", "question "], None) == "prompt"
    assert group_column(Path("x"), ["id", "topic"], None) is None
