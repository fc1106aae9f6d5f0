"""Predictions that somebody else made, for rows that we know: whatever file they were left in."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stackllm.errors import DataError, first_line
from stackllm.probabilities import Floats, log_sum, softmax
from stackllm.tables.columns import usual_column, written_by_pandas
from stackllm.tables.files import check_text, read_content, read_frame, shown
from stackllm.tables.ids import ID_NAMES, Rows, find_rows
from stackllm.tables.pickled import read_pickle
from stackllm.tables.submission import SUM_TOLERANCE, match_classes

_INDEX = "index"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_LIKELY = ("oof", "probabilities", "probs", "logits", "predictions", "preds", "test")
"""What an array of predictions is called among others, the likeliest first."""

_MOST = 2**32
"""Bytes that an archive of arrays may hold when unpacked."""


@dataclass(frozen=True)
class Outside:
    """What a file of predictions holds.

    Parameters
    ----------
    path
        The file.
    frame
        Its other columns, text; none where it is but an array.
    probabilities
        ``(n_rows, n_classes)``, rows sum to 1.
    notes
        How its numbers were read.
    """

    path: Path
    frame: pl.DataFrame
    probabilities: Floats
    notes: tuple[str, ...] = ()

    @property
    def n_rows(self) -> int:
        """How many rows it has."""
        return len(self.probabilities)


def read_predictions(
    path: Path, rows: Rows, classes: Sequence[str]
) -> tuple[Floats, tuple[str, ...]]:
    """Read somebody's probabilities for known rows.

    Parameters
    ----------
    path
        A file as :func:`read_outside` takes. It may list other rows too.
    rows
        The rows wanted, in order.
    classes
        The classes wanted, in order.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_rows, n_classes)``, rows sum to 1.
    tuple of str
        How the file was read, where that is not plain.

    Raises
    ------
    MissingInputError, DataError, StorageError
        As :func:`read_outside`, or if a row is not there.
    """
    outside = read_outside(path, classes)
    positions, note = places(outside, rows)
    return outside.probabilities[positions], (*outside.notes, *note)


def read_outside(path: Path, classes: Sequence[str]) -> Outside:
    """Read somebody's predictions.

    Parameters
    ----------
    path
        CSV or Parquet with a column per class, or with one column of texts that hold a number per class,
        separated by commas (as H2O LLM Studio writes); ``.npy`` or ``.npz``; or a pickle of plain arrays. The
        numbers are probabilities, or scores that a softmax makes some: what is below 0 is a score.
    classes
        The classes wanted, in order.

    Raises
    ------
    MissingInputError, DataError, StorageError
        With the file, column and row that is wrong.
    """
    content = read_content(path)
    if content.startswith(b"\x93NUMPY") or path.suffix.lower() in {".npy", ".npz"}:
        return _of_arrays(path, _arrays(path, content), classes)
    if path.suffix.lower() in {".pkl", ".pickle", ".p"} or re.match(rb"\x80[\x02-\x05]", content):
        return _of_arrays(path, read_pickle(path, content), classes)
    return _of_table(path, classes)


def places(outside: Outside, rows: Rows) -> tuple[np.ndarray, tuple[str, ...]]:
    """Where each of ``rows`` stands in a file, ``(n_rows,)``: by id, else by text, else by number.

    Raises
    ------
    DataError
        If a row is not there.
    """
    path, frame = outside.path, outside.frame
    first = frame.columns[0] if frame.width and _holds(frame[frame.columns[0]], rows.ids) else None
    beside = [_INDEX] if _INDEX in frame.columns and first != _INDEX else []
    by_text = _by_text(frame, rows)
    if first is None and by_text is not None:
        name = usual_column(path, frame.columns, (rows.ids.name, *ID_NAMES), "ids")
        if name is None or not _holds(frame[name], rows.ids):
            return by_text[0], (f'{path}: matched by the texts in column "{by_text[1]}"',)
    if not frame.width:
        frame = pl.DataFrame({"row": np.arange(outside.n_rows)})
        beside = ["row"]
    positions, by_number = find_rows(rows, path, frame, first, beside=beside, surplus=True)
    note = f"{path}: no id column, so rows are matched by number, from 0"
    return positions, (note,) if by_number else ()


def as_probabilities(path: Path, matrix: np.ndarray) -> tuple[Floats, tuple[str, ...]]:
    """Probabilities out of scores, and what was done to them.

    Parameters
    ----------
    path
        Where they come from.
    matrix
        Numbers ``(n_rows, n_classes)``.

    Raises
    ------
    DataError
        If they are not finite, or neither probabilities nor scores.
    """
    values = np.asarray(matrix, dtype=np.float64)
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise DataError(
            f"{path}: {int(bad.sum())} rows hold no numbers (first: row {row + 1}, {values[row].tolist()[:7]})."
        )
    total = values.sum(axis=1)
    if values.min() < 0:
        logarithms = np.abs(log_sum(values, 1)).max() < SUM_TOLERANCE
        what = "logarithms of probabilities" if logarithms else "logits"
        note = (
            f"{path}: {what}, from {values.min():.3g} to {values.max():.3g}; their softmax is taken"
        )
        return softmax(values), (note,)
    if (np.abs(total - 1) <= SUM_TOLERANCE * max(1, values.shape[1] / 2)).all():
        return values / total[:, None], ()
    if values.max() > 1 and (np.abs(total - 100) <= 0.1).all():
        return values / total[:, None], (f"{path}: percentages",)
    if values.max() > 1 and np.ptp(total) > SUM_TOLERANCE * total.max():
        note = f"{path}: scores above 0 whose sums differ; their softmax is taken"
        return softmax(values), (note,)
    row = int((np.abs(total - 1) > SUM_TOLERANCE).argmax())
    raise DataError(
        f"{path}: {int((np.abs(total - 1) > SUM_TOLERANCE).sum())} rows do not sum to 1 (first: row {row + 1}, sum "
        f"{total[row]:.6g}). Scale each row to sum to 1."
    )


def _of_table(path: Path, classes: Sequence[str]) -> Outside:
    frame = _without_index(read_frame(path, index=_INDEX))
    try:
        names = match_classes(path, frame.columns, classes)
    except DataError:
        packed = _packed(frame, len(classes))
        if packed is None:
            raise
        return _of_packed(path, frame, packed, len(classes))
    check_text(path, frame, names, "number")
    numbers = read_frame(path, lambda _: names, _INDEX).select(names)
    probabilities, notes = as_probabilities(path, numbers.to_numpy())
    return Outside(path, frame.drop(names), probabilities, notes)


def _packed(frame: pl.DataFrame, n_classes: int) -> str | None:
    """The column whose texts hold a number per class: one called like predictions, else the only one."""
    cell = rf"^\s*[\[(]?\s*{_NUMBER}(?:[\s,;]+{_NUMBER}){{{n_classes - 1}}}\s*[\])]?\s*$"
    fitting = [
        name
        for name in frame.columns
        if frame[name].dtype == pl.String and frame[name].str.contains(cell).fill_null(False).all()
    ]
    called = [name for name in fitting if name.lower().startswith(("pred", "prob", "logit"))]
    return next(iter(called or fitting), None)


def _of_packed(path: Path, frame: pl.DataFrame, name: str, n_classes: int) -> Outside:
    numbers = frame[name].str.extract_all(_NUMBER).list.to_array(n_classes)
    matrix = numbers.cast(pl.Array(pl.Float64, n_classes)).to_numpy()
    probabilities, notes = as_probabilities(path, matrix)
    if matrix.min() == 0 and matrix.max() <= 1 and np.allclose(matrix, matrix.round(3), atol=1e-9):
        # what was rounded to nothing is not impossible; at log loss that is the difference
        probabilities = np.maximum(probabilities, 2.5e-4)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        notes += (f"{path}: rounded to three decimals, so 0 is read as a quarter of the last one",)
    note = f'{path}: numbers of all classes in column "{name}"'
    return Outside(path, frame.drop(name), probabilities, (note, *notes))


def _without_index(frame: pl.DataFrame) -> pl.DataFrame:
    """The index of pandas under one name, whatever pandas called it."""
    odd = [name for name in frame.columns if name != _INDEX and written_by_pandas(name)]
    return (
        frame.rename({odd[0]: _INDEX}) if len(odd) == 1 and _INDEX not in frame.columns else frame
    )


def _holds(column: pl.Series, ids: pl.Series) -> bool:
    return column.dtype == pl.String and ids.is_in(column.implode()).all()


def _by_text(frame: pl.DataFrame, rows: Rows) -> tuple[np.ndarray, str] | None:
    """Where each row's text stands, and in which column; None where no column has them all.

    Texts that occur several times are matched in their order.
    """
    if rows.texts is None:
        return None
    wanted = _counted(rows.texts)
    for name in frame.columns:
        if not _holds(frame[name], rows.texts) or rows.texts.n_unique() < 2:
            continue
        held = _counted(frame[name]).with_columns(row=pl.int_range(pl.len()))
        at = wanted.join(held, on=["text", "nth"], how="left", maintain_order="left")["row"]
        if not at.null_count():
            return at.to_numpy().astype(np.intp), name
    return None


def _counted(texts: pl.Series) -> pl.DataFrame:
    plain = pl.DataFrame({"text": texts})
    return plain.with_columns(nth=pl.int_range(pl.len()).over("text"))


def _arrays(path: Path, content: bytes) -> Any:
    """The array or arrays of a file of numpy's; nothing that it would have to unpickle."""
    try:
        if content.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > _MOST:
                    raise DataError(f"{path}: it would unpack to more than {_MOST >> 30} GiB.")
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {it: loaded[it] for it in loaded.files}
    except DataError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise DataError(
            f"{path}: not a readable file of plain numbers ({first_line(error)}). Write it anew: np.save of an array "
            "of floats (n_rows, n_classes)."
        ) from error


def _of_arrays(path: Path, held: Any, classes: Sequence[str]) -> Outside:
    """The one matrix of predictions among arrays, and the texts beside it."""
    named = held if isinstance(held, dict) else {"": held}
    arrays = {str(name): _as_array(value) for name, value in named.items()}
    fitting = {
        name: array
        for name, array in arrays.items()
        if array is not None and array.ndim == 2 and array.dtype.kind in "fiu"
        and array.shape[1] == len(classes) and len(array)
    }  # fmt: skip
    if not fitting:
        shapes = ", ".join(
            f"{name or 'array'} {array.shape}"
            for name, array in arrays.items()
            if array is not None
        )
        raise DataError(
            f"{path}: it holds no array (n_rows, {len(classes)}) of numbers ({shapes[:200] or 'nothing of the kind'})."
            " Write one: np.save of an array of floats, a column per class."
        )
    name = next((it for it in _LIKELY if it in fitting), None) or next(iter(fitting))
    if len(fitting) > 1 and name not in _LIKELY:
        raise DataError(
            f"{path}: it holds several arrays that could be meant ({', '.join(map(shown, fitting))}). Keep one."
        )
    probabilities, notes = as_probabilities(path, fitting[name])
    texts = {
        it: pl.Series(it, [None if x is None else str(x) for x in array.tolist()], pl.String)
        for it, array in arrays.items()
        if array is not None and array.ndim == 1 and len(array) == len(probabilities)
        and array.dtype.kind in "OUiu"
    }  # fmt: skip
    note = (f'{path}: read from "{name}"',) if name else ()
    return Outside(path, pl.DataFrame(list(texts.values())), probabilities, (*note, *notes))


def _as_array(value: Any) -> np.ndarray | None:
    """A list of texts, or of lists of numbers, as an array; None for what is none."""
    if isinstance(value, list) and any(isinstance(it, str) for it in value):
        return np.fromiter(
            value, object, len(value)
        )  # else all would take as much room as the longest
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array if array.dtype != object or isinstance(value, np.ndarray) else None


def joined(parts: Sequence[Outside]) -> Outside:
    """Several files of other rows, one below the other: the folds of one model.

    The frame gets a column ``fold``, the number of the file, unless all have one.
    """
    frames = [
        part.frame
        if "fold" in part.frame.columns
        else part.frame.with_columns(fold=pl.lit(str(number)))
        for number, part in enumerate(parts)
    ]
    return replace(
        parts[0],
        frame=pl.concat(frames, how="diagonal"),
        probabilities=np.concatenate([part.probabilities for part in parts]),
        notes=tuple(note for part in parts for note in part.notes),
    )
