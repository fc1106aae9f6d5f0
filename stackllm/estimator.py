"""The whole recipe as one object: fit, predict, look, and go on where the command line stopped."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError

from stackllm.errors import DataError, MissingInputError, UsageError
from stackllm.metrics import accuracy, mean_with_error, row_losses, shown_with_error
from stackllm.pipeline import Until, run
from stackllm.predict import Model, is_as_read, open_model, predict_new, read_tables
from stackllm.rating.requests import ServerParams
from stackllm.report.explain import Explanation, explain_row
from stackllm.report.page.report import Report, report
from stackllm.settings import Settings, as_written, make_settings, read_settings
from stackllm.store.atomic import make_folder, write_file
from stackllm.store.records import RECORD, read_json
from stackllm.study import read_scored
from stackllm.tables.contest import NewRows, read_new
from stackllm.tables.frames import from_native, like_native
from stackllm.tables.sample import plain_layout, read_sample
from stackllm.workspace import Workspace, open_workspace

_TABLES = "tables"
"""Folder of the frames that ``fit`` got, below the run's."""


@dataclass(frozen=True)
class Score:
    """How good predictions are.

    Parameters
    ----------
    log_loss
        Mean log loss, in nats.
    error
        Its standard error, by a bootstrap over groups; None where a single group leaves it unknown.
    accuracy
        Share of rows whose likeliest class is right.
    """

    log_loss: float
    error: float | None
    accuracy: float

    def __str__(self) -> str:
        return (
            f"log loss {shown_with_error(self.log_loss, self.error)}, accuracy {self.accuracy:.4f}"
        )


class StackLLM(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The recipe of the command line as a scikit-learn classifier of frames.

    Parameters
    ----------
    text, group, label, id, question
        Names of columns: the response, what says which rows belong together (the question), the label, the
        row's id, and the question's text where ``group`` holds something else. None: as in ``[data]`` of the
        settings, where they are ``Response``, ``Question``, ``target``, ``id``.
    quota
        How often each class stands in one group.
    folds
        Folds of the training groups.
    rounds
        Rounds of pseudo-labels, played where there are unlabelled rows.
    seed
        Seed of folds, parts and every model.
    settings
        Everything else: what a ``stackllm.toml`` holds, as a mapping of its sections, or the path of such a
        file. None: the defaults, whatever file stands in the working folder.
    path
        The run's folder. What is there already is taken over: fit again and it goes on.
    n_jobs
        Units side by side; None: as many as there are cores.
    verbose
        Whether progress is shown, on standard error.

    Attributes
    ----------
    classes_
        Labels as text, in the order of the columns of ``predict_proba``.
    oof_
        polars: ``row_id, group, label`` of each training row and its final posterior, a column per class, by
        models that did not see its group.

    Notes
    -----
    Nothing is held in memory: a fitted object is a run's folder, and whatever it tells is read and verified there.
    So :func:`open_run` gives the same object for a run of the command line.
    """

    def __init__(
        self,
        *,
        text: str | None = None,
        group: str | None = None,
        label: str | None = None,
        id: str | None = None,
        question: str | None = None,
        quota: int | None = None,
        folds: int | None = None,
        rounds: int | None = None,
        seed: int | None = None,
        settings: Mapping[str, Any] | str | Path | None = None,
        path: str | Path = "artifacts/run",
        n_jobs: int | None = None,
        verbose: bool = False,
    ) -> None:
        self.text = text
        self.group = group
        self.label = label
        self.id = id
        self.question = question
        self.quota = quota
        self.folds = folds
        self.rounds = rounds
        self.seed = seed
        self.settings = settings
        self.path = path
        self.n_jobs = n_jobs
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, *, unlabelled: Any = None, truth: Any = None) -> Self:
        """Run the recipe on frames, or take over what the run's folder holds of it.

        Parameters
        ----------
        X
            The training frame, polars or pandas: a row per response.
        y
            Labels, ``(n_rows,)``, where the frame has no column of them.
        unlabelled
            Frame of whole groups without labels: rounds of pseudo-labels learn from it, and the run's
            submission is about it.
        truth
            Labels of the unlabelled rows, for scores on the leaderboard only: in the order of the rows, or a
            frame with ids.

        Raises
        ------
        DataError, UsageError, LockedError, StorageError, TrainingError, ServerError
            As the command line, with the same sentences.
        """
        settings = self._settings(unlabelled is not None)
        train = from_native(X, "the training frame")
        if y is not None:
            train = _labelled(train, y, settings.data.target)
        with self._workspace() as workspace:
            self._keep("train", train)
            labels = None
            if unlabelled is not None:
                test = from_native(unlabelled, "the unlabelled frame")
                self._keep("test", test)
                if truth is not None:
                    labels = self._keep("truth", _labelled(test, truth, settings.data.target))
            until: Until = "pseudo" if settings.pseudo.rounds else "stack"
            run(settings, workspace, until=until, truth=labels)
        return self

    @property
    def classes_(self) -> np.ndarray:
        """Labels as text, in the order of the columns of ``predict_proba``."""
        return np.array(self._model().classes)

    @property
    def oof_(self) -> pl.DataFrame:
        """Training rows and their out-of-fold posterior."""
        model = self._model()
        rows = read_tables(model).train
        labels = pl.Series("label", [model.classes[i] for i in rows["label"]])
        posterior = pl.read_parquet(self._root / "oof.parquet")
        return pl.concat(
            [
                rows.select("row_id", group="group_id"),
                labels.to_frame(),
                posterior.select(model.classes),
            ],
            how="horizontal",
        )

    def predict_proba(self, X: Any) -> Any:
        """Posteriors of the rows of whole groups, by the models of all folds.

        Parameters
        ----------
        X
            Frame with the columns of the training frame; labels in it are not looked at.

        Returns
        -------
        frame
            In the kind of ``X``, a column per class, rows as in ``X``.
        """
        model = self._model()
        with self._workspace() as workspace:
            rows = self._rows(model, from_native(X, "the frame"), workspace)
            probabilities = predict_new(model, rows.frame, workspace, self._server())
        columns = dict(zip(model.classes, probabilities.T, strict=True))
        return like_native(pl.DataFrame(columns), X)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest label of each row, text ``(n_rows,)``."""
        likeliest: np.ndarray = np.asarray(self.predict_proba(X)).argmax(axis=1)
        return np.take(self.classes_, likeliest)

    def score(self, X: Any, y: Any = None) -> Score:
        """How good the posteriors of labelled rows are.

        Parameters
        ----------
        X
            Frame of whole groups.
        y
            Labels in the order of the rows, or a frame with ids and labels. None: the label column of ``X``.

        Returns
        -------
        Score
            Less log loss is better: for scikit-learn's searches use ``scoring="neg_log_loss"``.
        """
        model = self._model()
        frame, target = from_native(X, "the frame"), model.data.target
        if y is None and target not in frame.columns:
            raise UsageError(f'there are no labels: pass y, or a frame with the column "{target}".')
        with self._workspace() as workspace:
            rows = self._rows(model, frame, workspace)
            truth = self._keep("truth", frame if y is None else _labelled(frame, y, target))
            labels = read_scored(truth, rows.rows, model.classes, model.data, workspace)
            probabilities = predict_new(model, rows.frame, workspace, self._server())
        groups = rows.frame["group_id"].to_numpy()
        loss, error = mean_with_error(row_losses(probabilities, labels), groups)
        return Score(loss, error, accuracy(probabilities, labels))

    def explain(self, X: Any, row: int = 0) -> Explanation:
        """Why a row gets its label: what each model says of it, and which n-grams speak for and against.

        Parameters
        ----------
        X
            A frame. Of the run's own rows, training or unlabelled, one row will do, for their groups are known; of new
            ones it must hold whole groups.
        row
            Which row of it, from 0.
        """
        model = self._model()
        with self._workspace() as workspace:
            rows = self._rows(model, from_native(X, "the frame"), workspace)
            if not 0 <= row < rows.frame.height:
                raise UsageError(f"row must be from 0 to {rows.frame.height - 1}, not {row}.")
            return explain_row(model, rows, row, workspace)

    def to_submission(self, X: Any, like: str | Path | None = None) -> pl.DataFrame:
        """The submission of the rows of a frame.

        Parameters
        ----------
        X
            Frame of whole groups. If it is the one that was unlabelled in ``fit``, these are the run's own
            predictions of it, none of them by a model that saw a pseudo-label of the row.
        like
            A sample submission, whose ids, columns and order are taken. None: the ids of the frame and a column
            ``target_<class>`` per class.
        """
        model = self._model()
        with self._workspace() as workspace:
            rows = self._rows(model, from_native(X, "the frame"), workspace)
            probabilities = self._stored(model, rows)
            if probabilities is None:
                probabilities = predict_new(model, rows.frame, workspace, self._server())
        make = plain_layout if like is None else partial(read_sample, Path(like))
        return make(rows.rows, model.classes).filled(probabilities)

    def leaderboard(self) -> pl.DataFrame:
        """Out-of-fold scores of every model of every round; see :func:`stackllm.report.leaderboard.leaderboard`."""
        return pl.read_csv(self._finished("leaderboard.csv"))

    def report(self, output: str | Path | None = None) -> Report:
        """Write the page about the run, and show it in a notebook; see :func:`stackllm.report.page.report.report`.

        Parameters
        ----------
        output
            The page, with ``.md`` and ``.json`` beside it. None: ``report.html`` in the run's folder.
        """
        self._finished("run.json")
        return report(self._root, self._root.parent, None if output is None else Path(output))

    def _repr_html_(self) -> str:
        """The leaderboard, for a notebook."""
        try:
            board = self.leaderboard()
        except NotFittedError:
            return f"<pre>{html.escape(repr(self))}, not fitted</pre>"
        return f"<p>{html.escape(repr(self))}</p>{board._repr_html_()}"

    @property
    def _root(self) -> Path:
        return Path(self.path)

    def _settings(self, unlabelled: bool) -> Settings:
        """The settings, with what the constructor says on top and the tables where ``fit`` puts them."""
        tables = self._root / _TABLES
        given: dict[str, dict[str, Any]] = {
            "data": {
                "text": self.text, "group": self.group, "target": self.label, "id": self.id,
                "question": self.question, "quota": self.quota,
            },
            "run": {"folds": self.folds, "seed": self.seed},
            "pseudo": {"rounds": self.rounds if unlabelled else 0},
        }  # fmt: skip
        overrides = {
            section: {name: value for name, value in values.items() if value is not None}
            for section, values in given.items()
        }
        if isinstance(self.settings, (str, Path)):
            settings = read_settings(Path(self.settings), overrides)
        else:
            settings = make_settings(self.settings or {}, overrides)
        test = str(tables / "test.parquet") if unlabelled else None
        data = replace(settings.data, train=str(tables / "train.parquet"), test=test)
        return replace(settings, data=data)

    def _server(self) -> ServerParams:
        return self._settings(unlabelled=True).server

    @contextmanager
    def _workspace(self) -> Iterator[Workspace]:
        root = self._root
        with open_workspace(
            root.name, root.parent, n_jobs=self.n_jobs, quiet=not self.verbose
        ) as workspace:
            yield workspace

    def _model(self) -> Model:
        try:
            return open_model(self._root)
        except MissingInputError as error:
            raise NotFittedError(str(error)) from error

    def _finished(self, name: str) -> Path:
        path = self._root / name
        if not path.exists():
            raise NotFittedError(
                f"{path}: there is no finished run here. Call fit first, or name another path."
            )
        return path

    def _keep(self, name: str, frame: pl.DataFrame) -> Path:
        """Write a frame where the run's tables stand, so that the command line can go on with it."""
        make_folder(self._root / _TABLES)
        path = self._root / _TABLES / f"{name}.parquet"
        write_file(path, frame.write_parquet)
        return path

    def _rows(self, model: Model, frame: pl.DataFrame, workspace: Workspace) -> NewRows:
        table = read_new(self._keep("new", frame), model.data)
        workspace.reporter.tell(table.notes, table.warnings)
        return table

    def _stored(self, model: Model, rows: NewRows) -> np.ndarray | None:
        """The run's own predictions of rows that it had without labels; None if these are others."""
        path = model.data.test
        if not path or not Path(path).is_file() or not is_as_read(model, path):
            return None
        test = read_new(Path(path), model.data).frame
        if not test.equals(rows.frame):
            return None
        return pl.read_parquet(self._root / "test.parquet").select(model.classes).to_numpy()


def open_run(path: str | Path, *, n_jobs: int | None = None, verbose: bool = False) -> StackLLM:
    """A finished run, made here or by the command line, as a fitted :class:`StackLLM`.

    Parameters
    ----------
    path
        The run's folder, such as ``artifacts/run``.
    n_jobs, verbose
        As for :class:`StackLLM`.

    Raises
    ------
    MissingInputError
        If no finished run is there.
    """
    root = Path(path)
    open_model(root)
    settings = read_json(root / RECORD)["settings"]
    named = _named(settings)
    written = as_written(
        settings
    )  # or fit would go on with the defaults, and predict ask otherwise
    return StackLLM(settings=written, path=path, n_jobs=n_jobs, verbose=verbose, **named)


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's settings say of the constructor's parameters."""
    data, made = settings["data"], settings["run"]
    columns = {
        "text": "text",
        "group": "group",
        "label": "target",
        "id": "id",
        "question": "question",
    }
    return {
        **{name: data[key] for name, key in columns.items()},
        "quota": data["quota"], "folds": made["folds"], "seed": made["seed"],
        "rounds": settings["pseudo"]["rounds"],
    }  # fmt: skip


def _labelled(frame: pl.DataFrame, labels: Any, name: str) -> pl.DataFrame:
    """A frame with its labels in a column, or a frame of ids and labels as it is."""
    if hasattr(labels, "columns"):
        return from_native(labels, "the frame of labels")
    values = list(labels)
    if len(values) != frame.height:
        raise DataError(
            f"there are {len(values)} labels for {frame.height} rows. Pass one per row."
        )
    return frame.with_columns(pl.Series(name, values))
