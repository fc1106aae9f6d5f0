"""What ``import stackllm`` offers: names, types, exceptions; and what it costs."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import stackllm
from stackllm import errors

ROOT = Path(__file__).parents[1]

MISUSED = """\
import stackllm
from stackllm import GroupPosterior, posterior

posterior("nonsense", 3, quotta=7)
stackllm.optimise([[1.0]], [0], temperature="hot")
stackllm.assign([[1.0]])
GroupPosterior(quotta=7)
stackllm.metrics.log_loss([[1.0]])
stackllm.nothing
stackllm.DataError("x").exit_code + "x"
"""


def test_type_checkers_see_every_misuse_and_no_use(tmp_path, monkeypatch) -> None:
    from mypy import api

    monkeypatch.chdir(ROOT)
    (tmp_path / "misused.py").write_text(MISUSED)
    told, failed, status = api.run(
        [
            str(tmp_path / "misused.py"),
            "--strict",
            "--follow-imports=silent",
            f"--cache-dir={tmp_path}",
        ]
    )
    assert not failed
    assert status == 1
    lines = [int(line) for line in re.findall(r"misused\.py:(\d+): error", told)]
    assert lines == list(range(4, 11)), told


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    tree = ast.parse(Path(stackllm.__file__).read_text())
    (typed,) = (
        node.body
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    homes = {alias.asname or alias.name: node.module for node in typed for alias in node.names}
    assert homes.pop("open") == stackllm.open.__module__
    assert {*homes, "__version__"} == set(stackllm.__all__)
    for name, module in homes.items():
        value = getattr(stackllm, name)
        assert value is (
            sys.modules["stackllm.metrics"]
            if name == "metrics"
            else getattr(sys.modules[module], name)
        )


def test_dir_lists_the_public_names_and_a_star_brings_them() -> None:
    assert dir(stackllm) == sorted([*stackllm.__all__, "open"])
    names: dict[str, object] = {}
    exec("from stackllm import *", names)
    assert set(stackllm.__all__) <= set(names)
    assert "open" not in names  # Python's own
    with pytest.raises(AttributeError, match="no attribute 'postterior'"):
        _ = stackllm.postterior


def test_importing_stackllm_loads_nothing_and_the_mathematics_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import stackllm; dir(stackllm);"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names));"
        "stackllm.posterior, stackllm.optimise, stackllm.assign, stackllm.DataError, stackllm.metrics;"
        "print([m for m in ('torch', 'sklearn', 'polars', 'scipy.optimize') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split("\n")[:2] == ["['stackllm']", "[]"]


def test_the_types_are_shipped() -> None:
    assert (ROOT / "stackllm" / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["stackllm"]


def errors_defined() -> dict[str, type[errors.StackllmError]]:
    return {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.StackllmError)
    }


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn = {
        name: (bool(also), int(status))
        for name, also, status in re.findall(
            r"(\w+Error)( \(ValueError\))? +(\d+)\b", errors.__doc__ or ""
        )
    }
    assert drawn == {
        name: (issubclass(kind, ValueError), kind.exit_code)
        for name, kind in errors_defined().items()
    }
    assert set(drawn) <= set(stackllm.__all__)


@pytest.mark.parametrize("kind", errors_defined().values())
def test_errors_travel_between_processes_with_their_words(kind) -> None:
    error = pickle.loads(pickle.dumps(kind("one sentence")))
    assert (type(error), str(error)) == (kind, "one sentence")


def test_bad_values_are_value_errors() -> None:
    with pytest.raises(ValueError, match="whole numbers of 0 or more"):
        stackllm.posterior([[0.5, 0.5]], [0], quota=-1)
    with pytest.raises(ValueError, match="not negative"):
        stackllm.posterior([[-1.0, 0.5]], [0])
