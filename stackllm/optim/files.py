"""How the files of one request are read: submissions, their groups, quotas and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackllm.errors import DataError, MissingInputError, did_you_mean
from stackllm.group.plan import Quota
from stackllm.optim.request import Columns
from stackllm.tables.files import read_frame
from stackllm.tables.groups import Groups, SameQuestion, group_column, groups_joined, groups_within
from stackllm.tables.ids import ID_NAMES, Read, Rows
from stackllm.tables.labels import LABEL_NAMES, Truth, read_truth
from stackllm.tables.quota import read_quota
from stackllm.tables.submission import ReadNumbers, Submission, read_submission


@dataclass(frozen=True)
class Files:
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

    def submission(
        self,
        path: Path,
        classes: Sequence[str] | None = None,
        beside: Sequence[str] = (),
        read: ReadNumbers = read_frame,
    ) -> Submission:
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
            beside=beside,
            classes=classes,
            renormalise=self.renormalise,
            advice="Have each scaled with the setting renormalise.",
            read=read,
        )

    def groups(self, sub: Submission, table: Path | None) -> Groups:
        """The groups of a submission: from ``table``, its own column, or the project's test table."""
        within = self.groups_within(sub) if table is None else None
        if within is not None:
            return within
        test = table or Path(self.project.get("test", "test.csv"))
        if table is None and not test.exists():
            self._refuse(sub, test)
        return self.groups_joined(rows_of(sub), test, self.project.get("id"))

    def groups_within(self, sub: Submission) -> Groups | None:
        """The groups of a submission by its own column; None without one."""
        column = self._group_column(sub.path, sub.frame.columns)
        if column is None:
            return None
        return groups_within(sub.path, sub.frame, column, self._same(column))

    def groups_joined(
        self, rows: Rows, path: Path, usual_id: str | None = None, surplus: bool = False
    ) -> Groups:
        """The groups of rows from another table."""
        column = self.named.group or self.project.get("group")
        return groups_joined(
            rows,
            path,
            column,
            self.named.id or usual_id,
            self._same(column),
            self.read,
            surplus=surplus,
        )

    def quota(self, text: str | None, classes: Sequence[str], groups: Groups) -> tuple[Quota, str]:
        """How often each class may stand in a group, and how to call that."""
        if text is None:
            text = str(self.project.get("quota", 1))
        return read_quota(text, classes, groups, group=self.named.group, read=self.read)

    def truth(self, path: Path, rows: Rows, classes: Sequence[str]) -> Truth:
        """The labels of rows."""
        usual = [self.project["target"]] if "target" in self.project else []
        return read_truth(
            path,
            rows,
            classes,
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


def rows_of(sub: Submission) -> Rows:
    """The rows of a submission, to be matched to another table."""
    return Rows(sub.frame[sub.id], sub.path)
