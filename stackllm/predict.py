"""Applying a run's stored models to groups that it never saw."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stackllm.crossfit.design import CrossFit, Fit
from stackllm.engine.local import Engine, Task
from stackllm.errors import DataError, MissingInputError, UsageError
from stackllm.llm.backbone import choose_dtype
from stackllm.llm.encode import EncoderParams
from stackllm.llm.locate import UNKNOWN, revision_of
from stackllm.members.boosting import predict_boosting
from stackllm.members.build import build_inputs
from stackllm.members.inputs import Inputs, load_inputs
from stackllm.members.registry import KINDS, Member
from stackllm.members.stage import full_places, gather_full, gather_places, places_of
from stackllm.probabilities import log_blend, log_probabilities, softmax
from stackllm.rating.local import RaterParams
from stackllm.rating.transport import ServerParams
from stackllm.recipes.loader import find_recipes
from stackllm.settings import build
from stackllm.stack.features import stack_features
from stackllm.stack.posteriors import fold_posteriors
from stackllm.stack.round import Round
from stackllm.store.digest import digest
from stackllm.store.units import Unit, make_unit, open_unit, stored_key
from stackllm.study import Study

VERSION = 2
_UNIT = "model"
_STACK = "stack"


def store_model(study: Study, played: Round) -> None:
    """Write down which units make up a round's model, and the recipes as they were.

    Parameters
    ----------
    study
        The run.
    played
        The round whose models are to be applied: the best one.
    """
    settings, table = study.settings, study.table
    encoder, rater = settings.encoder, settings.rater
    without = () if settings.encoder else ("encoder",)
    recipes = find_recipes(settings.recipes, without, rater.ask)
    places = _places(study, played.fits)
    full = _full_places(study)
    content = {
        "classes": list(table.classes),
        "id_name": table.id_name,
        "quota": settings.data.quota,
        "encoder": _as_computed(encoder) if encoder else None,
        "rater": _as_computed(rater),
        "backbones": {name: revision_of(name) for name in settings.backbones},
        "recipes": [recipe.path.name for recipe in recipes],
        "members": [
            {
                "name": member.name,
                "kind": member.kind,
                "params": dataclasses.asdict(member.of_one_model),
            }
            for member in settings.members
        ],
        "external": [params.name for params in settings.external],
        "places": places,
        "full": full,
        "temperatures": {
            name: found.temperatures.tolist() for name, found in played.posteriors.items()
        },
        "blend": {"names": list(played.blend.names), "weights": played.blend.weights.tolist()},
        "units": {
            path: stored_key(study.engine.root / path)
            for own in [*places.values(), *full.values()]
            for _, path in own
        },
    }

    def fill(folder: Path) -> None:
        (folder / "model.json").write_text(
            json.dumps(content, indent=1, sort_keys=True), encoding="utf-8", newline="\n"
        )
        for recipe in recipes:
            shutil.copyfile(recipe.path, folder / recipe.path.name)

    study.engine.ensure("model", [Task(make_unit(_UNIT, VERSION, content), fill, here=True)])


def submitted_blend(study: Study, played: Round) -> CrossFit:
    """A round's blend as it is submitted: with refitted members' models on all training rows.

    Only here do those predict. Pseudo-labels, the stack and every score are made of
    ``played.blend`` itself, whose models of a fold never saw that fold's labels.
    """
    blend = played.blend.predictions
    test = blend.test
    for member in study.settings.members:
        full = gather_full(member, study.design, study.engine.root)
        if full is not None:
            places = places_of(member, played.fits, study.design)
            folds = gather_places(places, study.design, study.engine.root)
            weights = played.blend.weights[:, played.blend.names.index(member.name)]
            test = exchange(test, weights, folds.test, full)
    return CrossFit(blend.oof, test)


def submitted(study: Study, played: Round) -> np.ndarray:
    """Posteriors of the test rows that are submitted, ``(n_test, n_classes)``."""
    if not any(member.refitted for member in study.settings.members):
        return played.final.test_mean()
    found = fold_posteriors(
        submitted_blend(study, played).test,
        study.design.test_groups,
        study.settings.data.quota,
        played.posteriors["blend"].temperatures,
    )
    mean: np.ndarray = found.mean(axis=0)
    return mean


def exchange(
    blended: np.ndarray, weights: np.ndarray, old: np.ndarray, new: np.ndarray
) -> np.ndarray:
    """Log blends with another model's predictions in one model's place.

    Parameters
    ----------
    blended
        Blends ``(n_folds, n_rows, n_classes)`` of :func:`~stackllm.probabilities.log_blend`,
        whose floor under every model's probabilities keeps them above 0.
    weights
        That model's weight in each, ``(n_folds,)``.
    old, new
        Its predictions, as ``blended`` or the same for all folds, and those in their place.
    """
    change = log_probabilities(new) - log_probabilities(old)
    return softmax(np.log(blended) + weights[:, None, None] * change)


def predict_new(
    root: Path,
    rows: pl.DataFrame,
    cache: Engine,
    engine: Engine,
    server: ServerParams | None = None,
    id_name: str | None = None,
) -> tuple[pl.DataFrame, np.ndarray]:
    """Posteriors of new rows.

    Parameters
    ----------
    root
        The run's folder.
    rows
        ``row_id, group_id, question, response`` of whole groups.
    cache, engine
        Engines over the shared folder and the run's.
    server
        How a server may be used, if the run asked one. None takes the defaults.
    id_name
        What the id column is to be called. None: as in the run.

    Returns
    -------
    frame
        The id column and a column ``target_<class>`` a class.
    probabilities
        ``(n_rows, n_classes)``.

    Raises
    ------
    MissingInputError
        If the run holds no finished model.
    UsageError
        If the run has external members, whose models stackllm does not have.
    DataError
        If the weights of an LLM are no longer those that the run was trained on.
    StorageError
        If a unit is damaged.
    """
    model, recipe_folder = _open_model(root)
    if model["external"]:
        raise UsageError(
            f"{root}: this run has the external member {model['external'][0]!r}, whose model stackllm does not have. "
            "Predict with a run without external members."
        )
    for name, revision in model.get("backbones", {}).items():
        _check_weights(name, revision)
    encoder = EncoderParams(**_tuples(model["encoder"])) if model["encoder"] else None
    recipes = tuple(str(recipe_folder / name) for name in model["recipes"])
    stored = [
        Member(
            entry["name"],
            entry["kind"],
            build(str(root), KINDS[entry["kind"]].params, entry["params"]),
        )
        for entry in model["members"]
    ]
    rater = RaterParams(**{**_tuples(model["rater"]), "ask": ()})  # its recipes are in the model
    folder, _ = build_inputs(
        f"new-{digest(rows)[:16]}", rows, encoder, recipes, cache, engine,
        trunks=[member.trunk for member in stored if member.trunk], rater=rater, server=server,
    )  # fmt: skip
    inputs = load_inputs(folder)
    temperatures = np.array(model["temperatures"]["blend"])
    blended = _blended(root, model, stored, inputs)
    final = fold_posteriors(blended, inputs.groups, model["quota"], temperatures).mean(axis=0)
    columns = [f"target_{name}" for name in model["classes"]]
    return pl.DataFrame(
        {id_name or model["id_name"]: rows["row_id"], **dict(zip(columns, final.T, strict=True))}
    ), final


def _blended(root: Path, model: dict[str, Any], stored: list[Member], inputs: Inputs) -> np.ndarray:
    """Each fold's blend of members and stack, ``(n_folds, n_rows, n_classes)``."""
    quota = model["quota"]
    members = {member.name: _member(root, model, member, inputs) for member in stored}
    posteriors = {
        name: CrossFit(
            np.empty((0, test.shape[2])),
            fold_posteriors(test, inputs.groups, quota, np.array(model["temperatures"][name])),
        )
        for name, test in members.items()
    }
    crossfits = {
        name: CrossFit(np.empty((0, test.shape[2])), test) for name, test in members.items()
    }
    models = {**members, "stack": _stack(root, model, crossfits, posteriors, inputs)}
    for member in stored:
        if member.name in model.get("full", {}):  # it stands for the models of every fold
            own = _member(root, model, member, inputs, "full")
            models[member.name] = np.broadcast_to(own, models[member.name].shape)
    return np.stack(
        [
            log_blend(
                np.stack([models[name][fold] for name in model["blend"]["names"]]),
                np.array(weights),
            )
            for fold, weights in enumerate(model["blend"]["weights"])
        ]
    )


def _as_computed(params: EncoderParams | RaterParams) -> dict[str, Any]:
    """Settings of an LLM with the precision that ``"auto"`` stood for on this machine."""
    return {**dataclasses.asdict(params), "dtype": choose_dtype(params.dtype)[0]}


def _check_weights(name: str, revision: str) -> None:
    """Refuse an LLM that is another one by now; of one in the hub that nobody has fetched yet there is no news."""
    found = revision_of(name)
    if found != revision and UNKNOWN not in (found, revision):
        raise DataError(
            f'backbone "{name}" is not the one that this run was trained on: its weights have changed. '
            "Put the old ones back, or train anew with stackllm stack or run."
        )


def _open_model(root: Path) -> tuple[dict[str, Any], Path]:
    folder = root / _UNIT
    if not folder.is_dir():
        raise MissingInputError(
            f'{root}: there is no finished model here. Run "stackllm stack" or "stackllm run" first, or give --name.'
        )
    open_unit(root, Unit(_UNIT, stored_key(folder)))
    return json.loads((folder / "model.json").read_text(encoding="utf-8")), folder


def _places(study: Study, fits: Sequence[Fit]) -> dict[str, list[tuple[int, str]]]:
    """Fold and unit of each model of each member and of the stack."""
    places = {
        member.name: [(p.fit.fold, p.path) for p in places_of(member, fits, study.design)]
        for member in study.settings.members
    }
    return {**places, _STACK: [(fit.fold, f"stack/models/{fit.name}") for fit in fits]}


def _full_places(study: Study) -> dict[str, list[tuple[int, str]]]:
    """Unit of each model on all training rows, of each member that has them."""
    return {
        member.name: [(p.fit.fold, p.path) for p in full_places(member, study.design)]
        for member in study.settings.members
        if member.refitted
    }


def _member(
    root: Path, model: dict[str, Any], member: Member, inputs: Inputs, which: str = "places"
) -> np.ndarray:
    """Predictions of each fold's models, ``(n_folds, n_rows, n_classes)``; with ``"full"`` of all folds' at once."""
    rows, kind = np.arange(len(inputs.groups)), KINDS[member.kind]
    places = model[which][member.name]
    return _by_fold(root, model, places, lambda folder, _: kind.predict(inputs, rows, folder))


def _stack(
    root: Path,
    model: dict[str, Any],
    members: dict[str, CrossFit],
    posteriors: dict[str, CrossFit],
    inputs: Inputs,
) -> np.ndarray:
    return _by_fold(
        root,
        model,
        model["places"][_STACK],
        lambda folder, fold: predict_boosting(
            stack_features(fold, members, posteriors, inputs.blocks, inputs.names, inputs.groups),
            folder,
        ),
    )


def _by_fold(
    root: Path, model: dict[str, Any], places: list[tuple[int, str]], predict: Any
) -> np.ndarray:
    found: dict[int, list[np.ndarray]] = {}
    for fold, path in places:
        folder = open_unit(root, Unit(path, model["units"][path]))
        found.setdefault(fold, []).append(predict(folder, fold))
    return np.stack([np.mean(found[fold], axis=0) for fold in sorted(found)])


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
