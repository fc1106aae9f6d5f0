"""Why a row was given its label: what each model says of it, and which n-grams speak for which class."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import polars as pl

from stackllm.members.lexical import telltale
from stackllm.predict import Model, Opinions, opinions_on, read_tables, unit_folders
from stackllm.report.text import aligned
from stackllm.store.records import RECORD, read_json
from stackllm.tables.contest import NewRows, Table
from stackllm.workspace import Workspace

_SHOWN = 8
"""N-grams for and against a class that people are shown."""


@dataclass(frozen=True)
class Explanation:
    """What is known of one row.

    Parameters
    ----------
    where
        ``"train"``, ``"test"`` or ``"new"``.
    row_id, response
        The row.
    label
        Its label; None where it has none.
    opinions
        ``model`` and a float64 column per class: calibrated probabilities of the row by each model, without its
        group, and as ``posterior`` what the group makes of them. Of a training row, all by models that did
        not see its group.
    ngrams
        ``member, view, ngram`` and a float64 column per class: what each n-gram of the response adds to the
        class's score above the mean over classes, averaged over the models that may be asked.
    """

    where: str
    row_id: str
    response: str
    label: str | None
    opinions: pl.DataFrame
    ngrams: pl.DataFrame

    @property
    def likeliest(self) -> str:
        """The class with the highest posterior."""
        classes = self.opinions.columns[1:]
        return classes[int(np.argmax(self.opinions.drop("model").row(-1)))]

    def strongest(self, name: str, n: int = _SHOWN) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The n-grams that speak most for a class, and most against it: ``member, view, ngram, adds``."""
        table = self.ngrams.select("member", "view", "ngram", adds=name)
        signs = (table.filter(pl.col("adds") > 0), table.filter(pl.col("adds") < 0))
        strongest, weakest = (
            part.sort(
                pl.col("adds").abs(),
                "member",
                "view",
                "ngram",
                descending=[True, False, False, False],
            )
            for part in signs
        )
        return strongest.head(n), weakest.head(n)

    def __str__(self) -> str:
        classes = self.opinions.columns[1:]
        rows = [
            [name, *(f"{p:.3f}" for p in values)] for name, *values in self.opinions.iter_rows()
        ]
        label = "" if self.label is None else f", label {self.label}"
        lines = [
            f"{self.where} row {self.row_id}{label}: {self.likeliest}",
            aligned([["model", *classes], *rows]),
        ]
        for words, table in zip(("for", "against"), self.strongest(self.likeliest), strict=True):
            told = ", ".join(
                f"{ngram!r} {adds:+.3f}"
                for ngram, adds in table.select("ngram", "adds").iter_rows()
            )
            lines.append(f"{words} {self.likeliest}: {told or 'no n-gram'}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def explain_row(model: Model, rows: NewRows, row: int, workspace: Workspace) -> Explanation:
    """Explain one row of a table.

    Parameters
    ----------
    model
        From :func:`~stackllm.predict.open_model`.
    rows
        A whole group or more. A row that the run itself had, known by its texts, is told from what is stored.
    row
        Which of them, from 0.
    workspace
        The run's.

    Raises
    ------
    MissingInputError, DataError, StorageError
        If the run's tables or its models are not what they were.
    """
    table = read_tables(model)
    wanted = rows.frame.row(row, named=True)
    where, place = _find(table, wanted)
    if where == "new":
        opinions, place = opinions_on(model, rows.frame, workspace), row
    else:
        opinions = _stored(model, where)
    label = table.train["label"][place] if where == "train" else None
    classes = model.classes
    told = {**opinions.rows, "posterior": opinions.posterior}
    return Explanation(
        where,
        wanted["row_id"] if where == "new" else getattr(table, where)["row_id"][place],
        wanted["response"],
        None if label is None else classes[label],
        pl.DataFrame(
            [[name, *matrix[place]] for name, matrix in told.items()],
            schema=["model", *classes],
            orient="row",
        ),
        _ngrams(model, wanted["response"], where, place),
    )


def _find(table: Table, wanted: dict[str, str]) -> tuple[str, int]:
    """In which of the run's tables a row stands, and where there; as ``"new"`` if it is in none."""
    for where, frame in (("train", table.train), ("test", table.test)):
        same = (frame["question"] == wanted["question"]) & (frame["response"] == wanted["response"])
        if same.any():
            by_id = same & (frame["row_id"] == wanted["row_id"])
            return where, int((by_id if by_id.any() else same).arg_max() or 0)
    return "new", 0


def _stored(model: Model, where: str) -> Opinions:
    """What the run handed out of its own rows."""
    which = "oof" if where == "train" else "test"
    best = read_json(model.root / RECORD)["best_round"]
    members = [member["name"] for member in model.content["members"]]

    def matrix(path: Path) -> np.ndarray:
        return pl.read_parquet(path).select(model.classes).to_numpy()

    folder = model.root / "predictions" / f"round{best}"
    rows = {
        name: matrix(folder / f"{name}_{which}.parquet") for name in (*members, "stack", "blend")
    }
    return Opinions(rows, matrix(model.root / f"{which}.parquet"))


def _ngrams(model: Model, response: str, where: str, place: int) -> pl.DataFrame:
    """What n-grams add by lexical models that did not see the row's group, nor a pseudo-label of the row."""
    tables = []
    for member in model.content["members"]:
        if member["kind"] != "lexical":
            continue
        for fold, folder in unit_folders(model, "places", member["name"]):
            if where == "train" and fold != _dealt(model, "fold", place):
                continue
            if where == "test" and folder.name.endswith(f"_part{_dealt(model, 'part', place)}"):
                continue
            tables.append(
                telltale(response, folder).select(pl.lit(member["name"]).alias("member"), pl.all())
            )
    names = {str(j): name for j, name in enumerate(model.classes)}
    if not tables:
        columns = dict.fromkeys(("member", "view", "ngram"), pl.String)
        return pl.DataFrame(schema={**columns, **dict.fromkeys(model.classes, pl.Float64)})
    by = ("member", "view", "ngram")
    return pl.concat(tables).group_by(by, maintain_order=True).mean().rename(names)


def _dealt(model: Model, what: str, place: int) -> int:
    """The fold of a training row, or the part of a test row."""
    return int(pl.read_parquet(model.root / "folds" / f"{what}s.parquet")[what][place])
