"""Stage one: every member, cross-fitted, as units."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stackllm.engine.local import Engine, Task
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
    inputs_key: str,
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
    inputs_key
        Key of that folder.
    seed
        Seed of every model.
    engine
        Runs the units.

    Returns
    -------
    dict
        Predictions of each member by name.
    """
    tasks = [
        Task(
            make_unit(
                f"members/{member.name}/{fit.name}",
                KINDS[member.kind].version,
                inputs_key, member.kind, member.params, fit_key(fit), seed,
            ),
            fit_member,
            (member, fit, inputs, seed),
        )
        for member in members
        for fit in fits
    ]  # fmt: skip
    folders = engine.ensure(f"members, round {fits[0].round}", tasks)
    return {
        member.name: gather(design, fits, folders[i * len(fits) : (i + 1) * len(fits)])
        for i, member in enumerate(members)
    }


def fit_member(folder: Path, member: Member, fit: Fit, inputs_folder: Path, seed: int) -> None:
    """Fit one model, and write it and its predictions into ``folder``."""
    kind = KINDS[member.kind]
    inputs = load_inputs(inputs_folder)
    kind.fit(inputs, fit.targets, member.params, seed, folder)
    np.save(folder / "predictions.npy", kind.predict(inputs, fit.predict, folder))


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
