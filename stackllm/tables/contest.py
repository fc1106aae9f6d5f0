"""The table: what was asked, what was answered, who wrote it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import polars as pl
from annotated_types import Ge, Le

from stackllm.errors import DataError, MissingInputError
from stackllm.parameters import FileName, Name, check
from stackllm.tables.columns import find_column
from stackllm.tables.files import check_ids, check_text, read_frame
from stackllm.tables.groups import SameQuestion, check_filled, group_ids, said_of_merged
from stackllm.tables.ids import Rows, column_of_codes, id_column
from stackllm.tables.labels import check_labelled, plain_labels, sort_classes


@dataclass(frozen=True)
class TableParams:
    """Where the table is and what its columns are called.

    Parameters
    ----------
    train, test
        CSV (in UTF-8) or Parquet files. In Python ``test`` may be None: there are no rows to predict yet.
    id
        Column of row ids. None takes ``id`` or ``row_id`` or one called nearly so, else the row's
        number from 0. A training table may lack it.
    group
        Column whose text says which rows belong together: the question.
    text
        Column with the response.
    target
        Column of labels in ``train``.
    question
        Column with the question's text, when ``group`` holds something else. None takes ``group``.
    same_question
        When two texts of the group column are one question: ``normalised`` if nothing that a reader
        minds is different (see :func:`stackllm.tables.groups.reading`), ``exact`` if nothing is. Ids
        (texts without white space, or any where ``question`` is another column) are always compared
        exactly.
    quota
        How often each class stands in one group.
    sample
        A sample submission, whose id column and column order the submission copies.
    csv_safe
        Put an apostrophe before ids in CSV exports that a spreadsheet would run as formulas.
    """

    train: FileName = "train.csv"
    test: FileName | None = "test.csv"
    id: Name | None = None
    group: Name = "Question"
    text: Name = "Response"
    target: Name = "target"
    question: Name | None = None
    same_question: SameQuestion = "normalised"
    quota: Annotated[int, Ge(1), Le(10_000)] = 1
    sample: FileName | None = None
    csv_safe: bool = False

    def __post_init__(self) -> None:
        check(self)

    @property
    def exact(self) -> bool:
        """Is every difference between two texts of the group column one?"""
        return self.same_question == "exact" or self.question not in (None, self.group)


@dataclass(frozen=True)
class Table:
    """A checked table.

    Parameters
    ----------
    train
        Columns ``row_id, group_id, question, response`` (text) and ``label`` (index into ``classes``).
    test
        The same without ``label``.
    classes
        Label texts: integers in their order, else sorted.
    id_name
        What the id column of a submission is called.
    notes
        What a user should know: counts of empty texts and broken quotas.
    warnings
        What a user should look at: questions that were merged, ids that may not be meant.
    sources
        Files of the training and the test table.
    """

    train: pl.DataFrame
    test: pl.DataFrame
    classes: tuple[str, ...]
    id_name: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    sources: tuple[Path, Path]

    @property
    def n_train(self) -> int:
        """Number of training rows."""
        return self.train.height

    def rows(self) -> pl.DataFrame:
        """All rows without labels, train above test: ``row_id, group_id, question, response``."""
        return pl.concat([self.train.drop("label"), self.test])

    def train_rows(self) -> Rows:
        """The training rows, to be matched to another table."""
        return _rows(self.train, self.id_name, self.sources[0])

    def test_rows(self) -> Rows:
        """The test rows, to be matched to another table."""
        return _rows(self.test, self.id_name, self.sources[1])


@dataclass(frozen=True)
class NewRows:
    """Rows to predict.

    Parameters
    ----------
    frame
        Columns ``row_id, group_id, question, response``, text.
    rows
        Their ids, called as their column is.
    notes, warnings
        As in :class:`Table`.
    """

    frame: pl.DataFrame
    rows: Rows
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def read_training(params: TableParams) -> Table:
    """Read and check the train and test files.

    Raises
    ------
    MissingInputError
        If a file is not there.
    DataError
        One report of every problem in both files.
    StorageError
        If a file cannot be read.
    """
    train_path = Path(params.train)
    test_path = Path(params.test) if params.test is not None else None
    missing = [str(path) for path in (train_path, test_path) if path and not path.exists()]
    if missing:
        raise MissingInputError(
            f"{' and '.join(missing)}: there is no such file. Run in the folder that holds train.csv and "
            "test.csv, or name them with the setting train and the setting test."
        )
    report = _Report([], [], [])
    train, _ = _read_rows(train_path, params, True, report)
    if test_path is None:
        test, id_name = train.drop("target", strict=False).clear(), params.id or "id"
    else:
        test, id_name = _read_rows(test_path, params, False, report)
    if report.problems:
        raise DataError("\n".join(report.problems))
    # both at once, so that a question has one id in both
    groups = group_ids(pl.concat([train["group"], test["group"]]), exact=params.exact)
    train = _grouped(train, groups[: train.height], train_path, report)
    test = _grouped(test, groups[train.height :], test_path or train_path, report)
    classes = sort_classes(train["target"].unique().to_list())
    if len(classes) < 2:
        raise DataError(
            f'{params.train}: column "{params.target}" holds one label only ("{classes[0]}"). Two or more are needed.'
        )
    label = train["target"].replace_strict(classes, range(len(classes)), return_dtype=pl.Int32)
    train = train.drop("target").with_columns(label.alias("label"))
    report.notes.extend(_quota_notes(params, train, test, len(classes)))
    return Table(
        train,
        test,
        classes,
        id_name,
        tuple(report.notes),
        tuple(report.warnings),
        (train_path, test_path or train_path),
    )


def read_new(path: Path, params: TableParams) -> NewRows:
    """Read rows to predict.

    Raises
    ------
    MissingInputError, DataError, StorageError
        As :func:`read_training`.
    """
    report = _Report([], [], [])
    frame, id_name = _read_rows(path, params, False, report)
    if report.problems:
        raise DataError("\n".join(report.problems))
    frame = _grouped(frame, group_ids(frame["group"], exact=params.exact), path, report)
    rows = Rows(frame["row_id"].rename(id_name), path)
    return NewRows(frame, rows, tuple(report.notes), tuple(report.warnings))


@dataclass(frozen=True)
class _Report:
    """What reading tables brings to light: sentences, added as they come."""

    problems: list[str]
    notes: list[str]
    warnings: list[str]

    def attempt(self, check: Callable[[], object]) -> bool:
        """Run a check, and note the problem if there is one: several are reported at once."""
        try:
            check()
        except DataError as error:
            self.problems.append(str(error))
            return False
        return True


def _read_rows(
    path: Path, params: TableParams, labelled: bool, report: _Report
) -> tuple[pl.DataFrame, str]:
    """Columns ``row_id, group, question, response`` (and ``target``) of one file, and what its id column is called."""
    raw = read_frame(path)
    roles = {"group": params.group, "response": params.text}
    if params.question is not None:
        roles["question"] = params.question
    if labelled:
        roles["target"] = params.target
    sound = [
        report.attempt(partial(find_column, path, raw.columns, name, f"{role}s"))
        for role, name in roles.items()
    ]
    if not all(sound):
        return pl.DataFrame(), ""
    roles.setdefault("question", params.group)
    check_text(path, raw, roles.values())
    columns = {role: raw[name].fill_null("") for role, name in roles.items()}
    ids, id_name = _ids(path, raw, params, labelled, list(roles.values()), report)
    report.attempt(partial(check_filled, path, raw, params.group))
    for name in dict.fromkeys((roles["question"], params.text)):
        empty = int((raw[name].fill_null("").str.strip_chars() == "").sum())
        if empty:
            report.notes.append(f'{path}: {empty} of {raw.height} rows have no text in "{name}".')
    if labelled:
        columns["target"] = plain_labels(columns["target"])
        report.attempt(partial(check_labelled, path, columns["target"]))
    return pl.DataFrame({"row_id": ids, **columns}), id_name


def _ids(
    path: Path,
    raw: pl.DataFrame,
    params: TableParams,
    labelled: bool,
    beside: list[str],
    report: _Report,
) -> tuple[pl.Series, str]:
    """Ids of rows, and what their column is called: ``id`` where rows are numbered."""
    wanted = None if labelled and params.id not in raw.columns else params.id
    name = None
    try:
        name = id_column(path, raw, wanted, beside=beside)
        if name is not None:
            check_ids(path, raw, name)
    except DataError as error:
        report.problems.append(str(error))
    if name is not None:
        return raw[name], name
    if not labelled:
        report.notes.append(f"{path}: no id column, so rows are numbered from 0.")
        likely = column_of_codes(raw, beside)
        if likely is not None:
            report.warnings.append(
                f'{path}: rows are numbered from 0, though column "{likely}" has another value in each of them. '
                f'If those are the ids, set id = "{likely}".'
            )
    return pl.Series([str(i) for i in range(raw.height)]), "id"


def _grouped(frame: pl.DataFrame, groups: pl.Series, path: Path, report: _Report) -> pl.DataFrame:
    """Rows with the id of their group in place of its text."""
    merged = said_of_merged(str(path), frame["group"], groups)
    if merged:
        report.warnings.append(merged)
    columns = ["row_id", groups.rename("group_id"), "question", "response"]
    return frame.select(*columns, *(["target"] if "target" in frame.columns else []))


def _quota_notes(
    params: TableParams, train: pl.DataFrame, test: pl.DataFrame, n_classes: int
) -> list[str]:
    """Count groups that do not hold every class exactly ``quota`` times."""
    notes = []
    counts = train.group_by("group_id", "label").len()
    odd = (
        counts.group_by("group_id")
        .agg(full=((pl.col("len") == params.quota).sum() == n_classes) & (pl.len() == n_classes))
        .filter(~pl.col("full"))
        .height
    )
    if odd:
        notes.append(
            f"{params.train}: {odd} of {train['group_id'].n_unique()} groups do not hold every class {params.quota}×."
        )
    sizes = test.group_by("group_id").len()["len"]
    n_places = n_classes * params.quota
    if (sizes < n_places).any():
        notes.append(
            f"{params.test}: {int((sizes < n_places).sum())} of {len(sizes)} groups have fewer than {n_places} rows; "
            "places stay free there."
        )
    if (sizes > n_places).any():
        notes.append(
            f"{params.test}: {int((sizes > n_places).sum())} of {len(sizes)} groups have more than {n_places} rows; "
            "they keep their calibrated row probabilities."
        )
    shared = set(train["group_id"]) & set(test["group_id"])
    if shared:
        notes.append(f"{len(shared)} groups stand in both {params.train} and {params.test}.")
    return notes


def _rows(frame: pl.DataFrame, id_name: str, source: Path) -> Rows:
    return Rows(frame["row_id"].rename(id_name), source, frame["response"])
