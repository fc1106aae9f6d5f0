"""Stage one: every member, cross-fitted, as units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stackllm.engine.local import Engine, Task
from stackllm.errors import DataError
from stackllm.llm.encode import workers
from stackllm.members.build import Keys
from stackllm.members.crossfit import CrossFit, Design, Fit
from stackllm.members.inputs import load_inputs
from stackllm.members.registry import KINDS, Member
from stackllm.store.digest import digest
from stackllm.store.units import make_unit


def cross_fit_members(
    members: Sequence[Member],
    fits: Sequence[Fit],
    design: Design,
    inputs: Path,
    keys: Keys,
    seed: int,
    engine: Engine,
) -> dict[str, CrossFit]:
    """Fit every member at every place of a cross-fit and put its predictions together.

    Parameters
    ----------
    members
        Which members.
    fits
        Places, from :class:`~stackllm.members.crossfit.Design`.
    design
        Folds and parts.
    inputs
        Folder of the label-free matrices.
    keys
        Digests of what a member may read there.
    seed
        Seed of every model.
    engine
        Runs the units.

    Returns
    -------
    dict
        Predictions of each member by name.
    """
    places = {member.name: places_of(member, fits, design) for member in members}
    found = {}
    for of_gpu in (True, False):  # the slowest first
        own = [member for member in members if KINDS[member.kind].of_gpu == of_gpu]
        tasks = [
            Task(
                make_unit(
                    place.path,
                    KINDS[member.kind].version,
                    keys[KINDS[member.kind].reads], fit_key(place.fit), member.weights,
                    params=(member.kind, member.of_one_model, seed + place.seed),
                ),
                fit_member,
                (member, place.fit, inputs, seed + place.seed),
            )
            for member in own
            for place in places[member.name]
        ]  # fmt: skip
        label = f"{'decoders' if of_gpu else 'members'}, round {fits[0].round}"
        folders = iter(engine.ensure(label, tasks, workers() if own and of_gpu else None))
        for member in own:
            fitted = [place.fit for place in places[member.name]]
            found[member.name] = gather(design, fitted, [next(folders) for _ in fitted])
    return {member.name: found[member.name] for member in members}


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
    if not member.every_round:
        fits = design.first_fits()
    several = hasattr(member.params, "seeds")
    return [
        Place(fit, seed, f"members/{member.name}/{fit.name}{f'_seed{seed}' if several else ''}")
        for fit in fits
        for seed in member.seeds
    ]


def fit_member(folder: Path, member: Member, fit: Fit, inputs_folder: Path, seed: int) -> None:
    """Fit one model, and write it and its predictions into ``folder``."""
    kind = KINDS[member.kind]
    inputs = load_inputs(inputs_folder)
    kind.fit(inputs, fit.targets, member.params, seed, folder)
    predictions = kind.predict(inputs, fit.predict, folder)
    if not np.isfinite(predictions).all():
        raise DataError(
            f'member "{member.name}", {fit.name}: its predictions are no numbers. Change its settings.'
        )
    np.save(folder / "predictions.npy", predictions)


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
    return design.gather(
        fits, [np.load(folder / "predictions.npy", allow_pickle=False) for folder in folders]
    )
