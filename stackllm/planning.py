"""What a run would do, before it does it: every stage that the settings imply, with what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import polars as pl

from stackllm.engine.local import TIMINGS, read_timings
from stackllm.errors import StackllmError
from stackllm.llm.backbone import load_config
from stackllm.llm.locate import is_ready
from stackllm.members.registry import Member, kind_of
from stackllm.members.stage import stage_label
from stackllm.report.text import aligned
from stackllm.study import Study

_CHARACTERS = 4
"""Characters per token of English text, about, where no tokenizer is loaded to count."""


@dataclass(frozen=True)
class Stage:
    """A stage and what it costs; None where that is not known.

    Parameters
    ----------
    name
        As progress lines call it.
    units
        How many pieces of work it has; None where that shows only once the stage before is done.
    to_run
        How many of them are not stored yet, as far as can be told now.
    texts, tokens
        What an LLM reads, about.
    n_bytes
        What it leaves on the disk, about.
    seconds
        How long it takes, by what such units took below this folder of runs.
    """

    name: str
    units: int | None
    to_run: int | None
    texts: int | None = None
    tokens: int | None = None
    n_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """All stages of a run, in their order.

    Parameters
    ----------
    stages
        The stages.
    notes
        What is to be asked of an LLM, in words.
    units
        Units of the first stage that is not complete, and why each would run or not.
    """

    stages: tuple[Stage, ...]
    notes: tuple[str, ...]
    units: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "would_run": self.units,
            "stages": [asdict(stage) for stage in self.stages],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        if not self.units and not self.notes:
            return "all units are done; nothing would run"
        lines = [["stage", "units", "to run", "texts", "tokens", "disk", "time"]]
        for stage in self.stages:
            disk = None if stage.n_bytes is None else f"{stage.n_bytes / 2**20:,.0f} MiB"
            time = None if stage.seconds is None else f"{stage.seconds:,.0f} s"
            counts = [
                "?" if count is None else f"{count:,}" for count in (stage.units, stage.to_run)
            ]
            read = ["" if count is None else f"{count:,}" for count in (stage.texts, stage.tokens)]
            lines.append([stage.name, *counts, *read, disk or "", time or "?"])
        return "\n".join([*self.notes, aligned(lines)])


def make_plan(
    study: Study, rounds: int, stack: bool, notes: list[str], units: dict[str, str]
) -> Plan:
    """What the stages of a run would cost.

    Parameters
    ----------
    study
        The run.
    rounds
        Rounds of pseudo-labels.
    stack
        Does it go beyond stage one?
    notes, units
        What a dry run met; see :class:`Plan`.
    """
    met = {
        label: counts
        for engine in (study.workspace.cache, study.workspace.run)
        for label, counts in engine.met.items()
    }
    times = _Times(study)
    stages = []
    for stage in _implied(study, rounds, stack):
        total, missing = met.get(stage.name, (stage.units, stage.units))
        seconds = times.of(stage.name, missing)
        stages.append(replace(stage, units=total, to_run=missing, seconds=seconds))
    return Plan(tuple(stages), tuple(notes), units)


def _implied(study: Study, rounds: int, stack: bool) -> Iterator[Stage]:
    """Every stage, with as many units as it has in a run that finds nothing."""
    settings, design = study.settings, study.design
    rows = study.table.rows()
    texts = rows.select("question", "response").unique()
    yield Stage("folds", 1, 1)
    if settings.encoder:
        lengths = (settings.encoder.max_question_tokens, settings.encoder.max_response_tokens)
        width = _hidden(settings.encoder.backbone)
        n_bytes = width and texts.height * len(settings.encoder.depths) * 2 * width * 4
        yield Stage("encoder", None, None, texts.height, _tokens(texts, *lengths), n_bytes)
    yield Stage("inputs", 1, 1)
    n_parts = int(design.parts.max()) + 1
    for number in range(rounds + 1):
        n_places = design.n_folds * (n_parts if number else 1)
        for of_gpu in (True, False):
            members = [it for it in settings.members if kind_of(it.kind).of_gpu == of_gpu]
            units = sum(_trainings(member, n_places, number) for member in members)
            for member in members if not number else ():
                if member.traits.trunk:
                    prompt = member.traits.trunk.prompt
                    lengths = (prompt.max_length_prompt, prompt.max_length_answer)
                    tokens = _tokens(texts, *lengths)
                    width = _hidden(member.traits.trunk.backbone)
                    yield Stage(
                        "trunk", None, None, texts.height, tokens, width and tokens * width * 2
                    )
            if units:
                yield Stage(stage_label([of_gpu], number), units, units)
        if stack:
            n_columns = (3 * len(settings.members) + 3) * design.n_classes + 200
            n_bytes = design.n_folds * rows.height * n_columns * 8
            yield Stage(
                f"stack inputs, round {number}", design.n_folds, design.n_folds, n_bytes=n_bytes
            )
            yield Stage(f"stack, round {number}", n_places, n_places)
    if stack:
        yield Stage("model", 1, 1)


def _trainings(member: Member, n_places: int, number: int) -> int:
    traits = member.traits
    if number and not traits.every_round:
        return 0
    n_seeds = len(traits.seeds or (0,))
    return n_seeds * (n_places + (traits.refitted and not number))


def _tokens(texts: pl.DataFrame, most_question: int, most_response: int) -> int:
    """About how many tokens are read: questions once for all of their responses."""
    questions = texts["question"].unique().str.len_chars() // _CHARACTERS + 1
    responses = texts["response"].str.len_chars() // _CHARACTERS + 1
    return int(questions.clip(upper_bound=most_question).sum()) + int(
        responses.clip(upper_bound=most_response).sum()
    )


def _hidden(backbone: str) -> int | None:
    """Width of an LLM's layers; None where its configuration is not on this machine."""
    try:
        if not is_ready(backbone):  # a dry run fetches and converts nothing
            return None
        return int(load_config(backbone, lambda text: None).hidden_size)
    except (StackllmError, AttributeError):
        return None


class _Times:
    """Mean seconds per unit, by what was logged below the folder of runs."""

    def __init__(self, study: Study) -> None:
        self.n_jobs = study.workspace.run.n_jobs
        members = study.settings.members
        decoders = tuple(f"members/{it.name}/" for it in members if kind_of(it.kind).of_gpu)
        seconds: dict[str, list[float]] = {}
        for path in study.workspace.root.parent.glob(f"*/{TIMINGS}"):
            for unit, spent in read_timings(path.parent).items():
                seconds.setdefault(_stage_of(unit, decoders), []).append(spent)
        self.means = {name: sum(values) / len(values) for name, values in seconds.items()}

    def of(self, name: str, units: int | None) -> float | None:
        """Seconds of so many units of a stage on all workers."""
        mean = self.means.get(name.split(",")[0])
        if mean is None or units is None:
            return None
        return mean * units / max(1, min(self.n_jobs, units))


def _stage_of(unit: str, decoders: tuple[str, ...]) -> str:
    """What a plan calls the stage of a unit, but for its round."""
    if unit.startswith(decoders):
        return "decoders"
    return "stack inputs" if unit.startswith("stack/inputs/") else unit.split("/")[0]
