"""What a user sees who typed something wrong: one sentence, the documented code, nothing lost."""

import os

import pytest
from conftest import write_table
from helpers import stackllm

PLAIN = ("--backbone", "none", "--quiet")


@pytest.fixture
def contest(tmp_path):
    return write_table(tmp_path, 9, 4)


def refused(cwd, status, sentence, *arguments):
    done = stackllm(*arguments, cwd=cwd)
    assert done.returncode == status, done.stderr
    assert sentence in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_nothing_there(tmp_path):
    refused(tmp_path, 66, "train.csv and test.csv: there is no such file", "stack", *PLAIN)


@pytest.mark.parametrize("option", ["--truth", "--sample"])
def test_files_that_are_needed_last_are_missed_first(contest, option):
    refused(
        contest,
        66,
        "no.csv: there is no such file. Check the path",
        "stack",
        option,
        "no.csv",
        *PLAIN,
    )
    assert not list((contest / "artifacts").rglob("manifest.json"))


def test_unknown_command_and_option(contest):
    refused(contest, 2, 'there is no command "stak". Did you mean "stack"?', "stak")
    refused(contest, 2, "No such option", "stack", "--fold", "5")


def test_wrong_column(contest):
    refused(
        contest,
        65,
        'no column "Respons". Did you mean "Response"?',
        "stack",
        "--text",
        "Respons",
        *PLAIN,
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[dta]\n", 'there is no section [dta]. Did you mean "data"?'),
        ("[run]\nfold = 3\n", '[run] has no key "fold". Did you mean "folds"?'),
        ("[run]\nfolds = 'x'\n", "[run] folds must be a whole number from 2 to 1000, not "),
        ("[run\n", "not a TOML file"),
        ("[[member]]\nkind = 'lexicl'\n", 'there is no kind "lexicl". Did you mean "lexical"?'),
        ("[[member]]\nkind = 'external'\nname = 'x'\n", '[[member]] number 1 needs "oof"'),
        (
            "[[member]]\nkind = 'lexical'\n[[member]]\nkind = 'lexical'\n",
            'two members are called "lexical"',
        ),
        ("[member]\nkind = 'lexical'\n", "[[member]], with double brackets"),
        ("[[member]]\nkind = 'lexical'\nname = '../x'\n", "letters, digits, _ and -"),
    ],
)
def test_bad_settings(contest, content, sentence):
    (contest / "stackllm.toml").write_text(content)
    refused(contest, 65, sentence, "stack", *PLAIN)


def test_values_without_sense(contest):
    refused(
        contest,
        2,
        "--folds must be a whole number from 2 to 1000, not 1",
        "stack",
        "--folds",
        "1",
        *PLAIN,
    )
    refused(contest, 65, "9 groups cannot be split into 20 folds", "stack", "--folds", "20", *PLAIN)
    refused(
        contest,
        2,
        "--rounds must be a whole number from 0 to 100, not -1",
        "pseudo",
        "--rounds",
        "-1",
        *PLAIN,
    )
    refused(contest, 2, "name may hold", "stack", "--name", "../x", *PLAIN)
    refused(contest, 66, "there is no such folder", "stack", "--backbone", "/no/where", "--quiet")
    refused(contest, 66, "no.toml: there is no such file", "stack", "--config", "no.toml", *PLAIN)


def test_bad_recipes(contest):
    (contest / "circle.py").write_text("NEEDS = ('nothing',)\ndef build(frame): return frame\n")
    refused(
        contest, 2, 'needs an unknown block "nothing"', "features", "--recipe", "circle.py", *PLAIN
    )
    (contest / "short.py").write_text("def build(frame): return frame.head(3).select('row_id')\n")
    refused(
        contest, 65, "returned 3. Return each row once", "features", "--recipe", "short.py", *PLAIN
    )
    (contest / "text2.py").write_text(
        "def build(frame): return frame.select('row_id', 'response')\n"
    )
    refused(
        contest,
        65,
        'column "response" is String, not a number',
        "features",
        "--recipe",
        "text2.py",
        *PLAIN,
    )


def test_predict_without_a_model(contest):
    refused(contest, 66, "there is no finished model here", "predict", "test.csv", "--quiet")
    assert not (contest / "artifacts").exists()


def test_a_locked_run_says_who_holds_it(contest):
    from stackllm.store.lock import locked

    with locked(contest / "artifacts" / "run"):
        refused(contest, 75, f"process {os.getpid()} on", "stack", *PLAIN)


def test_artifacts_that_are_a_file(contest):
    (contest / "artifacts").write_text("x")
    refused(contest, 74, "making the run's folder failed", "stack", *PLAIN)


def test_one_class_in_one_fold_only(contest):
    rows = (contest / "train.csv").read_text().replace(",1\n", ",0\n")
    question = rows.splitlines()[1].split(",")[0]
    (contest / "train.csv").write_text(rows + f"{question},lonely,9\n")
    refused(contest, 65, "no model could learn it there", "stack", *PLAIN)


def test_sample_of_another_contest(contest):
    (contest / "sample.csv").write_text("id,a,b\n0,0.5,0.5\n")
    done = stackllm("stack", "--sample", "sample.csv", "--folds", "3", *PLAIN, cwd=contest)
    assert done.returncode == 65
    assert "3 class columns are not there" in done.stderr
    assert not list((contest / "artifacts").rglob("manifest.json"))  # said before any work


def test_a_test_table_of_one_group(contest):
    """Pseudo-labels need two parts; all else goes without, as the sentence says."""
    lines = (contest / "test.csv").read_text().splitlines()
    (contest / "test.csv").write_text("\n".join(lines[:2]) + "\n")
    said = r"too few groups (1) for 2 parts, which pseudo-labels need. Lower --parts (2 at least)"
    refused(contest, 65, said, "run", *PLAIN)
    for command in (("run", "--rounds", "0"), ("stack",)):
        done = stackllm(*command, "--folds", "3", *PLAIN, cwd=contest)
        assert done.returncode == 0, done.stderr
