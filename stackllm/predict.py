"""A run's stored models: writing down which they are, and applying them to groups that they never saw."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl

from stackllm.engine.libraries import LOG, overheard
from stackllm.engine.local import Task
from stackllm.errors import DataError, MissingInputError, UsageError
from stackllm.llm.encode import EncoderParams
from stackllm.llm.locate import UNKNOWN, revision_of
from stackllm.members import own
from stackllm.members.boosting import predict_boosting
from stackllm.members.build import StoredInputs, build_inputs
from stackllm.members.inputs import Inputs, load_inputs
from stackllm.members.own import is_own
from stackllm.members.registry import KINDS, Member
from stackllm.members.stage import full_places, places_of
from stackllm.metrics import accuracy, mean_with_error, row_losses, shown_with_error
from stackllm.rating.local import RaterParams
from stackllm.rating.requests import ServerParams
from stackllm.rating.table import Rated, ratings_table, write_ratings
from stackllm.recipes.loader import Recipe, recipes_digest
from stackllm.settings import build
from stackllm.stack.features import stack_features
from stackllm.stack.posteriors import fold_posteriors
from stackllm.stack.round import Round, final_posteriors, final_rows
from stackllm.store.digest import digest, file_digest
from stackllm.store.records import RECORD, read_json, write_json
from stackllm.store.units import Unit, make_unit, open_unit, stored_key
from stackllm.study import Study, read_scored
from stackllm.tables.contest import Table, TableParams, read_new, read_training
from stackllm.tables.files import write_frame
from stackllm.tables.spreadsheet import spreadsheet_safe
from stackllm.workspace import Workspace

VERSION = 3
_UNIT, _FILE = "model", "model.json"
_STACK = "stack"
_OWN = "own"

Places = list[tuple[int, str]]
"""Fold and unit of each model of a member or of the stack."""


def store_model(study: Study, played: Round, full: Sequence[str]) -> None:
    """Write down which units make up a round's model, and the recipes as they were.

    Parameters
    ----------
    study
        The run.
    played
        The round whose models are to be applied: the best one.
    full
        Names of the members that also have models on all training rows.
    """
    settings, engine = study.settings, study.workspace.run
    encoder = settings.encoder
    places: dict[str, Places] = {
        _STACK: [(fit.fold, f"stack/models/{fit.name}") for fit in played.fits]
    }
    refitted: dict[str, Places] = {}
    for member in settings.members:
        models = places_of(member, played.fits, study.design)
        places[member.name] = [(place.fit.fold, place.path) for place in models]
        if member.name in full:
            whole = full_places(member, study.design)
            refitted[member.name] = [(place.fit.fold, place.path) for place in whole]
    content = {
        "classes": list(study.table.classes),
        "data": dataclasses.asdict(settings.data),
        "encoder": dataclasses.asdict(encoder) if encoder else None,
        "rater": dataclasses.asdict(settings.rater),
        "backbones": {name: revision_of(name) for name in settings.backbones},
        "recipes": [(recipe.path.name, recipe.needs) for recipe in study.recipes],
        "members": [_describe(member) for member in settings.members],
        "external": [params.name for params in settings.external],
        "places": places,
        "full": refitted,
        "temperatures": {
            name: calibrated.temperatures.tolist() for name, calibrated in played.posteriors.items()
        },
        "blend": {"names": list(played.blend.names), "weights": played.blend.weights.tolist()},
        "units": {
            path: stored_key(engine.folder(path))
            for models in [*places.values(), *refitted.values()]
            for _, path in models
        },
    }

    def fill(folder: Path) -> None:
        write_json(folder / _FILE, content, indent=1, sort_keys=True)
        for recipe in study.recipes:
            shutil.copyfile(recipe.path, folder / recipe.path.name)

    unit = make_unit(_UNIT, VERSION, content, recipes_digest(study.recipes))
    engine.ensure("model", [Task(unit, fill, here=True)])


@dataclass(frozen=True)
class Model:
    """What :func:`store_model` wrote, read and verified.

    Parameters
    ----------
    root
        The run's folder.
    content
        What ``model.json`` holds.
    data
        Where the run's tables were and what their columns are called.
    """

    root: Path
    content: dict[str, Any]
    data: TableParams

    @property
    def classes(self) -> tuple[str, ...]:
        """Label texts, in the order of the columns."""
        return tuple(self.content["classes"])

    @property
    def asks(self) -> bool:
        """Does it ask an LLM about new rows?"""
        return any(name.endswith(".toml") for name, _ in self.content["recipes"])


def open_model(root: Path) -> Model:
    """A finished run's model, to be applied to new rows.

    Raises
    ------
    MissingInputError
        If the run holds no finished model.
    UsageError
        If the run has external members, whose models stackllm does not have.
    DataError
        If the weights of an LLM are no longer those that the run was trained on.
    StorageError
        If the model is damaged or of an older version.
    """
    model = read_model(root)
    content = model.content
    if content["external"]:
        raise UsageError(
            f"{root}: this run has the external member {content['external'][0]!r}, whose model stackllm does not "
            "have. Predict with a run without external members."
        )
    for name, revision in content["backbones"].items():
        _check_weights(name, revision)
    return model


def read_model(root: Path) -> Model:
    """A finished run's model, to be looked at: external members and LLMs that changed are no hindrance.

    Raises
    ------
    MissingInputError
        If the run holds no finished model.
    DataError
        If it was stored by an older version.
    StorageError
        If it is damaged.
    """
    folder = root / _UNIT
    if not folder.is_dir():
        raise MissingInputError(
            f'{root}: there is no finished model here. Run "stackllm stack" or "stackllm run" first, or name another run.'
        )
    open_unit(root, Unit(_UNIT, stored_key(folder)))
    content = read_json(folder / _FILE)
    if "data" not in content:
        raise DataError(
            f"{root}: this model was stored by an older stackllm. Run the command that made the run again; it takes "
            "over what it can."
        )
    return Model(root, content, build(str(root), TableParams, content["data"]))


def read_tables(model: Model) -> Table:
    """The tables that the run was made of, whose rows are those of what it handed out.

    Raises
    ------
    MissingInputError, StorageError
        If one is gone or can't be read.
    DataError
        If one is another now.
    """
    for path in filter(None, (model.data.train, model.data.test)):
        if Path(path).is_file() and not is_as_read(model, path):
            raise DataError(
                f"{path}: this is not the table any more that {model.root} was made of. Put that back, or run the "
                "command that made the run again."
            )
    return read_training(model.data)


def is_as_read(model: Model, path: str) -> bool:
    """Is a table, byte for byte, one that the run was made of?"""
    inputs: dict[str, str] = read_json(model.root / RECORD)["inputs"]
    return file_digest(Path(path)) in inputs.values()


@dataclass(frozen=True)
class Predicted:
    """Predictions of the rows of a file.

    Parameters
    ----------
    frame
        The id column and a column ``target_<class>`` per class.
    score
        ``log_loss, log_loss_error, accuracy`` where labels were given, else empty. The error is None where
        a single group leaves it unknown.
    ratings
        What an LLM answered about the rows, as :func:`~stackllm.rating.table.ratings_table` gives it; None
        where the model asks nothing.
    """

    frame: pl.DataFrame
    score: dict[str, Any]
    ratings: pl.DataFrame | None = None

    def write(self, target: Path | None, csv_safe: bool | None = False) -> None:
        """Write the table to a file, and ratings beside it, or the table alone to the standard output."""
        write_frame(spreadsheet_safe(self.frame) if csv_safe else self.frame, target)
        if target is not None and self.ratings is not None:
            write_ratings(self.ratings, ratings_beside(target))

    def summary(self) -> dict[str, Any]:
        """The same for programs."""
        return {"rows": self.frame.height, **({"score": self.score} if self.score else {})}

    def told(self) -> str:
        """The same for people."""
        lines = []
        if self.score:
            loss = shown_with_error(self.score["log_loss"], self.score["log_loss_error"])
            lines.append(f"log loss {loss}, accuracy {self.score['accuracy']:.4f}")
        return "\n".join([*lines, f"{self.frame.height} rows"])


def ratings_beside(target: Path) -> Path:
    """Where the ratings stand of rows whose predictions stand in ``target``.

    Examples
    --------
    >>> ratings_beside(Path("new.predictions.csv")).as_posix()
    'new.predictions.ratings.csv'
    """
    return target.with_name(f"{target.stem}.ratings.csv")


def predict_file(
    model: Model,
    workspace: Workspace,
    path: Path,
    columns: Mapping[str, str] = MappingProxyType({}),
    truth: Path | None = None,
    server: ServerParams | None = None,
) -> Predicted:
    """Read a table of new groups, predict it with the run's models, and score that where labels are known.

    Parameters
    ----------
    model
        From :func:`open_model`.
    workspace
        The run's.
    path
        The table; no labels are read from it.
    columns
        Names of columns by their role (``id, group, text, question``) that differ from the run's.
    truth
        Labels of the rows, for scores.
    server
        How a server may be used, if the run asked one.

    Raises
    ------
    MissingInputError, UsageError, DataError, StorageError
        With a sentence for the user.
    """
    table = read_new(path, build(str(path), TableParams, columns, model.data, options=columns))
    workspace.reporter.tell(table.notes, table.warnings)
    rows = table.frame
    labels = None
    if truth is not None:  # read before hours of work
        labels = read_scored(truth, table.rows, model.classes, model.data, workspace)
    with overheard(workspace.root / LOG, "predict"):  # a user's class may print
        opinions = opinions_on(model, rows, workspace, server)
    probabilities = opinions.posterior
    names = [f"target_{name}" for name in model.classes]
    frame = pl.DataFrame(
        {table.rows.ids.name: rows["row_id"], **dict(zip(names, probabilities.T, strict=True))}
    )
    score = {} if labels is None else _score(probabilities, labels, rows["group_id"].to_numpy())
    if not opinions.rated:
        return Predicted(frame, score)
    ratings = ratings_table(opinions.rated, rows.with_columns(set=pl.lit("new")))
    return Predicted(frame, score, ratings)


def _score(probabilities: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    loss, error = mean_with_error(row_losses(probabilities, labels), groups)
    return {
        "log_loss": loss,
        "log_loss_error": error,
        "accuracy": accuracy(probabilities, labels),
    }


def predict_new(
    model: Model, rows: pl.DataFrame, workspace: Workspace, server: ServerParams | None = None
) -> np.ndarray:
    """Posteriors of new rows, by the functions that the run's own test rows went through.

    Parameters
    ----------
    model
        From :func:`open_model`.
    rows
        ``row_id, group_id, question, response`` of whole groups.
    workspace
        The run's.
    server
        How a server may be used, if the run asked one. None takes the defaults.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_rows, n_classes)``, columns in the order of :attr:`Model.classes`.

    Raises
    ------
    PendingError
        In a dry run, if anything has to be read.
    StorageError
        If a unit is damaged.
    """
    return opinions_on(model, rows, workspace, server).posterior


@dataclass(frozen=True)
class Opinions:
    """What a run's models say of some rows.

    Parameters
    ----------
    rows
        Row probabilities by each model, the stack and the blend included, float64 ``(n_rows, n_classes)``, the models
        of all folds averaged.
    posterior
        What the groups make of the blend's, ``(n_rows, n_classes)``.
    rated
        What an LLM answered about them, where the models read that.
    """

    rows: dict[str, np.ndarray]
    posterior: np.ndarray
    rated: tuple[Rated, ...] = ()


def opinions_on(
    model: Model, rows: pl.DataFrame, workspace: Workspace, server: ServerParams | None = None
) -> Opinions:
    """What each model says of new rows; parameters and errors are those of :func:`predict_new`."""
    content = model.content
    stored = _inputs(model, rows, workspace, server)
    inputs = load_inputs(stored.folder)
    groups, quota = inputs.groups, model.data.quota
    temperatures = {name: np.array(values) for name, values in content["temperatures"].items()}
    every = np.arange(rows.height)
    views, full = {}, {}
    for member in content["members"]:
        name, predict = member["name"], _predictor(member["kind"])

        def apply(folder: Path, _: int, predict: Predict = predict) -> np.ndarray:
            return predict(inputs, every, folder)

        views[name] = _by_fold(model, "places", name, apply)
        if name in content["full"]:
            full[name] = _by_fold(model, "full", name, apply)[0]
    posteriors = {
        name: fold_posteriors(view, groups, quota, temperatures[name])
        for name, view in views.items()
    }

    def stack(folder: Path, fold: int) -> np.ndarray:
        seen, certain = (
            {name: view[fold] for name, view in kind.items()} for kind in (views, posteriors)
        )
        features = stack_features(seen, certain, inputs.blocks, inputs.names, groups)
        return predict_boosting(features, folder)

    everything = {**views, _STACK: _by_fold(model, "places", _STACK, stack)}
    ordered = {name: everything[name] for name in content["blend"]["names"]}
    blended = final_rows(ordered, full, np.array(content["blend"]["weights"]))
    told = {name: view.mean(axis=0) for name, view in {**everything, "blend": blended}.items()}
    return Opinions(told, final_posteriors(blended, groups, quota), stored.rated)


def _inputs(
    model: Model, rows: pl.DataFrame, workspace: Workspace, server: ServerParams | None
) -> StoredInputs:
    content = model.content
    encoder = EncoderParams(**content["encoder"]) if content["encoder"] else None
    recipes = [
        Recipe(Path(name).stem, model.root / _UNIT / name, tuple(needs))
        for name, needs in content["recipes"]
    ]
    trunks = [
        KINDS[member["kind"]]
        .traits(build(str(model.root), KINDS[member["kind"]].params, member["params"]))
        .trunk
        for member in content["members"]
        if member["kind"] != _OWN
    ]
    return build_inputs(
        f"new-{digest(rows)[:16]}", rows, encoder, recipes, workspace,
        trunks=[trunk for trunk in trunks if trunk],
        rater=RaterParams(**{**content["rater"], "ask": ()}),  # its recipes are in the model
        server=server,
    )  # fmt: skip


def _by_fold(
    model: Model, which: str, name: str, predict: Callable[[Path, int], np.ndarray]
) -> np.ndarray:
    """Predictions of each fold's models, several of one fold averaged: ``(n_folds, n_rows, n_classes)``."""
    predictions: dict[int, list[np.ndarray]] = {}
    for fold, folder in unit_folders(model, which, name):
        predictions.setdefault(fold, []).append(predict(folder, fold))
    return np.stack([np.mean(predictions[fold], axis=0) for fold in sorted(predictions)])


def unit_folders(model: Model, which: str, name: str) -> Iterator[tuple[int, Path]]:
    """Fold and verified folder of each of a member's models: those of folds (``"places"``) or on all rows (``"full"``).

    Raises
    ------
    StorageError
        If one is damaged.
    """
    for fold, path in model.content[which][name]:
        yield fold, open_unit(model.root, Unit(path, model.content["units"][path]))


Predict = Callable[[Inputs, np.ndarray, Path], np.ndarray]


def _describe(member: Member) -> dict[str, Any]:
    if is_own(member.kind):  # its file stands with each of its models
        return {"name": member.name, "kind": _OWN}
    params = dataclasses.asdict(member.traits.params)
    return {"name": member.name, "kind": member.kind, "params": params}


def _predictor(kind: str) -> Predict:
    return own.predict if kind == _OWN else KINDS[kind].predict


def _check_weights(name: str, revision: str) -> None:
    """Refuse an LLM that is another one by now; of one in the hub that nobody has fetched yet there is no news."""
    now = revision_of(name)
    if now != revision and UNKNOWN not in (now, revision):
        raise DataError(
            f'backbone "{name}" is not the one that this run was trained on: its weights have changed. '
            "Put the old ones back, or train anew with stackllm stack or run."
        )
