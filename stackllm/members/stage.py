"""Stage one: every member, cross-fitted, as units."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stackllm.crossfit.design import CrossFit, Design, Fit
from stackllm.engine import ranks
from stackllm.engine.local import Engine, Task
from stackllm.engine.progress import notes_of_this_unit
from stackllm.errors import DataError, TrainingError
from stackllm.llm.locate import prepare
from stackllm.llm.trunk import TrunkParams
from stackllm.members.build import StoredInputs
from stackllm.members.inputs import Inputs, load_inputs
from stackllm.members.own import is_own
from stackllm.members.protocol import Kind
from stackllm.members.registry import Member, kind_of
from stackllm.store.checkpoints import FITTED, checkpoint, keep
from stackllm.store.digest import digest
from stackllm.store.units import copy_files, make_unit

_STARTS = "starts"
"""Stage of what models start from."""


def cross_fit_members(
    members: Sequence[Member],
    fits: Sequence[Fit],
    design: Design,
    inputs: StoredInputs,
    seed: int,
    engine: Engine,
    cache_trunk: Callable[[TrunkParams], None],
) -> dict[str, CrossFit]:
    """Fit every member at every place of a cross-fit and put its predictions together.

    Parameters
    ----------
    members
        Which members.
    fits
        Places, from :class:`~stackllm.crossfit.design.Design`.
    design
        Folds and parts.
    inputs
        The label-free matrices.
    seed
        Seed of every model.
    engine
        Runs the units.
    cache_trunk
        Called before models that train from a cached trunk are fitted, and only then.

    Returns
    -------
    dict
        Predictions of each member by name, averaged over its seeds.
    """
    models: dict[bool, list[Task]] = {}
    for of_gpu in (True, False):  # the slowest first
        for member in members:
            if kind_of(member.kind).of_gpu == of_gpu:
                tasks = _tasks(member, fits, design, inputs, seed, engine.root)
                if engine.lacks(tasks):
                    _prepare(member, inputs, engine, cache_trunk)
                    _ensure_starts(member, fits, design, inputs, seed, engine)
                models.setdefault(of_gpu, []).extend(tasks)
    number = fits[0].round
    if engine.dry_run:  # a plan tells them apart
        for of_gpu, tasks in models.items():
            engine.ensure(stage_label([of_gpu], number), tasks)
    else:  # side by side: what a processor fits need not wait for a GPU
        engine.ensure(stage_label([*models], number), [*itertools.chain(*models.values())])
    return {
        member.name: gather(
            design,
            [place.fit for place in places_of(member, fits, design)],
            [engine.folder(place.path) for place in places_of(member, fits, design)],
        )
        for member in members
    }


def _prepare(
    member: Member,
    inputs: StoredInputs,
    engine: Engine,
    cache_trunk: Callable[[TrunkParams], None],
) -> None:
    """What comes before a member is fitted, and only then."""
    traits = member.traits
    if traits.backbone and not engine.dry_run:  # here and not in every worker at once
        prepare(traits.backbone, engine.reporter.say)
        traits = member.traits  # what is here by now can be looked at
    if traits.trunk:
        cache_trunk(traits.trunk)
    if traits.remark:
        engine.reporter.say(traits.remark)
    told_before = kind_of(member.kind).told_before
    if told_before and not engine.dry_run:
        engine.reporter.tell(told_before(load_inputs(inputs.folder), member.params), ())


def stage_label(of_gpu: Sequence[bool], number: int) -> str:
    """What the members of a round are called in progress lines.

    Examples
    --------
    >>> stage_label([True, False], 0)
    'decoders and members, round 0'
    """
    names = ("decoders" if it else "members" for it in of_gpu)
    return f"{' and '.join(names)}, round {number}"


def _ensure_starts(
    member: Member,
    fits: Sequence[Fit],
    design: Design,
    inputs: StoredInputs,
    seed: int,
    engine: Engine,
) -> None:
    """What the models of a place start from, whatever their seed: units that come before theirs."""
    kind, traits = kind_of(member.kind), member.traits
    if traits.starts is None or engine.dry_run:
        return
    read = make_unit(
        f"{_STARTS}/{member.name}/states",
        kind.version,
        inputs.keys[kind.reads], traits.weights,
        params=(member.kind, traits.starts, design.n_classes),
    )  # fmt: skip
    label = f"what {member.name} starts from, round {fits[0].round}"
    task = Task(read, read_start, (member, design.n_classes, inputs.folder), gpu=traits.devices)
    (states,) = engine.ensure(label, [task])
    of_fits = {_start_of(member, place): place for place in _places(member, fits, design)}
    engine.ensure(
        label,
        [
            Task(
                make_unit(path, kind.version, read.key, fit_key(place.fit), params=seed),
                fit_start,
                (member, place, inputs.folder, states, seed),
            )
            for path, place in of_fits.items()
        ],
    )


def read_start(folder: Path, member: Member, n_classes: int, inputs_folder: Path) -> None:
    """Write into ``folder`` what all models of a member read before they learn, once for all."""
    start = kind_of(member.kind).start
    assert start is not None
    start.read(load_inputs(inputs_folder), member.params, n_classes, folder)


def fit_start(
    folder: Path, member: Member, place: Place, inputs_folder: Path, states: Path, seed: int
) -> None:
    """Write into ``folder`` what the models of a place start from."""
    start = kind_of(member.kind).start
    assert start is not None
    start.fit(load_inputs(inputs_folder), states, place.fit.targets, seed, folder)


def _start_of(member: Member, place: Place) -> str:
    return f"{_STARTS}/{member.name}/{place.fit.name}"


def _tasks(
    member: Member,
    fits: Sequence[Fit],
    design: Design,
    inputs: StoredInputs,
    seed: int,
    root: Path,
) -> list[Task]:
    kind, traits = kind_of(member.kind), member.traits
    name = "own" if is_own(member.kind) else member.kind
    shared = kind.start is not None
    return [
        Task(
            make_unit(
                place.path,
                kind.version,
                inputs.keys[kind.reads], fit_key(place.fit), traits.weights,
                # what seeds share comes of the run's, which nothing else here would tell
                params=(name, traits.params, seed + place.seed, *([seed] if shared else [])),
            ),
            fit_member,
            (
                member, place, inputs.folder, seed + place.seed,
                root / _start_of(member, place),
            ),
            together=kind.of_gpu,
            gpu=traits.devices,
        )
        for place in _places(member, fits, design)
    ]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where one model of a member stands.

    Parameters
    ----------
    fit
        Its place in the cross-fit.
    seed
        Added to the run's seed.
    path
        Its unit.
    """

    fit: Fit
    seed: int
    path: str


def places_of(member: Member, fits: Sequence[Fit], design: Design) -> list[Place]:
    """All models of a member in a round: seeds times places.

    A member that is not trained anew in every round goes on with its models of round 0, which saw
    no pseudo-label at all.
    """
    traits = member.traits
    if not traits.every_round:
        fits = design.first_fits()
    if traits.seeds is None:
        return [Place(fit, 0, f"members/{member.name}/{fit.name}") for fit in fits]
    return [
        Place(fit, seed, f"members/{member.name}/{fit.name}_seed{seed}")
        for fit in fits
        for seed in traits.seeds
    ]


def _places(member: Member, fits: Sequence[Fit], design: Design) -> list[Place]:
    return [*places_of(member, fits, design), *full_places(member, design)]


def full_places(member: Member, design: Design) -> list[Place]:
    """Models on all training rows, one per seed, of a member that is refitted for the test."""
    traits = member.traits
    return [
        Place(design.full_fit(), seed, f"members/{member.name}/round0_full_seed{seed}")
        for seed in traits.seeds or (0,)
        if traits.refitted
    ]


def fit_member(
    folder: Path,
    member: Member,
    place: Place,
    inputs_folder: Path,
    seed: int,
    start: Path,
) -> None:
    """Fit one model, from ``start`` if it shares one, and write it and its predictions into ``folder``.

    A model of hours is stored before it predicts: whatever happens then, the next attempt has it.

    Raises
    ------
    TrainingError, DataError
        If losses, weights or predictions are no numbers; it names the unit.
    """
    kind = kind_of(member.kind)
    inputs = replace(
        load_inputs(inputs_folder), start=start if member.traits.starts is not None else None
    )
    fitted = checkpoint(FITTED) if kind.of_gpu else None
    if fitted is not None:
        copy_files(fitted, folder)
    else:
        _fit(folder, kind, inputs, member, place, seed)
        if kind.of_gpu and not ranks.rank():
            keep(lambda to: copy_files(folder, to), "model", FITTED)
    predictions = kind.predict(inputs, place.fit.predict, folder)
    if not np.isfinite(predictions).all():
        raise DataError(f"{place.path}: its predictions are no numbers. Change its settings.")
    np.save(folder / "predictions.npy", predictions)


def _fit(folder: Path, kind: Kind, inputs: Inputs, member: Member, place: Place, seed: int) -> None:
    try:
        kind.fit(inputs, place.fit.targets, member.params, seed, folder)
    except TrainingError as error:
        notes = notes_of_this_unit()
        told = f" Its steps until then are in {notes}." if notes else ""
        raise TrainingError(f"{place.path}: {error}{told}") from error


def fit_key(fit: Fit) -> str:
    """Digest of what a place trains on and predicts."""
    targets = fit.targets
    return digest(
        targets.rows,
        targets.labels,
        targets.weights,
        targets.given,
        targets.n_classes,
        fit.predict,
    )


def gather(design: Design, fits: Sequence[Fit], folders: Sequence[Path]) -> CrossFit:
    """Read the predictions of a cross-fit's units."""
    return design.gather(fits, [_read(folder) for folder in folders])


def gather_places(places: Sequence[Place], design: Design, root: Path) -> CrossFit:
    """Read what the models at these places predict; several of one fold are averaged."""
    folders = [root / place.path for place in places]
    return gather(design, [place.fit for place in places], folders)


def gather_full(member: Member, design: Design, root: Path) -> np.ndarray | None:
    """Test rows by the models on all training rows, ``(n_test, n_classes)``; None without any."""
    predictions = [_read(root / place.path) for place in full_places(member, design)]
    return np.mean(predictions, axis=0) if predictions else None


def _read(folder: Path) -> np.ndarray:
    predictions: np.ndarray = np.load(folder / "predictions.npy", allow_pickle=False)
    return predictions
