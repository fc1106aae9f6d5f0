"""Stage three on files: a submission in, a better one out, and an account of what was done."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl

from stackllm.errors import DataError
from stackllm.group.optimise import Method, optimise_of
from stackllm.group.plan import checked
from stackllm.group.tempering import Calibration
from stackllm.optim.account import counts, scores
from stackllm.optim.files import Files, rows_of
from stackllm.optim.request import Columns, Request
from stackllm.tables.files import read_frame
from stackllm.tables.groups import group_column
from stackllm.tables.submission import Submission


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


def improve(
    request: Request, columns: Columns | None = None, project: Mapping[str, Any] | None = None
) -> Outcome:
    """Read, improve, and account for it; writes nothing.

    Parameters
    ----------
    request
        What to do.
    columns
        Names of columns. None: the usual ones.
    project
        What ``[data]`` of the settings says of the project's tables. None: nothing.

    Returns
    -------
    Outcome

    Raises
    ------
    UsageError, MissingInputError, DataError, StorageError
        In one sentence, with file, column, row and the next step.
    """
    read = functools.cache(read_frame)  # a pipe that two options name can be read once only
    files = Files(columns or Columns(), project or {}, request.renormalise, read)
    sub = files.submission(request.submission)
    groups = files.groups(sub, request.groups)
    quota, quota_name = files.quota(request.quota, sub.classes, groups)
    method, fit = _method(request, files, sub)
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
        **counts(method, groups, plan),
        "fit": fit,
        "score": None,
        "matched_by_row_number": [],
        "warnings": [groups.merged] if groups.merged else [],
    }
    if request.truth is not None:
        truth = files.truth(request.truth, rows_of(sub), sub.classes)
        account["score"] = scores(sub.probabilities, after, truth.labels, groups.codes)
        account["matched_by_row_number"] += [str(request.truth)] * truth.by_number
    if fit is not None:
        account["matched_by_row_number"] += [str(request.fit_truth)] * fit.pop("by_number")
    return Outcome(sub.replaced(after), account)


def _method(
    request: Request, files: Files, sub: Submission
) -> tuple[Method, dict[str, Any] | None]:
    """The method, and how it was chosen where there is something to fit it on."""
    if request.fit is None or request.fit_truth is None:
        name, temperature = request.method or "posterior", request.temperature
        return Method(name) if temperature is None else Method(name, Calibration(temperature)), None
    from stackllm.group.fitting import choose_method

    oof = files.submission(request.fit, sub.classes)
    column = group_column(oof.path, oof.frame.columns, files.named.group)
    if column is not None:
        groups = files.groups(oof, None)
    else:
        groups = files.groups_joined(rows_of(oof), request.fit_truth)
    if len(groups.names) < 2:
        raise DataError(
            f"{oof.path}: it has one group only, and fitting needs two or more: one to fit on and one to "
            "judge on. Give more groups, or leave out the setting fit."
        )
    quota, _ = files.quota(request.quota, sub.classes, groups)
    truth = files.truth(request.fit_truth, rows_of(oof), oof.classes)
    report = choose_method(
        oof.probabilities,
        groups.codes,
        truth.labels,
        quota,
        method=request.method,
        exactly=request.exactly,
    )
    told = asdict(report)
    told["method"] = report.method.name
    told["by_number"] = truth.by_number
    return report.method, told
