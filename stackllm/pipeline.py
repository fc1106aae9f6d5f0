"""The four steps on one screen."""

from __future__ import annotations

from stackllm.crossfit.design import CrossFit, Fit
from stackllm.crossfit.pseudo import pseudo_targets
from stackllm.engine.local import Engine
from stackllm.members.external import read_external
from stackllm.members.inputs import load_inputs
from stackllm.members.stage import cross_fit_members
from stackllm.settings import Settings
from stackllm.stack.posteriors import Calibrated, cross_posteriors
from stackllm.stack.round import Round, finish_round
from stackllm.stack.stage import cross_fit_stack
from stackllm.study import Study, open_study


def stage_one(study: Study, fits: list[Fit]) -> tuple[dict[str, CrossFit], dict[str, Calibrated]]:
    """Members of one round and their group posteriors."""
    settings, table = study.settings, study.table
    members = cross_fit_members(
        settings.members,
        fits,
        study.design,
        study.inputs,
        study.keys,
        settings.run.seed,
        study.engine,
        study.cache_trunk,
    )
    for params in settings.external:
        members[params.name], warnings = read_external(
            params, study.design, table.train_rows(), table.test_rows(), table.classes
        )
        for warning in warnings:
            study.engine.reporter.warn(warning)
    posteriors = {
        name: cross_posteriors(member, study.design, settings.data.quota)
        for name, member in members.items()
    }
    return members, posteriors


def play_round(study: Study, number: int, before: Round | None) -> Round:
    """Stages one to three; from round 1 on with pseudo-labels of the round before."""
    settings, design = study.settings, study.design
    if before is None:
        fits = design.first_fits()
    else:
        final = before.final
        fits = design.next_fits(
            number, lambda fold, part: pseudo_targets(final, design, settings.pseudo, fold, part)
        )
    members, posteriors = stage_one(study, fits)
    inputs = load_inputs(study.inputs)
    stack = cross_fit_stack(
        members,
        {name: found.predictions for name, found in posteriors.items()},
        inputs,
        fits,
        design,
        settings.stack,
        settings.run.seed,
        study.engine,
    )
    return finish_round(number, fits, members, posteriors, stack, design, settings.data.quota)


def play_rounds(study: Study, rounds: int) -> list[Round]:
    """Round 0 and so many rounds of pseudo-labels."""
    played = [play_round(study, 0, None)]
    for number in range(1, rounds + 1):
        played.append(play_round(study, number, played[-1]))
    return played


def run(settings: Settings, cache: Engine, engine: Engine) -> tuple[Study, list[Round]]:
    """All four steps: features, stack, posteriors, pseudo-labels."""
    study = open_study(settings, cache, engine)
    return study, play_rounds(study, settings.pseudo.rounds)
