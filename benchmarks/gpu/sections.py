"""The sections in their order, what each promises, and the figures that they give together."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.gradients import gradients
from benchmarks.gpu.models import free
from benchmarks.gpu.reading import encoder, rater, units
from benchmarks.gpu.tuning import grid, peft_unit, room_for_one, same_bytes
from benchmarks.harness import Figure

Results = dict[str, dict[str, Any]]
"""What each section gave, by its name."""

_READ = (
    "tokens_s",
    "utilisation",
    "plain_tokens_s",
    "plain_utilisation",
    "vs_plain",
    "estimate_gib",
)
_RATED = ("rows_s", "utilisation", "vs_forward", "vs_generate4")
_TUNED = (
    "training_tokens_s", "unit_seconds", "utilisation", "loading_saving_share", "loads",
    "copies_alive", "peak_gib", "estimate_gib",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A part of the benchmark that stands and fails alone.

    Parameters
    ----------
    name
        What it is called in results and for ``--only``.
    run
        Gives what it measured.
    gives
        Names that have to stand in there.
    """

    name: str
    run: Callable[[Bench], dict[str, Any]]
    gives: tuple[str, ...]


SECTIONS = (
    Section("ceilings", ceilings, ("bfloat16_tflops", "float32_tflops")),
    Section("encoder 1b", lambda it: encoder(it, "1b", 128, 128), _READ),
    Section("encoder 8b", lambda it: encoder(it, "8b", 32, 128), _READ),
    Section("rater 1b", lambda it: rater(it, "1b", 64), _RATED),
    Section("rater 8b", lambda it: rater(it, "8b", 16), _RATED),
    Section("grid 1b trunk", lambda it: grid(it, "1b", 4), (*_TUNED, "caching_seconds")),
    Section("grid 1b all", lambda it: grid(it, "1b", "all"), _TUNED),
    Section("peft 1b all", lambda it: peft_unit(it, "1b"), ("training_tokens_s", "unit_seconds")),
    Section("same bytes", lambda it: same_bytes(it, "1b"), ("same", "distinct")),
    Section("gradients", lambda it: gradients(it, "1b"), ("bfloat16", "float16", "nf4")),
    Section("room for one 3b trunk", lambda it: room_for_one(it, "3b", 4), ("ended",)),
    Section("room for one 3b all", lambda it: room_for_one(it, "3b", "all"), ("ended",)),
    Section("grid 1b nf4", lambda it: grid(it, "1b", 4, "nf4"), _TUNED),
    Section("units 1b", lambda it: units(it, "1b"), ("rows_s", "again_seconds")),
    Section("grid 8b trunk", lambda it: grid(it, "8b", 4, n_groups=64), _TUNED),
)  # the goals' first: whatever stops it, they stand


def play_sections(
    bench: Bench, limit: float = float("inf"), only: str = "", out: Path | None = None
) -> Results:
    """Run section after section.

    Parameters
    ----------
    bench
        Sizes, and where models stand.
    limit
        Seconds after which no further section begins.
    only
        Run those alone in whose names it stands.
    out
        A file that gets a line of JSON as each section ends.
    """
    start, results = time.perf_counter(), Results()
    for section in SECTIONS:
        if only not in section.name:
            continue
        began = time.perf_counter()
        if began - start > limit:
            result: dict[str, Any] = {"skipped": "time"}
        else:
            result = {**_attempt(section, bench), "took": time.perf_counter() - began}
        results[section.name] = result
        line = json.dumps({"section": section.name, **result})
        print(line, file=sys.stderr, flush=True)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    return results


def _attempt(section: Section, bench: Bench) -> dict[str, Any]:
    """What a section gives, or why it did not."""
    try:
        result = section.run(bench)
        absent = [] if "skipped" in result else [it for it in section.gives if it not in result]
        if absent:
            result["failed"] = f"it does not give {', '.join(absent)}"
    except Exception as error:  # the next one stands for itself
        traceback.print_exc(limit=-6)
        result = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    free()
    return result


GOALS = {
    "encoder_utilisation_1b": (0.45, "higher"),
    "encoder_utilisation_8b": (0.6, "higher"),
    "encoder_vs_plain_1b": (1.5, "higher"),
    "encoder_vs_plain_8b": (1.5, "higher"),
    "rater_vs_forward_1b": (1.0, "higher"),
    "rater_vs_generate4_1b": (1.0, "higher"),
    "trunk_unit_vs_peft": (4.0, "higher"),
    "loading_saving_share": (0.2, "lower"),
    "copies_alive": (1.0, "lower"),
    "estimate_error": (0.15, "lower"),
    "room_for_one": (1.0, "higher"),
    "float16_small_gradient_error": (0.05, "lower"),
    "same_bytes": (1.0, "higher"),
}
"""What each figure should reach on an H100, and which way is better."""


def figures(results: Results) -> dict[str, Figure]:
    """What can be said of the goals, as far as the sections that it takes have ended."""

    def of(section: str, name: str) -> Any:
        return results.get(section, {}).get(name)

    def every(name: str) -> list[Any]:
        values = (it.get(name) for it in results.values())
        return [value for value in values if value is not None]

    unit, rival = of("grid 1b trunk", "unit_seconds"), of("peft 1b all", "unit_seconds")
    ends = every("ended")
    values = {
        "encoder_utilisation_1b": of("encoder 1b", "utilisation"),
        "encoder_utilisation_8b": of("encoder 8b", "utilisation"),
        "encoder_vs_plain_1b": of("encoder 1b", "vs_plain"),
        "encoder_vs_plain_8b": of("encoder 8b", "vs_plain"),
        "rater_vs_forward_1b": of("rater 1b", "vs_forward"),
        "rater_vs_generate4_1b": of("rater 1b", "vs_generate4"),
        "trunk_unit_vs_peft": rival / unit if rival and unit else None,
        "loading_saving_share": max(every("loading_saving_share"), default=None),
        "copies_alive": max(map(max, every("copies_alive")), default=None),
        "estimate_error": max(every("estimate_error"), default=None),
        "room_for_one": sum(ends) / len(ends) if ends else None,
        "float16_small_gradient_error": of("gradients", "float16_small"),
        "same_bytes": of("same bytes", "same"),
    }
    return {
        name: Figure(value, *GOALS[name]) for name, value in values.items() if value is not None
    }


def incomplete(results: Results) -> list[str]:
    """Names of the sections that did not give what they promise."""
    return [name for name, it in results.items() if "failed" in it or "skipped" in it]
