"""``stackllm predict``: stored models on new groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from stackllm.cli.options import (
    CONFIG,
    CSV_SAFE,
    FILE,
    MAX_REQUESTS,
    TRUTH,
    column_options,
    settings_of,
    work_options,
    workspace_of,
)
from stackllm.cli.output import chosen_output


@click.command()
@click.argument("new", type=FILE, metavar="NEW.csv")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Where to write; - is the standard output.  [NEW.predictions.csv]",
)
@column_options
@TRUTH
@CSV_SAFE
@MAX_REQUESTS
@CONFIG
@work_options
def predict(
    new: Path,
    output: str | None,
    truth: Path | None,
    csv_safe: bool | None,
    max_requests: int | None,
    config: Path | None,
    **options: Any,
) -> None:
    """Apply the stored models of a run to new groups.

    NEW.csv has the columns of the run's test table: their names are those of the run where no option says
    otherwise. Settings, seed, quota and models are the run's; a settings file is only asked how a server
    may be used.

    \b
    Examples:
      stackllm predict new.csv
      stackllm predict new.csv --name ten -o answers.csv
      stackllm predict new.csv --truth labels.csv
    """
    columns = {
        key: value
        for key in ("id", "group", "text", "question", "same_question")
        if (value := options.pop(key)) is not None
    }
    server = settings_of(config, max_requests=max_requests).server
    beside = new.parent / f"{new.stem}.predictions.csv"
    target = chosen_output(output, beside, options["as_json"], [new, truth])
    from stackllm.predict import open_model, predict_file, ratings_beside

    model = open_model(options["artifacts"] / options["name"])  # before a folder is made for it
    ratings = ratings_beside(target) if target and model.asks else None
    if ratings:
        for path in (ratings, ratings.with_suffix(".parquet")):
            chosen_output(str(path), beside, options["as_json"], [new, truth])
    with workspace_of(**options) as workspace:
        predicted = predict_file(model, workspace, new, columns, truth, server)
        if workspace.dry_run:
            click.echo(json.dumps({"would_run": {}}) if options["as_json"] else "nothing would run")
            return
        predicted.write(target, csv_safe)
        told = predicted.summary() | {"output": str(target)}
        if ratings:
            told["ratings"] = str(ratings)
        if target is None:
            click.echo(predicted.told(), err=True)
        else:
            also = f", ratings: {ratings}" if ratings else ""
            said = f"{predicted.told()}: {target}{also}"
            click.echo(json.dumps(told) if options["as_json"] else said)
