"""What a run has chosen for itself and keeps: the commit of each LLM, and the precision that ``"auto"`` stands for.

Neither may depend on the day or the machine that a command happens to run on, or the next command would
read and train everything anew: a branch of the hub moves, and a laptop would choose float32 where the GPU
that began the run chose bfloat16. So both are settled once, before anything is keyed by them, and every
later command on the run takes them. Below :func:`choose` nothing sees an ``"auto"`` or a branch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackllm.errors import MissingInputError, ServerError
from stackllm.llm.hub import hub_model, named_commit
from stackllm.llm.locate import pinned
from stackllm.llm.machine import QUANTISED, Precision, choose_dtype
from stackllm.parameters import BACKBONE, hints_of, marks
from stackllm.store.atomic import write_text
from stackllm.store.records import read_json
from stackllm.workspace import Workspace

FILE = "choices.json"

_MOVED_SECONDS = 5.0
"""How long the hub may take to say whether a branch has moved, which is but news."""

_OPEN = ("auto", *QUANTISED)
"""Precisions that leave something to the machine, be it but what packed weights are computed in."""


@dataclass(frozen=True)
class Choices:
    """What is settled.

    Parameters
    ----------
    precision
        What ``"auto"`` stands for; int8 and nf4 weights are computed in it too. Empty until something asks for it.
    backbones
        Models of the hub with their commit, ``"org/name@commit"``, by the name that the settings give.
    """

    precision: str = ""
    backbones: dict[str, str] = field(default_factory=dict)

    def write(self, root: Path) -> None:
        """Keep it with the run."""
        write_text(root / FILE, json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True))


def choose(readers: Sequence[Any], workspace: Workspace) -> tuple[list[Any], Choices]:
    """What every ``"auto"`` precision and every name of an LLM becomes in a run.

    A dry run without a hub in reach leaves what it cannot know as it is named, and says so.

    Parameters
    ----------
    readers
        Parameters of what is going to read with an LLM on the run's machines. Others among them, and None,
        stay as they are.
    workspace
        The run's.

    Returns
    -------
    made
        What each of ``readers`` becomes, in their order.
    choices
        What is to be kept with the run.

    Raises
    ------
    MissingInputError, UsageError
        If there is no such LLM.
    ServerError
        If neither the hub nor the local cache tells which commit a name means.
    """
    stored = _read(workspace)
    precision, reason = choose_dtype("auto")
    if stored.precision:
        reason = "as this run began" + (
            ""
            if stored.precision == precision
            else f"; this machine alone would take {precision}: {reason}"
        )
        precision = stored.precision
    is_open = any(getattr(it, name) in _OPEN for it in readers for name in _precisions(it))
    choices = Choices(precision if is_open else stored.precision, dict(stored.backbones))
    names = {getattr(params, name) for params in readers for name in _backbones(params)}
    taken = {name: _pinned(name, choices, workspace) for name in sorted(names)}
    if is_open:
        workspace.reporter.say(f'precision "auto": {precision} ({reason})')
    return [_replaced(params, precision, taken) for params in readers], choices


def _precisions(params: Any) -> list[str]:
    """Names of the fields that hold the precision of an LLM's weights."""
    return [name for name, hint in _hints(params) if hint == Precision]


def _backbones(params: Any) -> list[str]:
    """Names of the fields that name an LLM."""
    return [name for name, hint in _hints(params) if BACKBONE in marks(hint)]


def _hints(params: Any) -> list[tuple[str, Any]]:
    return [] if params is None else list(hints_of(type(params)).items())


def _replaced(params: Any, precision: str, taken: dict[str, str]) -> Any:
    changed = {name: taken[getattr(params, name)] for name in _backbones(params)}
    for name in _precisions(params):
        value = getattr(params, name)
        if value in _OPEN:
            changed[name] = precision if value == "auto" else f"{value}-{precision}"
    return dataclasses.replace(params, **changed) if changed else params


def _pinned(name: str, choices: Choices, workspace: Workspace) -> str:
    """A backbone with the commit that the run reads it at; one that the run does not know yet is added to its choices."""
    say = workspace.reporter.say
    if name in choices.backbones:
        made = choices.backbones[name]
        say(f"backbone {name}: {made}, as this run began{_news(name, made)}")
        return made
    try:
        made = pinned(name)
    except ServerError as error:
        if not workspace.dry_run:
            raise
        say(f"{error} All that it is to read counts as unread.")
        return name
    if made != name:
        choices.backbones[name] = made
        say(f"backbone {name}: {made}")
    return made


def _news(name: str, made: str) -> str:
    """Whether the hub has gone on meanwhile, and how to go along; nothing where it is out of reach."""
    model = hub_model(name)
    try:
        now = named_commit(model, _MOVED_SECONDS) if model else None
    except (MissingInputError, ServerError):
        return ""
    if now is None or made.endswith(f"@{now}"):
        return ""
    return f'. The hub is at another commit by now; to read with that, set revision = "{now}"'


def _read(workspace: Workspace) -> Choices:
    path = workspace.root / FILE
    try:
        content = read_json(path)
        return Choices(str(content["precision"]), dict(content["backbones"]))
    except FileNotFoundError:
        return Choices()
    except (OSError, ValueError, KeyError, TypeError):
        workspace.reporter.warn(
            f"{path} cannot be read, so what this run had chosen is chosen anew."
        )
        return Choices()
