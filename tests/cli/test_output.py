"""Where tables go: nothing that a command reads is replaced, and nothing is asked for twice."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from stackllm.cli import cli
from stackllm.cli.output import chosen_output
from stackllm.errors import MissingInputError, StorageError, UsageError

SUBMISSION = "id,group,a,b\n0,q,0.4,0.6\n1,q,0.7,0.3\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sub.csv").write_text(SUBMISSION)
    Path("test.csv").write_text("id,group\n0,q\n1,q\n")
    return tmp_path


@pytest.mark.parametrize("name", ["sub.csv", "./sub.csv", "link.csv", "test.csv", "truth.csv"])
def test_a_file_that_is_read_is_never_replaced(folder, name):
    Path("link.csv").symlink_to("sub.csv")
    Path("truth.csv").write_text("id,target\n0,a\n1,b\n")
    before = Path(name).read_bytes()
    arguments = ["optim", "sub.csv", "--truth", "truth.csv", "-o", name]
    assert isinstance(
        CliRunner().invoke(cli, arguments, standalone_mode=False).exception, UsageError
    )
    assert Path(name).read_bytes() == before


def test_what_else_is_refused_before_any_work(folder):
    with pytest.raises(StorageError, match="this is a folder"):
        chosen_output(".", Path("x"), False, [])
    with pytest.raises(UsageError, match="both want the standard output"):
        chosen_output("-", Path("x"), True, [])
    assert chosen_output("-", Path("x"), False, []) is None
    assert chosen_output(None, Path("x"), True, [None]) == Path("x")


@pytest.mark.parametrize("command", ["optim", "predict"])
@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_folder_as_table_is_one_sentence(folder, command, name):
    error = CliRunner().invoke(cli, [command, name], standalone_mode=False).exception
    assert isinstance(error, MissingInputError)
