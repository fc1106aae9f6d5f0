"""The logbook: what every run below a folder was and how it scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stackllm.report.text import aligned


def read_runs(artifacts: Path) -> list[dict[str, Any]]:
    """One entry a finished run, by name; a run whose ``run.json`` can't be read says so.

    Parameters
    ----------
    artifacts
        Folder of runs.
    """
    found = []
    for path in sorted(artifacts.glob("*/run.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            run = record["settings"]["run"]
            found.append(
                {
                    "name": path.parent.name,
                    "train": record["n_train"],
                    "test": record["n_test"],
                    "classes": len(record["classes"]),
                    "folds": run["folds"],
                    "seed": run["seed"],
                    "members": [member["name"] for member in record["settings"]["members"]],
                    "oof": list(record["oof_log_loss"].values()),
                    "best_round": record["best_round"],
                }
            )
        except (ValueError, KeyError, OSError):
            found.append({"name": path.parent.name, "unreadable": str(path)})
    return found


def render_runs(runs: list[dict[str, Any]], artifacts: Path) -> str:
    """The logbook as aligned text."""
    if not runs:
        return f"no finished run below {artifacts}."
    names = ["name", "train", "test", "classes", "folds", "seed", "members", "oof", "best_round"]
    return aligned([names, *([_cell(run.get(name, "?")) for name in names] for run in runs)])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{item:.4f}" if isinstance(item, float) else str(item) for item in value)
    return str(value)
