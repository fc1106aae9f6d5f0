"""Stage three on files: a submission in, a better one out, and an account of what was done."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from stackllm.errors import DataError, MissingInputError, did_you_mean
from stackllm.group.optimise import Method, optimise_of
from stackllm.group.plan import Quota, checked
from stackllm.group.tempering import Calibration
from stackllm.optim.account import counts, scores
from stackllm.optim.request import Columns, Request
from stackllm.tables.files import read_frame
from stackllm.tables.groups import Groups, SameQuestion, group_column, groups_joined, groups_within
from stackllm.tables.ids import ID_NAMES, Read, Rows
from stackllm.tables.labels import LABEL_NAMES, Truth, read_truth
from stackllm.tables.quota import read_quota
from stackllm.tables.submission import Submission, read_submission


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
    files = _Files(columns or Columns(), project or {}, request.renormalise, read)
    sub = files.submission(request.submission)
    groups = files.groups(sub, request.groups)
    quota, quota_name = files.quota(request.quota, sub, groups)
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
        truth = files.truth(request.truth, sub)
        account["score"] = scores(sub.probabilities, after, truth.labels, groups.codes)
        account["matched_by_row_number"] += [str(request.truth)] * truth.by_number
    if fit is not None:
        account["matched_by_row_number"] += [str(request.fit_truth)] * fit.pop("by_number")
    return Outcome(sub.replaced(after), account)


@dataclass(frozen=True)
class _Files:
    """How the files of one request are read.

    Parameters
    ----------
    named
        What columns are called.
    project
        What the settings say of the project's tables.
    renormalise
        Take rows whatever they sum to.
    read
        Reads a table, each once.
    """

    named: Columns
    project: Mapping[str, Any]
    renormalise: bool
    read: Read

    def submission(self, path: Path, classes: Sequence[str] | None = None) -> Submission:
        """A table of probabilities."""
        usual = (self.project["id"], *ID_NAMES) if "id" in self.project else ID_NAMES
        return read_submission(
            path,
            id_name=self.named.id,
            id_names=usual,
            # with a name that is not there, what is called like groups is still no class
            group=lambda header: (
                self._group_column(path, header) or group_column(path, header, None)
            ),
            classes=classes,
            renormalise=self.renormalise,
            advice="Have each scaled with the setting renormalise.",
        )

    def groups(self, sub: Submission, table: Path | None) -> Groups:
        """The groups of a submission: from ``table``, its own column, or the project's test table."""
        column = self._group_column(sub.path, sub.frame.columns)
        if column is not None and table is None:
            return groups_within(sub.path, sub.frame, column, self._same(column))
        test = table or Path(self.project.get("test", "test.csv"))
        if table is None and not test.exists():
            self._refuse(sub, test)
        return self.groups_joined(sub, test, self.project.get("id"))

    def groups_joined(self, sub: Submission, path: Path, usual_id: str | None = None) -> Groups:
        """The groups of a submission from another table."""
        column = self.named.group or self.project.get("group")
        return groups_joined(
            _rows(sub), path, column, self.named.id or usual_id, self._same(column), self.read
        )

    def quota(self, text: str | None, sub: Submission, groups: Groups) -> tuple[Quota, str]:
        """How often each class may stand in a group, and how to call that."""
        if text is None:
            text = str(self.project.get("quota", 1))
        return read_quota(text, sub.classes, groups, group=self.named.group, read=self.read)

    def truth(self, path: Path, sub: Submission) -> Truth:
        """The labels of a submission's rows."""
        usual = [self.project["target"]] if "target" in self.project else []
        return read_truth(
            path,
            _rows(sub),
            sub.classes,
            target=self.named.target,
            usual=[*usual, *LABEL_NAMES],
            id_name=self.named.id,
            how=self.named.labels,
            advice="Say which, suffix or position, with the setting labels.",
            read=self.read,
        )

    def _group_column(self, path: Path, header: Sequence[str]) -> str | None:
        return group_column(path, header, self.named.group)

    def _same(self, column: str | None) -> SameQuestion:
        question = self.project.get("question")
        if question is not None and question != column:  # then the column holds ids
            return "exact"
        return self.named.same_question or self.project.get("same_question", "normalised")

    def _refuse(self, sub: Submission, test: Path) -> None:
        """Say that nothing tells which rows belong together."""
        if self.named.group is not None:
            raise DataError(
                f'{sub.path}: there is no column "{self.named.group}". '
                f"{did_you_mean(self.named.group, sub.frame.columns)} If it stands in another table, name "
                "that with the setting groups."
            )
        if "test" in self.project:
            raise MissingInputError(
                f'{test}: there is no such file; stackllm.toml names it ([data] test = "…"). Check the '
                "path, or name another table with the setting groups."
            )
        raise MissingInputError(
            f"{sub.path}: nothing says which rows belong together. Name its group column with the setting "
            "group, or a table that has one with the setting groups, or the test table in stackllm.toml "
            '([data] test = "…"), or run where test.csv is.'
        )


def _rows(sub: Submission) -> Rows:
    return Rows(sub.frame[sub.id], sub.path)


def _method(
    request: Request, files: _Files, sub: Submission
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
        groups = files.groups_joined(oof, request.fit_truth)
    if len(groups.names) < 2:
        raise DataError(
            f"{oof.path}: it has one group only, and fitting needs two or more: one to fit on and one to "
            "judge on. Give more groups, or leave out the setting fit."
        )
    quota, _ = files.quota(request.quota, sub, groups)
    truth = files.truth(request.fit_truth, oof)
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
