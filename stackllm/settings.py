"""Everything a run can be told, from ``stackllm.toml`` and the command line."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from stackllm.crossfit.pseudo import PseudoParams
from stackllm.errors import DataError, MissingInputError, UsageError, did_you_mean
from stackllm.llm.backbone import Attention, Devices, Dtype, Precision
from stackllm.llm.encode import EncoderParams
from stackllm.llm.locate import anchored
from stackllm.llm.prompts import Keep
from stackllm.members.boosting import BoostingParams
from stackllm.members.external import ExternalParams
from stackllm.members.registry import DEFAULT_MEMBERS, KINDS, Member
from stackllm.rating.local import RaterParams
from stackllm.rating.transport import ServerParams
from stackllm.tables.contest import TableParams

CONFIG = "stackllm.toml"

MAX_SEED = 2**31
"""Seeds are below it, so that a run's and a member's together are below what every library takes."""


@dataclass(frozen=True)
class RunParams:
    """Settings of a run as a whole.

    Parameters
    ----------
    folds
        Folds of the training groups.
    parts
        Parts of the test groups, for pseudo-labels.
    seed
        Seed of folds, parts and every model.
    """

    folds: int = 5
    parts: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("folds", "parts"):
            if getattr(self, name) < 2:
                raise UsageError(f"--{name} must be 2 or more, not {getattr(self, name)}.")
        if not 0 <= self.seed < MAX_SEED:
            raise UsageError(f"--seed must be from 0 to {MAX_SEED - 1}, not {self.seed}.")


DEFAULT_STACK = BoostingParams(
    n_trees=150, learning_rate=0.05, n_leaves=7, feature_share=0.2, n_seeds=3
)


@dataclass(frozen=True)
class Settings:
    """All settings.

    Parameters
    ----------
    data, run, encoder, rater, server, stack, pseudo
        Settings of each step. ``encoder`` None leaves the LLM out, and what needs it.
    members
        Members that stackllm trains.
    external
        Members made elsewhere.
    recipes
        Paths of recipe files beside those of the recipe folder.
    """

    data: TableParams = field(default_factory=TableParams)
    run: RunParams = field(default_factory=RunParams)
    encoder: EncoderParams | None = field(default_factory=EncoderParams)
    rater: RaterParams = field(default_factory=RaterParams)
    server: ServerParams = field(default_factory=ServerParams)
    stack: BoostingParams = DEFAULT_STACK
    pseudo: PseudoParams = field(default_factory=PseudoParams)
    members: tuple[Member, ...] = DEFAULT_MEMBERS
    external: tuple[ExternalParams, ...] = ()
    recipes: tuple[str, ...] = ()


_CHOICES = {
    "Dtype": get_args(Dtype), "Precision": get_args(Precision), "Attention": get_args(Attention),
    "Devices": get_args(Devices), "Keep": get_args(Keep),
}  # fmt: skip
"""What a setting that is declared as one of a few words may be."""

_SECTIONS = ("data", "run", "encoder", "rater", "server", "stack", "pseudo")


def read_settings(path: Path | None, overrides: dict[str, dict[str, Any]]) -> Settings:
    """Settings from a file, with options from the command line on top.

    Parameters
    ----------
    path
        A TOML file. None takes ``./stackllm.toml`` where there is one, else the defaults.
    overrides
        For each section the values that the user gave as options.

    Raises
    ------
    MissingInputError
        If ``path`` is not there.
    DataError
        If it is no TOML or has an unknown section or key, or a value of the wrong type.
    UsageError
        If a value has no sense.
    """
    if path is None and not Path(CONFIG).exists():
        content: dict[str, Any] = {}
    else:
        content = read_toml(path or Path(CONFIG))
    where = str(path or CONFIG)
    known = [*_SECTIONS, "member", "recipes"]
    for name in content:
        if name not in known:
            raise DataError(f"{where}: there is no section [{name}]. {did_you_mean(name, known)}")
    _check_tables(where, content)
    _anchor(content, (path or Path(CONFIG)).parent)
    values: dict[str, Any] = {}
    for section in _SECTIONS:
        default = getattr(Settings(), section)
        given = content.get(section, {})
        if section == "encoder" and given.get("backbone") == "none":
            values[section] = None
            continue
        given = {**given, **overrides.get(section, {})}
        if section == "encoder" and given.get("backbone") == "none":
            values[section] = None
        else:
            values[section] = build(f"{where}: [{section}]", default, given)
    if "member" in content:
        values["members"], values["external"] = _members(where, content["member"])
    if values["encoder"] is None:
        chosen = values.get("members", DEFAULT_MEMBERS)
        values["members"] = tuple(member for member in chosen if member.kind != "frozen")
    recipes = (*content.get("recipes", ()), *overrides.get("recipes", {}).get("files", ()))
    return Settings(recipes=tuple(recipes), **values)


def _check_tables(where: str, content: dict[str, Any]) -> None:
    """Refuse sections that are no tables and members that are no list of tables."""
    for section in _SECTIONS:
        if not isinstance(content.get(section, {}), dict):
            raise DataError(f"{where}: [{section}] must be a table of keys and values.")
    members = content.get("member", [])
    if not isinstance(members, list) or not all(isinstance(entry, dict) for entry in members):
        raise DataError(f"{where}: members are written [[member]], with double brackets.")
    recipes = content.get("recipes", [])
    if not isinstance(recipes, list) or not all(isinstance(name, str) for name in recipes):
        raise DataError(f"{where}: recipes must be a list of file names.")


def _anchor(content: dict[str, Any], folder: Path) -> None:
    """Make the file names that a settings file holds relative to where that file stands."""
    named: list[tuple[Any, tuple[str, ...]]] = [
        (content.get("data", {}), ("train", "test", "sample"))
    ]
    named += [(entry, ("oof", "test")) for entry in content.get("member", [])]
    for table, keys in named:
        for key in keys:
            if isinstance(table.get(key), str):
                table[key] = str(folder / table[key])
    for table in (content.get("encoder", {}), content.get("rater", {}), *content.get("member", [])):
        if isinstance(table.get("backbone"), str):
            table["backbone"] = anchored(table["backbone"], folder)
    if "recipes" in content:
        content["recipes"] = [str(folder / name) for name in content["recipes"]]


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises
    ------
    MissingInputError, DataError
        If it is not there or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows marks its files
    except FileNotFoundError as error:
        raise MissingInputError(f"{path}: there is no such file. Check --config.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise DataError(f"{path}: not a TOML file ({error}).") from error


def build(where: str, default: Any, given: dict[str, Any]) -> Any:
    """A copy of the dataclass ``default`` with ``given`` values, names and types checked.

    Raises
    ------
    DataError
        With the unknown name or the value of the wrong type.
    """
    fields = {entry.name: entry for entry in dataclasses.fields(default)}
    checked = {}
    for name, value in given.items():
        if name not in fields:
            raise DataError(f'{where}: there is no "{name}". {did_you_mean(name, fields)}')
        current = getattr(default, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise DataError(f"{where}: {name} must be a table of keys and values.")
            checked[name] = build(f"{where}.{name}", current, value)
            continue
        checked[name] = _typed(f"{where}: {name}", value, current, str(fields[name].type))
    return dataclasses.replace(default, **checked)


def _typed(where: str, value: Any, default: Any, declared: str) -> Any:
    """``value`` in the type that its field declares."""
    if isinstance(value, list | tuple) and declared.startswith("tuple["):
        inner = declared.removeprefix("tuple[").split(",")[0]
        shown = default[0] if default else inner
        return tuple(_typed(f"{where}, each of them,", entry, shown, inner) for entry in value)
    if "float" in declared and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    kinds = {
        "str": str, "Literal": str, **dict.fromkeys(_CHOICES, str),
        "bool": bool, "int": int, "float": float, "tuple": tuple,
    }  # fmt: skip
    wanted = tuple(
        kind
        for alternative in declared.split(" | ")
        for name, kind in kinds.items()
        if alternative.startswith(name)
    )
    if value is None and "None" in declared:
        return value
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise DataError(f"{where} must be {declared}, such as {default!r}, not {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where} must be a finite number, not {value}.")
    if declared in _CHOICES and value not in _CHOICES[declared]:
        raise UsageError(f'{where} must be one of {", ".join(_CHOICES[declared])}, not "{value}".')
    return value


def _members(where: str, entries: Any) -> tuple[tuple[Member, ...], tuple[ExternalParams, ...]]:
    members: list[Member] = []
    external: list[ExternalParams] = []
    for i, entry in enumerate(entries):
        kind = entry.get("kind")
        label = f"{where}: [[member]] number {i + 1}"
        if kind == "external":
            lacking = {"name", "oof", "test"} - set(entry)
            if lacking:
                raise DataError(f'{label}: an external member needs "{sorted(lacking)[0]}".')
            given = {name: value for name, value in entry.items() if name != "kind"}
            external.append(build(label, ExternalParams("", "", ""), given))
        elif kind == "default":
            members += DEFAULT_MEMBERS
        elif isinstance(kind, str) and kind in KINDS:
            given = {name: value for name, value in entry.items() if name not in ("kind", "name")}
            params = build(label, KINDS[kind].params(), given)
            members.append(Member(str(entry.get("name", kind)), kind, params))
        else:
            raise DataError(
                f'{label}: there is no kind "{kind}". {did_you_mean(str(kind), [*KINDS, "external", "default"])}'
            )
    names = [member.name for member in members] + [member.name for member in external]
    for name in names:
        if name in ("stack", "blend"):
            raise DataError(f'{where}: "{name}" is a model of its own. Call the member otherwise.')
        if names.count(name) > 1:
            raise DataError(
                f'{where}: two members are called "{name}". Give each a name of its own.'
            )
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", name):
            raise DataError(
                f'{where}: member name "{name:.120}" may hold up to 100 letters, digits, _ and -, no - in front.'
            )
    return tuple(members), tuple(external)
