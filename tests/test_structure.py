"""The house rules that a machine can check: which way imports point, what is documented, what starts fast."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stackllm"

LEVELS = [
    {"errors"},
    {"metrics", "parameters", "probabilities", "store", "toml", "crossfit", "llm.machine"},
    {"group", "engine"},
    {"tables"},
    {"optim", "llm", "workspace"},
    {"rating", "finetune"},
    {"recipes"},
    {"members"},
    {"stack"},
    {"settings"},
    {"study"},
    {"predict", "report"},
    {"outputs", "planning"},
    {"pipeline"},
    {"estimator"},
    {"cli", "__main__"},
]
HEAVY = ("torch", "transformers", "lightgbm", "sklearn")


def level(parts):
    """Of a module, given as the parts of its name below stackllm; a module may stand lower than its package."""
    return next(i for i, names in enumerate(LEVELS) if names & {parts[0], ".".join(parts[:2])})


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path):
    """Modules that a file imports, with whether it does so at its top."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # of the package itself they are names, not modules
                within = "" if node.module == "stackllm" else f".{alias.name}"
                yield node.module + within, node in top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in top


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts
    for module, _ in imports(path):
        parts = module.split(".")
        if parts[0] == "stackllm" and len(parts) > 1:
            assert level(parts[1:]) <= level(own), f"{'.'.join(own)} imports {module}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_needed(path):
    if path.name in {
        "estimator.py",
        "callbacks.py",
        "trainer.py",
    }:  # they have to subclass a library's classes
        return
    for module, at_top in imports(path):
        assert not (at_top and module.split(".")[0] in HEAVY), (
            f"{path.name} imports {module} at its top"
        )


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_everything_public_is_documented(path):
    tree = ast.parse(path.read_text())
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_texts_are_the_same_bytes_on_every_system(path):
    """Windows reads and writes an alphabet of its own, and other ends of lines, unless told."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = ast.unparse(node.func).split(".") if isinstance(node, ast.Call) else [""]
        if call[-1] in {"open", "read_text", "write_text"} and call != ["os", "open"]:
            named = {keyword.arg for keyword in node.keywords}
            binary = any(isinstance(it, ast.Constant) and "b" in str(it.value) for it in node.args)
            where = f"{path.name}:{node.lineno}"
            assert binary or "encoding" in named or call == ["write_text"], f"{where}: encoding?"
            assert binary or "newline" in named or call[-1] != "write_text" or len(call) == 1, where


def test_every_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")}
    assert set(listed) == {".".join(path.parts) for path in found} | {"stackllm.features"}


def loaded_by(arguments):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['stackllm', *{arguments!r}]\n"
        "try:\n    runpy.run_module('stackllm', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_help_loads_nothing_heavy():
    assert not loaded_by(["--help"]) & {*HEAVY, "numpy", "polars", "scipy", "rich", "pydantic"}


def test_every_command_has_help_with_a_runnable_example():
    from click.testing import CliRunner

    from stackllm.cli import COMMANDS, cli

    for name in COMMANDS:
        shown = CliRunner().invoke(cli, [name, "--help"])
        assert shown.exit_code == 0, name
        assert f"stackllm {name}" in shown.output.split("Example", 1)[1], name


def test_every_command_is_in_the_readme():
    from stackllm.cli import COMMANDS

    readme = (ROOT / "README.md").read_text()
    for name in COMMANDS:
        assert f"stackllm {name}" in readme


def test_public_names_can_be_imported():
    import stackllm

    for name in stackllm.__all__:
        assert getattr(stackllm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = stackllm.nothing
