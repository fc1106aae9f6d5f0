"""Asked recipes: what is read, what is asked, and what columns come of the answers."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import DataError, MissingInputError, UsageError
from stackllm.rating.question import Asked, Case, list_cases, make_columns, read_asked
from stackllm.recipes.loader import find_asked, find_recipes, run_recipes
from stackllm.store.digest import digest

RATING = Asked("r", "rating", "Rate.", ("1", "2", "3"))
CATEGORY = Asked("c", "category", "Sort.", ("math", "history", "other"), ("question",))
COMPARISON = Asked("p", "comparison", "Compare.", ("A", "B"), partners=1)


def frame(rows):
    return pl.DataFrame(rows, schema=["group_id", "question", "response"], orient="row")


def test_the_shipped_recipes():
    assert find_asked() == ["category", "gpt_rating", "preferred", "review"]
    rating, category, preferred = (
        read_asked(Path(f"features/{name}.toml"))
        for name in ("gpt_rating", "category", "preferred")
    )
    assert rating.answers == tuple(map(str, range(1, 11)))
    assert category.sees == ("question",)
    assert {"biology", "history", "math", "idea", "recommendation"} <= set(category.answers)
    assert preferred.kind == "comparison"
    review = read_asked(Path("features/review.toml"))
    assert review.kind == "rubric"
    assert review.names == ("clarity", "correctness", "completeness", "tone")
    assert [asked.block for asked in review.questions][-1] == "review_tone"
    assert {asked.sees for asked in review.questions} == {review.sees}
    assert rating.questions == (rating,)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("scale = [1, 10]", '"instruction" must be a text'),
        ("instruction = 'x'", "give exactly one of"),
        ("instruction = 'x'\nscale = [1, 2]\nlabels = ['a', 'b']", "give exactly one of"),
        ("instruction = 'x'\nscale = [5, 1]", '"scale" goes up'),
        ("instruction = 'x'\nscale = [1, 1.5]", "two whole numbers"),
        ("instruction = 'x'\nscale = [1, 1000]", "at most 101 steps"),
        ("instruction = 'x'\nlabels = ['a']", "2 to 101"),
        ("instruction = 'x'\nlabels = ['a b', 'A-b']", "two labels are"),
        ("instruction = 'x'\nlabels = ['a', '!']", "printable characters"),
        ("instruction = 'x'\nlabels = 'ab'", "a list of texts"),
        ("instruction = 'x'\ncompare = 0", "number of partners"),
        ("instruction = 'x'\ncompare = 1\nsees = ['question']", 'sees "response"'),
        ("instruction = 'x'\nscale = [1, 2]\nsees = ['answer']", "knows no 'answer'"),
        ("instruction = 'x'\nscal = [1, 2]", 'Did you mean "scale"'),
        ("instruction = ", "not a TOML file"),
    ],
)
def test_files_that_make_no_sense(tmp_path, content, said):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        read_asked(path)


def rubric(*questions, head="instruction = 'x'"):
    """A file's text: questions are pairs of a name, as TOML writes it, and its keys."""
    return "\n".join([head, *(f"[rubric.{name}]\n{keys}" for name, keys in questions)])


RATED = "ask = 'How?'\nscale = [1, 5]"
ANOTHER = ("tone", "ask = 'Which?'\nlabels = ['x', 'y']")
NAME = "a letter and up to 39 letters"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (rubric(("a", RATED)), "2 to 20 questions, not 1"),
        (rubric(*((f"q{i}", RATED) for i in range(30))), "2 to 20 questions, not 30"),
        (f"{rubric(head='rubric = 5')}\ninstruction = 'x'", r"such as \[rubric.clarity\]"),
        (f"{rubric(ANOTHER)}\n[rubric]\na = 'How?'", "a table per question"),
        (rubric(("a", RATED), ANOTHER, head="instruction = 'x'\nscale = [1, 2]"), "exactly one of"),
        (rubric(("a", RATED), ANOTHER, head="instruction = 'x'\ncompare = 1"), 'and "rubric"'),
        (rubric(("a", RATED), ANOTHER, head=""), '"instruction" must be a text'),
        (rubric(("a", "scale = [1, 5]"), ANOTHER), 'question "a": "ask" must be a text'),
        (rubric(("a", "ask = ' '\nscale = [1, 5]"), ANOTHER), '"ask" must be a text'),
        (rubric(("a", "ask = 'How?'"), ANOTHER), 'one of "scale" and "labels"'),
        (rubric(("a", f"{RATED}\nlabels = ['x', 'y']"), ANOTHER), 'one of "scale" and "labels"'),
        (rubric(("a", "ask = 'How?'\nscale = [5, 1]"), ANOTHER), 'question "a": "scale" goes up'),
        (rubric(("a", "ask = 'How?'\nlabels = ['x']"), ANOTHER), 'question "a": "labels" must be'),
        (rubric(("a", "ask = 'How?'\nlabels = ['x', 'X']"), ANOTHER), "two labels are"),
        (rubric(("a", "ask = 'How?'\ncompare = 1"), ANOTHER), 'no key "compare"'),
        (rubric(("a", f"{RATED}\nscal = 1"), ANOTHER), 'Did you mean "scale"'),
        (rubric(("a", f"{RATED}\nsees = ['question']"), ANOTHER), "Put it above all"),
        (rubric(("'a: b'", RATED), ANOTHER), NAME),
        (rubric(("'1'", RATED), ANOTHER), NAME),
        (rubric(("_", RATED), ANOTHER), NAME),
        (rubric(("''", RATED), ANOTHER), NAME),
        (rubric(("a" * 41, RATED), ANOTHER), NAME),
        (rubric((r'"a\nb"', RATED), ANOTHER), NAME),
        (rubric(("Tone", RATED), ANOTHER), 'two questions are "tone"'),
        (rubric(("a-b", RATED), ("'A b'", RATED)), "apart from case and marks"),
        (rubric(("a", RATED), ("a", RATED)), "not a TOML file"),
        (rubric(("a", RATED), ("b", f"{RATED}\ninstruction = 'x'"), head=""), "Put it above all"),
    ],
)
def test_rubrics_that_make_no_sense(tmp_path, content, said):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(DataError, match=said) as raised:
        read_asked(path)
    assert str(raised.value).startswith(str(path))


def test_two_recipes_that_would_make_the_same_column(tmp_path):
    first, second, made_by_hand = (
        tmp_path / name for name in ("mine.toml", "mine_tone.toml", "mine_tone.py")
    )
    first.write_text(rubric(("clarity", RATED), ("tone", RATED)))
    second.write_text("instruction = 'x'\nscale = [1, 3]")
    said = (
        r'mine_tone.toml: "mine_tone" would make the column "mine_tone_expected", .* of .*mine.toml'
    )
    with pytest.raises(DataError, match=said):
        find_recipes((str(first), str(second)))
    second.write_text(rubric(("a", "ask = 'x'\nlabels = ['x ok', 'y']"), ("a_p_x", RATED)))
    with pytest.raises(
        DataError, match=r'"mine_tone_a_p_x" would make the .*_p_x_ok", and so would'
    ):
        find_recipes((str(second),))
    made_by_hand.write_text("def build(frame):\n    return frame.select('row_id', ok='row_id')")
    recipes = find_recipes((str(first), str(made_by_hand)), without=("encoder",))
    rows = frame([("g", "q", "a")])
    rated = pl.DataFrame({"expected": [1.0], "ok": [1.0]})
    with pytest.raises(DataError, match=r'the column "mine_tone_ok" is one of .*, too'):
        run_recipes(recipes, rows, pl.DataFrame(), {"mine_clarity": rated, "mine_tone": rated})


def test_a_question_of_its_own_is_known_as_before():
    """What was answered before there were rubrics is found again."""
    assert digest(RATING) == "6b684c8100429ab1c4a025bca00d788ad9ce81a4409bcd384191e9f1e6379b27"


def test_asked_recipes_are_off_unless_turned_on(tmp_path):
    assert not any(recipe.is_asked for recipe in find_recipes())
    on = find_recipes(ask=("gpt_rating",))
    assert [recipe.block for recipe in on if recipe.is_asked] == ["gpt_rating"]
    needs = {recipe.block: recipe.needs for recipe in on}
    assert "asked" in needs["within"]
    assert "asked" not in {need for recipe in find_recipes() for need in recipe.needs}
    with pytest.raises(UsageError, match='Did you mean "gpt_rating"'):
        find_recipes(ask=("gpt_ratin",))
    with pytest.raises(MissingInputError, match="no such recipe file"):
        find_recipes(extra=(str(tmp_path / "no.toml"),))


def test_a_third_file_flows_through_aggregation(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("scale = [1, 5]\ninstruction = 'How kind is it?'")
    rows = frame([("g", "q", "a"), ("g", "q", "b"), ("h", "q", "c")])
    recipes = find_recipes((str(mine),), without=("encoder",))
    asked = read_asked(mine)
    _, places = list_cases(asked, rows)
    answers = np.array([[0.2] * 5, [0, 0, 0, 0, 1.0], [np.nan] * 5])
    columns = make_columns(asked, places, answers, 3)
    made = run_recipes(recipes, rows, pl.DataFrame(), {"mine": columns})
    assert made["mine_expected"].to_list()[:2] == pytest.approx([3, 5])
    assert made["mine_ok"].to_list() == [1, 1, 0]
    assert made["within_asked_mine_mean"].to_list()[:2] == pytest.approx([4, 4])
    assert made["within_asked_mine_gap"].to_list()[:2] == pytest.approx([2, 0])
    assert made["standing_asked_mine_rank"].to_list()[:2] == [1, 2]
    assert np.isnan(made["mine_expected"][2])


def test_a_missing_rating_does_not_spoil_its_group(tmp_path):
    rows = frame([("g", "q", "a"), ("g", "q", "b"), ("g", "q", "c")])
    recipes = find_recipes(without=("encoder",), ask=("gpt_rating",))
    columns = pl.DataFrame({"expected": [2.0, np.nan, 4.0], "ok": [1.0, 0.0, 1.0]})
    made = run_recipes(recipes, rows, pl.DataFrame(), {"gpt_rating": columns})
    assert made["within_asked_gpt_rating_mean"].to_list() == [3, 3, 3]
    assert made["within_asked_gpt_rating_gap"].to_list() == [2, None, 0]


answers = st.lists(st.floats(0.01, 1), min_size=3, max_size=3)


@given(st.lists(answers | st.none(), min_size=1, max_size=6))
def test_columns_against_the_definitions(drawn):
    rows = frame([("g", "q", f"r{i}") for i in range(len(drawn))])
    probabilities = np.array(
        [np.full(3, np.nan) if a is None else np.array(a) / sum(a) for a in drawn]
    )
    rated = make_columns(RATING, list_cases(RATING, rows)[1], probabilities, rows.height)
    for row, own in zip(rated.iter_rows(named=True), probabilities, strict=True):
        if np.isnan(own).any():
            assert row["ok"] == 0
            assert all(np.isnan(row[name]) for name in ("expected", "entropy", "likeliest"))
            continue
        assert row["ok"] == 1
        assert row["expected"] == pytest.approx(
            sum(p * v for p, v in zip(own, (1, 2, 3), strict=True))
        )
        assert row["entropy"] == pytest.approx(-sum(p * np.log(p) for p in own))
        assert row["likeliest"] == 1 + int(np.argmax(own))


def test_a_question_is_sorted_once_and_every_row_gets_its_category():
    rows = frame([("g", "q1", "a"), ("h", "q2", "b"), ("g", "q1", "c")])
    cases, places = list_cases(CATEGORY, rows)
    assert cases == [Case("q1", ()), Case("q2", ())]
    made = make_columns(CATEGORY, places, np.array([[0.7, 0.2, 0.1], [0.0, 0.1, 0.9]]), 3)
    assert made.columns == ["p_math", "p_history", "p_other", "code", "ok"]
    assert made["code"].to_list() == [0, 2, 0]
    assert made["p_other"].to_list() == [0.1, 0.9, 0.1]


texts = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6)


@given(texts, st.integers(1, 3))
def test_partners_rotate(drawn, partners):
    asked = Asked("p", "comparison", "Compare.", ("A", "B"), partners=partners)
    rows = frame([("g", "q", text) for text in drawn])
    cases, places = list_cases(asked, rows)
    steps = min(partners, len(drawn) - 1)
    for row, text in enumerate(drawn):
        own = [(case, sign) for r, case, sign in places if r == row]
        assert [sign for _, sign in own].count(1) == steps == [sign for _, sign in own].count(-1)
        for case, sign in own:
            assert cases[case].responses[0 if sign == 1 else 1] == text


@given(st.permutations(range(5)))
def test_the_order_of_the_table_says_nothing(order):
    rows = frame([("g", "q", f"text {i}") for i in range(5)])
    first = set(list_cases(COMPARISON, rows)[0])
    assert set(list_cases(COMPARISON, rows[list(order)])[0]) == first


def test_a_preference_for_the_first_place_cancels_out():
    rows = frame([("g", "q", "a"), ("g", "q", "b"), ("alone", "q", "c")])
    cases, places = list_cases(COMPARISON, rows)
    assert len(cases) == 2
    biased = make_columns(COMPARISON, places, np.array([[0.8, 0.2]] * 2), 3)
    assert biased["logodds"].to_list()[:2] == pytest.approx([0, 0])
    assert biased["ok"].to_list() == [1, 1, 0]
    fair = np.array([[0.9, 0.1] if case.responses[0] == "a" else [0.1, 0.9] for case in cases])
    assert make_columns(COMPARISON, places, fair, 3)["logodds"].to_list()[:2] == pytest.approx(
        [np.log(9), -np.log(9)]
    )
