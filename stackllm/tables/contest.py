"""The table: what was asked, what was answered, who wrote it."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from stackllm.errors import DataError, MissingInputError, UsageError, did_you_mean
from stackllm.tables.files import check_text, read_table


@dataclass(frozen=True)
class TableParams:
    """Where the table is and what its columns are called.

    Parameters
    ----------
    train, test
        CSV or Parquet files.
    id
        Column of row ids. None takes ``id`` where there is one, else the row's number from 0.
    group
        Column whose (normalised) text says which rows belong together: the question.
    text
        Column with the response.
    target
        Column of labels in ``train``.
    question
        Column with the question's text, when ``group`` holds something else. None takes ``group``.
    quota
        How often each class stands in one group.
    sample
        A sample submission, whose id column and column order the submission copies.
    csv_safe
        Put an apostrophe before ids in CSV exports that a spreadsheet would run as formulas.
    """

    train: str = "train.csv"
    test: str = "test.csv"
    id: str | None = None
    group: str = "Question"
    text: str = "Response"
    target: str = "target"
    question: str | None = None
    quota: int = 1
    sample: str | None = None
    csv_safe: bool = False

    def __post_init__(self) -> None:
        if self.quota < 1:
            raise UsageError(f"quota must be 1 or more, not {self.quota}.")


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
        What a user should know: counts of empty texts, broken quotas, merged questions.
    """

    train: pl.DataFrame
    test: pl.DataFrame
    classes: tuple[str, ...]
    id_name: str
    notes: tuple[str, ...]

    @property
    def n_train(self) -> int:
        """Number of training rows."""
        return self.train.height

    def rows(self) -> pl.DataFrame:
        """All rows without labels, train above test: ``row_id, group_id, question, response``."""
        return pl.concat([self.train.drop("label"), self.test])


def normalise(text: str) -> str:
    """A question's text with what makes no difference taken out.

    Unicode NFKC, case-folded, white space collapsed, closing punctuation dropped.

    Examples
    --------
    >>> normalise("What  is\\nRust ?") == normalise("what is rust")
    True
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return re.sub(r"[\s.?!…:;,]+$", "", folded) or folded


def group_ids(texts: pl.Series) -> pl.Series:
    """Stable id of each group: 16 hexadecimal digits of the SHA-256 of its normalised text."""
    names = {
        text: hashlib.sha256(normalise(text).encode()).hexdigest()[:16] for text in texts.unique()
    }
    return texts.replace_strict(names, return_dtype=pl.String).alias("group_id")


def read_training(params: TableParams) -> Table:
    """Read and check the train and test files.

    Raises
    ------
    MissingInputError
        If a file is not there.
    DataError
        One report of every problem in both files.
    """
    missing = [name for name in (params.train, params.test) if not Path(name).exists()]
    if missing:
        raise MissingInputError(
            f"{' and '.join(missing)}: there is no such file. "
            "Run in the folder that holds train.csv and test.csv, or name them with --train and --test."
        )
    problems: list[str] = []
    notes: list[str] = []
    train = _read_rows(Path(params.train), params, True, problems, notes)
    test = _read_rows(Path(params.test), params, False, problems, notes)
    if problems:
        raise DataError("\n".join(problems))
    classes = sort_classes(train["target"].unique().to_list())
    if len(classes) < 2:
        raise DataError(
            f'{params.train}: column "{params.target}" holds one label only ("{classes[0]}"). Two or more are needed.'
        )
    label = train["target"].replace_strict(
        list(classes), list(range(len(classes))), return_dtype=pl.Int32
    )
    train = train.drop("target").with_columns(label.alias("label"))
    notes += _quota_notes(params, train, test, len(classes))
    return Table(train, test, classes, test_id_name(params), tuple(notes))


def read_new(path: Path, params: TableParams) -> pl.DataFrame:
    """Read rows to predict: ``row_id, group_id, question, response``.

    Raises
    ------
    MissingInputError, DataError
        As :func:`read_training`.
    """
    problems: list[str] = []
    frame = _read_rows(path, params, False, problems, [])
    if problems:
        raise DataError("\n".join(problems))
    return frame


def test_id_name(params: TableParams) -> str:
    """What the id column is called in a submission."""
    return params.id or "id"


def sort_classes(labels: list[str]) -> tuple[str, ...]:
    """Labels in their order: as numbers when all are integers, else as text."""
    if all(re.fullmatch(r"-?\d{1,18}", label) for label in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def _read_rows(
    path: Path, params: TableParams, labelled: bool, problems: list[str], notes: list[str]
) -> pl.DataFrame:
    """Canonical rows of one file; problems and notes are added to the lists."""
    raw = read_table(path)
    question = params.question or params.group
    wanted = [params.group, question, params.text, *([params.target] if labelled else [])]
    if params.id is not None and not (labelled and params.id not in raw.columns):
        wanted.append(params.id)
    lacking = [name for name in dict.fromkeys(wanted) if name not in raw.columns]
    for name in lacking:
        problems.append(f'{path}: there is no column "{name}". {did_you_mean(name, raw.columns)}')
    if lacking:
        return pl.DataFrame()
    id_column = params.id or "id"
    check_text(path, raw, [name for name in (*wanted, id_column) if name in raw.columns])
    if id_column in raw.columns:
        ids = raw[id_column].cast(pl.String).fill_null("")
        problems += _id_problems(path, id_column, ids)
    else:
        ids = pl.Series([str(i) for i in range(raw.height)])
    columns = {
        "row_id": ids,
        "group_id": group_ids(raw[params.group].cast(pl.String).fill_null("")),
        "question": raw[question].cast(pl.String).fill_null(""),
        "response": raw[params.text].cast(pl.String).fill_null(""),
    }
    merged = raw[params.group].n_unique() - columns["group_id"].n_unique()
    if merged:
        notes.append(f"{path}: {merged} near-identical questions merged into the group of another.")
    for name, column in ((params.group, raw[params.group]), (params.text, raw[params.text])):
        empty = int((column.cast(pl.String).fill_null("").str.strip_chars() == "").sum())
        if empty:
            notes.append(f'{path}: {empty} of {raw.height} rows have no text in "{name}".')
    if labelled:
        target = raw[params.target].cast(pl.String).fill_null("").str.strip_chars()
        blank = (target == "").arg_true().to_list()
        if blank:
            problems.append(
                f'{path}: {len(blank)} rows have no label in "{params.target}" (first: row {blank[0] + 1}). '
                "Fill them in or remove the rows."
            )
        columns["target"] = target
    return pl.DataFrame(columns)


def _id_problems(path: Path, name: str, ids: pl.Series) -> list[str]:
    problems = []
    blank = (ids.str.strip_chars() == "").arg_true().to_list()
    if blank:
        problems.append(
            f'{path}: {len(blank)} rows have no id in "{name}" (first: row {blank[0] + 1}). Fill them in.'
        )
    twice = ids.filter(ids.is_duplicated() & (ids.str.strip_chars() != ""))
    if len(twice):
        first = twice[0]
        rows = [str(i + 1) for i in (ids == first).arg_true().to_list()[:5]]
        problems.append(
            f'{path}: {twice.n_unique()} ids occur more than once in column "{name}" '
            f"(first: {first}, rows {' and '.join(rows)}). Remove the duplicates or pass --id COLUMN."
        )
    return problems


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
    places = n_classes * params.quota
    if (sizes < places).any():
        notes.append(
            f"{params.test}: {int((sizes < places).sum())} of {len(sizes)} groups have fewer than {places} rows; "
            "places stay free there."
        )
    if (sizes > places).any():
        notes.append(
            f"{params.test}: {int((sizes > places).sum())} of {len(sizes)} groups have more than {places} rows; "
            "they keep their calibrated row probabilities."
        )
    shared = set(train["group_id"]) & set(test["group_id"])
    if shared:
        notes.append(f"{len(shared)} groups stand in both {params.train} and {params.test}.")
    return notes
