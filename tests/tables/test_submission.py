from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import DataError
from stackllm.tables.submission import match_classes

FILE = Path("oof.csv")
NAMES = st.text(st.characters(categories=("L", "N"), include_characters="_-. "), min_size=1)


@given(st.lists(NAMES, min_size=2, max_size=6, unique=True), NAMES, st.randoms())
def test_a_common_beginning_finds_every_class_in_any_order(classes, beginning, random):
    columns = [beginning + name for name in classes]
    header = columns.copy()
    random.shuffle(header)
    if not set(classes) & set(header):
        assert match_classes(FILE, header, classes) == columns


def test_names_come_before_beginnings_and_beginnings_before_suffixes():
    assert match_classes(FILE, ["id", "b", "a", "x_a", "x_b"], ["a", "b"]) == ["a", "b"]
    assert match_classes(FILE, ["id", "p_10", "p_1"], ["1", "10"]) == ["p_1", "p_10"]
    assert match_classes(FILE, ["id", "oof0", "oof1"], ["target_0", "target_1"]) == ["oof0", "oof1"]


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (["id", "a_3", "b_3"], 'first: "gpt-3"'),
        (["id", "oof_gpt-3", "oof_x", "x_gpt-3", "x_claude-3"], None),
        (["id", "x_gpt-3", "x_claude-3", "y_gpt-3", "y_claude-3"], 'could be column "x_gpt-3" or'),
    ],
)
def test_columns_of_one_suffix_are_never_taken_for_each_other(header, sentence):
    classes = ["gpt-3", "claude-3"]
    if sentence is None:
        assert match_classes(FILE, header, classes) == ["x_gpt-3", "x_claude-3"]
        return
    with pytest.raises(DataError, match=sentence):
        match_classes(FILE, header, classes)
