"""``stackllm predict``: stored models on new groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from stackllm.cli.options import data_options, run_options, session


@click.command()
@click.argument("new", type=Path, metavar="NEW.csv")
@click.option(
    "-o",
    "--output",
    type=Path,
    metavar="FILE",
    help="Where to write; - is the standard output.  [NEW.predictions.csv]",
)
@data_options
@run_options
def predict(new: Path, output: Path | None, **options: Any) -> None:
    """Apply the stored models of a run to new groups.

    NEW.csv has the question and response columns of the training table, whole groups, no labels.

    \b
    Examples:
      stackllm predict new.csv
      stackllm predict new.csv --name ten -o answers.csv
    """
    with session(**options) as opened:
        from stackllm.predict import predict_new
        from stackllm.tables.contest import read_new
        from stackllm.tables.files import write_frame
        from stackllm.tables.spreadsheet import spreadsheet_safe

        table = read_new(new, opened.settings.data)
        for note in table.notes:
            opened.engine.reporter.say(note)
        for warning in table.warnings:
            opened.engine.reporter.warn(warning)
        frame, _ = predict_new(
            opened.engine.root,
            table.frame,
            opened.cache,
            opened.engine,
            opened.settings.server,
            table.rows.ids.name,
        )
        if opened.engine.dry_run:
            click.echo(json.dumps({"would_run": {}}) if opened.json else "nothing would run")
            return
        target = output or new.with_suffix(".predictions.csv")
        if opened.settings.data.csv_safe:
            frame = spreadsheet_safe(frame)
        streamed = str(target) == "-"
        write_frame(frame, None if streamed else target)
        if not streamed:
            click.echo(
                json.dumps({"output": str(target), "rows": frame.height})
                if opened.json
                else f"{frame.height} rows: {target}"
            )
