"""A table of all methods of stage three on the out-of-fold predictions of stage-one members.

``python -m benchmarks.methods --truth train.csv --group Question OOF.parquet…`` prints Markdown: a line
a member, a column a method, log loss on groups that the method's coefficients were not fitted on, with
the standard error over groups.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from stackllm.crossfit.folds import group_folds
from stackllm.group.fitting import fit_method
from stackllm.group.optimise import Method, optimise
from stackllm.metrics import bootstrap_error, row_losses
from stackllm.tables.files import read_frame
from stackllm.tables.groups import groups_joined
from stackllm.tables.ids import Rows
from stackllm.tables.labels import read_truth
from stackllm.tables.submission import Submission, read_submission

COLUMNS = ("none", "assignment", "blend", "sinkhorn", "posterior", "posterior, T = 1")
NOT_CLASSES = ("fold", "group_id", "group", "target", "label", "question", "response")


def main() -> None:
    """Parse the options and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument(
        "oof", type=Path, nargs="+", metavar="OOF", help="CSV or Parquet: id and classes"
    )
    parser.add_argument("--truth", type=Path, required=True, help="table with labels and groups")
    parser.add_argument("--group", default=None, help="its group column")
    parser.add_argument("--target", default=None, help="its label column")
    parser.add_argument("--id", default=None, help="its id column (else rows count from 0)")
    parser.add_argument("--quota", type=int, default=1)
    options = parser.parse_args()
    print(f"| predictions | {' | '.join(COLUMNS)} |")
    print(f"|---|{'---|' * len(COLUMNS)}")
    for path in options.oof:
        losses, groups = member(path, options)
        cells = [f"{x.mean():.3f} ± {bootstrap_error(x, groups):.3f}" for x in losses.values()]
        print(f"| {path.stem} | {' | '.join(cells)} |")


def member(path: Path, options: argparse.Namespace) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Row losses of each method, cross-fitted over five folds of groups."""
    sub = _read(path)
    rows = Rows(sub.frame[sub.id], path)
    groups = groups_joined(rows, options.truth, options.group, options.id).codes
    labels = read_truth(
        options.truth, rows, sub.classes, target=options.target, id_name=options.id
    ).labels
    folds = group_folds(groups.astype(str), 5, 0)
    losses = {name: np.empty(len(labels)) for name in COLUMNS}
    for fold in range(5):
        rest, own = folds != fold, folds == fold
        for name in COLUMNS:
            if name == "posterior, T = 1":
                method = Method("posterior")
            else:
                method = fit_method(
                    name, sub.probabilities[rest], groups[rest], labels[rest], options.quota
                )
            answer = optimise(sub.probabilities[own], groups[own], options.quota, method=method)
            losses[name][own] = row_losses(answer, labels[own])
    return losses, groups


def _read(path: Path) -> Submission:
    header = read_frame(path).columns
    rest = [name for name in header if name not in {*NOT_CLASSES, "id", "row_id"}]
    return read_submission(path, classes=rest)


if __name__ == "__main__":
    main()
