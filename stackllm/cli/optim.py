"""``stackllm optim``: stage three on anybody's submission."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from stackllm.cli.options import FILE, together

METHODS = ("posterior", "assignment", "blend", "sinkhorn", "none")
_OPTIONS = together(
    click.option(
        "--groups", type=FILE, metavar="FILE", help="Table with ids and groups. [default: test.csv]"
    ),
    click.option(
        "--fit", type=FILE, metavar="FILE", help="Out-of-fold predictions to fit the method on."
    ),
    click.option("--fit-truth", type=FILE, metavar="FILE", help="The labels of --fit."),
    click.option("--truth", type=FILE, metavar="FILE", help="True labels: score before and after."),
    click.option(
        "-o",
        "--output",
        metavar="OUT",
        help="Where to write; - is the standard output. [default: SUB.optim.csv]",
    ),
    click.option("--id", metavar="COLUMN", help="Column of ids. [default: id, else the first]"),
    click.option("--group", metavar="COLUMN", help="Column that says which rows belong together."),
    click.option("--target", metavar="COLUMN", help="Column of labels. [default: target]"),
    click.option(
        "--same-question",
        type=click.Choice(["normalised", "exact"]),
        help="When two question texts are one group. [default: normalised]",
    ),
    click.option(
        "--labels",
        type=click.Choice(["name", "suffix", "position"]),
        help="How labels name classes. [default: whichever fits]",
    ),
    click.option(
        "--method", type=click.Choice(METHODS), help="[default: posterior, or with --fit the best]"
    ),
    click.option(
        "--quota",
        metavar="N|N,N,…|FILE",
        help="Places of each class in a group. [default: stackllm.toml's, or 1]",
    ),
    click.option(
        "--exactly", is_flag=True, help="Every place is filled; else a class has at most its quota."
    ),
    click.option(
        "--temperature",
        metavar="T|auto",
        help="Above 1 flattens. [default: 1, or with --fit the best]",
    ),
    click.option("--renormalise", is_flag=True, help="Scale rows that do not sum to 1."),
    click.option(
        "--csv-safe",
        is_flag=True,
        help="Make texts that a spreadsheet would run as formulas harmless.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print an account as JSON."),
)


@click.command()
@click.argument("submission", metavar="SUB.csv", type=FILE)
@_OPTIONS
def optim(
    submission: Path, output: str | None, as_json: bool, csv_safe: bool, **options: Any
) -> None:
    """Improve a submission of grouped probabilities by what the quotas tell.

    SUB.csv has an id column and a column per class. Rows that belong together come from a group
    column in it, else from --groups, else from the test table of stackllm.toml, else from test.csv.

    \b
    Examples:
      stackllm optim submission.csv
      stackllm optim submission.csv --groups test.csv --group Question --truth solution.csv
      stackllm optim submission.csv --fit oof.csv --fit-truth train.csv -o better.csv
      stackllm optim submission.csv --quota 2,1,1 --method assignment -o - | head
    """
    from stackllm.cli.output import chosen_output
    from stackllm.optim.account import describe
    from stackllm.optim.improve import improve
    from stackllm.optim.request import Columns, Request
    from stackllm.tables.files import write_frame
    from stackllm.tables.spreadsheet import spreadsheet_safe

    options["temperature"] = _temperature(options["temperature"], options["fit"])
    names = ("id", "group", "target", "labels", "same_question")
    columns = Columns(**{name: options.pop(name) for name in names})
    project = given_project()
    beside = submission.parent / f"{submission.stem}.optim{submission.suffix or '.csv'}"
    reads = [submission, *(options[name] for name in ("groups", "truth", "fit", "fit_truth"))]
    reads += [
        Path(project.get("test", "test.csv")),
        *([Path(options["quota"])] if options["quota"] else []),
    ]
    target = chosen_output(output, beside, as_json, reads)
    outcome = improve(Request(submission, **options), columns, project)
    account = {**outcome.account, "output": output if target is None else str(target)}
    lines = [*describe(account), *([f"wrote {target}"] if target else [])]
    # everything that could still fail comes before the output is there
    told = _as_json(account) if as_json else "\n".join(lines)
    csv_safe = csv_safe or project.get("csv_safe", False)
    write_frame(spreadsheet_safe(outcome.frame) if csv_safe else outcome.frame, target)
    on_stderr = target is None
    click.echo(_printable(told, sys.stderr if on_stderr else sys.stdout), err=on_stderr)


def given_project() -> dict[str, Any]:
    """What ``[data]`` of ``./stackllm.toml`` says; empty if there is none."""
    if not os.path.lexists("stackllm.toml"):  # the reader of settings takes a second to import
        return {}
    from stackllm.settings import given_data

    return given_data()


def _as_json(account: dict[str, Any]) -> str:
    """As people write it where the terminal can show it, else with escapes for what is not ASCII."""
    text = json.dumps(account, ensure_ascii=False, allow_nan=False, default=str)
    if _printable(text, sys.stdout) == text:
        return text
    return json.dumps(account, allow_nan=False, default=str)


def _printable(text: str, stream: Any) -> str:
    """With escapes for what the stream's encoding, or any, has no characters for."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _temperature(text: str | None, fit: Path | None) -> float | None:
    from stackllm.errors import UsageError

    if text is None or text == "auto":
        if text == "auto" and fit is None:
            raise UsageError("--temperature auto needs --fit and --fit-truth to find it on.")
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-6 <= value <= 1e6:
        raise UsageError(f'--temperature "{text}": give a number from 1e-6 to 1e6, or auto.')
    return value
