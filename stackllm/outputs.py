"""What a run hands out: predictions, submission, leaderboard, pseudo-labels, run.json."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stackllm import __version__
from stackllm.crossfit.design import CrossFit
from stackllm.crossfit.pseudo import audit
from stackllm.members.registry import Member
from stackllm.members.stage import gather_full, gather_places, places_of
from stackllm.predict import store_model, submitted, submitted_blend
from stackllm.stack.posteriors import cross_calibrate
from stackllm.stack.round import Round
from stackllm.store.atomic import write_file, write_text
from stackllm.store.digest import file_digest
from stackllm.study import Study
from stackllm.tables.contest import Table
from stackllm.tables.sample import plain_layout, read_sample
from stackllm.tables.spreadsheet import spreadsheet_safe

_NOT_STORED = {"seconds", "test_one_fold", "test_raw", "test_posterior", "test_se"}
"""Leaderboard columns that the same run may not repeat: times, and scores against a truth that is only shown."""

_PACKAGES = (
    "numpy",
    "scipy",
    "polars",
    "scikit-learn",
    "lightgbm",
    "torch",
    "transformers",
    "joblib",
    "click",
)


def best_round(rounds: Sequence[Round]) -> Round:
    """The round whose final posteriors have the least out-of-fold log loss; the first of equals."""
    return min(rounds, key=lambda played: played.loss)


def write_outputs(study: Study, rounds: Sequence[Round], board: pl.DataFrame) -> Path:
    """Publish everything that a run hands out, below the run's folder.

    ``oof.parquet`` and ``test.parquet`` hold the final posteriors of the best round,
    ``predictions/`` the calibrated row probabilities of every model and round, and of single seeds
    and refitted models where members have them, ``pseudo_labels.parquet`` the audit table, ``submission_raw.csv`` round 0 before stage three, ``leaderboard.csv`` the scores, ``run.json`` how it was made.

    Returns
    -------
    Path
        ``submission.csv`` of the best round.
    """
    root, table = study.engine.root, study.table
    best = best_round(rounds)
    for played in rounds:
        for name, found in played.posteriors.items():
            folder = root / "predictions" / f"round{played.number}"
            _write(folder / f"{name}_oof.parquet", table.train, table, found.rows.oof)
            _write(folder / f"{name}_test.parquet", table.test, table, found.rows.test_mean())
        final = submitted(study, played)
        write_submission(root / f"submission_round{played.number}.csv", study, final)
    for member in study.settings.members:
        _write_parts(study, member, root / "predictions" / "round0")
    final = submitted(study, best)
    _write(root / "oof.parquet", table.train, table, best.final.oof)
    _write(root / "test.parquet", table.test, table, final)
    if len(rounds) > 1:
        labels = pl.concat(
            audit(
                played.final, study.design, played.number + 1, table.test["row_id"], table.classes
            )
            for played in rounds[:-1]
        )
        write_file(root / "pseudo_labels.parquet", labels.write_parquet)
    scores = board.select([name for name in board.columns if name not in _NOT_STORED])
    write_file(root / "leaderboard.csv", scores.write_csv)
    write_text(root / "run.json", json.dumps(_record(study, rounds), indent=1, sort_keys=True))
    store_model(study, best)
    raw = cross_calibrate(submitted_blend(study, rounds[0]), study.design).test_mean()
    write_submission(root / "submission_raw.csv", study, raw)
    submission = root / "submission.csv"
    write_submission(submission, study, final)
    return submission


def _write_parts(study: Study, member: Member, folder: Path) -> None:
    """Publish what a member's single seeds predict in round 0, and its models on all training rows.

    Each is calibrated like the member itself: on its own out-of-fold rows, and the models on all
    rows, which have none, on the member's.
    """
    design, root, table = study.design, study.engine.root, study.table
    places = places_of(member, design.first_fits(), design)
    if len(member.seeds) > 1:
        for seed in member.seeds:
            own = [place for place in places if place.seed == seed]
            rows = cross_calibrate(gather_places(own, design, root), design)
            name = f"{member.name}_seed{seed}"
            _write(folder / f"{name}_oof.parquet", table.train, table, rows.oof)
            _write(folder / f"{name}_test.parquet", table.test, table, rows.test_mean())
    full = gather_full(member, design, root)
    if full is not None:
        whole = gather_places(places, design, root)
        rows = cross_calibrate(CrossFit(whole.oof, np.broadcast_to(full, whole.test.shape)), design)
        _write(folder / f"{member.name}_full_test.parquet", table.test, table, rows.test_mean())


def write_submission(path: Path, study: Study, probabilities: np.ndarray) -> None:
    """Publish test probabilities as CSV, in the columns of the sample submission if there is one.

    Raises
    ------
    DataError
        If the sample's columns do not match the classes or its ids are not the test rows.
    """
    sample = study.settings.data.sample
    layout = read_sample(Path(sample), study.table) if sample else plain_layout(study.table)
    frame = layout.filled(probabilities)
    if study.settings.data.csv_safe:
        frame = spreadsheet_safe(frame)
    write_file(path, frame.write_csv)


def _write(path: Path, rows: pl.DataFrame, table: Table, probabilities: np.ndarray) -> None:
    columns = dict(zip(table.classes, probabilities.T, strict=True))
    frame = pl.DataFrame({"row_id": rows["row_id"], **columns})
    write_file(path, frame.write_parquet)


def _record(study: Study, rounds: Sequence[Round]) -> dict[str, Any]:
    """How a run was made, without anything that differs between two runs of the same."""
    data = study.settings.data
    return {
        "stackllm": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_flags": _cpu_flags(),
        "versions": {name: version(name) for name in _PACKAGES},
        "settings": json.loads(json.dumps(dataclasses.asdict(study.settings))),
        "inputs": {path: file_digest(Path(path)) for path in (data.train, data.test)},
        "classes": list(study.table.classes),
        "n_train": study.table.train.height,
        "n_test": study.table.test.height,
        "notes": list(study.table.notes),
        "oof_log_loss": {f"round {played.number}": played.loss for played in rounds},
        "best_round": best_round(rounds).number,
        "blend_weights": {
            f"round {played.number}": dict(
                zip(played.blend.names, played.blend.weights.mean(axis=0).tolist(), strict=True)
            )
            for played in rounds
        },
    }


def _cpu_flags() -> list[str]:
    """The vector instructions that decide a machine's arithmetic, where the system tells."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return []
    words = set(path.read_text(encoding="utf-8", errors="replace").split())
    return sorted(
        words & {"avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"}
    )
