"""What the report's panels show, as plain values: sums over what a run predicted out of fold."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from stackllm.metrics import mean_with_error, row_losses
from stackllm.probabilities import Floats
from stackllm.report.changes import chosen
from stackllm.report.leaderboard import seconds_of, verdict
from stackllm.report.logbook import read_logbook
from stackllm.report.page.finished import Finished
from stackllm.report.public import band_of
from stackllm.report.text import cut, one_line

N_BINS = 10
"""Bins of confidence."""

_NAME = 32
"""Letters of a class's or model's name that are shown."""

_UNITS = 40
"""Lines of units by time."""


_OF_SCORES = ("name", "cv", "cv_se", "lb", "train", "test")
"""What is told of a public score; the day of its entry is none of a run's results."""


def shown_name(name: str) -> str:
    """A name of unknown making, as it stands in a table."""
    return cut(one_line(name), _NAME)


def short_names(names: Sequence[str], width: int) -> list[str]:
    """Names cut to so many letters, without what all of them begin with where the cut would make two alike.

    Examples
    --------
    >>> short_names(["meta/llama-3.1-8B-instruct", "meta/llama-3.1-70B-instruct"], 8)
    ['…8B-ins…', '…70B-in…']
    >>> short_names(["a", "bc"], 8)
    ['a', 'bc']
    """
    shown = [cut(one_line(name), width) for name in names]
    if len(set(shown)) == len(set(names)):
        return shown
    shared = os.path.commonprefix([one_line(name) for name in names])  # noqa: RUF071 - of letters, not folders
    start = max((i + 1 for i, letter in enumerate(shared) if not letter.isalnum()), default=0)
    return [cut("…" * (start > 0) + one_line(name)[start:], width) for name in names]


def standing(run: Finished) -> dict[str, Any]:
    """The verdict's numbers: how good the answers are, what the group brought, and what chance is."""
    labels, groups = run.design.labels, run.design.train_groups
    raw, posterior = row_losses(run.raw, labels), row_losses(run.posterior, labels)
    hits = run.posterior.argmax(axis=1) == labels
    whole = [bool(hits[rows].all()) for rows in _by(groups)]
    return {
        "posterior": _with_error(posterior, groups),
        "raw": _with_error(raw, groups),
        "brought": _with_error(raw - posterior, groups),
        "chance": math.log(len(run.classes)),
        "accuracy": _with_error(hits.astype(np.float64), groups),
        "groups_right": sum(whole),
        "n_groups": len(whole),
        "n_rows": len(labels),
        "n_test": int(run.record["n_test"]),
    }


def leaderboard(run: Finished) -> list[dict[str, Any]]:
    """The leaderboard's rows with the time of each model, the best posterior first."""
    rows = []
    for row in run.board.iter_rows(named=True):
        told = {name: _number(value) for name, value in row.items()}
        told["seconds"] = seconds_of(run.timings, row["model"], row["round"])
        told["submitted"] = (row["round"], row["model"]) == (run.shown.number, run.name_shown)
        rows.append(told | {"model": one_line(row["model"])})
    return sorted(rows, key=lambda row: (row["posterior"], row["round"], row["model"]))


def rounds(run: Finished) -> list[dict[str, Any]]:
    """The blend of each round, and each beside the one before it, in words."""
    if run.best_round is None:
        return []
    blends = [row for row in leaderboard(run) if row["model"] == "blend"]
    blends.sort(key=lambda row: int(row["round"]))
    told = [
        {name: row[name] for name in ("round", "raw", "posterior", "posterior_se")} | {"verdict": ""}
        for row in blends
    ]  # fmt: skip
    for before, after in pairwise(told):
        one, other = (run.posteriors(it["round"], "blend") for it in (before, after))
        after["verdict"] = verdict(one, other, run.design)
    return told


def confusion(matrix: Floats, labels: np.ndarray) -> list[list[int]]:
    """How many rows of a class (down) were taken for a class (across)."""
    n = matrix.shape[1]
    flat = np.bincount(labels * n + matrix.argmax(axis=1), minlength=n * n)
    counts: list[list[int]] = flat.reshape(n, n).tolist()
    return counts


def reliability(matrix: Floats, labels: np.ndarray, groups: np.ndarray) -> list[dict[str, Any]]:
    """How often the likeliest class is right, by how likely it was said to be; bins without rows are left out."""
    confidence = matrix.max(axis=1)
    hits = (matrix.argmax(axis=1) == labels).astype(np.float64)
    bins = np.minimum((confidence * N_BINS).astype(np.int64), N_BINS - 1)
    told = []
    for number in np.unique(bins):
        inside = bins == number
        share, error = mean_with_error(hits[inside], groups[inside])
        told.append(
            {
                "confidence": float(confidence[inside].mean()),
                "right": share,
                "error": error,
                "rows": int(inside.sum()),
            }
        )
    return told


def correlation(run: Finished) -> dict[str, Any]:
    """How alike the models' mistakes are: correlation of what each says of every class, less the truth."""
    number = run.shown.number
    board = run.board.filter((pl.col("round") == number) & (pl.col("model") != "blend"))
    names = board.sort("posterior", maintain_order=True)["model"].to_list()[:_UNITS]
    truth = np.eye(len(run.classes))[run.design.labels]
    mistakes = np.stack([(run.rows(number, name) - truth).ravel() for name in names])
    lengths = np.linalg.norm(mistakes, axis=1)
    alike = (mistakes @ mistakes.T) / np.maximum(np.outer(lengths, lengths), 1e-12)
    return {"models": [one_line(name) for name in names], "matrix": alike.tolist()}


def weights(run: Finished) -> dict[str, Any] | None:
    """The blend's weights in each fold; None where there is no blend."""
    if run.model is None:
        return None
    blend = run.model.content["blend"]
    by_model = np.array(blend["weights"]).T
    return {
        "models": [one_line(name) for name in blend["names"]],
        "weights": by_model.tolist(),
        "mean": by_model.mean(axis=1).tolist(),
    }


def slices(run: Finished) -> list[dict[str, Any]]:
    """The posterior's log loss on parts of the rows: by length of the response, by class, by fold."""
    labels, groups = run.design.labels, run.design.train_groups
    losses = row_losses(run.posterior, labels)
    parts: list[tuple[str, str, np.ndarray]] = []
    if run.table is not None:
        lengths = run.table.train["response"].str.len_chars().to_numpy()
        edges = np.unique(np.quantile(lengths, [0.2, 0.4, 0.6, 0.8]).round())
        place = np.searchsorted(edges, lengths, side="right")
        for number in np.unique(place):
            of = lengths[place == number]
            name = f"{of.min():,} to {of.max():,} characters"
            parts.append(("length", name, place == number))
    for j, name in enumerate(short_names(run.classes, _NAME)):
        parts.append(("class", name, labels == j))
    for fold in np.unique(run.design.folds):
        parts.append(("fold", f"fold {fold}", run.design.folds == fold))
    return [
        {
            "by": by,
            "slice": name,
            "rows": int(inside.sum()),
            "loss": _with_error(losses[inside], groups[inside]),
        }
        for by, name, inside in parts
        if inside.any()
    ]


def pseudo(run: Finished) -> list[dict[str, Any]]:
    """Of each round's pseudo-labels: how sure they were, how many turned since the round before, how many stand.

    A test row has a label per fold whose models made one; the likeliest of each counts.
    """
    path = run.root / "pseudo_labels.parquet"
    if run.best_round is None or not path.is_file():
        return []
    audit = pl.read_parquet(path)
    keys = ["row_id", "fold", "part"]
    final = pl.read_parquet(run.root / "test.parquet")
    answer = final.select(
        "row_id",
        pl.Series("answer", np.array(run.classes)[final.select(run.classes).to_numpy().argmax(axis=1)]),
    )  # fmt: skip
    told: list[dict[str, Any]] = []
    before: pl.DataFrame | None = None
    for number in sorted(audit["round"].unique()):
        labels = (
            audit.filter(pl.col("round") == number)
            .sort("confidence", descending=True, maintain_order=True)
            .unique(keys, keep="first", maintain_order=True)
        )
        confidence = labels["confidence"].to_numpy().clip(0.0, 1.0)
        turned = None
        if before is not None:
            both = labels.join(before, on=keys, suffix="_before")
            turned = (
                _number((both["label"] != both["label_before"]).mean()) if both.height else None
            )
        stands = labels.join(answer, on="row_id")
        told.append(
            {
                "round": int(number),
                "labels": labels.height,
                "rows": labels["row_id"].n_unique(),
                "confidence": _number(labels["confidence"].mean()),
                "histogram": np.histogram(confidence, N_BINS, (0.0, 1.0))[0].tolist(),
                "turned": turned,
                "stand": _number((stands["label"] == stands["answer"]).mean()),
            }
        )
        before = labels
    return told


def public_scores(run: Finished) -> dict[str, Any] | None:
    """Public scores of the logbook beside the runs against their own, as :class:`~stackllm.report.public.Band` has them."""
    band = dataclasses.asdict(band_of(read_logbook(run.root.parent).scores))
    band["pairs"] = [{it: pair[it] for it in _OF_SCORES} for pair in band["pairs"]]
    return band if band["pairs"] else None


def how_made(run: Finished) -> dict[str, Any]:
    """Settings that differ from the defaults, tables, versions, time by unit, and the command."""
    record = run.record
    kinds: dict[str, list[float]] = {}
    for path, seconds in run.timings.items():
        kinds.setdefault("/".join(path.split("/")[:2]), []).append(seconds)
    spent = sorted(kinds.items(), key=lambda item: (-sum(item[1]), item[0]))
    return {
        "changed": {one_line(name): value for name, value in chosen(record["settings"]).items()},
        "inputs": {one_line(path): known for path, known in record["inputs"].items()},
        "backbones": record["backbones"],
        "versions": {"stackllm": record["stackllm"], "python": record["python"], **record["versions"]},
        "machine": record["machine"],
        "units": [
            {"unit": one_line(name), "number": len(seconds), "seconds": sum(seconds)}
            for name, seconds in spent[:_UNITS]
        ],
        "seconds": sum(map(sum, kinds.values())),
        "command": _command(run),
    }  # fmt: skip


def _command(run: Finished) -> str:
    """What makes the same run again, where the settings are as they were."""
    verb = {"features": "features", "stack": "stack"}.get(run.record.get("until", ""), "run")
    return f"stackllm {verb} --name {run.root.name}"


def _by(groups: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of each group, groups in the order of their numbers."""
    order = np.argsort(groups, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _with_error(values: np.ndarray, groups: np.ndarray) -> dict[str, float | None]:
    mean, error = mean_with_error(values, groups)
    return {"value": mean, "error": error}


def _number(value: Any) -> Any:
    """A number as JSON can hold it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rounded(value: Any) -> Any:
    """The same with all numbers to six decimals, and none that JSON can't hold."""
    if isinstance(value, Mapping):
        return {str(name): rounded(it) for name, it in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(it) for it in value]
    if isinstance(value, float):
        return round(value, 6) + 0.0 if math.isfinite(value) else None
    return value
