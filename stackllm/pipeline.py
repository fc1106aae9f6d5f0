"""The four steps on one screen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from stackllm.crossfit.design import CrossFit, Fit
from stackllm.crossfit.pseudo import pseudo_targets
from stackllm.engine.local import PendingError
from stackllm.members.build import StoredInputs, build_inputs, index_trunk
from stackllm.members.inputs import load_inputs
from stackllm.members.stage import cross_fit_members
from stackllm.outputs import Run, hand_out, hand_out_ratings, recorded, store_best
from stackllm.planning import Plan, make_plan
from stackllm.settings import Settings
from stackllm.stack.posteriors import Calibrated, cross_posteriors
from stackllm.stack.round import Round, finish_round
from stackllm.stack.stage import cross_fit_stack
from stackllm.study import Study, open_study, store_folds
from stackllm.workspace import Workspace

Until = Literal["features", "stack", "pseudo"]
"""Which step is the last: members, stack and blend, or rounds of pseudo-labels."""

_INPUTS = "table"
"""What the unit of the table's matrices is called."""


def run(
    settings: Settings, workspace: Workspace, *, until: Until = "pseudo", truth: Path | None = None
) -> Run:
    """All steps as far as ``until``, and everything that a run hands out.

    Parameters
    ----------
    settings
        What the user asked for.
    workspace
        Where results stand, and who computes them.
    until
        The last step.
    truth
        Labels of the test rows, for scores only.

    Raises
    ------
    MissingInputError, DataError, UsageError
        Before the first unit, if anything that the run is going to need is not there or not right.
    StorageError, TrainingError, ServerError, BudgetError
        If a unit fails; finished units are kept, and the same call goes on.
    """
    study = open_study(settings, workspace, truth, _rounds(settings, until))
    with recorded(study):
        store_folds(study)
        inputs = make_inputs(study)
        ratings = hand_out_ratings(
            study, inputs.rated
        )  # before hours of training, for who paid for them
        return hand_out(study, *play(study, inputs, until), ratings)


def plan(
    settings: Settings, workspace: Workspace, *, until: Until = "pseudo", truth: Path | None = None
) -> Plan:
    """What :func:`run` would do, of all stages; the parameters and errors are the same, the workspace dry."""
    study = open_study(settings, workspace, truth, _rounds(settings, until))
    notes: list[str] = []
    units: dict[str, str] = {}
    for step in (store_folds, partial(_play_and_store, until=until)):
        try:
            step(study)
        except PendingError as error:
            units |= error.units
            notes += [error.note] if error.note else []
    return make_plan(study, _rounds(settings, until), until != "features", notes, units)


def _play_and_store(study: Study, until: Until) -> None:
    _, rounds = play(study, make_inputs(study), until)
    if rounds:
        store_best(study, rounds)


def make_inputs(study: Study) -> StoredInputs:
    """The label-free matrices of all rows of the table."""
    settings = study.settings
    return build_inputs(
        _INPUTS, study.table.rows(), settings.encoder, study.recipes, study.workspace,
        rater=settings.rater, server=settings.server,
    )  # fmt: skip


def play(
    study: Study, inputs: StoredInputs, until: Until
) -> tuple[dict[str, Calibrated], list[Round]]:
    """Stage one's posteriors where it is the last step, else the rounds that were played."""
    if until == "features":
        return stage_one(study, inputs, study.design.first_fits())[1], []
    return {}, play_rounds(study, inputs, _rounds(study.settings, until))


def _rounds(settings: Settings, until: Until) -> int:
    return settings.pseudo.rounds if until == "pseudo" else 0


def play_rounds(study: Study, inputs: StoredInputs, rounds: int) -> list[Round]:
    """Round 0 and so many rounds of pseudo-labels."""
    played = [play_round(study, inputs, study.design.first_fits())]
    for number in range(1, rounds + 1):
        label = partial(pseudo_targets, played[-1].final, study.design, study.settings.pseudo)
        played.append(play_round(study, inputs, study.design.next_fits(number, label)))
    return played


def play_round(study: Study, inputs: StoredInputs, fits: Sequence[Fit]) -> Round:
    """Stages one to three at the places of one cross-fit."""
    settings, design = study.settings, study.design
    members, posteriors = stage_one(study, inputs, fits)
    stack = cross_fit_stack(
        members,
        {name: calibrated.predictions for name, calibrated in posteriors.items()},
        load_inputs(inputs.folder),
        fits,
        design,
        settings.stack,
        settings.run.seed,
        study.workspace.run,
    )
    return finish_round(fits, members, posteriors, stack, design, settings.data.quota)


def stage_one(
    study: Study, inputs: StoredInputs, fits: Sequence[Fit]
) -> tuple[dict[str, CrossFit], dict[str, Calibrated]]:
    """Members at the places of one cross-fit, and their group posteriors."""
    settings, rows = study.settings, study.table.rows()
    members = cross_fit_members(
        settings.members,
        fits,
        study.design,
        inputs,
        settings.run.seed,
        study.workspace.run,
        lambda trunk: index_trunk(_INPUTS, rows, trunk, study.workspace),
    )
    members |= study.external
    quota = settings.data.quota
    return members, {
        name: cross_posteriors(member, study.design, quota) for name, member in members.items()
    }
