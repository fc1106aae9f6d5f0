"""What ``stackllm optim`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stackllm.errors import UsageError
from stackllm.tables.groups import SameQuestion


@dataclass(frozen=True)
class Columns:
    """What columns are called, and how their texts are read; None where it is found out.

    Parameters
    ----------
    id
        The id column of every file.
    group
        The column that says which rows belong together.
    target
        The label column of ``truth`` and ``fit_truth``.
    labels
        How labels name classes: ``name``, ``suffix``, ``position``.
    same_question
        When two texts of the group column are one question, as in
        :class:`~stackllm.tables.contest.TableParams`.
    """

    id: str | None = None
    group: str | None = None
    target: str | None = None
    labels: str | None = None
    same_question: SameQuestion | None = None


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
        A number, numbers per class, or a file. None: the project's, or 1.
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
    quota: str | None = None
    exactly: bool = False
    temperature: float | None = None
    fit: Path | None = None
    fit_truth: Path | None = None
    truth: Path | None = None
    renormalise: bool = False

    def __post_init__(self) -> None:
        if (self.fit is None) != (self.fit_truth is None):
            raise UsageError(
                "the setting fit and the setting fit_truth belong together: predictions and their labels."
            )
        if self.fit is not None and self.temperature is not None:
            raise UsageError("temperature with fit: give one of them, as fit finds its own.")
