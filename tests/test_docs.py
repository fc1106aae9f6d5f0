"""What docstrings, the README and the pages under docs/ show is so: examples run, promised errors can come."""

import ast
import builtins
import doctest
import importlib
import importlib.util
import pkgutil
import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
from raises import Code

import stackllm
from stackllm import errors
from stackllm.cli import COMMANDS, cli
from stackllm.settings import read_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *ROOT.glob("*/README.md")]
HISTORY = {"LOG.md", *(path.name for path in (ROOT / "docs/decisions").iterdir())}
"""Pages that say what was typed then, not what to type now."""

MODULES = [it.name for it in pkgutil.walk_packages(stackllm.__path__, "stackllm.")]
EXAMPLES = re.compile(r"^ *>>> ", re.MULTILINE)
CODE = Code(ROOT / "stackllm")
TOLD_IN_FULL = {"group", "stack", "metrics", "probabilities"}


def source(module):
    return Path(importlib.util.find_spec(module).origin).read_text()


@pytest.mark.parametrize("name", [name for name in MODULES if EXAMPLES.search(source(name))])
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed


@pytest.mark.parametrize(("place", "named"), list(CODE.documented()), ids=".".join)
def test_errors_that_are_promised_can_come(place, named):
    possible = CODE.errors(place)
    for name in named:
        assert hasattr(errors, name) or hasattr(builtins, name) or name in possible, name
        assert name in possible, f"{'.'.join(place)} promises {name}, and nothing there raises it"


def test_errors_that_are_raised_are_promised():
    """By the public functions whose whole point is to check what they are given."""
    promised = dict(CODE.documented())
    for place, node in CODE.nodes.items():
        public = isinstance(node, ast.FunctionDef) and not re.search(r"\b_", ".".join(place))
        if public and place[0].split(".")[1] in TOLD_IN_FULL:
            raised = {name for name in CODE.raised_by(place) if hasattr(errors, name)}
            assert raised <= set(promised.get(place, ())), ".".join(place)


def test_a_promise_that_is_not_kept_is_seen(tmp_path):
    (tmp_path / "stack.py").write_text(
        textwrap.dedent('''
        from errors import DataError, UsageError
        class Reader:
            def close(self): raise UsageError("closed")
        def made(): return DataError("no")
        def read():
            """Read.

            Raises
            ------
            DataError, UsageError
                Never the second.
            """
            raise made()
        def unread(reader: Reader): reader.close()
        ''')
    )
    code = Code(tmp_path)
    ((place, named),) = code.documented()
    assert named == ["DataError", "UsageError"]
    assert "DataError" in code.errors(place)
    assert "UsageError" not in code.errors(place)
    assert "UsageError" in code.errors((place[0], "unread"))
    assert code.raised_by((place[0], "Reader.close")) == {"UsageError"}


def blocks(languages):
    """Fenced blocks of some languages, each with its page and line."""
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
            if match[1] in languages and page.name not in HISTORY:
                line = text[: match.start()].count("\n") + 1
                yield pytest.param(match[2], id=f"{page.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize("block", list(blocks({"python"})))
def test_python_on_the_pages_runs(block):
    """On groups of four rows; what a block is given stands under the names that pages use."""
    if "AutoPeftModel" in block:
        pytest.skip("needs a fine-tuned model: run in tests/finetune/test_model.py")
    if "StackLLM" in block:
        pytest.skip("needs frames: run in tests/test_estimator.py")
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(0)
    groups, y = np.repeat(np.arange(12), 4), np.tile([0, 0, 1, 2], 12)
    X = draw.normal(size=(48, 3)) + np.eye(3)[y]
    given = {
        "probabilities": draw.dirichlet(np.ones(3), 48), "groups": groups, "y": y, "g": groups,
        "X": X, "X_new": X, "g_new": groups, "classifier": LogisticRegression(),
    }  # fmt: skip
    exec(block, given)


@pytest.mark.parametrize("block", list(blocks({"toml"})))
def test_settings_on_the_pages_are_read(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    member = "class MyMember:\n    fit = predict = lambda self, *_: None\n"
    (tmp_path / "my_member.py").write_text(member)
    (tmp_path / "stackllm.toml").write_text(block)
    read_settings(tmp_path / "stackllm.toml", {})


def typed():
    """Lines of code blocks, and spans of code, in which stackllm or a benchmark is typed."""
    for page in PAGES:
        if page.name in HISTORY:
            continue
        for number, line in enumerate(page.read_text().splitlines(), 1):
            whole = re.match(r" *(?:\$ )?((?:stackllm|python -m benchmarks\.[a-z]).*)", line)
            spans = re.findall(r"`((?:stackllm|python -m benchmarks\.[a-z])[^`]*)`", line)
            for command in [whole[1]] if whole else spans:
                yield pytest.param(command, id=f"{page.relative_to(ROOT)}:{number} {command}")


@pytest.mark.parametrize("command", list(typed()))
def test_commands_on_the_pages_can_be_typed(command):
    """Optional parts in brackets, ellipses, comments and what comes after a pipe aside."""
    plain = re.sub(r"\[[^]]*\]|…|\.\.\.| \|.*", "", command)
    program, *words = shlex.split(plain, comments=True)
    if program == "python":
        assert importlib.util.find_spec(words[1])
    elif words and not words[0].startswith("-"):
        name, *arguments = words
        assert name in COMMANDS
        if arguments and "--help" not in arguments:
            # click remembers a command's --help as the first context of it calls it
            root = cli.make_context("stackllm", [], resilient_parsing=True)
            cli.get_command(root, name).make_context(name, arguments, parent=root)


def test_the_tree_of_the_readme():
    """The package's modules and folders, each once, and nothing that is not there."""
    tree = (ROOT / "README.md").read_text().split("\n## Tree\n")[1].split("```")[1]
    listed = re.findall(r"^  (\w+)(?:/|\.py) ", tree, re.MULTILINE)
    there = {name for _, name, _ in pkgutil.iter_modules(stackllm.__path__)} - {"__main__"}
    assert sorted(listed) == sorted(there)
