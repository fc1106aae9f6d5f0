"""``stackllm compare``: two runs, models or files of predictions, paired over groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from stackllm.cli.options import ARTIFACTS, CSV_SAFE, FILE


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--truth",
    type=FILE,
    metavar="FILE",
    help="Labels of the rows; of runs, the test predictions are compared then.",
)
@click.option("--groups", type=FILE, metavar="FILE", help="Table with ids and groups.")
@click.option("--id", metavar="COLUMN", help="Column of ids. [default: id, else the first]")
@click.option("--group", metavar="COLUMN", help="Column that says which rows belong together.")
@click.option("--target", metavar="COLUMN", help="Column of labels. [default: target]")
@click.option(
    "--quota",
    metavar="N|N,N,…|FILE",
    help="Places of each class in a group. [default: the run's, stackllm.toml's, or as labels show]",
)
@click.option("--top", type=click.IntRange(0), default=5, show_default=True, help="Groups to show.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the bootstrap."
)
@click.option(
    "-o", "--output", metavar="FILE", help="Where to write the difference in every group."
)
@CSV_SAFE
@ARTIFACTS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def compare(
    a: str,
    b: str,
    top: int,
    output: str | None,
    csv_safe: bool | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Tell whether two models differ, by how much, and in which groups.

    A and B are runs (NAME), models of runs (NAME/MODEL, NAME/round1, NAME/round1/MODEL; MODEL is a member,
    stack or blend), or files with an id column and a column per class. ":raw" behind a run or model stands
    for its rows before stage three. Out-of-fold predictions of runs are compared, or with --truth those of
    the test rows. Rows are matched by id, classes by name.

    \b
    Examples:
      stackllm compare demo big
      stackllm compare demo demo/lexical
      stackllm compare demo demo:raw
      stackllm compare mine.csv theirs.csv --truth solution.csv --groups test.csv -o groups.csv
    """
    from stackllm.cli.optim import given_project
    from stackllm.cli.output import chosen_output
    from stackllm.optim.request import Columns
    from stackllm.report.compare import compare as compared
    from stackllm.tables.files import write_frame
    from stackllm.tables.spreadsheet import spreadsheet_safe

    columns = Columns(**{name: options.pop(name) for name in ("id", "group", "target")})
    reads = [Path(a), Path(b), options["truth"], options["groups"]]
    target = chosen_output(output, Path("-"), as_json, reads) if output else None
    told = compared(a, b, columns=columns, project=given_project(), **options)
    if output:
        frame = told.groups
        write_frame(spreadsheet_safe(frame) if csv_safe else frame, target)
    text = json.dumps(told.summary(top)) if as_json else told.told(top)
    click.echo(text, err=output == "-")
