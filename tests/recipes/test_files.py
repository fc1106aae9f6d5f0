"""Python files of the user's own: what is wrong in them is a sentence with the file's name."""

import polars as pl
import pytest

from stackllm.errors import DataError, UsageError
from stackllm.recipes.files import load_file
from stackllm.recipes.loader import Recipe, find_recipes, run_recipes

ROWS = pl.DataFrame({"group_id": ["a"], "question": ["q"], "response": ["r"]})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def build(frame) return frame", r"mine\.py: loading it failed \(SyntaxError: "),
        ("import no_such_package", r"mine\.py: loading it failed \(ModuleNotFoundError: No module"),
        ("x = 1", r"mine\.py: a recipe defines build\(frame\)"),
    ],
)
def test_a_recipe_that_cannot_be_loaded_is_told_before_any_work(tmp_path, source, said):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(UsageError, match=said):
        find_recipes(extra=(str(path),))


def test_a_recipe_that_fails_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def build(frame):\n    return frame['no such column']\n")
    with pytest.raises(DataError, match=r"mine\.py: build\(\) failed \(ColumnNotFoundError: "):
        run_recipes([Recipe("mine", path)], ROWS, pl.DataFrame())


def test_the_same_content_is_one_module_and_other_content_another(tmp_path):
    one, same, other = (tmp_path / f"{name}.py" for name in ("one", "same", "other"))
    for path, value in ((one, 1), (same, 1), (other, 2)):
        path.write_text(f"value = {value}\n")
    assert load_file(one, "recipe") is load_file(same, "recipe")
    assert load_file(other, "recipe").value == 2
    assert load_file(one, "own") is not load_file(one, "recipe")


def test_a_file_that_is_no_python_is_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("value = 3\n")
    with pytest.raises(
        UsageError, match=r'mine\.txt: not a Python file\. Let its name end in "\.py"'
    ):
        load_file(path, "recipe")
