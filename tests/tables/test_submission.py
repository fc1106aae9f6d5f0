from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import DataError
from stackllm.tables.submission import match_classes, read_submission

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


def submission(tmp_path, header, *rows, **options):
    path = tmp_path / "sub.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return read_submission(path, group=lambda names: "g" if "g" in names else None, **options)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    ("header", "rows", "odd"),
    [
        ("Unnamed: 0,id,a,b", ["0,7,.9,.4", "1,8,.2,.3"], "Unnamed: 0"),
        ("Unnamed: 0,id,a,b", ["0,7,.9,.1"], "Unnamed: 0"),
        ("Unnamed: 0.1,id,a,b", ["0,7,.9,.1"], None),
        ("id,__index_level_0__,a,b", ["7,0,.9,.4", "8,1,.2,.3"], "__index_level_0__"),
        ("Unnamed: 0,a,b", ["0,.9,.1", "1,.2,.8"], "Unnamed: 0"),
        ("id,prompt_id,a,b", ["7,0,.9,.1", "8,0,.2,.8"], "prompt_id"),
        ("id,prompt_id,a,b", ["7,0,.9,.4", "8,1,.2,.3"], "prompt_id"),
        ("id,promptId,a,b,c", ["7,12,60,30,10", "8,12,20,30,49"], "promptId"),
        ("id,n,a,b", ["7,0,60,40", "8,1,20,80", "9,2,50,50"], "n"),
        ("id,n,a,b", ["7,3,.6,.4", "8,1,.2,.8"], "n"),
        ("id,index,a,b", ["7,0,.9,.4", "8,1,.2,.3"], "index"),
        ("id,length,a,b", ["7,120,.9,.4", "8,120,.2,.3"], "length"),
        ("id,seconds,a,b", ["7,1.5,.9,.4", "8,2.25,.2,.3"], "seconds"),
    ],
)
def test_what_is_no_probability_is_never_a_class_in_silence(
    tmp_path, header, rows, odd, renormalise
):
    if odd is None:  # a name of somebody's own: the sum tells
        assert submission(tmp_path, header, *rows).classes == ("Unnamed: 0.1", "a", "b")
        return
    with pytest.raises(DataError, match=f'column "{odd}" (looks like no class|is the index)'):
        submission(tmp_path, header, *rows, renormalise=renormalise)
    # the next step works: without that column it is read
    place = header.split(",").index(odd)
    fewer = [
        ",".join(c for i, c in enumerate(line.split(",")) if i != place) for line in (header, *rows)
    ]
    if "id" in header.split(","):
        result = submission(tmp_path, *fewer, renormalise=True)
        assert set(result.classes) <= set("abc")
    if not odd.startswith(("Unnamed", "__")):  # or it is said to be the group
        renamed = header.replace(odd, "g")
        assert "g" not in submission(tmp_path, renamed, *rows, renormalise=True).classes


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("id,a,b", ["7,3,1", "8,1,1"]),  # scores
        ("id,a,b", ["7,60,40", "8,0,100"]),  # percent
        ("id,a,b,c", ["7,60,40,0", "8,0,100,0"]),
        ("id,a,b,c", ["7,5,1,0", "8,2,1,0"]),  # votes, none for c
        ("id,a,b,c", ["7,1,0,0", "8,0,1,0"]),  # one-hot
        ("id,a,b", ["7,.9,.4", "8,.2,.3"]),  # sigmoids
        ("id,a,b", ["7,2.5,.5", "8,.25,1.5"]),  # odds
        ("key,en,id,fr", ["7,.5,.25,.25", "8,0,1,0"]),  # a class called id
        ("id,paid_id,b", ["7,1,0", "8,0,1"]),  # one-hot, called like ids, and it sums to 1
        ("id,a,b", ["7,3,0.5"]),  # one row tells nothing
    ],
)
def test_scores_counts_and_one_hot_are_classes(tmp_path, header, rows):
    id_name = header.split(",")[0]
    result = submission(tmp_path, header, *rows, renormalise=True, id_name=id_name)
    assert [id_name, *result.classes] == header.split(",")


def test_rows_off_get_the_advice_of_the_caller_and_no_other(tmp_path):
    with pytest.raises(DataError, match=r"sum 0\.9\)\. Scale each row to sum to 1\.$"):
        submission(tmp_path, "id,a,b", "7,.5,.4")
    with pytest.raises(DataError, match=r"\. Ask Ada\.$"):
        submission(tmp_path, "id,a,b", "7,.5,.4", advice="Ask Ada.")


def test_ids_are_where_their_name_says(tmp_path):
    assert submission(tmp_path, "a,Id,b", ".5,7,.5").id == "Id"
    assert submission(tmp_path, "row,a,b", "7,.5,.5").id == "row"
    with pytest.raises(DataError, match='"Id" and "ID" could both hold the ids'):
        submission(tmp_path, "a,Id,b,ID", ".5,7,.5,8")
    with pytest.raises(DataError, match=r'the first, "a", holds probabilities\. Add a'):
        submission(tmp_path, "a,b,c", ".5,.25,.25", ".25,.5,.25")
    with pytest.raises(DataError, match=r'no column "key". There are: "id"'):
        submission(tmp_path, "id,a,b", "7,.5,.5", id_name="key")
