"""``stackllm runs``: the logbook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stackllm.cli.options import ARTIFACTS, AS_JSON, FILE, together

if TYPE_CHECKING:
    from stackllm.report.public import Given

_OPTIONS = together(
    click.option("--models", is_flag=True, help="Show each run's models, too."),
    click.option(
        "--lb", multiple=True, metavar="NAME=SCORE", help="Enter the public score of a run or RUN/MODEL."
    ),
    click.option(
        "--cv", multiple=True, metavar="NAME=SCORE",
        help="With --lb: the score out of fold of what was trained elsewhere.",
    ),
    click.option("--note", multiple=True, help="With --lb: a note for all scores, or one for each."),
    click.option(
        "--lb-plot", type=FILE, metavar="FILE", help="Draw CV against LB: .svg, or .png by matplotlib."
    ),
    ARTIFACTS,
    AS_JSON,
    click.option("--csv", "as_csv", is_flag=True, help="Print the table as CSV, with all columns."),
    click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown."),
    click.option("--sizes", is_flag=True, help="What takes up room instead; see stackllm clean."),
)  # fmt: skip


@click.command()
@click.argument("names", nargs=-1)
@_OPTIONS
def runs(
    names: tuple[str, ...], artifacts: Path, lb_plot: Path | None, models: bool, sizes: bool,
    as_json: bool, as_csv: bool, as_markdown: bool, lb: tuple[str, ...], cv: tuple[str, ...], note: tuple[str, ...],
) -> None:  # fmt: skip
    """The logbook: every run, how it was made and how it scored, the newest first; NAMES shows some.

    A line is added when a run finishes or fails, and stays when its folder is gone. Public scores
    are entered by hand, also of what was trained elsewhere; entering one again corrects it.

    \b
    Examples:
      stackllm runs --models
      stackllm runs demo 'big*' --csv
      stackllm runs --lb demo=0.736 --note "4 epochs"
      stackllm runs --lb mistral=0.855 --cv mistral=1.00639
      stackllm runs --lb-plot scores.svg
      stackllm runs --sizes
    """
    from stackllm.report import listing, public
    from stackllm.report.lb_plot import check_plot, plot
    from stackllm.report.logbook import read_logbook

    given = _given(lb, cv, note)
    formats = {"--json": as_json, "--csv": as_csv, "--markdown": as_markdown}
    _one_of(formats)
    if sizes or lb_plot:  # which say nothing as a table
        _one_of({"--sizes": sizes, "--lb-plot": bool(lb_plot), **formats, "--json": False})
    if sizes:
        others = {"NAMES": names, "--models": models, "--lb": lb}
        _one_of({"--sizes": True, **{name: bool(it) for name, it in others.items()}})
    if sizes:
        from stackllm.report import housekeeping

        parts = housekeeping.sizes(artifacts)
        told = {"sizes": [vars(part) for part in parts]}
        click.echo(json.dumps(told) if as_json else housekeeping.render_sizes(parts, artifacts))
        return
    if lb_plot:
        check_plot(lb_plot)
    if given:
        public.enter(artifacts, given)
    logbook = listing.choose(read_logbook(artifacts), names)
    if lb_plot:
        band = public.band_of(logbook.scores)
        plot(band, lb_plot)
        click.echo(json.dumps(band.summary()) if as_json else public.render_band(band, lb_plot))
    elif as_json:
        click.echo(listing.as_json(logbook))
    elif as_csv:
        click.echo(listing.as_csv(logbook, models), nl=False)
    elif as_markdown:
        click.echo(listing.as_markdown(logbook, models), nl=False)
    else:
        click.echo(listing.as_text(logbook, models))


def _given(lb: tuple[str, ...], cv: tuple[str, ...], notes: tuple[str, ...]) -> list[Given]:
    """Scores as they were typed, each with its CV and its note."""
    from stackllm.errors import UsageError, did_you_mean
    from stackllm.report.public import Given

    scores = [_score("--lb", it) for it in lb]
    beside = dict(_score("--cv", it) for it in cv)
    for name in beside.keys() - {name for name, _ in scores}:
        known = did_you_mean(name, [it for it, _ in scores]) if scores else ""
        raise UsageError(f'--cv "{name:.80}" comes without --lb of that name. {known}'.rstrip())
    if len(notes) not in (0, 1, len(scores)) or (notes and not scores):
        raise UsageError(
            f"--note is given {len(notes)} times and --lb {len(scores)} times. Give one note for all scores, or one "
            "for each, in their order."
        )
    each = notes if len(notes) == len(scores) else (notes or ("",)) * len(scores)
    return [
        Given(name, score, beside.get(name), text)
        for (name, score), text in zip(scores, each, strict=True)
    ]


def _score(option: str, text: str) -> tuple[str, float]:
    from stackllm.errors import UsageError
    from stackllm.parameters import shown

    name, _, value = text.rpartition("=")
    try:
        score = float(value)
    except ValueError:
        score = None
    if not name or score is None:
        raise UsageError(f"{option} {shown(text)}: write a name and a number, such as demo=0.736.")
    return name, score


def _one_of(options: dict[str, bool]) -> None:
    from stackllm.errors import UsageError

    given = [name for name, is_given in options.items() if is_given]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} do not go together. Leave all but one out.")
