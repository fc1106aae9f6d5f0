"""Which errors can come out of a function, as far as its code tells without running it."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

Place = tuple[str, str]
"""A module, and the dotted name of a function, class or constant in it."""

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# any object may be meant by ``x.get``: not followed
COMMON = {name for kind in (str, bytes, dict, list, set, Path) for name in dir(kind)}
MADE = ("__init__", "__post_init__", "__enter__", "__exit__", "__iter__", "__call__")


class Code:
    """The functions, classes and constants of a package, and what each mentions.

    A name is followed to what the module defines or imports under it. An attribute is followed to
    every method of that name, since the kind of its object is not known: a little more is held to
    be possible than is.
    """

    def __init__(self, package: Path) -> None:
        self.nodes: dict[Place, ast.AST] = {}
        self.methods: dict[str, set[Place]] = defaultdict(set)
        self.functions: dict[str, set[Place]] = defaultdict(set)
        self.names: dict[str, dict[str, Place]] = {}
        trees = {}
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            trees[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
        for module, tree in trees.items():
            for node in tree.body:
                self._define(module, node)
            self.names[module] = {
                name: (where, name)
                for where, name in self.nodes
                if where == module and "." not in name
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module:
                    for alias in node.names:
                        given = alias.asname or alias.name
                        self.names[module].setdefault(given, (node.module, alias.name))

    def _define(self, module: str, node: ast.AST, prefix: str = "") -> None:
        if isinstance(node, ast.Assign | ast.AnnAssign) and not prefix:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    self.nodes[module, target.id] = node
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            place = module, prefix + node.name
            self.nodes[place] = node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    self._define(module, inner, f"{place[1]}.")
            else:
                (self.methods if prefix else self.functions)[node.name].add(place)

    def documented(self) -> Iterator[tuple[Place, list[str]]]:
        """Functions and classes with a section ``Raises``, and the errors named there."""
        for place, node in self.nodes.items():
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                section = re.search(
                    r"^Raises\n-+\n(.*?)(?=^\S[^\n]*\n-+\n|\Z)",
                    ast.get_docstring(node) or "",
                    re.S | re.M,
                )
                lines = section[1].splitlines() if section else []
                named = [line for line in lines if line and not line[0].isspace()]
                if named:
                    yield place, [name.strip() for line in named for name in line.split(",")]

    def raised_by(self, place: Place) -> set[str]:
        """Names of the errors in a function's own ``raise`` statements."""
        errors = (part.exc for part in _parts(self.nodes[place]) if isinstance(part, ast.Raise))
        called = (error.func if isinstance(error, ast.Call) else error for error in errors)
        return {error.id for error in called if isinstance(error, ast.Name)}

    def errors(self, start: Place) -> set[str]:
        """Names of the errors that a function, or whatever it mentions, mentions, and of their bases."""
        seen, waiting, names = {start}, [start], set()
        while waiting:
            place = waiting.pop()
            node = self.nodes.get(place)
            if node is None:
                continue
            if not isinstance(node, ast.ClassDef) or place == start:
                names |= set(_raised(node))
            further = set(self._mentioned(place, node, whole=place == start)) - seen
            seen |= further
            waiting.extend(further)
        return {base for name in names for base in self._bases(name)}

    def _mentioned(self, place: Place, node: ast.AST, whole: bool) -> Iterator[Place]:
        module, name = place
        names = self.names[module]
        if isinstance(node, ast.ClassDef) and not whole:  # its instances are not its methods
            yield from ((module, f"{name}.{method}") for method in MADE)
            yield from (
                names[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in names
            )
            return
        called = {id(part.func) for part in _parts(node) if isinstance(part, ast.Call)}
        for part in _parts(node):
            if isinstance(part, ast.Name) and part.id in names:
                yield names[part.id]
            elif isinstance(part, ast.Attribute):
                base = part.value.id if isinstance(part.value, ast.Name) else ""
                own = (module, f"{name.rpartition('.')[0]}.{part.attr}")
                if ".".join(names.get(base, ())) in self.names:
                    yield ".".join(names[base]), part.attr
                elif base == "self" and own in self.nodes:
                    yield own
                elif part.attr not in COMMON:
                    yield from self.methods.get(part.attr, ())
                    if part.attr not in self.methods and id(part) in called:
                        yield from self.functions.get(part.attr, ())

    def _bases(self, error: str) -> set[str]:
        classes = (
            node
            for (_, name), node in self.nodes.items()
            if name == error and isinstance(node, ast.ClassDef)
        )
        bases = {ast.unparse(base) for node in classes for base in node.bases}
        return {error}.union(*(self._bases(base) for base in bases))


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one but annotations, and what is caught."""
    yield node
    for field, value in ast.iter_fields(node):
        caught = isinstance(node, ast.ExceptHandler) and field == "type"
        if field not in {"annotation", "returns"} and not caught:
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, ast.AST):
                    yield from _parts(part)


def _raised(node: ast.AST) -> Iterator[str]:
    """Errors that are mentioned: raised, made to be raised elsewhere, or chosen among."""
    for part in _parts(node):
        name = getattr(part, "id", getattr(part, "attr", ""))
        if name.endswith(("Error", "Expired")):
            yield name
