"""The logbook for people, spreadsheets and pages: one line per run, and per model where that is wanted."""

from __future__ import annotations

import fnmatch
import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from stackllm.errors import MissingInputError, did_you_mean
from stackllm.parameters import shown
from stackllm.report.logbook import SCORES, Logbook
from stackllm.report.text import WIDTH, aligned, cut, one_line
from stackllm.store.ledger import Entry
from stackllm.tables.spreadsheet import spreadsheet_safe

_NAME = 24
"""Cells of the column of names."""
_LINES = 4
"""Lines that the settings of a run, or a note, take at most; ``--csv`` and ``--json`` have them whole."""

COLUMNS = (
    "date", "name", "model", "state", "error", "until", "round", "kind", "backbone", "parameters", "precision",
    "epochs", "lengths", "seeds", *SCORES, "raw_spread", "posterior_spread", "cv", "lb", "note", "seconds",
    "train", "test", "classes", "folds", "seed", "changed", "data", "stackllm", "commit", "key",
)  # fmt: skip


def choose(logbook: Logbook, names: Sequence[str]) -> Logbook:
    """The logbook of some runs, and of submissions of elsewhere, by name or with ``*`` and ``?``.

    Raises
    ------
    MissingInputError
        If a name matches nothing.
    """
    if not names:
        return logbook
    known = list(dict.fromkeys(it["name"] for it in (*logbook.runs, *logbook.scores)))
    for name in names:
        if not fnmatch.filter(known, name) and name not in known:
            raise MissingInputError(
                f"{logbook}: nothing is called {shown(name)}. {did_you_mean(name, known)}"
            )

    def wanted(entry: Entry) -> bool:
        # a score of a model goes with its run
        names_of_it = {entry["name"], entry["name"].rpartition("/")[0] if entry.get("run") else ""}
        return any(
            it == name or fnmatch.fnmatchcase(it, name) for name in names for it in names_of_it
        )

    runs, scores = (list(filter(wanted, it)) for it in (logbook.runs, logbook.scores))
    return Logbook(runs, scores, logbook.damaged, logbook.path)


def rows(logbook: Logbook, models: bool = False) -> Iterator[Entry]:
    """A flat dict per run and submission of elsewhere, with its public score; below a run its models, if wanted."""
    public = {(it["name"], it["run"]): it for it in logbook.scores}
    beside = ("cv", "lb", "note")
    for run in logbook.runs:
        score = public.get((run["name"], run.get("key")), {})
        yield run | {name: score[name] for name in beside if name in score}
        for model in run.get("models", []) if models else []:
            name = f"{run['name']}/{model['model']}"
            of_best = model["round"] == (run["best_round"] or 0)
            score = public.get((name, run["key"]), {}) if of_best else {}
            yield {
                "date": run.get("date"),
                "name": run["name"],
                **model,
                **{it: score[it] for it in beside if it in score},
            }
    for score in logbook.scores:
        if not score["run"]:
            yield {**score, "state": "elsewhere"}


def as_text(logbook: Logbook, models: bool = False) -> str:
    """An aligned table of at most 100 columns, the newest first."""
    listed = list(rows(logbook, models))
    lines = [f"{logbook}: line {number} is damaged and passed over." for number in logbook.damaged]
    if not listed:
        return "\n".join([f"no run in {logbook} or beside it.", *lines])
    shown_columns = ["date", "name", "until", "raw", "posterior", "test", "LB", "time"]
    cells = [_cells(row) for row in listed]
    used = [
        i for i, name in enumerate(shown_columns)
        if name in ("date", "name", "until") or any(line[i] for line in cells)
    ]  # fmt: skip
    table = [[line[i] for i in used] for line in (shown_columns, *cells)]
    head, *body = aligned(table, left=(0, 1, 2)).split("\n")
    told = [head]
    for row, line in zip(listed, body, strict=True):
        told += [cut(line, WIDTH)]
        for detail in _details(row):
            folded = textwrap.wrap(detail, WIDTH - 4, max_lines=_LINES, placeholder=" …")
            told += [cut(f"    {it}", WIDTH) for it in folded]
    return "\n".join([*told, *lines])


def as_json(logbook: Logbook) -> str:
    """Everything, as one JSON object."""
    content = {
        "runs": [row for row in rows(logbook) if row["state"] != "elsewhere"],
        "scores": logbook.scores,
        "damaged": list(logbook.damaged),
    }
    return json.dumps(content)


def as_csv(logbook: Logbook, models: bool = False) -> str:
    """A table with a column for everything; what a spreadsheet would run as a formula is harmless."""
    return spreadsheet_safe(_frame(logbook, models)).write_csv()


def as_markdown(logbook: Logbook, models: bool = False) -> str:
    """A table of the columns that hold anything, for a page."""
    frame = _frame(logbook, models)
    names = [name for name in frame.columns if frame[name].null_count() < frame.height]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in frame.select(names).iter_rows():
        lines.append("| " + " | ".join(map(_markdown, row)) + " |")
    return "\n".join(lines) + "\n"


def _frame(logbook: Logbook, models: bool) -> pl.DataFrame:
    # JSON may hold numbers of both kinds in a column, and anything in a file that others wrote
    columns = [[_plain(name, row.get(name)) for row in rows(logbook, models)] for name in COLUMNS]
    return pl.DataFrame(
        [
            pl.Series(name, values, strict=False)
            for name, values in zip(COLUMNS, columns, strict=True)
        ]
    )


def _plain(name: str, value: Any) -> Any:
    if name == "changed" and isinstance(value, dict):
        return _settings(value) or None
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return value


def _markdown(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4f}" if isinstance(value, float) else one_line(str(value))
    for special in "\\|`<>*_[]":
        text = text.replace(special, f"\\{special}")
    return text


def _cells(row: Entry) -> list[str]:
    """What the table shows of a row; a model stands below its run."""
    is_model = "model" in row
    name = f"  {row['model']}" if is_model else row["name"]
    state = row.get("state", "finished")
    until = f"round {row['round']}" if is_model else row.get("until", "")
    return [
        "" if is_model else str(row.get("date") or "")[:10],
        cut(one_line(str(name)), _NAME),
        until if state == "finished" else state,
        _score(row.get("raw")),
        _score(row.get("posterior"), row.get("posterior_se")),
        _score(row.get("test_posterior")),
        _score(row.get("lb")),
        _time(row.get("seconds")),
    ]


def _details(row: Entry) -> Iterator[str]:
    """What stands below a row: its settings, why it failed, what somebody noted."""
    if "unreadable" in row:
        yield f"can't be read: {row['unreadable']}"
    if row.get("error"):
        yield one_line(row["error"])
    reads = [
        row.get("backbone"),
        f"{row['parameters'] / 1e6:,.0f} M" if row.get("parameters") else None,
        row.get("precision"),
        f"{row['epochs']:g} epochs" if row.get("epochs") else None,
        f"lengths {'+'.join(map(str, row['lengths']))}" if row.get("lengths") else None,
        _seeds(row),
    ]
    made_of = ", ".join(str(it) for it in reads if it)
    if made_of:
        yield one_line(made_of)
    if row.get("changed"):
        yield one_line(_settings(row["changed"]))
    if row.get("state") == "elsewhere" and row.get("cv") is not None:
        yield f"CV {row['cv']:.4f}"
    if row.get("note"):
        yield one_line(row["note"])


def _seeds(row: Entry) -> str:
    by_seed = row.get("by_seed")
    if not by_seed:
        return ""
    losses = " ".join(f"{it['posterior']:.4f}" for it in by_seed.values())
    return f"{len(by_seed)} seeds: {losses} (spread {row['posterior_spread']:.4f})"


def _settings(changed: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {shown(value)}" for name, value in changed.items())


def _score(value: Any, error: Any = None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if error is None else f"{value:.4f}±{error:.4f}"


def _time(seconds: Any) -> str:
    """Of a computation, for people.

    Examples
    --------
    >>> _time(12.3), _time(600), _time(9000)
    ('12 s', '10 min', '2.5 h')
    """
    if not seconds:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
