"""Everything that a report says, as one dict of plain values; the page, report.md and report.json are made of it."""

from __future__ import annotations

from typing import Any

from stackllm.metrics import shown_with_error
from stackllm.report.page import browser, panels
from stackllm.report.page.checks import checks
from stackllm.report.page.finished import Finished
from stackllm.report.text import one_line

SCHEMA = "stackllm report 1"
"""What the dict calls itself; the number rises when a program that reads it would have to change."""


def gather(run: Finished) -> dict[str, Any]:
    """All that the report of a run says.

    Parameters
    ----------
    run
        From :func:`~stackllm.report.page.finished.read_finished`.

    Returns
    -------
    dict
        Numbers, texts, lists and dicts only: the same for the same run, without any time of day.
    """
    labels, groups = run.design.labels, run.design.train_groups
    listed, heard = browser.groups(run)
    told: dict[str, Any] = {
        "schema": SCHEMA,
        "name": one_line(run.root.name),
        "classes": [one_line(name) for name in run.classes],
        "model": one_line(run.name_shown),
        "best_round": run.best_round,
        "standing": panels.standing(run),
        "leaderboard": panels.leaderboard(run),
        "rounds": panels.rounds(run),
        "confusion": {
            "raw": panels.confusion(run.raw, labels),
            "posterior": panels.confusion(run.posterior, labels),
        },
        "reliability": {
            "raw": panels.reliability(run.raw, labels, groups),
            "posterior": panels.reliability(run.posterior, labels, groups),
        },
        "browser": listed,
        "voices": browser.voices(run, heard),
        "correlation": panels.correlation(run),
        "weights": panels.weights(run),
        "slices": panels.slices(run),
        "pseudo": panels.pseudo(run),
        "public": panels.public_scores(run),
        "made": panels.how_made(run),
        "lacks": list(run.lacks),
        "notes": [one_line(note) for note in run.record.get("notes", [])],
    }
    told["verdict"] = _verdict(told)
    told["checks"] = checks(run, told)
    return panels.rounded(told)  # type: ignore[no-any-return]


def _verdict(told: dict[str, Any]) -> list[str]:
    """What somebody who reads one sentence should read, and the two after it."""
    standing, chance = told["standing"], told["standing"]["chance"]
    loss, brought, hits = (standing[it] for it in ("posterior", "brought", "accuracy"))
    error = loss["error"]
    which = (
        f"The best model, {told['model']}, has"
        if told["best_round"] is None
        else f"What is submitted, the blend of round {told['best_round']}, has"
    )
    first = f"{which} a log loss of {shown_with_error(**loss)} out of fold"
    if error is None:
        first += f"; guessing has {chance:.4f}, and one group tells no error."
    elif loss["value"] < chance - 2 * error:
        first += f", where guessing has {chance:.4f}."
    else:
        first += f": no better than guessing ({chance:.4f}) as far as so few groups tell."
    gain = shown_with_error(abs(brought["value"]), brought["error"])
    if brought["error"] is not None and abs(brought["value"]) <= 2 * brought["error"]:
        second = f"What the group brings is within its error ({gain})."
    else:
        word = "brought" if brought["value"] > 0 else "cost"
        second = f"Row by row it is {shown_with_error(**standing['raw'])}: the group {word} {gain}."
    third = (
        f"The likeliest class is right in {hits['value']:.1%} of {standing['n_rows']:,} rows, and in all rows of "
        f"{standing['groups_right']:,} of {standing['n_groups']:,} groups."
    )
    return [first, second, third]
