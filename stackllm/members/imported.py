"""Taking over predictions that others left: aligned with our rows, checked, and stored as external members."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stackllm.crossfit.design import Design
from stackllm.crossfit.folds import group_folds
from stackllm.errors import DataError, UsageError
from stackllm.members.external import in_sample_sign
from stackllm.metrics import mean_with_error, row_losses, shown_with_error
from stackllm.probabilities import Floats
from stackllm.store.atomic import make_folder, replace_folder, write_text
from stackllm.store.digest import file_digest
from stackllm.tables.columns import usual_column
from stackllm.tables.contest import Table, TableParams, read_training
from stackllm.tables.ids import ID_NAMES, Rows
from stackllm.tables.imports import Outside, joined, places, read_outside

_RECORD = "import.json"
"""Tells a folder of imports from any other that stands in its place."""

_OF_TRAINING = re.compile(r"oof|val|train|fold", re.IGNORECASE)
_OF_TEST = re.compile(r"test|sub|infer", re.IGNORECASE)
_ROLE = re.compile(r"(oofs?|valid(ation)?|val|train|tests?|sub(mission)?|pred(iction)?s?)", re.I)


@dataclass(frozen=True)
class Imported:
    """What was taken over.

    Parameters
    ----------
    folder
        Where it stands.
    scores
        ``member, oof, oof_se`` of each: out-of-fold log loss with its error over groups.
    notes
        How files were read and matched.
    warnings
        What a user should look at.
    """

    folder: Path
    scores: pl.DataFrame
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def settings(self) -> str:
        """The lines of a settings file that take these members."""
        where = self.folder.as_posix()
        oof, test = (
            json.dumps(f"{where}/{it}/*.parquet", ensure_ascii=False) for it in ("oof", "test")
        )
        return f'[[member]]\nkind = "external"\noof = {oof}\ntest = {test}'

    def summary(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "folder": str(self.folder),
            "members": self.scores.to_dicts(),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "settings": self.settings,
        }

    def __str__(self) -> str:
        lines = [
            f"{row['member']}: out-of-fold log loss {shown_with_error(row['oof'], row['oof_se'])}"
            for row in self.scores.iter_rows(named=True)
        ]
        warned = [f"warning: {it}" for it in self.warnings]
        advice = 'In stackllm.toml (beside [[member]] kind = "default", if those are to stay):'
        return "\n".join([*self.notes, *warned, *lines, advice, self.settings])


def import_files(
    files: Sequence[Path],
    name: str,
    data: TableParams,
    *,
    n_folds: int = 5,
    seed: int = 0,
    tests: Sequence[Path] = (),
    into: Path = Path("imports"),
    replace: bool = False,
) -> Imported:
    """Take over predictions: one or several whole out-of-fold files, or one per fold, and those of the test rows.

    Parameters
    ----------
    files
        Files as :func:`~stackllm.tables.imports.read_outside` takes. Which hold training and which test rows shows in
        their ids, texts, names and lengths.
    name
        What the member is called; of several, what stands before the names of their files.
    data
        Where the tables are and what their columns are called.
    n_folds, seed
        Of our folds, which theirs are compared with.
    tests
        Files of test rows, where it does not show.
    into
        Folder of imports.
    replace
        May an import of that name give way?

    Raises
    ------
    MissingInputError, DataError, StorageError
        With the file, column and row that is wrong.
    UsageError
        If the name is taken or makes no sense.
    """
    folder = _checked_folder(into, name, replace)
    table = read_training(data)
    train, test = table.train_rows(), table.test_rows()
    parts = [read_outside(path, table.classes) for path in files]
    is_test = [_is_test(part, train, test) for part in parts]
    of_training = [part for part, it in zip(parts, is_test, strict=True) if not it]
    of_test = [part for part, it in zip(parts, is_test, strict=True) if it]
    of_test += [read_outside(path, table.classes) for path in tests]
    if not of_training or not of_test:
        lacking, rows = ("out-of-fold", train) if not of_training else ("test", test)
        raise DataError(
            f"{lacking} predictions are not among the files: none holds the rows of {rows.source}. Name them too; "
            "a member needs both."
        )
    design = _design(table, n_folds, seed)
    notes: list[str] = []
    warnings: list[str] = []
    scores = []
    made: dict[str, tuple[Floats, Floats]] = {}
    for member, oof, new in _members(name, of_training, of_test, len(train.ids)):
        at, told = places(oof, train)
        rows = oof.probabilities[at]
        notes += [*oof.notes, *told]
        warnings += _fold_signs(oof, at, design)
        views = []
        for part in new:
            where, told = places(part, test)
            notes += [*part.notes, *told]
            views.append(part.probabilities[where])
        if len(new) > 1:
            notes.append(f"{member}: test predictions of {len(new)} files are averaged")
        made[member] = rows, np.mean(views, axis=0)
        sign = in_sample_sign(*made[member], design)
        warnings += [f"{member}: {sign}"] if sign else []
        loss, error = mean_with_error(row_losses(rows, design.labels), design.train_groups)
        scores.append({"member": member, "oof": loss, "oof_se": error})
    _store(folder, table, made, [*files, *tests], notes, warnings)
    frame = pl.DataFrame(scores, schema_overrides={"oof_se": pl.Float64})
    return Imported(folder, frame, tuple(dict.fromkeys(notes)), tuple(dict.fromkeys(warnings)))


def _checked_folder(into: Path, name: str, replace: bool) -> Path:
    """Where an import of that name goes."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", name) or name in ("stack", "blend"):
        raise UsageError(
            f'the name "{name}" must be up to 64 letters, digits, _ and -, no - in front, and neither stack nor blend.'
        )
    folder = into / name
    if folder.exists() and not (replace and (folder / _RECORD).is_file()):
        step = "set the setting replace" if (folder / _RECORD).is_file() else "move it"
        raise UsageError(f"{folder}: this is there already. Choose another name, or {step}.")
    return folder


def _design(table: Table, n_folds: int, seed: int) -> Design:
    train, test = (part["group_id"].to_numpy() for part in (table.train, table.test))
    codes = np.unique(np.concatenate([train, test]), return_inverse=True)[1]
    labels = table.train["label"].to_numpy().astype(np.int64)
    folds = group_folds(train, n_folds, seed)
    parts = np.zeros(len(test), dtype=np.int32)
    return Design(labels, folds, parts, codes, len(table.classes), table.classes)


def _is_test(part: Outside, train: Rows, test: Rows) -> bool:
    """Are these rows of the test table? By texts, else by ids, name or length."""
    of_both = [_texts_fit(part, rows) for rows in (train, test)]
    if not any(of_both):
        of_both = [_ids_fit(part, rows) for rows in (train, test)]
    if of_both[0] != of_both[1]:
        return of_both[1]
    if not any(of_both):
        raise DataError(
            f"{part.path}: its {part.n_rows} rows are neither those of {train.source} nor of {test.source}, by id, text "
            "or number. Give it the ids or the texts of one of them."
        )
    stem = part.path.stem
    named = [bool(of.search(stem)) for of in (_OF_TRAINING, _OF_TEST)]
    if named[0] != named[1]:
        return named[1]
    lengths = [part.n_rows == len(rows.ids) for rows in (train, test)]
    if lengths[0] != lengths[1]:
        return lengths[1]
    raise DataError(
        f"{part.path}: its rows could be those of {train.source} or of {test.source}. Name the files of test rows with the "
        'setting tests, or give one of them "oof" or "test" in its name.'
    )


def _texts_fit(part: Outside, rows: Rows) -> bool:
    texts = rows.texts
    return texts is not None and any(
        column.n_unique() > 1 and column.is_in(texts.implode()).all() for column in part.frame
    )


def _ids_fit(part: Outside, rows: Rows) -> bool:
    frame = part.frame
    names = [] if not frame.width else [
        usual_column(part.path, frame.columns, (rows.ids.name, *ID_NAMES), "ids") or frame.columns[0]
    ]  # fmt: skip
    if names and frame[names[0]].is_in(rows.ids.implode()).all():
        return True
    return part.n_rows == len(rows.ids)


def _members(
    name: str, of_training: Sequence[Outside], of_test: Sequence[Outside], n_train: int
) -> list[tuple[str, Outside, Sequence[Outside]]]:
    """Each member with its out-of-fold rows and its files of test rows."""
    whole = [part.n_rows >= n_train for part in of_training]
    if not any(whole):
        return [(name, joined(of_training), of_test)]
    if not all(whole):
        odd = of_training[whole.index(False)]
        raise DataError(
            f"{odd.path}: it holds {odd.n_rows} of {n_train} training rows, and other files hold all. Import whole files "
            "and single folds apart."
        )
    if len(of_training) == 1:
        return [(name, of_training[0], of_test)]
    wholes: dict[str, Outside] = {}
    for part in of_training:
        other = wholes.setdefault(_stem(part.path), part)
        if other is not part:
            raise DataError(
                f"{part.path} and {other.path} would both be the member {name}_{_stem(part.path)}. Rename one of them."
            )
    tests: dict[str, list[Outside]] = {key: [] for key in wholes}
    for part in of_test:
        if _stem(part.path) not in tests:
            raise _unlike(part, "training")
        tests[_stem(part.path)].append(part)
    if lonely := next((part for key, part in wholes.items() if not tests[key]), None):
        raise _unlike(lonely, "test")
    return [(f"{name}_{key}", part, tests[key]) for key, part in wholes.items()]


def _unlike(part: Outside, rows: str) -> DataError:
    return DataError(
        f'{part.path}: none of the files of {rows} rows is called like it. Call both alike but for "oof" and "test" '
        "(oof_a.csv and test_a.csv), or oofs/a.csv and tests/a.csv."
    )


def _stem(path: Path) -> str:
    """The name of a file without what says which rows it holds."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem)
    return re.sub(r"_{2,}", "_", _ROLE.sub("", plain)).strip("-_") or plain


def _fold_signs(oof: Outside, at: np.ndarray, design: Design) -> list[str]:
    """What their folds say, where they left any."""
    if "fold" not in oof.frame.columns:
        return []
    folds = oof.frame["fold"].to_numpy()[at]
    pairs = {*zip(design.train_groups.tolist(), folds.tolist(), strict=True)}
    n_split = len(pairs) - len(np.unique(design.train_groups))
    if n_split:
        return [
            f"{oof.path}: its folds are not by group: some of the rows of {n_split} groups trained the model that predicted "
            "the others, which looks better out of fold than it is."
        ]
    both = {*zip(design.folds.tolist(), folds.tolist(), strict=True)}
    if len(both) != len(set(folds.tolist())) or len(both) != design.n_folds:
        return [
            f"{oof.path}: its folds are by group, but others than ours: what is stacked on it knows a little of the labels it "
            "is judged by."
        ]
    return []


def _store(
    folder: Path,
    table: Table,
    made: dict[str, tuple[Floats, Floats]],
    sources: Sequence[Path],
    notes: Sequence[str],
    warnings: Sequence[str],
) -> None:
    content = {
        "sources": {str(path): file_digest(path) for path in sources},
        "notes": list(notes),
        "warnings": list(warnings),
    }

    def fill(temporary: Path) -> None:
        write_text(temporary / _RECORD, json.dumps(content, indent=1, sort_keys=True))
        for at, (which, rows) in enumerate((("oof", table.train), ("test", table.test))):
            make_folder(temporary / which)
            for member, views in made.items():
                columns = dict(zip(table.classes, views[at].T, strict=True))
                frame = pl.DataFrame({table.id_name: rows["row_id"], **columns})
                frame.write_parquet(temporary / which / f"{member}.parquet")

    replace_folder(folder, fill)
