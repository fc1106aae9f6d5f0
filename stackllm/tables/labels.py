"""Labels: one way to read them, for the training table and for everybody's truth."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from stackllm.errors import DataError, did_you_mean
from stackllm.tables.columns import find_column, usual_column
from stackllm.tables.files import check_text, first_row, read_frame, refuse_blank, shown
from stackllm.tables.ids import Read, Rows, find_rows
from stackllm.tables.submission import plain_digits, suffixes

LABEL_NAMES = ("target", "label", "class", "y")

NAME_IT = ", or name it with the setting target"
AS_CALLED = "Write labels as the classes are called."


@dataclass(frozen=True)
class Truth:
    """The labels of rows, for scoring or to fit on.

    Parameters
    ----------
    labels
        int64 ``(n_rows,)``, class index of each row.
    by_number
        True if the table has no id column, so that rows were matched by their number, from 0.
    """

    labels: NDArray[np.int64]
    by_number: bool


def read_truth(
    path: Path,
    rows: Rows,
    classes: Sequence[str],
    *,
    target: str | None = None,
    usual: Sequence[str] = LABEL_NAMES,
    id_name: str | None = None,
    how: str | None = None,
    advice: str = AS_CALLED,
    named: str = NAME_IT,
    read: Read = read_frame,
) -> Truth:
    """Class index of each row, from a table with ids and labels.

    Parameters
    ----------
    path
        The table. It may list other rows too.
    rows
        The rows wanted, in their order.
    classes
        Names of the classes, or of their columns.
    target
        The label column. None: the first of ``usual`` that is there, or the only one called nearly so,
        or the only one but the id.
    usual
        Usual names of a label column.
    id_name
        The id column, as in :func:`~stackllm.tables.ids.id_column`.
    how, advice
        How labels name classes, as in :func:`read_labels`.
    named
        What to do besides renaming a column of labels that cannot be told.
    read
        Reads the table.

    Raises
    ------
    MissingInputError, DataError, StorageError
        With the file, column and first row that is wrong.
    """
    frame = read(path)
    column = label_column(path, frame.columns, target, usual, (id_name, rows.ids.name), named)
    check_text(path, frame, [column])
    # all labels are read before rows are matched, so that a message counts rows as the file does
    labels = read_labels(path, frame[column], classes, how, advice)
    positions, by_number = find_rows(rows, path, frame, id_name, beside=[column], surplus=True)
    return Truth(labels[positions], by_number)


def label_column(
    path: Path,
    header: Sequence[str],
    wanted: str | None,
    usual: Sequence[str] = LABEL_NAMES,
    ids: Sequence[str | None] = (),
    named: str = NAME_IT,
) -> str:
    """The column of labels, as in :func:`read_truth`.

    Raises
    ------
    DataError
        If it cannot be told.
    """
    if wanted is not None:
        return find_column(path, header, wanted, "labels")
    column = usual_column(path, header, usual, "labels")
    if column is not None:
        return column
    rest = [name for name in header if name not in ids]
    if len(rest) == 1:
        return rest[0]
    raise DataError(
        f"{path}: no column is named like a label. {did_you_mean(usual[0], header)} "
        f'Call the column that holds the labels "{usual[0]}"{named}.'
    )


def plain_labels(labels: pl.Series) -> pl.Series:
    """Labels as text, whole numbers in one spelling: ``6``, `` 6 ``, ``6.0`` and ``006`` are one.

    Parameters
    ----------
    labels
        Text, ``(n_rows,)``. An empty one, or ``nan`` among numbers, is no label.

    Returns
    -------
    polars.Series
        ``(n_rows,)``, null where there is no label.

    Examples
    --------
    >>> plain_labels(pl.Series(["0.0", "6", " 06", "-1.0", "", "nan"])).to_list()
    ['0', '6', '6', '-1', None, None]
    """
    distinct = labels.drop_nulls().unique(maintain_order=True)
    plain = [plain_label(label) for label in distinct]
    numbers = {name for name in plain if re.fullmatch(r"-?\d+", name)}
    void = {"", "nan", "NaN"} if set(plain) - numbers <= {"", "nan", "NaN"} else {""}
    values = [None if name in void else name for name in plain]
    return labels.replace_strict(distinct, values, return_dtype=pl.String, default=None)


def check_labelled(path: Path, plain: pl.Series) -> None:
    """Refuse rows without a label, as :func:`plain_labels` gives them.

    Raises
    ------
    DataError
        With the first of them.
    """
    step = "Fill them in or remove the rows."
    refuse_blank(path, plain.is_null(), f'label in "{plain.name}"', step)


def plain_label(text: str) -> str:
    """One label without spaces around; a whole number without leading zeros and zeros behind a point.

    Examples
    --------
    >>> plain_label(" 6.0"), plain_label("-0"), plain_label("v6.0")
    ('6', '0', 'v6.0')
    """
    number = re.fullmatch(r"(-?)0*([0-9]+)(\.0*)?", text.strip())
    if number is None:
        return text.strip()
    sign = "" if number[2] == "0" else number[1]
    return sign + number[2]


def sort_classes(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels in their order: as numbers when all are integers, else as text."""
    if all(re.fullmatch(r"-?\d{1,18}", label) for label in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def read_labels(
    path: Path,
    labels: pl.Series,
    classes: Sequence[str],
    how: str | None = None,
    advice: str = AS_CALLED,
) -> NDArray[np.int64]:
    """Labels as class indices: names of classes, their suffixes, or positions from 0.

    Names come first. They may have one beginning before them all (``target_3`` for 3), and numbers
    are compared as :func:`plain_label` spells them. Suffixes and positions are tried where names do
    not fit, and must agree.

    Parameters
    ----------
    path
        Where they come from, for messages.
    labels
        Text, ``(n_rows,)``.
    classes
        Names of the classes, or of their columns.
    how
        ``name``, ``suffix`` or ``position``. None: whichever fits.
    advice
        What to do if two of them fit and differ.

    Returns
    -------
    numpy.ndarray
        int64 ``(n_rows,)``.

    Raises
    ------
    DataError
        If a label fits no class, or two readings differ.
    """
    plain = plain_labels(labels)
    check_labelled(path, plain)
    distinct = plain.unique(maintain_order=True).to_list()
    tables = {kind: table for kind, table in _readings(classes).items() if how in {None, kind}}
    seen = {kind: table(distinct) for kind, table in tables.items()}
    fitting = {kind: indices for kind, indices in seen.items() if None not in indices}
    if not fitting:
        _refuse(path, labels, plain, distinct, seen, classes)
    if "name" in fitting:
        fitting = {"name": fitting["name"]}
    for label, *indices in zip(distinct, *fitting.values(), strict=True):
        if len(set(indices)) > 1:
            both = " or ".join(
                f'class "{classes[j or 0]}" by its {kind}'
                for kind, j in zip(fitting, indices, strict=True)
            )
            raise DataError(f'{path}: label "{label}" can be read as {both}. {advice}')
    indices = next(iter(fitting.values()))
    return plain.replace_strict(distinct, indices, return_dtype=pl.Int64).to_numpy()


_BEGINNING = re.compile(r"^$|[^\W\d]\W?$").search
"""What may stand before the names of all classes: it ends in a letter or ``_`` and a sign at most."""

Reading = Callable[[list[str]], list[int | None]]
"""From all different labels to their classes, None where there is none."""


def _readings(classes: Sequence[str]) -> dict[str, Reading]:
    """Each way to read labels."""
    names = {plain_label(name): j for j, name in enumerate(classes)}
    if len(names) < len(classes):
        names = {name: j for j, name in enumerate(classes)}  # "4" and "4.0" are two columns here
    ends = {suffix: j for j, suffix in enumerate(suffixes(classes))}
    positions = {str(j): j for j in range(len(classes))}

    def by_name(labels: list[str]) -> list[int | None]:
        starts = {labels[0].removesuffix(name) for name in names if labels[0].endswith(name)}
        for start in sorted(filter(_BEGINNING, starts)):
            if all(label.startswith(start) for label in labels):
                indices = [names.get(plain_label(label.removeprefix(start))) for label in labels]
                if None not in indices:
                    return indices
        return [names.get(label) for label in labels]

    return {
        "name": by_name,
        "suffix": lambda labels: [
            ends.get(label, ends.get(plain_digits(label))) for label in labels
        ],
        "position": lambda labels: [positions.get(label) for label in labels],
    }


def _refuse(
    path: Path,
    labels: pl.Series,
    plain: pl.Series,
    distinct: list[str],
    seen: dict[str, list[int | None]],
    classes: Sequence[str],
) -> None:
    nearest = min(seen.values(), key=lambda indices: indices.count(None))
    row = first_row(plain == distinct[nearest.index(None)])
    names = ", ".join(f'"{name}"' for name in classes[:8]) + (", …" if len(classes) > 8 else "")
    raise DataError(
        f"{path}: label {shown(labels[row - 1])} (row {row}) is no class. Labels are names of classes ({names}), "
        f"their suffixes, or positions from 0 to {len(classes) - 1}, all of one kind."
    )
