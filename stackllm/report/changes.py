"""What somebody chose: settings that are not as stackllm has them where nobody sets them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from stackllm.errors import StackllmError
from stackllm.members.registry import DEFAULT_MEMBERS, kind_of
from stackllm.settings import Settings

_OWN_ENTRY = {"dtype", "precision", "report_to"}
"""Settings that say where and how a run was watched, or that ``"auto"`` became on its machine: told beside these."""


NO_NUMBER = {"data.train", "data.test", "data.sample", "data.csv_safe"}
"""Where the tables stand and how the submission is written: no number differs by it."""


def as_stored(params: Any) -> dict[str, Any]:
    """A parameter class as ``run.json`` has it: dicts, and lists for tuples."""
    stored: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(params)))
    return stored


def flat(params: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by their whole name.

    Examples
    --------
    >>> flat({"run": {"seed": 1}, "recipes": []})
    {'run.seed': 1, 'recipes': []}
    """
    names: dict[str, Any] = {}
    for name, value in params.items():
        inner = isinstance(value, Mapping)
        names |= flat(value, f"{above}{name}.") if inner else {f"{above}{name}": value}
    return names


def changes(params: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ from ``default`` or that it does not know, inner ones as ``training.epochs``."""
    known = flat(default)
    return {name: value for name, value in flat(params).items() if known.get(name) != value}


def chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run that differ from the defaults, by name.

    Parameters
    ----------
    settings
        As ``run.json`` has them.

    Returns
    -------
    dict
        Such as ``{"run.seed": 1, "decoder.training.epochs": 4}``: a member's begin with its name, and
        ``members`` lists them where they are not the default ones.
    """
    default = as_stored(Settings())
    told: dict[str, Any] = {}
    for section, values in settings.items():
        usual = default.get(section)
        if section in ("members", "notes"):
            continue
        if isinstance(values, Mapping):
            usual = usual if isinstance(usual, Mapping) else {}
            told |= {f"{section}.{name}": value for name, value in changes(values, usual).items()}
        elif values != usual:
            told[section] = _named(values)
    members = settings["members"]
    if _named(members) != _named(default["members"]):
        told["members"] = _named(members)
    for member in members:
        told |= {f"{member['name']}.{name}": value for name, value in of_member(member).items()}
    return {
        name: value for name, value in told.items() if name.rpartition(".")[2] not in _OWN_ENTRY
    }


def of_member(member: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the default member of that name, or else from the defaults of its kind."""
    usual = next(
        (it.params for it in DEFAULT_MEMBERS if (it.name, it.kind) == (member["name"], member["kind"])),
        None,
    )  # fmt: skip
    if usual is None:
        try:
            usual = kind_of(member["kind"]).params()
        except (StackllmError, TypeError):  # of a file of the user's own that is gone
            return flat(member["params"])
    return changes(member["params"], as_stored(usual))


def _named(value: Any) -> Any:
    """Parts of a list by their names, where they have such."""
    if not isinstance(value, list):
        return value
    return [it["name"] if isinstance(it, Mapping) and "name" in it else it for it in value]
