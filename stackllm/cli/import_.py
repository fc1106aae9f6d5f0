"""``stackllm import``: predictions that others left, as members."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from stackllm.cli.options import CONFIG, FILE, column_options, settings_of


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILE…")
@click.option("--as", "name", required=True, metavar="NAME", help="What the member is called.")
@click.option(
    "--test-predictions",
    "tests",
    multiple=True,
    type=FILE,
    metavar="FILE",
    help="A file of test rows, where ids, texts, names and lengths do not tell.",
)
@click.option("--train", metavar="FILE", help="Training table.  [train.csv]")
@click.option("--test", metavar="FILE", help="Test table.  [test.csv]")
@column_options
@click.option("--target", metavar="COLUMN", help="Label column.  [target]")
@click.option(
    "--to", "into", type=Path, default=Path("imports"), show_default=True, help="Folder of imports."
)
@click.option("--replace", is_flag=True, help="Replace an import of that name.")
@CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def import_(
    files: tuple[Path, ...],
    name: str,
    tests: tuple[Path, ...],
    into: Path,
    replace: bool,
    config: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Take over predictions that others left: out-of-fold ones and those of the test rows.

    A FILE is CSV or Parquet with a column per class, or with a column of texts that hold all numbers (H2O LLM
    Studio), .npy, .npz, or a pickle of plain arrays, which is read without being unpickled. Rows are matched
    by id, else by text, else by their order; logits are told by their values. Files that each hold a part of the
    training rows are the folds of one member; files that each hold all are members of their own, with the test
    file of the same name.

    \b
    Examples:
      stackllm import oof.csv test_predictions.csv --as h2o
      stackllm import fold0.csv fold1.csv fold2.csv test.npy --as mistral
      stackllm import oofs/*.csv tests/*.csv --as zoo
    """
    from stackllm.members.imported import import_files

    settings = settings_of(config, **options)
    run = settings.run
    told = import_files(
        files,
        name,
        settings.data,
        n_folds=run.folds,
        seed=run.seed,
        tests=tests,
        into=into,
        replace=replace,
    )
    click.echo(json.dumps(told.summary()) if as_json else str(told))
