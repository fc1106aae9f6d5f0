"""Coded judgements of a run: what somebody who knows such runs would point at. docs/report.md tells each one more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from stackllm.metrics import mean_with_error
from stackllm.report.logbook import read_logbook, run_key
from stackllm.report.page.finished import Finished
from stackllm.report.page.panels import shown_name

FEW_GROUPS = 100
"""Fewer groups than this leave errors so wide that most ideas look alike."""

_GAP = 0.03
"""Confidence above accuracy that is worth a word; less is, too, if nothing else is wrong."""

_TURNED = 0.1
"""Share of pseudo-labels that turn between two rounds and make people wonder."""

_SHARE, _SECONDS = 0.05, 10.0
"""A member costs time if it takes this share of all, and so many seconds."""

_MANY_PAIRS = 300

_PLAIN = 0.75
"""Classes told apart so often need no bootstrap."""

TITLES = {
    "SLM01": "few groups",
    "SLM02": "over-confident rows",
    "SLM03": "groups over quota",
    "SLM04": "member without weight that costs time",
    "SLM05": "classes never told apart",
    "SLM06": "test unlike out of fold",
    "SLM07": "pseudo-labels that turn",
    "SLM08": "quota larger than in the labels",
}
"""What each check looks for."""


def anchor(code: str) -> str:
    """Where docs/report.md tells of a check.

    Examples
    --------
    >>> anchor("SLM01")
    'slm01-few-groups'
    """
    return f"{code} {TITLES[code]}".lower().replace(" ", "-")


def checks(run: Finished, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checks that have something to say, issues before notes.

    Parameters
    ----------
    run
        The run.
    told
        What the panels show: ``standing, leaderboard, weights, pseudo``.

    Returns
    -------
    list of dict
        ``code, title, severity, sentence, anchor``; severity is ``"issue"`` or ``"note"``.
    """
    looks = (
        _few_groups(told), _over_confident(run), _over_quota(run), _idle_members(told), _alike(run), _test_unlike(run),
        _turned(told), _loose_quota(run),
    )  # fmt: skip
    met = [
        {"code": code, "title": TITLES[code], "severity": severity, "sentence": sentence, "anchor": anchor(code)}
        for code, look in zip(TITLES, looks, strict=True)
        for severity, sentence in look
    ]  # fmt: skip
    return sorted(met, key=lambda check: (check["severity"] != "issue", check["code"]))


Said = Iterator[tuple[str, str]]
"""Severity and sentence."""


def _few_groups(told: Mapping[str, Any]) -> Said:
    standing = told["standing"]
    n_groups, error = standing["n_groups"], standing["posterior"]["error"]
    if n_groups == 1:
        yield (
            "issue",
            "There is a single training group: nothing tells how much groups differ, so no score has an error.",
        )
    elif n_groups < FEW_GROUPS:
        yield (
            "note",
            (
                f"There are {n_groups} training groups, and the log loss is known to ± {error:.3f} only. Judge changes by "
                "the paired differences, which are far better known."
            ),
        )


def _over_confident(run: Finished) -> Said:
    labels, groups = run.design.labels, run.design.train_groups
    for name, matrix in (("Posteriors", run.posterior), ("Row probabilities", run.raw)):
        hits = matrix.argmax(axis=1) == labels
        gap, error = mean_with_error(matrix.max(axis=1) - hits, groups)
        if error is not None and gap > max(_GAP, 2 * error):
            yield (
                "issue",
                (
                    f"{name} are over-confident: the likeliest class is said to be right in {matrix.max(axis=1).mean():.0%} "
                    f"of the rows and is in {hits.mean():.0%} (± {error:.1%})."
                ),
            )


def _over_quota(run: Finished) -> Said:
    design, quota = run.design, run.shown.quota
    places = quota * design.n_classes
    of_group = np.zeros((int(design.groups.max()) + 1, design.n_classes), dtype=np.int64)
    np.add.at(of_group, (design.train_groups, design.labels), 1)
    n_over = int((of_group > quota).any(axis=1).sum())
    if n_over:
        yield (
            "issue",
            (
                f"In {n_over} of {(of_group.sum(axis=1) > 0).sum()} training groups a class stands more often than its quota of "
                f"{quota}: posteriors rule such labels out."
            ),
        )
    if len(design.test_groups):
        sizes = np.bincount(design.test_groups)
        if (sizes > places).any():
            yield (
                "issue",
                (
                    f"{(sizes > places).sum()} of {(sizes > 0).sum()} test groups have more rows than the {places} places of "
                    "their quotas: those rows keep their own probabilities."
                ),
            )


def _idle_members(told: Mapping[str, Any]) -> Said:
    if not told["weights"]:
        return
    spent: dict[str, float] = {}
    for row in told["leaderboard"]:
        spent[row["model"]] = spent.get(row["model"], 0.0) + row["seconds"]
    total = sum(spent.values())
    idle = [
        name
        for name, weight in zip(told["weights"]["models"], told["weights"]["mean"], strict=True)
        if weight == 0 and name != "stack" and spent.get(name, 0.0) > max(_SECONDS, _SHARE * total)
    ]
    if idle:
        named = ", ".join(f"{shown_name(name)} ({spent[name]:.0f} s)" for name in idle)
        yield (
            "note",
            (
                f"Of {total:.0f} seconds of training, some went to members that the blend gives no weight in any fold (the stack "
                f"reads them all the same): {named}."
            ),
        )


def _alike(run: Finished) -> Said:
    labels, groups = run.design.labels, run.design.train_groups
    pairs = list(combinations(range(len(run.classes)), 2))[:_MANY_PAIRS]
    alike = []
    for one, other in pairs:
        of = (labels == one) | (labels == other)
        if not of.any():
            continue
        mine = np.where(labels[of] == one, run.raw[of, one], run.raw[of, other])
        theirs = np.where(labels[of] == one, run.raw[of, other], run.raw[of, one])
        right = (mine > theirs) + 0.5 * (mine == theirs)
        if right.mean() > _PLAIN:
            continue
        told_apart, error = mean_with_error(right, groups[of])
        if error is not None and told_apart - 2 * error <= 0.5:
            alike.append(
                f"{shown_name(run.classes[one])} and {shown_name(run.classes[other])} ({told_apart:.0%} ± {error:.0%})"
            )
    if alike:
        more = f", and {len(alike) - 4} more pairs" if len(alike) > 4 else ""
        yield (
            "issue",
            (
                f"Row by row, these are told apart no better than by a coin: {', '.join(alike[:4])}{more}."
            ),
        )


def _test_unlike(run: Finished) -> Said:
    """Scores on test rows with a truth stand in the logbook only: they are no part of a run."""
    key = run_key(run.root.name, run.record)
    for entry in read_logbook(run.root.parent).runs:
        if entry.get("key") != key:
            continue
        for model in entry.get("models", []):
            if (model["model"], model["round"]) != (run.name_shown, run.shown.number):
                continue
            needed = [
                model.get(it) for it in ("test_one_fold", "test_se", "posterior", "posterior_se")
            ]
            if any(it is None for it in needed):
                continue
            test, test_error, oof, oof_error = needed
            error = float(np.hypot(test_error, oof_error))
            if abs(test - oof) > 2 * error:
                yield "issue", (
                    f"One fold's models have a log loss of {test:.3f} on the test rows, {oof:.3f} out of fold: "
                    f"{'worse' if test > oof else 'better'} by {abs(test - oof):.3f} ± {error:.3f}, more than chance allows."
                )  # fmt: skip
            return


def _turned(told: Mapping[str, Any]) -> Said:
    turned = [(it["round"], it["turned"]) for it in told["pseudo"] if it["turned"] is not None]
    if turned and turned[-1][1] > _TURNED:
        number, share = turned[-1]
        yield (
            "note",
            (
                f"{share:.0%} of the pseudo-labels of round {number} are others than the round before made: the rounds have not "
                "settled."
            ),
        )


def _loose_quota(run: Finished) -> Said:
    design, quota = run.design, run.shown.quota
    codes = design.train_groups.astype(np.int64) * design.n_classes + design.labels
    most = int(np.unique(codes, return_counts=True)[1].max())
    if most < quota:
        yield (
            "issue",
            (
                f"The quota is {quota}, but no class stands more than {most} times in a training group: set the setting quota "
                f"to {most}, and posteriors know more."
            ),
        )
