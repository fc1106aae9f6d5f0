"""Writes the blocks of docs/settings.md that say what can be set, from the classes: ``make docs``."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stackllm.members.own import OwnParams
from stackllm.members.registry import DEFAULT_MEMBERS, KINDS
from stackllm.parameters import allowed, hints_of
from stackllm.settings import Settings

TARGET = Path(__file__).with_name("settings.md")

_COLUMN = 34
"""Where the limits begin behind a value."""


def page() -> str:
    """The page with its blocks made anew."""
    blocks = {"defaults": defaults(), "members": members()}
    blocks |= {kind: every_setting_of(kind) for kind in KINDS}
    own = ["[[member]]", 'kind = "my_member.py:MyMember"', 'name = "mymember"', *keys(OwnParams())]
    blocks["own"] = "\n".join(own) + "\n"

    def made(found: re.Match[str]) -> str:
        return f"<!-- made: {found[1]} -->\n```toml\n{blocks[found[1]]}```\n"

    return re.sub(r"<!-- made: (\w+) -->\n```toml\n.*?```\n", made, TARGET.read_text(), flags=re.S)


def defaults() -> str:
    """Every section with every key as it is where nobody sets it."""
    settings = Settings()
    lines = [
        '# Further recipe files, such as ["my_block.py"]; above the first [section].',
        "recipes = []",
    ]
    for entry in dataclasses.fields(Settings):
        params = getattr(settings, entry.name)
        if dataclasses.is_dataclass(params):
            lines += ["", f"[{entry.name}]", *keys(params)]
    return "\n".join(lines) + "\n"


def members() -> str:
    """The default members: what differs from the defaults of their kind."""
    lines = []
    for member in DEFAULT_MEMBERS:
        plain = KINDS[member.kind].params()
        lines += ["[[member]]", f"kind = {toml(member.kind)}"]
        lines += [f"name = {toml(member.name)}"] if member.name != member.kind else []
        for name in hints_of(type(plain)):
            value = getattr(member.params, name)
            lines += [f"{name} = {toml(value)}"] if value != getattr(plain, name) else []
    return "\n".join(lines) + "\n"


def every_setting_of(kind: str) -> str:
    """A member of one kind with every key as it is where nobody sets it."""
    head = ["[[member]]", f"kind = {toml(kind)}", f"name = {toml(kind)}"]
    return "\n".join([*head, *keys(KINDS[kind].params(), "member.")]) + "\n"


def keys(params: Any, path: str = "") -> Iterator[str]:
    """Lines of a parameter class: what the docstring says, then keys, values and limits."""
    hints = hints_of(type(params))
    tables = []
    for names, text in described(type(params)):
        flat = [name for name in names if not dataclasses.is_dataclass(hints[name])]
        tables += [name for name in names if name not in flat]
        if flat:
            yield from textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ")
        for name in flat:
            value = getattr(params, name)
            line = f"# {name} =" if value is None else f"{name} = {toml(value)}"
            yield f"{line:{_COLUMN}} # {allowed(hints[name])}"
    for name in tables:
        yield f"[{path}{name}]"
        yield from keys(getattr(params, name), f"{path}{name}.")


def described(params: type) -> Iterator[tuple[list[str], str]]:
    """Names and words of each entry of a class's docstring, without its marks for Sphinx."""
    section = (params.__doc__ or "").split("----------\n", 1)[1]
    for names, text in re.findall(r"^    (\w[\w, ]*)\n((?:        .*\n|\n)+)", section, re.M):
        words = " ".join(text.split()).replace("``", "`")
        words = words.replace("None takes", "Not set, it takes").replace("None is", "Not set:")
        yield names.split(", "), re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", words)


def toml(value: Any) -> str:
    """A value as TOML has it."""
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    TARGET.write_text(page())
