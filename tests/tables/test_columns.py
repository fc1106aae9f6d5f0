from pathlib import Path

import pytest

from stackllm.errors import DataError
from stackllm.tables.columns import find_column

FILE = Path("train.csv")


def test_a_column_is_where_its_name_says_to_the_letter():
    assert find_column(FILE, ["Id", "id ", "id"], "id", "ids") == "id"


@pytest.mark.parametrize("name", ["Id", "ID", "id ", " id", "_id", "\ufeffid", "ｉｄ"])
def test_a_name_that_is_nearly_the_one_wanted_is_named_and_not_taken(name):
    with pytest.raises(DataError, match=f'^train.csv: there is no column "id".*"{name}"'):
        find_column(FILE, ["Question", name], "id", "ids")


@pytest.mark.parametrize("name", ["promptId", "PromptID", "Prompt ID", "prompt-id", "PROMPT_ID"])
def test_case_spaces_and_underscores_are_seen_through(name):
    with pytest.raises(DataError, match=f'Did you mean "{name}"'):
        find_column(FILE, ["text", name], "prompt_id", "groups")


def test_every_look_alike_is_named():
    with pytest.raises(DataError, match='Did you mean "Id" or "ID"'):
        find_column(FILE, ["Id", "ID"], "id", "ids")


def test_another_name_altogether_lists_what_is_there():
    with pytest.raises(
        DataError, match=r'There are: "a", "b"\. Name the column that holds the ids'
    ):
        find_column(FILE, ["a", "b"], "id", "ids")
