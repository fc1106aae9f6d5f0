"""The logbook: what every run below a folder was and how it scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stackllm.report.text import aligned
from stackllm.store.lock import is_locked
from stackllm.store.records import read_json

RECORD, STATE, EARLIER = "run.json", "state.json", "earlier"
"""How a run was made, whether it finished, and the folder of what runs of other settings handed out."""


def read_runs(artifacts: Path) -> list[dict[str, Any]]:
    """One entry per run, by name: finished, failed and interrupted ones, and what was set aside.

    A run whose ``run.json`` can't be read says so.

    Parameters
    ----------
    artifacts
        Folder of runs.
    """
    return [_entry(folder, name) for folder, name in _folders(artifacts)]


def render_runs(runs: list[dict[str, Any]], artifacts: Path) -> str:
    """The logbook as aligned text."""
    if not runs:
        return f"no finished run below {artifacts}."
    names = [
        "name",
        "state",
        "until",
        "train",
        "test",
        "classes",
        "folds",
        "seed",
        "members",
        "oof",
        "best_round",
    ]
    lines = [[_cell(run.get(name, "?")) for name in names] for run in runs]
    errors = [f"{run['name']}: {run['error']}" for run in runs if "error" in run]
    return "\n".join([aligned([names, *lines]), *errors])


def _folders(artifacts: Path) -> Iterator[tuple[Path, str]]:
    for state in sorted(
        {path.parent for name in (RECORD, STATE) for path in artifacts.glob(f"*/{name}")}
    ):
        for earlier in sorted(state.glob(f"{EARLIER}/*/{RECORD}")):
            yield earlier.parent, f"{state.name}/{EARLIER}/{earlier.parent.name}"
        yield state, state.name


def _entry(folder: Path, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, **_state(folder)}
    if not (folder / RECORD).is_file():
        return entry
    try:
        record = read_json(folder / RECORD)
        run = record["settings"]["run"]
        return entry | {
            "until": record.get("until", "pseudo"),
            "train": record["n_train"],
            "test": record["n_test"],
            "classes": len(record["classes"]),
            "folds": run["folds"],
            "seed": run["seed"],
            "members": [member["name"] for member in record["settings"]["members"]],
            "oof": list(record["oof_log_loss"].values()),
            "best_round": record["best_round"],
        }
    except (ValueError, KeyError, OSError, TypeError, AttributeError):
        return entry | {"unreadable": str(folder / RECORD)}


def _state(folder: Path) -> dict[str, str]:
    """Whether a run finished; one that neither finished nor failed and that nobody holds was interrupted."""
    try:
        state: dict[str, str] = read_json(folder / STATE)
    except FileNotFoundError:
        return {"state": "finished"}
    except (ValueError, OSError):
        return {"state": "unreadable"}
    if state.get("state") == "running" and not is_locked(folder):
        return {"state": "interrupted"}
    return state


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(f"{item:.4f}" if isinstance(item, float) else str(item) for item in value)
    return str(value)
