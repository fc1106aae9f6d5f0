"""Recipe files of the user's own: what they do wrong is one sentence."""

import polars as pl
import pytest

from stackllm.errors import DataError, UsageError
from stackllm.recipes.loader import find_recipes, run_recipes

ROWS = pl.DataFrame(
    {"row_id": ["a", "b"], "group_id": ["q", "q"], "question": ["?", "?"], "response": ["x", "yy"]}
)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def build(", "loading it failed .SyntaxError"),
        ("import sys\nsys.exit(1)", "loading it failed .SystemExit: 1, line 2"),
        ("1 / 0", "loading it failed .ZeroDivisionError: division by zero, line 1"),
        ("x = 1", "a recipe defines build"),
        ("NEEDS = 'text'\ndef build(frame): return frame", "NEEDS lists names of blocks"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, source, said):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UsageError, match=said):
        find_recipes((str(tmp_path / "mine.py"),), ("encoder",))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("frame.select('row_id', 'nothing')", "failed .ColumnNotFoundError"),
        ("frame.select(pl.col('row_id').cast(str), x=1.0)", "build.. failed .SchemaError"),
        ("None", "must return a polars frame"),
        ("frame.select('row_id', 'response')", "is String, not a number"),
    ],
)
def test_a_recipe_that_fails(tmp_path, body, said):
    path = tmp_path / "mine.py"
    path.write_text(f"import polars as pl; build = lambda frame: {body}\n")
    recipe = next(r for r in find_recipes((str(path),), ("encoder",)) if r.path == path)
    with pytest.raises(DataError, match=said):
        run_recipes([recipe], ROWS, pl.DataFrame())


def test_a_recipe_that_is_named_twice_is_asked_once():
    once = find_recipes(ask=("gpt_rating",))
    assert find_recipes(ask=("gpt_rating", "gpt_rating")) == once
    assert sum(recipe.block == "gpt_rating" for recipe in once) == 1
