"""What docstrings promise to raise is what can come: followed by name from function to function."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import stackllm
from stackllm import errors

PACKAGE = Path(stackllm.__file__).parent
ERRORS = {name for name, value in vars(errors).items() if inspect.isclass(value)} - {
    "StackllmError"
}
TOLD_IN_FULL = (["group"], ["stack"], ["metrics"], ["probabilities"])
"""Where a public function's docstring also names every error that its own lines raise."""


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods of a module, by the name that calls them; a class calls its constructor."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    made = method.name in {"__init__", "__post_init__"}
                    yield node.name if made else method.name, method


def imported(tree: ast.Module, module: str) -> dict[str, str]:
    """Name to module, of what a module takes from our own modules and of what it defines."""
    homes = dict.fromkeys((name for name, _ in functions(tree)), module)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stackllm"):
            for alias in node.names:
                homes[alias.name] = str(node.module)
    return homes


def raised(function: ast.FunctionDef) -> set[str]:
    """Our errors that a function's own lines raise."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            names |= {error.id} & ERRORS if isinstance(error, ast.Name) else set()
    return names


def named(function: ast.FunctionDef) -> set[str]:
    """Our errors that a function names anywhere, to raise or to hand on, but for those it catches."""
    caught = {
        id(node)
        for handler in ast.walk(function)
        if isinstance(handler, ast.ExceptHandler) and handler.type is not None
        for node in ast.walk(handler.type)
    }
    return {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and node.id in ERRORS and id(node) not in caught
    }


def promised(function: ast.FunctionDef) -> set[str]:
    """Our errors that a docstring lists under Raises."""
    doc = ast.get_docstring(function) or ""
    section = re.search(r"^Raises\n-+\n(.*?)(?=^\w[^\n]*\n-+$|\Z)", doc, re.M | re.S)
    lines = section[1].splitlines() if section else []
    return set(re.findall(r"\w+", " ".join(x for x in lines if not x.startswith(" ")))) & ERRORS


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {
        module_of(path): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@pytest.fixture(scope="module")
def reach(trees) -> dict[tuple[str, str], set[str]]:
    """What each function can raise, by itself or through what it names: too much rather than too little.

    A plain name is followed to the module that it comes from; a method to all methods of that name in
    the modules that are imported.
    """
    can: dict[tuple[str, str], set[str]] = {}
    for module, tree in trees.items():
        for name, function in functions(tree):
            can.setdefault((module, name), set()).update(named(function))
    callees: dict[tuple[str, str], set[tuple[str, str]]] = {key: set() for key in can}
    for module, tree in trees.items():
        homes = imported(tree, module)
        near = {module, *homes.values(), *(f"{home}.{name}" for name, home in homes.items())}
        for name, function in functions(tree):
            for node in ast.walk(function):
                if isinstance(node, ast.Name) and node.id in homes:
                    callees[module, name].add((homes[node.id], node.id))
                elif isinstance(node, ast.Attribute):
                    callees[module, name] |= {(home, node.attr) for home in near}
    grown = True
    while grown:
        grown = False
        for key, called in callees.items():
            more = set().union(*(can[other] for other in called & can.keys())) - can[key]
            can[key] |= more
            grown |= bool(more)
    return can


@pytest.mark.parametrize("module", sorted(map(module_of, PACKAGE.rglob("*.py"))))
def test_docstrings_promise_what_can_come(module: str, trees, reach) -> None:
    for name, function in functions(trees[module]):
        if function.name.startswith("_"):
            continue
        vain = promised(function) - reach[module, name]
        assert not vain, f"{function.name} promises {vain}, and nothing that it calls raises that"
        if module.split(".")[1:2] in TOLD_IN_FULL:
            silent = raised(function) - promised(function)
            assert not silent, f"{function.name} raises {silent}, and its docstring does not say so"


def test_a_false_promise_would_be_seen(reach) -> None:
    (function,) = ast.parse(
        'def posterior():\n    """Do.\n\n    Raises\n    ------\n    LockedError\n        Never.\n    """'
    ).body
    assert isinstance(function, ast.FunctionDef)
    can = reach["stackllm.group.posterior", "posterior"]
    assert promised(function) - can == {"LockedError"}
    assert can == {"DataError", "UsageError"}
