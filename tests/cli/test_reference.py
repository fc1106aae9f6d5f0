"""The reference of all commands says what the commands say."""

import importlib.util
from pathlib import Path

import pytest
from helpers import stackllm

from stackllm.cli import COMMANDS

SCRIPT = Path(__file__).parents[2] / "docs" / "make_commands.py"


def test_the_reference_is_what_help_prints():
    spec = importlib.util.spec_from_file_location("make_commands", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.reference(), "run make docs"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_examples_and_stands_in_the_readme(name, tmp_path):
    help_text = stackllm(name, "--help", cwd=tmp_path).stdout
    assert f"stackllm {name}" in help_text.split("Examples:")[1]
    assert f"stackllm {name}" in (SCRIPT.parents[1] / "README.md").read_text()
