"""What commands print: leaderboards for people, one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np

from stackllm.cli.options import Session
from stackllm.engine.local import read_timings
from stackllm.outputs import best_round, write_outputs
from stackllm.report.leaderboard import leaderboard, member_scores, render
from stackllm.stack.posteriors import Calibrated
from stackllm.stack.round import Round
from stackllm.study import Study
from stackllm.tables.labels import LABEL_NAMES, read_truth


def show_members(opened: Session, study: Study, posteriors: dict[str, Calibrated]) -> None:
    """Print the scores of stage one."""
    timings = read_timings(study.engine.root)
    board = member_scores(0, posteriors, study.design, timings, _truth(opened, study))
    _print(opened, {"leaderboard": board.to_dicts()}, [render(board)])


def show_rounds(opened: Session, study: Study, rounds: Sequence[Round]) -> None:
    """Publish what a run hands out, and print its scores and where everything is."""
    if study.engine.dry_run:
        _print(opened, {"would_run": {}}, ["all units are done; nothing would run"])
        return
    timings = read_timings(study.engine.root)
    board = leaderboard(rounds, study.design, timings, _truth(opened, study))
    submission = write_outputs(study, rounds, board)
    best = best_round(rounds)
    lines = [render(board), *_verdicts(rounds)]
    lines.append(f"submission of round {best.number}: {submission}")
    result = {
        "leaderboard": board.to_dicts(),
        "best_round": best.number,
        "oof_log_loss": best.loss,
        "submission": str(submission),
    }
    _print(opened, result, lines)


def _verdicts(rounds: Sequence[Round]) -> list[str]:
    """Each round's honest score beside the last one's."""
    return [
        f"round {after.number}: out-of-fold posterior log loss {after.loss:.4f}, before {before.loss:.4f} "
        f"({'better' if after.loss < before.loss else 'not better'})"
        for before, after in pairwise(rounds)
    ]


def _truth(opened: Session, study: Study) -> np.ndarray | None:
    path: Path | None = opened.truth
    if path is None:
        return None
    target = study.settings.data.target
    truth = read_truth(
        path, study.table.test_rows(), study.table.classes, usual=(target, *LABEL_NAMES)
    )
    if truth.by_number:
        study.engine.reporter.warn(
            f"{path}: no id column, so its rows are matched by number, from 0."
        )
    return truth.labels


def _print(opened: Session, result: dict[str, Any], lines: list[str]) -> None:
    click.echo(json.dumps(result) if opened.json else "\n".join(lines))
