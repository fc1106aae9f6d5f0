"""The logbook: what every run was and how it scored, kept in one file beside the runs.

``logbook.jsonl`` only ever grows. A run adds a line when it finishes or fails, with all of its models; the same
run again adds none, and the same name with other settings another one. So the record outlives the folders. What
has no line, because it still runs, was killed, or was made before there was a logbook, is read from its folder.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import polars as pl

from stackllm.report.changes import NO_NUMBER, chosen, of_member
from stackllm.store.digest import digest
from stackllm.store.ledger import Entry, append, read_ledger
from stackllm.store.lock import is_locked
from stackllm.store.records import RECORD, read_json

LOGBOOK = "logbook.jsonl"
STATE, EARLIER = "state.json", "earlier"
"""Whether a run finished, and the folder of what runs of other settings handed out."""

SCORES = (
    "raw", "raw_se", "posterior", "posterior_se", "accuracy", "auc", "test_one_fold", "test_raw", "test_posterior",
    "test_se",
)  # fmt: skip
"""What a leaderboard says of a model, but for its time."""

_DIGITS = 6
"""Scores are the same to so many decimals where the same work was done on two machines."""


@dataclass(frozen=True)
class Logbook:
    """All that is known of the runs below a folder.

    Parameters
    ----------
    runs
        An entry per line and per run that has none, the newest first. Order is that of the file: a clock that was
        set back changes no order.
    scores
        Public scores, the latest of each run, model and submission of elsewhere; see
        :mod:`stackllm.report.public`.
    damaged
        Numbers of lines that are not as they were written.
    path
        The file.
    """

    runs: list[Entry]
    scores: list[Entry]
    damaged: tuple[int, ...]
    path: Path

    def __str__(self) -> str:
        return str(self.path)


def read_logbook(artifacts: Path) -> Logbook:
    """The logbook of a folder of runs.

    Raises
    ------
    StorageError
        If the system refuses to read it.
    """
    path = artifacts / LOGBOOK
    ledger = read_ledger(path)
    lines = [entry for entry in reversed(ledger.entries) if entry.get("kind") == "run"]
    folders = [_of_folder(folder, name) for folder, name in _folders(artifacts)]
    known = {entry["key"] for entry in lines}
    errors = {(entry["name"], entry.get("error")) for entry in lines}
    rest = [
        entry
        for entry in folders
        if not (entry.get("state") == "finished" and entry.get("key") in known)
        and not (entry.get("state") == "failed" and (entry["name"], entry.get("error")) in errors)
    ]
    at_work = [entry for entry in rest if entry["state"] in ("running", "interrupted")]
    before = sorted((it for it in rest if it not in at_work), key=_date, reverse=True)
    latest: dict[tuple[str, Any], Entry] = {}
    for entry in ledger.entries:
        if entry.get("kind") == "score":
            subject = (str(entry.get("name")), entry.get("run"))
            latest.pop(subject, None)  # a correction is news
            latest[subject] = entry
    return Logbook(
        [*at_work, *lines, *before], list(reversed(latest.values())), ledger.damaged, path
    )


def _date(entry: Entry) -> str:
    return str(entry.get("date", ""))


def record_run(artifacts: Path, entry: Entry) -> bool:
    """Add a run's line, unless it says what a line says already; was it added?

    A failure is news unless it is the last thing that the logbook has of that name.

    Raises
    ------
    LockedError, StorageError
        If the logbook can't be written.
    """

    def unless_known(entries: Sequence[Entry]) -> list[Entry]:
        lines = [it for it in entries if it.get("kind") == "run" and it["name"] == entry["name"]]
        if entry["state"] == "failed":
            lines = lines[-1:]
        return [] if any(_says(line, entry) for line in lines) else [entry]

    return bool(append(artifacts / LOGBOOK, unless_known))


def now() -> str:
    """The time as the logbook has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe(
    name: str, record: Mapping[str, Any], board: Sequence[Mapping[str, Any]], error: str = ""
) -> Entry:
    """A run's entry.

    Parameters
    ----------
    name
        Of the run.
    record
        What its ``run.json`` holds, or is going to hold.
    board
        Rows of its leaderboard; empty for one that failed.
    error
        Why it failed.
    """
    settings = record["settings"]
    losses = list(record.get("oof_log_loss", {}).values())
    models = [_model(record, row) for row in board] or [
        _model(record, {"model": member["name"]}) for member in settings["members"]
    ]
    entry: Entry = {
        "kind": "run",
        "date": now(),
        "name": name,
        "state": "failed" if error else "finished",
        **({"error": error} if error else {}),
        "until": record.get("until", "pseudo"),
        "best_round": record.get("best_round"),
        "oof": losses,
        **_final_scores(record, board),
        "seconds": round(sum(row.get("seconds") or 0.0 for row in board), 3),
        "data": _data(record),
        "train": record["n_train"],
        "test": record["n_test"],
        "classes": len(record["classes"]),
        "folds": settings["run"]["folds"],
        "seed": settings["run"]["seed"],
        "members": [member["name"] for member in settings["members"]],
        "changed": chosen(settings),
        "stackllm": record.get("stackllm"),
        "commit": commit(),
        "models": models,
        "key": run_key(name, record, error),
    }
    return entry


def run_key(name: str, record: Mapping[str, Any], error: str = "") -> str:
    """What a run is, whatever machine, day and version it was made with: its name, data, choices and losses."""
    choices = {
        setting: value
        for setting, value in chosen(record["settings"]).items()
        if setting not in NO_NUMBER and setting.split(".")[0] not in ("server", "tracking")
    }
    losses = [round(loss, _DIGITS) for loss in record.get("oof_log_loss", {}).values()]
    until = record.get("until", "pseudo")
    return digest(name, choices, _data(record), losses, "" if error else until, error)[:16]


@cache
def commit() -> str | None:
    """The commit of the stackllm that is at work: of its clone, or of the repository that it was installed from."""
    clone = (
        Path(__file__).parents[2] / ".git"
    )  # of a repository that merely holds the environment, none is there
    try:
        if clone.exists():
            return commit_of(clone)
        files = distribution("stackllm").files or []
        origin = next(it for it in files if it.name == "direct_url.json")
        return str(read_json(Path(origin.locate()))["vcs_info"]["commit_id"])
    except (OSError, PackageNotFoundError, ValueError, LookupError, TypeError, StopIteration):
        return None


def commit_of(git: Path) -> str | None:
    """What is checked out where ``git`` is the folder, or the file that names it; no program is started for it."""

    def words(path: Path) -> list[str]:
        return path.read_text(encoding="utf-8").split() if path.is_file() else []

    folder = git if git.is_dir() else git.parent / words(git)[1]
    head = words(folder / "HEAD")
    if head[0] != "ref:":
        return head[0]
    shared = folder / (words(folder / "commondir") or ["."])[0]  # of a further work tree
    packed = words(shared / "packed-refs")
    known = dict(zip(packed[1:], packed, strict=False))  # each name stands behind its commit
    loose = words(shared / head[1])
    return loose[0] if loose else known.get(head[1])


def spread(scores: Mapping[str, Mapping[str, float]], of: str) -> float | None:
    """Standard deviation of a score over seeds; None with fewer than two."""
    values = [it[of] for it in scores.values()]
    return statistics.stdev(values) if len(values) > 1 else None


def _model(record: Mapping[str, Any], row: Mapping[str, Any]) -> Entry:
    """A model's settings, and its scores where there are any."""
    settings, name = record["settings"], row["model"]
    member = next((it for it in settings["members"] if it["name"] == name), None)
    kind = name if name in ("stack", "blend") else "external"
    by_seed = record.get("seeds", {}).get(name, {}) if not row.get("round") else {}
    told: Entry = {"model": name, "round": row.get("round", 0), "kind": kind}
    if member is not None:
        told |= _reading(member, settings.get("encoder") or {})
        told["parameters"] = record.get("parameters", {}).get(told["backbone"])
        told["changed"] = of_member(member)
    if by_seed:
        told["by_seed"] = by_seed
        told |= {f"{of}_spread": spread(by_seed, of) for of in ("raw", "posterior")}
    told |= {score: _number(row[score]) for score in (*SCORES, "seconds") if score in row}
    return told


def _reading(member: Mapping[str, Any], encoder: Mapping[str, Any]) -> Entry:
    """What LLM a member stands on, and how that reads and is trained."""
    params = member["params"]
    prompt, training = params.get("prompt") or {}, params.get("training") or {}
    if member["kind"] == "frozen":  # it reads with the run's encoder
        params = {**encoder, "precision": encoder.get("dtype")}
        prompt = {
            name: encoder.get(name) for name in ("max_question_tokens", "max_response_tokens")
        }
    return {
        "kind": member["kind"],
        "backbone": params.get("backbone"),
        "precision": params.get("precision"),
        "epochs": training.get("epochs"),
        "lengths": [value for name, value in prompt.items() if name.startswith("max_")],
        "seeds": params.get("seeds"),
    }


def _final_scores(record: Mapping[str, Any], board: Sequence[Mapping[str, Any]]) -> Entry:
    """Scores of what is handed out: the best round's blend, or of stage one the best member."""
    best = record.get("best_round")
    if best is None:
        rows = sorted(board, key=lambda row: row["posterior"])
    else:
        rows = [row for row in board if (row["round"], row["model"]) == (best, "blend")]
    return {name: _number(rows[0][name]) for name in SCORES if rows and name in rows[0]}


def _number(value: Any) -> Any:
    """A score as JSON can hold it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _data(record: Mapping[str, Any]) -> str:
    """Digest of the tables that a run was made of, wherever they stood."""
    return digest(sorted(record["inputs"].values()))[:16]


def _says(line: Entry, entry: Entry) -> bool:
    """Does a line say everything that another would? Scores that the other lacks are no difference."""
    if (line["key"], line.get("error")) != (entry["key"], entry.get("error")):
        return False
    models = [line.get("models", []), entry["models"]]
    names = [[(it["model"], it["round"]) for it in those] for those in models]
    return names[0] == names[1] and all(
        after.get(name) is None
        or (
            before.get(name) is not None
            and math.isclose(before[name], after[name], abs_tol=10**-_DIGITS)
        )
        for before, after in zip(*models, strict=True)
        for name in SCORES
    )


def _folders(artifacts: Path) -> Iterator[tuple[Path, str]]:
    for state in sorted(
        {path.parent for name in (RECORD, STATE) for path in artifacts.glob(f"*/{name}")}
    ):
        for earlier in sorted(state.glob(f"{EARLIER}/*/{RECORD}")):
            yield earlier.parent, f"{state.name}/{EARLIER}/{earlier.parent.name}"
        yield state, state.name


def _of_folder(folder: Path, name: str) -> Entry:
    """A run as its folder tells it."""
    entry: Entry = {"name": name, **state_of(folder)}
    path = folder / RECORD
    if not path.is_file():
        return entry
    try:
        made = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
        record = read_json(path)
        # what was set aside has a line under the name that the run had then
        described = describe(name, record, _board(folder), str(entry.get("error", "")))
        described["key"] = run_key(name.split("/")[0], record)
        return described | {"date": made, "commit": None} | entry
    except (ValueError, KeyError, OSError, TypeError, AttributeError):
        return entry | {"unreadable": str(path)}


def _board(folder: Path) -> list[dict[str, Any]]:
    path = folder / "leaderboard.csv"
    try:
        return pl.read_csv(path).to_dicts() if path.is_file() else []
    except pl.exceptions.PolarsError:
        return []


def state_of(folder: Path) -> dict[str, str]:
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
