"""What was done to a submission: counts, scores, and the lines that tell a person."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackllm.group.optimise import Method
from stackllm.group.plan import Batch, Plan
from stackllm.metrics import mean_with_error, row_losses, shown_with_error
from stackllm.probabilities import Floats
from stackllm.tables.files import shown
from stackllm.tables.groups import Groups


def counts(method: Method, groups: Groups, plan: Plan) -> dict[str, Any]:
    """How many groups were done how and why, and which were kept.

    Parameters
    ----------
    method
        What was done.
    groups
        The group of each row.
    plan
        What can be done with each.

    Returns
    -------
    dict
        ``how``, an entry for each way, and ``kept``, an entry for each group left as it came.
    """
    done: dict[str, dict[str, Any]] = {}
    alone = []
    for batch in plan.batches if method.name != "none" else ():
        how = _called(method, batch)
        entry = done.setdefault(how, {"how": how, "groups": 0, "rows": 0, "reason": batch.reason})
        entry["groups"] += batch.n_groups
        entry["rows"] += batch.rows.size
        if batch.reason not in entry["reason"] and len(entry["reason"]) < 200:
            entry["reason"] += f"; {batch.reason}"
        if batch.how == "rows":
            names = [groups.names[code] for code in groups.codes[batch.rows[:, 0]].tolist()]
            alone += [
                {"group": name[:200], "rows": batch.rows.shape[1], "reason": batch.reason}
                for name in names
            ]
    return {"how": list(done.values()), "kept": alone}


def _called(method: Method, batch: Batch) -> str:
    if batch.how == "rows":
        return "kept"
    if method.name == "posterior":
        return {"exact": "exact", "bethe": "belief propagation"}[batch.how]
    return method.name


def scores(
    before: Floats, after: Floats, labels: NDArray[np.intp], groups: NDArray[np.intp]
) -> dict[str, Any]:
    """Scores before and after, and the gain, each with its standard error over groups.

    Parameters
    ----------
    before, after
        ``(n_rows, n_classes)``, as they came and as they are handed out.
    labels
        Class index of each row, ``(n_rows,)``.
    groups
        Group code of each row, ``(n_rows,)``.
    """
    raw = before / before.sum(axis=1, keepdims=True)
    told: dict[str, Any] = {}
    losses = {}
    for name, matrix in (("before", raw), ("after", after)):
        losses[name] = row_losses(matrix, labels)
        hits = matrix.argmax(axis=1) == labels
        exact = np.bincount(groups, weights=~hits) == 0  # (n_groups,)
        told[name] = {}
        for what, values, of in (
            ("log_loss", losses[name], groups),
            ("accuracy", hits, groups),
            ("group_exact_accuracy", exact, np.arange(len(exact))),
        ):
            told[name][what], told[name][f"{what}_error"] = mean_with_error(values, of)
    told["gain"], told["gain_error"] = mean_with_error(losses["before"] - losses["after"], groups)
    return told


def describe(account: dict[str, Any]) -> list[str]:
    """The account in lines for a person to read."""
    groups = account["groups"]
    lines = [
        f"{account['input']}: {account['rows']:,} rows, {len(account['classes'])} classes, "
        f"{groups['count']:,} groups ({groups['source']})"
    ]
    if account["fit"] is not None:
        lines += _describe_fit(account["fit"])
    settings = account["method"]
    as_it_came = account["temperature"] == 1 and not account["bias"]
    if account["method"] in {"posterior", "sinkhorn"} or not as_it_came:
        settings += f", temperature {account['temperature']:.4g}"
        settings += ", a bias per class" if account["bias"] else ""
    lines.append(f"method {settings}, quota {account['quota']}")
    for entry in account["how"]:
        lines.append(f"  {entry['how']}: {entry['groups']:,} groups ({entry['reason']})")
    if account["kept"]:
        names = ", ".join(shown(entry["group"]) for entry in account["kept"][:3])
        said = "kept as they came" if as_it_came else "kept, but for the temperature"
        lines.append(f"  {said}: {names}{', …' if len(account['kept']) > 3 else ''}")
    lines += account["warnings"]
    for path in account["matched_by_row_number"]:
        lines.append(f"{path}: no id column, so its rows are matched by row number, from 0")
    if account["score"] is not None:
        lines += _describe_score(account["score"])
    return lines


def _describe_fit(fit: dict[str, Any]) -> list[str]:
    scores = ", ".join(f"{name} {loss:.4f}" for name, loss in fit["scores"].items())
    lines = [f"cross-validated on {fit['n_groups']:,} groups, log loss: {scores}"]
    gain = shown_with_error(fit["gain"], fit["gain_error"])
    if fit["helps"]:
        lines.append(f"{fit['candidate']} gains {gain} on groups it was not fitted on")
    else:
        lines.append(f"no method helps (gain {gain}): the probabilities stay as they are")
    return lines


def _describe_score(score: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("before", "after"):
        row = score[name]
        parts = [
            f"{what.replace('_', ' ')} {shown_with_error(row[what], row[what + '_error'])}"
            for what in ("log_loss", "accuracy", "group_exact_accuracy")
        ]
        lines.append(f"{name:>6}: {', '.join(parts)}")
    lines.append(f"  gain: log loss {shown_with_error(score['gain'], score['gain_error'])}")
    if score["gain_error"] is None:
        lines.append("  one group only, so nothing tells how sure these numbers are")
    return lines
