"""Public scores in the logbook, beside the scores out of fold: entered by hand, and judged by statistics.

A contest shows one score of a submission, on rows that nobody sees. Beside the score out of fold it tells whether
the two agree, and which submission scored otherwise than the others let expect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stackllm.errors import MissingInputError, UsageError, did_you_mean
from stackllm.parameters import shown
from stackllm.report.logbook import LOGBOOK, Logbook, now, read_logbook
from stackllm.report.text import one_line
from stackllm.store.ledger import Entry, append

MAX_NAME, MAX_NOTE = 200, 10_000
"""Characters of a name, and of a note."""

LEVEL = 0.95
"""Share of scores that are to be expected inside a band: of twenty good submissions one falls outside."""

_ENOUGH = 5
"""Pairs from which on a line through them is told from chance better than by the errors of single scores."""
_LEAST = 3
"""Pairs that a line with an error takes at least."""


@dataclass(frozen=True)
class Given:
    """A public score as somebody enters it.

    Parameters
    ----------
    name
        Of a run; ``run/model`` for one of its models; any other for what was trained elsewhere.
    lb
        The public score.
    cv
        The score out of fold. None takes the run's: log loss of the posteriors, which is what it submits; of a
        model the row's log loss, calibrated, as that is what stands in ``predictions/``.
    note
        Anything.
    """

    name: str
    lb: float
    cv: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not (0 < len(self.name) <= MAX_NAME and self.name.isprintable() and self.name.strip()):
            raise UsageError(
                f"the name {shown(self.name)} must be of 1 to {MAX_NAME} characters that can be printed."
            )
        if len(self.note) > MAX_NOTE:
            raise UsageError(
                f"the note on {shown(self.name)} has {len(self.note):,} characters; it may have {MAX_NOTE:,}."
            )
        for score in (self.lb, self.cv):
            if score is not None and not math.isfinite(score):
                raise UsageError(f"the score of {shown(self.name)} must be a number, not {score}.")


def enter(artifacts: Path, given: Sequence[Given]) -> list[Entry]:
    """Add public scores to the logbook, all or none; what it says already is not said again.

    Returns
    -------
    list of dict
        The lines that were added.

    Raises
    ------
    MissingInputError
        If a name is of no run, model or earlier entry, and comes without ``cv``.
    UsageError
        If a name is given twice.
    LockedError, StorageError
        If the logbook can't be read or written.
    """
    names = [it.name for it in given]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{shown(name)} is given two scores. Leave one of them out.")
    logbook = read_logbook(artifacts)
    lines = [_line(it, logbook) for it in given]

    def unless_known(entries: Sequence[Entry]) -> list[Entry]:
        latest = {(it["name"], it["run"]): it for it in entries if it.get("kind") == "score"}
        return [it for it in lines if not _same(it, latest.get((it["name"], it["run"])))]

    return append(artifacts / LOGBOOK, unless_known)


def _same(line: Entry, before: Entry | None) -> bool:
    return before is not None and {**before, "date": ""} == {**line, "date": ""}


def _line(given: Given, logbook: Logbook) -> Entry:
    run = next((it for it in logbook.runs if _is(it, given.name)), None)
    earlier = next((it for it in logbook.scores if it["name"] == given.name and not it["run"]), {})
    scored: Mapping[str, Any] = run or {}
    of = "posterior"
    if run is None:
        of = "raw"
        run, scored = _model(given.name, logbook)
    if run is None and given.cv is None and not earlier:
        raise MissingInputError(
            f"{logbook}: there is no run or model {shown(given.name)}. "
            f"{did_you_mean(given.name, known_names(logbook))} "
            "What was trained elsewhere is entered with its own score out of fold: the setting cv."
        )
    cv, error = (scored.get(of), scored.get(f"{of}_se")) if run else (earlier.get("cv"), None)
    if given.cv is not None and given.cv != cv:
        cv, error = given.cv, None
    return {
        "kind": "score",
        "date": now(),
        "name": given.name,
        "run": run and run["key"],
        "data": run and run["data"],
        "train": run and run["train"],
        "test": run and run["test"],
        "cv": cv,
        "cv_se": error,
        "lb": given.lb,
        "note": given.note,
    }


def _is(run: Entry, name: str) -> bool:
    return bool(run["name"] == name and run.get("key") and run["state"] != "failed")


def _model(name: str, logbook: Logbook) -> tuple[Entry | None, Mapping[str, Any]]:
    """The run and the model of ``run/model``: of its best round, or the first."""
    of, _, model = name.rpartition("/")
    for run in logbook.runs:
        if _is(run, of):
            rows = [it for it in run["models"] if it["model"] == model]
            best = [it for it in rows if it["round"] == run["best_round"]]
            if rows:
                return run, (best or rows)[0]
    return None, {}


def known_names(logbook: Logbook) -> list[str]:
    """Runs, their models, and what was entered of elsewhere."""
    runs = [it for it in logbook.runs if it.get("key")]
    names = [it["name"] for it in (*runs, *logbook.scores)]
    names += [f"{it['name']}/{model['model']}" for it in runs for model in it["models"]]
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Band:
    """Where public scores are to be expected.

    Parameters
    ----------
    pairs
        Scores of the logbook that have both.
    kind
        ``"regression"``: LB as a straight line in CV, by least squares, with its prediction interval.
        ``"error"``: as much as CV, give or take what the errors of both tables allow. ``"none"``: nothing to
        go by.
    slope, intercept
        Of the line.
    scale, mean, width
        Of a regression: standard deviation beside the line, times Student's t; mean of CV; and the root of its
        sum of squares.
    outside
        Names of the submissions that are not where they are to be expected.
    unjudged
        Names of those for which that can't be told.
    left_out
        Names of those on other data.
    """

    pairs: tuple[Entry, ...]
    kind: Literal["regression", "error", "none"]
    slope: float = 1.0
    intercept: float = 0.0
    scale: float = 0.0
    mean: float = 0.0
    width: float = 1.0
    outside: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def at(self, cv: float) -> tuple[float, float, float]:
        """Least, likeliest and greatest LB that a regression expects of a CV."""
        centre = self.intercept + self.slope * cv
        part = 1 + 1 / len(self.pairs) + ((cv - self.mean) / self.width) ** 2
        half = self.scale * math.sqrt(part)
        return centre - half, centre, centre + half

    def summary(self) -> dict[str, Any]:
        """The same for programs."""
        of = ("name", "cv", "cv_se", "lb")
        return {
            "band": self.kind,
            "slope": self.slope,
            "intercept": self.intercept,
            "level": LEVEL,
            "pairs": [
                {**{it: pair[it] for it in of}, "outside": pair["name"] in self.outside}
                for pair in self.pairs
            ],
            "unjudged": list(self.unjudged),
            "left_out": list(self.left_out),
        }

    @property
    def told(self) -> str:
        """What the band is, in words."""
        n = len(self.pairs)
        if self.kind == "regression":
            return (
                f"band: a straight line through {n} pairs, LB = {self.intercept:.3f} + {self.slope:.3f} CV, "
                f"and {LEVEL:.0%} of what scatters as they do"
            )
        if self.kind == "error":
            return (
                f"band: LB as CV, {LEVEL:.0%} of what the rows drawn let expect (CV's group standard error); "
                f"a line takes {_ENOUGH} pairs of different CV"
            )
        return f"no band: a line takes {_LEAST} pairs of different CV, or runs that know the error of their CV"


def band_of(scores: Iterable[Entry]) -> Band:
    """Judge public scores by each other, or where there are too few by the error of CV.

    With five pairs or more (three, where not every CV has an error) LB is regressed on CV, and a score is to be
    expected in the prediction interval,

        a + b CV  ±  t(n-2) s sqrt(1 + 1/n + (CV - mean)² / sum of squares of CV).

    Whether a submission is outside is judged by the line through the *others*, for one that is far off bends a
    line and widens a band that it had a part in. With fewer pairs LB is expected to be what CV is: they differ by
    the rows that were drawn, so by ``cv_se · sqrt(1 + n_train / n_test)`` (standard error) at the least, the public
    part being some of the test rows.

    Parameters
    ----------
    scores
        The latest scores of the logbook, the newest first. Those of other data than the newest are left out.
    """
    pairs = _labelled([it for it in scores if it["cv"] is not None])
    data = next((it["data"] for it in pairs if it["data"]), None)
    others = [it["name"] for it in pairs if it["data"] not in (None, data)]
    pairs = [it for it in pairs if it["data"] in (None, data)]
    known = [it for it in pairs if it["cv_se"]]
    n_different = len({round(it["cv"], 9) for it in pairs})
    enough = _ENOUGH if len(known) == len(pairs) else _LEAST
    if min(len(pairs), n_different) >= enough:
        return _regression(tuple(pairs), tuple(others))
    outside = [it["name"] for it in known if abs(it["lb"] - it["cv"]) > expected_half(it)]
    rest = [it["name"] for it in pairs if not it["cv_se"]]
    kind: Literal["error", "none"] = "error" if known else "none"
    return Band(
        tuple(pairs), kind, outside=tuple(outside), unjudged=tuple(rest), left_out=tuple(others)
    )


def _labelled(pairs: list[Entry]) -> list[Entry]:
    """Runs of one name and several settings by their key, too."""
    names = [it["name"] for it in pairs]
    return [
        {**it, "name": f"{it['name']} ({it['run'][:6]})"}
        if it["run"] and names.count(it["name"]) > 1
        else it
        for it in pairs
    ]


def expected_half(pair: Entry) -> float:
    """How far LB may be from CV by the rows that were drawn for both."""
    from scipy.stats import norm

    rows = 1 + pair["train"] / pair["test"] if pair["train"] and pair["test"] else 1.0
    return float(norm.ppf((1 + LEVEL) / 2)) * float(pair["cv_se"]) * math.sqrt(rows)


def _regression(pairs: tuple[Entry, ...], left_out: tuple[str, ...]) -> Band:
    band = _line_through(pairs)
    outside, unjudged = [], []
    for i, pair in enumerate(pairs):
        rest = (*pairs[:i], *pairs[i + 1 :])
        if len({round(it["cv"], 9) for it in rest}) < _LEAST:
            unjudged.append(pair["name"])
            continue
        low, _, high = _line_through(rest).at(pair["cv"])
        slack = 1e-9 * max(1.0, abs(low), abs(high))  # of scores that lie on one line
        if not low - slack <= pair["lb"] <= high + slack:
            outside.append(pair["name"])
    return Band(
        pairs, "regression", band.slope, band.intercept, band.scale, band.mean, band.width,
        tuple(outside), tuple(unjudged), left_out,
    )  # fmt: skip


def _line_through(pairs: tuple[Entry, ...]) -> Band:
    from scipy.stats import t

    cv, lb = (np.array([it[of] for it in pairs], dtype=float) for of in ("cv", "lb"))
    mean = float(cv.mean())
    width = float(np.linalg.norm(cv - mean))
    slope = float((cv - mean) @ (lb - lb.mean())) / width**2
    intercept = float(lb.mean()) - slope * mean
    free = len(pairs) - 2
    scatter = float(np.linalg.norm(lb - intercept - slope * cv)) / math.sqrt(free)
    scale = scatter * float(t.ppf((1 + LEVEL) / 2, free))
    return Band(pairs, "regression", slope, intercept, scale, mean, width)


def render_band(band: Band, path: Path) -> str:
    """What a picture shows, in words."""
    lines = [f"{len(band.pairs)} public scores drawn into {path}", band.told]
    if band.kind != "none":
        for pair in band.pairs:
            if pair["name"] in band.outside:
                lines.append(f"outside: {one_line(pair['name'])}, {_where(band, pair)}")
        if not band.outside and len(band.unjudged) < len(band.pairs):
            lines.append("none is outside")
    named = {
        "can't be judged": band.unjudged,
        "of other data, not drawn": band.left_out,
    }
    lines += [
        f"{told}: {', '.join(map(one_line, names))}" for told, names in named.items() if names
    ]
    return "\n".join(lines)


def _where(band: Band, pair: Entry) -> str:
    if band.kind == "error":
        low, high = pair["cv"] - expected_half(pair), pair["cv"] + expected_half(pair)
    else:
        rest = tuple(it for it in band.pairs if it is not pair)
        low, _, high = _line_through(rest).at(pair["cv"])
    side = "below" if pair["lb"] < low else "above"
    by = "" if band.kind == "error" else " by the others"
    return f"LB {pair['lb']:.4f} is {side} {low:.4f} to {high:.4f}, expected{by} of CV {pair['cv']:.4f}"
