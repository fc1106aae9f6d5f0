"""The leaderboard: every member, the stack and the blend of every round, raw and after stage three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from stackllm.crossfit.design import Design
from stackllm.metrics import (
    accuracy,
    auc,
    bootstrap_error,
    log_loss,
    mean_with_error,
    row_losses,
    shown_with_error,
)
from stackllm.report.text import aligned
from stackllm.stack.posteriors import Calibrated
from stackllm.stack.round import Round


def leaderboard(
    rounds: Sequence[Round],
    design: Design,
    timings: dict[str, float],
    truth: np.ndarray | None = None,
) -> pl.DataFrame:
    """Scores of every model of every round.

    Parameters
    ----------
    rounds
        Played rounds.
    design
        Folds, groups and labels.
    timings
        Seconds of each unit.
    truth
        Class index of each test row, ``(n_test,)``, where it is known.

    Returns
    -------
    polars.DataFrame
        ``round, model, raw, raw_se, posterior, posterior_se, behind, behind_se, accuracy, auc,
        seconds`` out of fold (log loss in nats with group-bootstrap standard errors, ``raw`` of row
        probabilities calibrated one by one; ``behind`` is how far the posterior is behind the
        submitted model's, the best round's blend, paired over groups; accuracy of the posterior;
        area under the curve of the raw probabilities, one against the rest; seconds of fitting and
        predicting) and, with ``truth``,
        ``test_one_fold`` (posterior by the models of one fold, averaged: what the out-of-fold score
        estimates), ``test_raw, test_posterior, test_se`` (by all folds together: what is submitted,
        but for decoders that were refitted).
    """
    submitted = best_round(rounds).final.oof
    return pl.concat(
        member_scores(played.number, played.posteriors, design, timings, truth, submitted)
        for played in rounds
    )


def best_round(rounds: Sequence[Round]) -> Round:
    """The round whose final posteriors have the least out-of-fold log loss; the first of equals."""
    return min(rounds, key=lambda played: played.loss)


def member_scores(
    number: int,
    posteriors: Mapping[str, Calibrated],
    design: Design,
    timings: dict[str, float],
    truth: np.ndarray | None = None,
    submitted: np.ndarray | None = None,
) -> pl.DataFrame:
    """The leaderboard's rows of one round's models; see :func:`leaderboard`.

    Without ``submitted``, the out-of-fold posteriors ``(n_train, n_classes)`` that all others are
    compared with, there is no column ``behind``.
    """
    return pl.DataFrame(
        [
            {
                "round": number,
                "model": name,
                **_oof_scores(calibrated, design, submitted),
                "seconds": seconds_of(timings, name, number),
                **({} if truth is None else _test_scores(calibrated, design, truth)),
            }
            for name, calibrated in posteriors.items()
        ]
    )


def verdicts(rounds: Sequence[Round], design: Design) -> list[str]:
    """Each round beside the one before it, in words."""
    return [
        f"round {after.number}: out-of-fold posterior log loss {after.loss:.4f}, before {before.loss:.4f}; "
        + verdict(before.final.oof, after.final.oof, design)
        for before, after in pairwise(rounds)
    ]


def verdict(before: np.ndarray, after: np.ndarray, design: Design) -> str:
    """What one set of out-of-fold predictions gains over another on the same rows, and whether that is news.

    Parameters
    ----------
    before, after
        Probabilities, float64 ``(n_train, n_classes)``.
    design
        Labels and groups.
    """
    gains = row_losses(before, design.labels) - row_losses(after, design.labels)
    gain, error = float(gains.mean()), bootstrap_error(gains, design.train_groups)
    said = "better" if gain > 0 else "worse"
    if not abs(gain) > 2 * error:  # also where a single group leaves the error unknown
        said = "no difference beyond its error"
    return f"gain {gain:+.4f} ± {error:.4f}, paired over groups: {said}"


def render(board: pl.DataFrame) -> str:
    """The leaderboard as aligned text of at most 100 columns; scores on the test rows stand below it."""
    tables = [_OUT_OF_FOLD, *([_ON_TEST] if "test_posterior" in board.columns else [])]
    return "\n".join(_table(board, columns) for columns in tables)


_OUT_OF_FOLD = {
    "round": "round",
    "model": "model",
    "raw": "raw",
    "posterior": "posterior",
    "behind": "to submitted",
    "accuracy": "accuracy",
    "auc": "auc",
    "seconds": "seconds",
}
_ON_TEST = {
    "round": "test",
    "model": "model",
    "test_one_fold": "one fold",
    "test_raw": "raw",
    "test_posterior": "posterior",
}
_ERRORS = {"posterior": "posterior_se", "behind": "behind_se", "test_posterior": "test_se"}
_WIDEST = 24
"""Letters of a model's name that are shown."""


def _table(board: pl.DataFrame, columns: Mapping[str, str]) -> str:
    names = [name for name in columns if name in board.columns]
    lines = [[columns[name] for name in names]]
    lines += [[_cell(row, name) for name in names] for row in board.iter_rows(named=True)]
    return aligned(lines, left=(1,))


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if isinstance(value, str) and len(value) > _WIDEST:
        return f"{value[: _WIDEST - 1]}…"
    if not isinstance(value, float):
        return str(value)
    if name == "seconds":
        return f"{value:.0f}"
    if name == "behind" and not value:
        return "0"
    told = shown_with_error(value, row[_ERRORS[name]] if name in _ERRORS else None)
    return f"+{told}" if name == "behind" and value > 0 else told


def _oof_scores(
    calibrated: Calibrated, design: Design, submitted: np.ndarray | None
) -> dict[str, float | None]:
    raw, final = calibrated.rows.oof, calibrated.oof
    groups = design.train_groups
    raw_loss, raw_error = mean_with_error(row_losses(raw, design.labels), groups)
    losses = row_losses(final, design.labels)
    final_loss, final_error = mean_with_error(losses, groups)
    behind: dict[str, float | None] = {}
    if submitted is not None:
        difference = losses - row_losses(submitted, design.labels)
        behind["behind"], behind["behind_se"] = mean_with_error(difference, groups)
    return {
        "raw": raw_loss,
        "raw_se": raw_error,
        "posterior": final_loss,
        "posterior_se": final_error,
        **behind,
        "accuracy": accuracy(final, design.labels),
        "auc": auc(raw, design.labels),
    }


def _test_scores(
    calibrated: Calibrated, design: Design, truth: np.ndarray
) -> dict[str, float | None]:
    final = calibrated.predictions.test_mean()
    loss, error = mean_with_error(row_losses(final, truth), design.test_groups)
    one_fold = [log_loss(matrix, truth) for matrix in calibrated.predictions.test]
    return {
        "test_one_fold": float(np.mean(one_fold)),
        "test_raw": log_loss(calibrated.rows.test_mean(), truth),
        "test_posterior": loss,
        "test_se": error,
    }


def seconds_of(timings: Mapping[str, float], name: str, number: int) -> float:
    """Seconds of fitting and predicting by a model in a round, all places together."""
    folders = (
        f"members/{name}/round{number}_",
        f"stack/models/round{number}_" if name == "stack" else " ",
    )
    return float(sum(seconds for path, seconds in timings.items() if path.startswith(folders)))
