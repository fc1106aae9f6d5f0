"""Stage three on files: a submission in, a better one out, and an account of what was done."""

from __future__ import annotations

import functools
import math
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from stackllm.errors import DataError, MissingInputError, UsageError, did_you_mean
from stackllm.group.optimise import Method, optimise_of
from stackllm.group.plan import Batch, Floats, Plan, checked
from stackllm.group.tempering import Calibration
from stackllm.store.atomic import storage_errors
from stackllm.tables.files import check_text, read_frame, shown
from stackllm.tables.joining import (
    Groups,
    Read,
    group_column,
    groups_joined,
    groups_within,
    id_column,
    join_on_id,
    label_column,
    read_labels,
    read_quota,
)
from stackllm.tables.submission import ID_NAMES, Submission, read_submission


@dataclass(frozen=True)
class Columns:
    """What columns are called; None where the usual names are looked for.

    Parameters
    ----------
    id
        ``--id``: the id column of every file.
    group
        ``--group``: the column that says which rows belong together.
    target
        ``--target``: the label column of ``--truth`` and ``--fit-truth``.
    labels
        ``--labels``: how labels name classes (``name``, ``suffix``, ``position``).
    """

    id: str | None = None
    group: str | None = None
    target: str | None = None
    labels: str | None = None


@dataclass(frozen=True)
class Request:
    """What to improve, and how; each field is an option of ``stackllm optim``.

    Parameters
    ----------
    submission
        The file to improve.
    groups
        A table with ids and groups. None: the submission's own group column, or the project's test
        table.
    method
        A method of :mod:`stackllm.group.optimise`. None: ``posterior``, or with ``fit`` the best.
    quota
        A number, numbers a class, or a file.
    exactly
        Must every place be filled?
    temperature
        None: 1, or with ``fit`` the best.
    fit, fit_truth
        Out-of-fold predictions and their labels, to fit on.
    truth
        Labels of the submission, to score before and after.
    renormalise
        Take rows whatever they sum to.
    """

    submission: Path
    groups: Path | None = None
    method: str | None = None
    quota: str = "1"
    exactly: bool = False
    temperature: float | None = None
    fit: Path | None = None
    fit_truth: Path | None = None
    truth: Path | None = None
    renormalise: bool = False

    def __post_init__(self) -> None:
        if (self.fit is None) != (self.fit_truth is None):
            raise UsageError("--fit and --fit-truth belong together: predictions and their labels.")
        if self.fit is not None and self.temperature is not None:
            raise UsageError("--temperature with --fit: give one of them, as --fit finds its own.")


@dataclass(frozen=True)
class Outcome:
    """The improved table and an account of what was done.

    Parameters
    ----------
    frame
        The submission with better probabilities.
    account
        What ``--json`` prints: input, groups, quota, method, how many groups were done how and why,
        the groups that were kept as they are, and the fit's and the truth's scores.
    """

    frame: pl.DataFrame
    account: dict[str, Any] = field(default_factory=dict)


def improve(request: Request, columns: Columns | None = None) -> Outcome:
    """Read, improve, and account for it; writes nothing.

    Parameters
    ----------
    request
        What to do.
    columns
        Names of columns. None: the usual ones.

    Returns
    -------
    Outcome

    Raises
    ------
    UsageError, MissingInputError, DataError, StorageError
        In one sentence, with file, column, row and the next step.
    """
    project = _project()
    named = columns or Columns()
    read = functools.cache(read_frame)  # a pipe that two options name can be read once only
    sub = _submission(request, named, project)
    groups = _groups(sub, request, named, project, read)
    quota, quota_name = read_quota(request.quota, sub.classes, groups, group=named.group, read=read)
    method, fit = _method(request, named, sub, project, read)
    matrix, plan = checked(sub.probabilities, groups.codes, quota, exactly=request.exactly)
    after = optimise_of(matrix, plan, method)
    account: dict[str, Any] = {
        "input": str(request.submission),
        "rows": sub.frame.height,
        "classes": list(sub.classes),
        "groups": {"count": len(groups.names), "source": groups.source},
        "quota": quota_name,
        "exactly": request.exactly,
        "method": method.name,
        "temperature": method.calibration.temperature,
        "bias": list(method.calibration.bias),
        "blend": asdict(method.blend) if method.name == "blend" else None,
        **_how(method, groups, plan),
        "fit": fit,
        "score": None,
        "matched_by_row_number": [],
    }
    if request.truth is not None:
        labels, by_row = _labels(request.truth, sub, named, read)
        account["score"] = _score(sub.probabilities, after, labels, groups.codes)
        account["matched_by_row_number"] += [str(request.truth)] * by_row
    if fit is not None:
        account["matched_by_row_number"] += [str(request.fit_truth)] * fit.pop("by_row")
    return Outcome(sub.replaced(after), account)


def _project() -> dict[str, str]:
    """``[data]`` of ``stackllm.toml`` in the working directory, empty if there is none."""
    path = Path("stackllm.toml")
    if not path.is_file():
        return {}
    try:
        with storage_errors(path, "reading"):
            table = tomllib.loads(path.read_text(encoding="utf-8")).get("data", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid TOML ({error}). Mend that line.") from error
    if not isinstance(table, dict):
        raise DataError(f"{path}: [data] must be a table.")
    wrong = [key for key in ("test", "id", "group") if not isinstance(table.get(key, ""), str)]
    if wrong:
        raise DataError(f'{path}: "{wrong[0]}" in [data] must be text in quotes.')
    return {key: table[key] for key in ("test", "id", "group") if table.get(key)}


def _submission(request: Request, named: Columns, project: dict[str, str]) -> Submission:
    usual = [project["id"], *ID_NAMES] if "id" in project else ID_NAMES
    return read_submission(
        request.submission,
        id_name=named.id,
        id_names=usual,
        # with a name that is not there, what is called like groups is still no class
        group=lambda header: group_column(header, named.group) or group_column(header, None),
        renormalise=request.renormalise,
    )


def _groups(
    sub: Submission, request: Request, named: Columns, project: dict[str, str], read: Read
) -> Groups:
    own = group_column(sub.frame.columns, named.group)
    if own is not None and request.groups is None:
        return groups_within(sub.path, sub.frame, own)
    test = request.groups or Path(project.get("test", "test.csv"))
    if request.groups is None and not test.exists():
        if named.group is not None:
            raise DataError(
                f'{sub.path}: there is no column "{named.group}". '
                f"{did_you_mean(named.group, sub.frame.columns)} If it stands in another table, pass "
                "--groups TEST.csv."
            )
        if "test" in project:
            raise MissingInputError(
                f'{test}: there is no such file; stackllm.toml names it ([data] test = "…"). Check the '
                "path, or pass --groups TEST.csv."
            )
        raise MissingInputError(
            f"{sub.path}: nothing says which rows belong together. Give it a group column "
            "(--group COLUMN), or pass --groups TEST.csv, or name the test table in stackllm.toml "
            '([data] test = "…"), or run where test.csv is.'
        )
    column = named.group or project.get("group")
    return groups_joined(
        sub.frame[sub.id], sub.path, test, column, named.id or project.get("id"), read
    )


def _method(
    request: Request, named: Columns, sub: Submission, project: dict[str, str], read: Read
) -> tuple[Method, dict[str, Any] | None]:
    if request.fit is None or request.fit_truth is None:
        method = Method(request.method or "posterior")
        if request.temperature is None:
            return method, None
        return Method(method.name, Calibration(request.temperature), method.blend), None
    from stackllm.group.fitting import choose_method

    oof = read_submission(
        request.fit, id_name=named.id, classes=sub.classes, renormalise=request.renormalise
    )
    own = group_column(oof.frame.columns, named.group)
    if own is not None:
        groups = groups_within(oof.path, oof.frame, own)
    else:
        column = named.group or project.get("group")
        ids = oof.frame[oof.id]
        groups = groups_joined(ids, oof.path, request.fit_truth, column, named.id, read)
    if len(groups.names) < 2:
        raise DataError(
            f"{oof.path}: it has one group only, and fitting needs two or more: one to fit on and one to "
            "judge on. Give more groups, or leave out --fit."
        )
    quota, _ = read_quota(request.quota, sub.classes, groups, group=named.group, read=read)
    labels, by_row = _labels(request.fit_truth, oof, named, read)
    report = choose_method(
        oof.probabilities,
        groups.codes,
        labels,
        quota,
        method=request.method,
        exactly=request.exactly,
    )
    told = asdict(report)
    told["method"] = report.method.name
    told["by_row"] = by_row
    return report.method, told


def _labels(
    path: Path, sub: Submission, named: Columns, read: Read
) -> tuple[NDArray[np.intp], bool]:
    """Class index of each row, and whether rows were matched by their number."""
    frame = read(path)
    column = label_column(path, frame.columns, named.target, sub.id)
    check_text(path, frame, [column])
    # read before they are joined, so that a message counts rows as the file does
    labels = read_labels(path, frame[column], sub.classes, named.labels)
    ids, known = sub.frame[sub.id], frame.with_columns(pl.Series(column, labels))
    joined = join_on_id(ids, sub.path, known, path, column, named.id)
    by_row = id_column(path, frame, ids, named.id, column) is None
    return joined.to_numpy().astype(np.intp), by_row


def _how(method: Method, groups: Groups, plan: Plan) -> dict[str, Any]:
    """How many groups were done how and why, and which were kept."""
    done: dict[str, dict[str, Any]] = {}
    kept = []
    for batch in plan.batches if method.name != "none" else ():
        how = _called(method, batch)
        entry = done.setdefault(how, {"how": how, "groups": 0, "rows": 0, "reason": batch.reason})
        entry["groups"] += batch.n_groups
        entry["rows"] += batch.rows.size
        if batch.reason not in entry["reason"] and len(entry["reason"]) < 200:
            entry["reason"] += f"; {batch.reason}"
        if batch.how == "rows":
            names = [groups.names[code] for code in groups.codes[batch.rows[:, 0]].tolist()]
            kept += [
                {"group": name[:200], "rows": batch.rows.shape[1], "reason": batch.reason}
                for name in names
            ]
    return {"how": list(done.values()), "kept": kept}


def _called(method: Method, batch: Batch) -> str:
    if batch.how == "rows":
        return "kept"
    if method.name == "posterior":
        return {"exact": "exact", "bethe": "belief propagation"}[batch.how]
    return method.name


def _score(
    before: Floats, after: Floats, labels: NDArray[np.intp], groups: NDArray[np.intp]
) -> dict[str, Any]:
    from stackllm.metrics import group_exact_accuracy, row_losses

    raw = before / before.sum(axis=1, keepdims=True)
    told: dict[str, Any] = {}
    losses, hits = {}, {}
    for name, matrix in (("before", raw), ("after", after)):
        guess = matrix.argmax(axis=1)
        losses[name], hits[name] = row_losses(matrix, labels), (guess == labels).astype(float)
        exact = np.ones(int(groups.max()) + 1)
        exact[groups[guess != labels]] = 0.0
        told[name] = {
            "log_loss": float(losses[name].mean()),
            "log_loss_error": _error(losses[name], groups),
            "accuracy": float(hits[name].mean()),
            "accuracy_error": _error(hits[name], groups),
            "group_exact_accuracy": group_exact_accuracy(guess, labels, groups),
            "group_exact_accuracy_error": _error(exact, np.arange(len(exact))),
        }
    told["gain"] = told["before"]["log_loss"] - told["after"]["log_loss"]
    told["gain_error"] = _error(losses["before"] - losses["after"], groups)
    return told


def _error(values: Floats, groups: NDArray[np.intp]) -> float | None:
    """Standard error over groups; None where a single group leaves it unknown."""
    from stackllm.metrics import bootstrap_error

    error = bootstrap_error(values, groups)
    return None if math.isnan(error) else error


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
        settings += ", a bias a class" if account["bias"] else ""
    lines.append(f"method {settings}, quota {account['quota']}")
    for entry in account["how"]:
        lines.append(f"  {entry['how']}: {entry['groups']:,} groups ({entry['reason']})")
    if account["kept"]:
        names = ", ".join(shown(entry["group"]) for entry in account["kept"][:3])
        kept = "kept as they came" if as_it_came else "kept, but for the temperature"
        lines.append(f"  {kept}: {names}{', …' if len(account['kept']) > 3 else ''}")
    for path in account["matched_by_row_number"]:
        lines.append(f"{path}: no id column, so its rows are matched by row number, from 0")
    if account["score"] is not None:
        lines += _describe_score(account["score"])
    return lines


def _describe_fit(fit: dict[str, Any]) -> list[str]:
    scores = ", ".join(f"{name} {loss:.4f}" for name, loss in fit["scores"].items())
    lines = [f"cross-validated on {fit['n_groups']:,} groups, log loss: {scores}"]
    gain = _with_error(fit["gain"], fit["gain_error"])
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
            f"{what.replace('_', ' ')} {_with_error(row[what], row[what + '_error'])}"
            for what in ("log_loss", "accuracy", "group_exact_accuracy")
        ]
        lines.append(f"{name:>6}: {', '.join(parts)}")
    lines.append(f"  gain: log loss {_with_error(score['gain'], score['gain_error'])}")
    if score["gain_error"] is None:
        lines.append("  one group only, so nothing tells how sure these numbers are")
    return lines


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
