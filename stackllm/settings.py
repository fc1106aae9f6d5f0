"""Everything a run can be told, from ``stackllm.toml`` and the command line."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Le

from stackllm.crossfit.pseudo import PseudoParams
from stackllm.engine.trackers import TrackingParams
from stackllm.errors import (
    DataError,
    MissingInputError,
    ServerError,
    StackllmError,
    UsageError,
    did_you_mean,
)
from stackllm.llm.backbone import load_config
from stackllm.llm.encode import EncoderParams
from stackllm.llm.locate import anchored, check_backbone, is_ready, with_revision
from stackllm.members.boosting import BoostingParams
from stackllm.members.external import ExternalParams, expanded
from stackllm.members.own import is_own
from stackllm.members.registry import DEFAULT_MEMBERS, KINDS, Member, kind_of
from stackllm.parameters import (
    BACKBONE,
    FILE,
    FileName,
    Name,
    Seed,
    check,
    hints_of,
    marks,
    shown,
    validated,
)
from stackllm.rating.address import check_url
from stackllm.rating.local import RaterParams
from stackllm.rating.requests import ServerParams
from stackllm.tables.contest import TableParams
from stackllm.toml import read_toml

CONFIG = "stackllm.toml"

NO_BACKBONE = "none"
"""As ``[encoder] backbone``: there is no encoder."""

Params = TypeVar("Params")

_REVISION = "revision"
"""A key beside an LLM's: its commit, branch or tag in the hub. To everything below it is a part of the LLM's name."""


@dataclass(frozen=True)
class _Pin:
    revision: Name


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

    folds: Annotated[int, Ge(2), Le(1000)] = 5
    parts: Annotated[int, Ge(2), Le(1000)] = 2
    seed: Seed = 0

    def __post_init__(self) -> None:
        check(self)


DEFAULT_STACK = BoostingParams(
    n_trees=150, learning_rate=0.05, n_leaves=7, feature_share=0.2, n_seeds=3
)


@dataclass(frozen=True)
class Settings:
    """All settings.

    Parameters
    ----------
    data, run, encoder, rater, server, stack, pseudo, tracking
        Settings of each step. ``encoder`` None leaves the LLM out, and what needs it.
    members
        Members that stackllm trains.
    external
        Members made elsewhere.
    recipes
        Paths of recipe files beside those of the recipe folder.
    notes
        What a user should know of how the settings were read; no part of what is computed.
    """

    data: TableParams = field(default_factory=TableParams)
    run: RunParams = field(default_factory=RunParams)
    encoder: EncoderParams | None = field(default_factory=EncoderParams)
    rater: RaterParams = field(default_factory=RaterParams)
    server: ServerParams = field(default_factory=ServerParams)
    stack: BoostingParams = DEFAULT_STACK
    pseudo: PseudoParams = field(default_factory=PseudoParams)
    tracking: TrackingParams = field(default_factory=TrackingParams)
    members: tuple[Member, ...] = DEFAULT_MEMBERS
    external: tuple[ExternalParams, ...] = ()
    recipes: tuple[FileName, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def backbones(self) -> tuple[str, ...]:
        """Names of all LLMs that a run reads with on its machines, sorted."""
        named = {name for member in self.members if (name := member.traits.backbone)}
        if self.encoder:
            named.add(self.encoder.backbone)
        if self.asks:
            named.add(self.rater.backbone)
        return tuple(sorted(named))

    @property
    def asks(self) -> bool:
        """Is a recipe going to ask an LLM on the run's machines?"""
        of_own = any(name.lower().endswith(".toml") for name in self.recipes)
        return bool((self.rater.ask or of_own) and not self.rater.url)


_SECTIONS = {
    entry.name: getattr(Settings(), entry.name)
    for entry in dataclasses.fields(Settings)
    if dataclasses.is_dataclass(getattr(Settings(), entry.name))
}
"""Name and default of each table of a settings file."""


def read_settings(path: Path | None, overrides: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Settings from a file, with options from the command line on top.

    The file is checked whole and by itself first, so that whether it can be read does not depend on
    the command that reads it.

    Parameters
    ----------
    path
        A TOML file. None takes ``./stackllm.toml`` where there is one, else the defaults.
    overrides
        For each section the values that the user gave as options; sentences call them so. Recipe
        files are ``{"recipes": {"files": (...)}}``.

    Raises
    ------
    MissingInputError
        If ``path`` is not there.
    DataError
        If it is no TOML or has an unknown section or key, or a value of the wrong type.
    UsageError
        If a value is not allowed.
    StorageError
        If the system refuses to read the file.
    """
    content, where = _read(path)
    return _checked(content, where, (path or Path(CONFIG)).parent, overrides)


def make_settings(
    content: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Settings:
    """Settings out of what a file would hold, held to the same rules; file names are relative to the working folder.

    Raises
    ------
    MissingInputError, DataError, UsageError
        As :func:`read_settings`.
    """
    return _checked(content, "settings", Path(), overrides)


def as_written(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run noted in ``run.json``, as a settings file would hold them; for :func:`make_settings`."""
    written: dict[str, Any] = {
        name: _without_nulls(record[name]) for name in _SECTIONS if record.get(name) is not None
    }
    if record["encoder"] is None:
        written["encoder"] = {"backbone": NO_BACKBONE}
    if record["recipes"]:
        written["recipes"] = list(record["recipes"])
    trained = [{**it["params"], "name": it["name"], "kind": it["kind"]} for it in record["members"]]
    outside = [{**it, "kind": "external"} for it in record["external"]]
    return {**written, "member": [_without_nulls(it) for it in (*trained, *outside)]}


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is set: a settings file can't say that something is not."""
    return {
        name: _without_nulls(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None
    }


def _checked(
    content: Mapping[str, Any], where: str, folder: Path, overrides: Mapping[str, Mapping[str, Any]]
) -> Settings:
    _check_layout(where, content)
    sections = {
        name: build(f"{where}: [{name}]", type(default), content.get(name, {}), default, folder)
        for name, default in _SECTIONS.items()
    }
    recipes = _recipes(f"{where}: recipes", content.get("recipes", ()), folder, DataError)
    default, members, external = _members(where, content.get("member"), folder)
    for name, given in overrides.items():
        if name == "recipes":
            recipes += _recipes("the setting recipes", given.get("files", ()), Path(), UsageError)
        elif name in _SECTIONS:
            sections[name] = build(
                f"[{name}]", type(sections[name]), given, sections[name], Path(), options=given
            )
        else:
            raise UsageError(f"no option sets [{name}]. {did_you_mean(name, _SECTIONS)}")
    notes: tuple[str, ...] = ()
    if sections["encoder"].backbone == NO_BACKBONE:
        sections["encoder"] = None
        members, notes = _without_encoder(where, members, default)
    return Settings(**sections, members=members, external=external, recipes=recipes, notes=notes)


def given_data() -> dict[str, Any]:
    """What ``[data]`` of ``./stackllm.toml`` says, after the whole file is checked.

    Returns
    -------
    dict
        Only what is written there; file names as they are reached from here. Empty without a file.

    Raises
    ------
    MissingInputError, DataError, UsageError, StorageError
        As :func:`read_settings`.
    """
    settings = read_settings(None, {})
    return {name: getattr(settings.data, name) for name in _read(None)[0].get("data", {})}


def check_llms(settings: Settings, dry_run: bool = False) -> None:
    """Refuse an LLM that cannot be reached as it is named, before any work.

    Raises
    ------
    MissingInputError, StorageError
        If its folder is not there, or not what can be loaded.
    UsageError
        If it is none to read with, or the address of its server is wrong.
    ServerError
        If it is not here and its hub is out of reach; a dry run may do without.
    """
    for name in settings.backbones:
        try:
            check_backbone(name)
        except ServerError:
            if not dry_run:
                raise
    rater = settings.rater
    # of a type that is read? The encoder looks at its own first thing
    if settings.asks and is_ready(rater.backbone):
        load_config(rater.backbone, lambda text: None)
    if settings.rater.ask and settings.rater.url:
        check_url(settings.rater.url, settings.server.allow_http)


def build(
    where: str,
    params: type[Params],
    given: Mapping[str, Any],
    base: Params | None = None,
    folder: Path | None = None,
    options: Collection[str] = (),
) -> Params:
    """A parameter class out of what somebody wrote, names, types and limits checked.

    Parameters
    ----------
    where
        What sentences begin with, such as ``stackllm.toml: [stack]``.
    params
        The dataclass.
    given
        Values by field; a table for a field that is a dataclass itself.
    base
        Values of the other fields. None takes the class's defaults.
    folder
        What file names are relative to. None leaves them as they are.
    options
        Which values came from options; they are called so.

    Raises
    ------
    DataError
        With the unknown name or the value of the wrong type.
    UsageError
        With a value that is not allowed.
    """
    hints, wrong = hints_of(params), UsageError if options else DataError
    values, tables = {}, {}
    backbone = next((name for name, hint in hints.items() if BACKBONE in marks(hint)), None)
    for name, value in given.items():
        if name == _REVISION and backbone:
            continue  # a part of the LLM's name
        if name not in hints:
            raise wrong(f'{where} has no key "{name}". {_place_of(name, hints)}')
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise DataError(f"{where} {name} must be a table of keys and values.")
            inner = None if base is None else getattr(base, name)
            tables[name] = build(f"{where}, [member.{name}]", hints[name], value, inner, folder)
        else:
            values[name] = value

    def label(name: str) -> str:
        return f"the setting {name}" if name in options else f"{where} {name}"

    checked = validated(params, values, label, wrong)
    if folder is not None:
        checked = {
            name: _anchored(hints[name], value, folder, label(name))
            for name, value in checked.items()
        }
    if backbone and _REVISION in given:
        revision = validated(_Pin, {_REVISION: given[_REVISION]}, label, wrong)[_REVISION]
        named = checked.get(backbone, getattr(base or params(), backbone))
        try:
            checked[backbone] = with_revision(named, revision)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
    for entry in dataclasses.fields(params):  # type: ignore[arg-type]
        missing = entry.default is entry.default_factory is dataclasses.MISSING
        if base is None and missing and entry.name not in checked:
            raise DataError(f'{where} needs "{entry.name}".')
    try:
        if base is None:
            return params(**checked, **tables)
        return dataclasses.replace(base, **checked, **tables)  # type: ignore[type-var]
    except StackllmError as error:  # a rule between fields
        raise type(error)(f"{where}: {error}") from error


def _read(path: Path | None) -> tuple[dict[str, Any], str]:
    """What a settings file holds, and what it is called; nothing where there is no file."""
    if path is None and not os.path.lexists(CONFIG):
        return {}, CONFIG
    return read_toml(path or Path(CONFIG)), str(path or CONFIG)


def _check_layout(where: str, content: Mapping[str, Any]) -> None:
    """Refuse unknown sections, sections that are no tables, and members that are no list of tables."""
    known = [*_SECTIONS, "member", "recipes"]
    for name, value in content.items():
        if name not in known:
            raise DataError(f"{where}: there is no section [{name}]. {_place_of(name, known)}")
        if name in _SECTIONS and not isinstance(value, dict):
            raise DataError(f"{where}: [{name}] must be a table of keys and values.")
    members = content.get("member", [{}])
    if not isinstance(members, list) or not all(isinstance(entry, dict) for entry in members):
        raise DataError(f"{where}: members are written [[member]], with double brackets.")
    if not members:
        raise DataError(f"{where}: member is an empty list. Leave it out for the default members.")


def _place_of(name: str, known: Collection[str]) -> str:
    """Where a key belongs that stands in the wrong place, or the nearest known one."""
    homes = [
        f"[{section}]" for section, params in _SECTIONS.items() if name in hints_of(type(params))
    ]
    if name == "recipes":
        return "It must stand above the first [section]."
    return f"It belongs into {' or '.join(homes)}." if homes else did_you_mean(name, known)


def _recipes(
    label: str, names: Any, folder: Path, wrong_type: type[StackllmError]
) -> tuple[str, ...]:
    checked = validated(Settings, {"recipes": names}, lambda _: label, wrong_type)["recipes"]
    return tuple(_anchored(FileName, name, folder, label) for name in checked)


def _anchored(hint: Any, value: Any, folder: Path, label: str) -> Any:
    """A file name as it is reached from here, out of one relative to ``folder``; others as they are."""
    is_file = FILE in marks(hint)
    if value is None or not (is_file or BACKBONE in marks(hint)):
        return value
    name = os.path.expanduser(value)  # noqa: PTH111  (of pathlib's, nobody knows which user is unknown)
    if name.startswith("~"):
        raise MissingInputError(
            f'{label}: "{value}" begins with a user who is not known here. Write the whole path.'
        )
    return str(folder / name) if is_file else anchored(name, folder)


def _members(
    where: str, entries: list[dict[str, Any]] | None, folder: Path
) -> tuple[tuple[Member, ...], tuple[Member, ...], tuple[ExternalParams, ...]]:
    """Members that only the default list brings, all members that stackllm trains, and external ones."""
    if entries is None:
        return DEFAULT_MEMBERS, DEFAULT_MEMBERS, ()
    default: tuple[Member, ...] = ()
    members: list[Member] = []
    external: list[ExternalParams] = []
    for i, entry in enumerate(entries):
        label = f"{where}: [[member]] number {i + 1}"
        kind = entry.get("kind")
        if "name" in entry:
            _check_name(label, entry["name"])
        named = {"name": entry["name"]} if "name" in entry else {}
        given = {name: value for name, value in entry.items() if name not in ("kind", "name")}
        if kind == "default":
            if len(entry) > 1:
                raise DataError(f'{label}: kind "default" takes no other keys. Remove them.')
            default = DEFAULT_MEMBERS
            members += DEFAULT_MEMBERS
        elif kind == "external":
            for one in expanded(label, {**named, **given}, folder):
                _check_name(label, one.get("name", "member"))
                external.append(build(label, ExternalParams, one, None, folder))
        elif isinstance(kind, str) and (kind in KINDS or is_own(kind)):
            if is_own(kind):  # a file name, with the class behind it
                kind = _anchored(FileName, kind, folder, label)
            try:
                params = kind_of(kind).params
            except StackllmError as error:  # of the user's own file
                raise type(error)(f"{label}: {error}") from error
            made: Any = build(label, params, given, None, folder)
            name = entry.get("name", kind.rpartition(":")[2].lower())
            _check_name(label, name)
            members.append(Member(name, kind, made))
        else:
            known = [*KINDS, "external", "default"]
            raise DataError(
                f'{label}: there is no kind "{kind}". {did_you_mean(str(kind), known)}'
                if "kind" in entry
                else f'{label} needs "kind". {did_you_mean("", known)}'
            )
    names = [*(member.name for member in members), *(params.name for params in external)]
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f'{where}: two members are called "{name}". Give each a name of its own.'
            )
    return default, tuple(members), tuple(external)


def _check_name(label: str, name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", name):
        raise DataError(
            f"{label}: the name {shown(name)} must be up to 100 letters, digits, _ and -, no - in front."
        )
    if name in ("stack", "blend"):
        raise DataError(
            f'{label}: "{name}" is what stackllm calls a model of stage two. Choose another name.'
        )


def _without_encoder(
    where: str, members: tuple[Member, ...], default: tuple[Member, ...]
) -> tuple[tuple[Member, ...], tuple[str, ...]]:
    """Members that need no encoder, and a note if others of the default list are left out."""
    frozen = [member for member in members if member.kind == "frozen"]
    for member in frozen:
        if member not in default:
            raise UsageError(
                f'{where}: the member "{member.name}" reads with the LLM of [encoder], whose backbone is '
                f'"{NO_BACKBONE}". Give one with the setting backbone, or remove the member.'
            )
    if not frozen:
        return members, ()
    names = " and ".join(member.name for member in frozen)
    note = (
        f'backbone "{NO_BACKBONE}": the default members {names} are left out, and what recipes take '
        "from the LLM."
    )
    return tuple(member for member in members if member not in frozen), (note,)
