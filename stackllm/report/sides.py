"""Two sets of predictions brought together: the same rows, the same classes, and what is known of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from stackllm.crossfit.folds import group_folds
from stackllm.errors import DataError, MissingInputError, UsageError, did_you_mean
from stackllm.group.plan import Plan, Quota, checked
from stackllm.optim.files import Files
from stackllm.optim.request import Columns
from stackllm.probabilities import Floats, as_array, check_probabilities, group_codes
from stackllm.report.stored import StoredModel, Which, find_model, run_names
from stackllm.stack.posteriors import nested_posterior
from stackllm.tables.columns import find_column
from stackllm.tables.files import as_read, read_frame
from stackllm.tables.frames import from_native
from stackllm.tables.groups import Groups, group_column
from stackllm.tables.ids import Rows, first_few
from stackllm.tables.labels import LABEL_NAMES, read_labels
from stackllm.tables.submission import match_classes

Predictions: TypeAlias = str | Path | ArrayLike | Any
"""A run, a model, a file, a frame of polars or pandas, or an array ``(n_rows, n_classes)``."""

_N_FOLDS = 5
"""Folds in which a temperature is fitted where the rows have none of their own."""

_EVEN = 1e-3
"""Posteriors of a full group sum to the quotas within this; rows on their own never do."""


@dataclass(frozen=True)
class Side:
    """One of the two.

    Parameters
    ----------
    name
        What it is called.
    given
        What is compared, ``(n_rows, n_classes)``.
    ids
        Of its rows, text ``(n_rows,)``.
    classes
        What its columns are called.
    by_number
        Are these but the numbers of its rows and columns, from 0?
    rows, posterior
        Row probabilities before stage three, and group posteriors, where they are known.
    labels, groups, folds
        Label texts, group names and folds of its rows, ``(n_rows,)``, where it knows them.
    quota
        How often a class stands in a group, where it knows.
    stored
        The model, if it is one of a run.
    """

    name: str
    given: Floats
    ids: pl.Series
    classes: tuple[str, ...]
    by_number: bool = False
    rows: Floats | None = None
    posterior: Floats | None = None
    labels: pl.Series | None = None
    groups: pl.Series | None = None
    folds: NDArray[Any] | None = None
    quota: int | None = None
    stored: StoredModel | None = None

    def taken(self, at: NDArray[np.intp], columns: NDArray[np.intp]) -> Side:
        """The same of some rows and with its columns in another order."""

        given = np.ascontiguousarray(self.given[at][:, columns])

        def matrix(values: Floats | None) -> Floats | None:
            if values is self.given or values is None:
                return values if values is None else given
            return np.ascontiguousarray(values[at][:, columns])

        def of_rows(values: pl.Series | None) -> pl.Series | None:
            return None if values is None else values[at]

        return replace(
            self,
            given=given,
            ids=self.ids[at],
            rows=matrix(self.rows),
            posterior=matrix(self.posterior),
            labels=of_rows(self.labels),
            groups=of_rows(self.groups),
            folds=None if self.folds is None else self.folds[at],
        )


@dataclass(frozen=True)
class Pair:
    """Two sides of the same rows in the same order, with the same columns.

    Parameters
    ----------
    a, b
        The two.
    ids, groups
        Row ids and names of groups, ``(n_rows,)``.
    classes
        What the columns are called.
    labels, codes
        Class index and group number of each row, ``(n_rows,)``.
    rows, posteriors
        Both views of the two, where they are known of both and not what is compared anyway.
    notes
        What a reader should know.
    """

    a: Side
    b: Side
    ids: pl.Series
    groups: pl.Series
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    codes: NDArray[np.intp]
    rows: tuple[Floats, Floats] | None
    posteriors: tuple[Floats, Floats] | None
    notes: tuple[str, ...]


def read_pair(
    a: Predictions,
    b: Predictions,
    truth: Any,
    groups: Any,
    quota: int | str | None,
    columns: Columns,
    project: Mapping[str, Any],
    artifacts: Path,
) -> Pair:
    """Read two sets of predictions and everything that is known of their rows; see :func:`~stackllm.report.compare.compare`."""
    reader = _Reader(columns, project, artifacts, "oof" if truth is None else "test")
    one, other = reader.side(a, "A"), reader.side(b, "B")
    notes: list[str] = []
    one, other, source = _aligned(one, other, notes)
    rows = Rows(one.ids, source)
    labels = reader.labels(truth, rows, one, other, notes)
    known = reader.groups(groups, truth, rows, (one, other), notes)
    codes = np.arange(len(labels)) if known is None else known.codes
    _tell_folds(one, other, notes)
    posteriors = None
    if known is not None:
        each = reader.quota(quota, one, other, known, labels)
        if each is not None:
            posteriors = _with_posteriors(one, other, known, each, labels)
    if posteriors is not None:
        one, other = posteriors
    return Pair(
        one,
        other,
        one.ids.alias("row_id"),
        pl.Series("group", [known.names[code] for code in codes]) if known else one.ids,
        one.classes,
        labels,
        codes,
        _both(one, other, "rows"),
        _both(one, other, "posterior"),
        tuple(notes),
    )


class _Reader:
    """Reads what may stand in files, in runs or in memory.

    Parameters
    ----------
    columns, project, artifacts
        As for :func:`~stackllm.report.compare.compare`.
    which
        The rows of a run that are meant.
    """

    def __init__(
        self, columns: Columns, project: Mapping[str, Any], artifacts: Path, which: Which
    ) -> None:
        self._frames: dict[Path, pl.DataFrame] = {}
        self._files = Files(columns, project, False, functools.cache(self._read))
        self._artifacts, self._which = artifacts, which

    def side(self, given: Predictions, letter: str) -> Side:
        """One of the two, with all that it knows of itself."""
        if isinstance(given, str | Path):
            name, path = str(given), Path(given)
            if path.is_file():
                return self._of_table(name, path)
            stored = find_model(name, self._artifacts)
            if stored is None:
                raise MissingInputError(
                    f"{name}: there is no such file, and no such run below {self._artifacts}. "
                    + did_you_mean(name.split("/")[0], run_names(self._artifacts))
                )
            return _of_run(stored, self._which)
        if hasattr(given, "columns"):
            return self._of_table(letter, self._remember(given, letter))
        return _of_array(letter, given)

    def labels(
        self, truth: Any, rows: Rows, one: Side, other: Side, notes: list[str]
    ) -> NDArray[np.int64]:
        """Class index of each row."""
        if truth is None:
            known = [side for side in (one, other) if side.labels is not None]
            if not known:
                raise UsageError(
                    "nothing tells which class each row is of. Name a table of labels with the setting truth."
                )
            both = [read_labels(Path(side.name), side.labels, one.classes) for side in known]  # type: ignore[arg-type]
            if (both[0] != both[-1]).any():
                first = int((both[0] != both[-1]).argmax())
                raise DataError(
                    f"{one.name} and {other.name} have other labels of {int((both[0] != both[-1]).sum())} rows "
                    f"({first_few(rows.ids[first : first + 1])}): they are of other tables. Compare runs of the same."
                )
            return both[0]
        if isinstance(truth, str | Path) or hasattr(truth, "columns"):
            path = Path(truth) if isinstance(truth, str | Path) else self._remember(truth, "truth")
            told = self._files.truth(path, rows, one.classes)
            if told.by_number:
                notes.append(f"{path}: no id column, so its rows are matched by row number, from 0")
            return told.labels
        values = as_array(truth, "truth")
        if values.shape != (len(rows.ids),):
            raise DataError(
                f"truth must be one label per row ({len(rows.ids)}); its shape is {values.shape}."
            )
        return read_labels(Path("truth"), pl.Series(map(str, values.tolist())), one.classes)

    def groups(
        self, groups: Any, truth: Any, rows: Rows, sides: tuple[Side, Side], notes: list[str]
    ) -> Groups | None:
        """The group of each row; None where nothing tells."""
        if groups is not None and not (
            isinstance(groups, str | Path) or hasattr(groups, "columns")
        ):
            codes, names = group_codes(groups)
            if len(codes) != len(rows.ids):
                raise DataError(
                    f"groups must be one per row ({len(rows.ids)}); there are {len(codes)}."
                )
            return Groups(codes, tuple(map(str, names)), "groups", True, None)
        if groups is not None:
            path = Path(groups) if isinstance(groups, str | Path) else None
            path = path or self._remember(groups, "groups")
            return self._files.groups_joined(rows, path, surplus=True)
        known = [side.groups for side in sides if side.groups is not None]
        if known:
            codes, names = group_codes(known[0].to_numpy())
            other = group_codes(known[-1].to_numpy())[0]
            if len({*zip(codes.tolist(), other.tolist(), strict=True)}) != len(names):
                notes.append(
                    f"the two group their rows differently: by the groups of {sides[0].name}"
                )
            return Groups(codes, tuple(map(str, names)), sides[0].name, True, None)
        beside = self._groups_beside(truth, rows)
        if beside is None:
            notes.append(
                "nothing tells which rows belong together, so each counts as a group of its own: where rows do "
                "belong together, errors are larger than told. Name a table of groups with the setting groups"
            )
        return beside

    def quota(
        self,
        quota: int | str | None,
        one: Side,
        other: Side,
        groups: Groups,
        labels: NDArray[np.int64],
    ) -> Quota | None:
        """How often each class stands in a group; None where nothing tells."""
        if quota is not None or "quota" in self._files.project:
            text = None if quota is None else str(quota)
            return self._files.quota(text, one.classes, groups)[0]
        of_runs = [side.quota for side in (one, other) if side.quota is not None]
        if of_runs:
            return of_runs[0]
        counts = np.zeros((len(groups.names), len(one.classes)), dtype=np.int64)
        np.add.at(counts, (groups.codes, labels), 1)
        return counts[0] if (counts == counts[0]).all() and (counts > 0).any() else None

    def _groups_beside(self, truth: Any, rows: Rows) -> Groups | None:
        """Groups from the table of labels or the project's test table, if one has them for these rows."""
        files = self._files
        tables = [
            Path(truth) if isinstance(truth, str | Path) else Path("truth"),
            Path(files.project.get("test", "test.csv")),
        ]
        for path in tables:
            if path not in self._frames and not path.is_file():
                continue
            try:
                header = files.read(path).columns
                wanted = files.named.group or files.project.get("group")
                if group_column(path, header, wanted) is not None:
                    return files.groups_joined(rows, path, files.project.get("id"), surplus=True)
            except DataError:  # a table of other rows, which is no fault of anybody's
                continue
        return None

    def _of_table(self, name: str, path: Path) -> Side:
        header = self._files.read(path).columns
        target = self._files.named.target
        beside = [find_column(path, header, target, "labels")] if target in header else []
        beside += [it for it in (*LABEL_NAMES, "fold") if it in header and it not in beside]
        sub = self._files.submission(
            path, beside=beside, read=self._read if path in self._frames else read_frame
        )
        groups = self._files.groups_within(sub)
        label = next((it for it in beside if it != "fold"), None)
        return Side(
            name,
            sub.probabilities / sub.probabilities.sum(axis=1, keepdims=True),
            ids=sub.frame[sub.id],
            classes=sub.classes,
            labels=None if label is None else sub.frame[label],
            groups=None if groups is None else _names(groups),
        )

    def _remember(self, frame: Any, name: str) -> Path:
        """A name under which a frame in memory is read as a file would be."""
        frame = from_native(frame, name)
        if not frame.height:
            raise DataError(f"{name}: the table has no rows.")
        self._frames[Path(name)] = frame
        return Path(name)

    def _read(
        self, path: Path, numbers: Callable[[list[str]], list[str]] = lambda header: []
    ) -> pl.DataFrame:
        if path in self._frames:
            return as_read(path, self._frames[path], numbers)
        return read_frame(path, numbers)


def _of_run(stored: StoredModel, which: Which) -> Side:
    key = stored.key(which)
    rows = stored.rows(which)
    posterior = stored.posterior(which)
    of_training = which == "oof"
    return Side(
        stored.name,
        rows if stored.raw else posterior,
        key["row_id"],
        stored.classes,
        rows=rows,
        posterior=posterior,
        labels=key["label"] if of_training else None,
        groups=key["group_id"],
        folds=key["fold"].to_numpy() if of_training else None,
        quota=stored.quota,
        stored=stored,
    )


def _of_array(name: str, given: ArrayLike) -> Side:
    matrix = as_array(given, name)
    if matrix.ndim != 2 or not matrix.size:
        raise DataError(
            f"{name} must be (n_rows, n_classes) with at least one row; its shape is {matrix.shape}."
        )
    matrix = check_probabilities(matrix, np.arange(len(matrix)))
    rows, columns = (pl.Series("row_id", map(str, range(n))) for n in matrix.shape)
    return Side(
        name,
        matrix / matrix.sum(axis=1, keepdims=True),
        rows,
        tuple(columns),
        by_number=True,
    )


def _names(groups: Groups) -> pl.Series:
    return pl.Series("group", [groups.names[code] for code in groups.codes])


def _aligned(one: Side, other: Side, notes: list[str]) -> tuple[Side, Side, Path]:
    """Both with the same rows and columns, and what the rows are called in messages."""
    if (one.by_number or other.by_number) and one.given.shape != other.given.shape:
        raise DataError(
            f"{one.name} is {one.given.shape} and {other.name} {other.given.shape}, and nothing but their order tells "
            "which rows and classes are the same. Give arrays of one shape, or tables with ids."
        )
    if one.by_number:
        one = replace(one, ids=other.ids, classes=other.classes)
    elif other.by_number:
        other = replace(other, ids=one.ids, classes=one.classes)
    turned = one.stored is None and other.stored is not None  # classes are called as the run's are
    first, second = (other, one) if turned else (one, other)
    order = _columns(first, second)
    if first.stored and not second.stored and not second.by_number:
        _check_which(first, second)
    left = pl.DataFrame({"id": first.ids, "row": np.arange(len(first.given))})
    right = pl.DataFrame({"id": second.ids, "other": np.arange(len(second.given))})
    both = left.join(right, on="id", how="inner", maintain_order="left")
    if not both.height:
        raise DataError(
            f"{one.name} and {other.name} have no row in common ({first_few(one.ids)}, and {first_few(other.ids)}). "
            "Compare predictions of the same rows."
        )
    for side, rest in (
        (first, left.join(right, on="id", how="anti", maintain_order="left")),
        (second, right.join(left, on="id", how="anti", maintain_order="left")),
    ):
        if rest.height:
            notes.append(
                f"{side.name} has {rest.height:,} rows that the other lacks ({first_few(rest['id'])}): left out"
            )
    every = np.arange(len(order), dtype=np.intp)
    second = replace(
        second.taken(both["other"].to_numpy().astype(np.intp), order), classes=first.classes
    )
    first = first.taken(both["row"].to_numpy().astype(np.intp), every)
    source = Path(first.name)
    return (second, first, source) if turned else (first, second, source)


def _columns(first: Side, second: Side) -> NDArray[np.intp]:
    """Which columns of the second hold the classes of the first, ``(n_classes,)``."""
    wanted, held = first.classes, second.classes
    if len(wanted) != len(held):
        most, least = (first, second) if len(wanted) > len(held) else (second, first)
        only = [it for it in most.classes if it not in least.classes]
        raise DataError(
            f"{most.name} has {len(most.classes)} classes and {least.name} {len(least.classes)} "
            f"(only the first has {first_few(only)[7:]}). Compare predictions of the same classes."
        )
    names = match_classes(Path(second.name), held, wanted)
    return np.array([held.index(name) for name in names], dtype=np.intp)


def _check_which(run: Side, table: Side) -> None:
    """Refuse a table of the run's other rows: where both are numbered from 0 they would look the same."""
    assert run.stored is not None
    here, there = ("oof", "test") if run.folds is not None else ("test", "oof")
    ids = set(table.ids)
    its_own, others = (set(run.stored.key(it)["row_id"]) for it in (here, there))  # type: ignore[arg-type]
    if ids == others and ids != its_own:
        rows, step = (
            ("test", "Give their labels with the setting truth")
            if there == "test"
            else ("training", "Leave out the setting truth, as the run knows their labels")
        )
        raise DataError(f"{table.name}: it holds the {rows} rows of {run.name}. {step}.")


def _tell_folds(one: Side, other: Side, notes: list[str]) -> None:
    if one.folds is None or other.folds is None:
        return
    pairs = {*zip(one.folds.tolist(), other.folds.tolist(), strict=True)}
    if len(pairs) != len(set(one.folds.tolist())) or len(pairs) != len(set(other.folds.tolist())):
        notes.append(
            "their folds differ, so a part of the difference is which rows each model learnt from"
        )


def _with_posteriors(
    one: Side, other: Side, groups: Groups, quota: Quota, labels: NDArray[np.int64]
) -> tuple[Side, Side] | None:
    """Both with group posteriors, fitted where they have none; None where too few groups are there to fit on."""
    if one.posterior is not None and other.posterior is not None:
        return one, other
    if len(groups.names) < 2:
        return None
    folds = one.folds if one.folds is not None else other.folds
    if folds is None:
        folds = group_folds(groups.codes, min(_N_FOLDS, len(groups.names)), 0)
    made = []
    for side in (one, other):
        if side.posterior is None:
            matrix, plan = checked(side.given, groups.codes, quota)
            if _is_posterior(matrix, plan):
                side = replace(side, posterior=matrix)
            else:
                posterior, _ = nested_posterior(matrix, plan, labels, folds)
                side = replace(side, rows=matrix, posterior=posterior)
        made.append(side)
    return made[0], made[1]


def _is_posterior(matrix: Floats, plan: Plan) -> bool:
    """Do the probabilities of every full group sum to its quotas, as nothing but stage three makes them?"""
    full = [batch for batch in plan.batches if batch.is_full]
    return bool(full) and all(
        (np.abs(matrix[batch.rows].sum(axis=1) - np.array(batch.quota)) < _EVEN).all()
        for batch in full
    )


def _both(one: Side, other: Side, view: str) -> tuple[Floats, Floats] | None:
    """A view of both, unless one lacks it or it is what is compared anyway."""
    a, b = getattr(one, view), getattr(other, view)
    if a is None or b is None or (a is one.given and b is other.given):
        return None
    return None if np.array_equal(a, b) else (a, b)  # such as a run beside its own raw rows
