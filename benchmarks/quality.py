"""How good ``stackllm run`` is on a contest, beside what the contest team did on the same members.

The seed recipe is the contest team's: LightGBM on the members' out-of-fold logits and text features,
without posteriors or forms within the group, then the raw probabilities blended with their Hungarian
assignment by coefficients fitted on the other folds. ``--data DIR`` names a folder with ``train.csv``,
``test.csv`` and ``solution.csv``; without it the shipped sample is used.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.harness import Figure, Result, main
from stackllm.crossfit.targets import Targets
from stackllm.group.fitting import fit_method
from stackllm.group.optimise import optimise
from stackllm.members.boosting import BoostingParams, fit_boosting, predict_boosting
from stackllm.metrics import log_loss
from stackllm.probabilities import log_probabilities

ARTIFACTS = Path("artifacts") / "benchmark"
"""Made anew by every measurement and left there to look at."""

SAMPLE = Path(__file__).parents[1] / "examples" / "seven_voices"


def measure(quick: bool, data: Path | None) -> Result:
    """Run all four steps in a process of their own and score what they left."""
    with tempfile.TemporaryDirectory() as folder:
        source = _shrink(data or SAMPLE, Path(folder)) if quick else (data or SAMPLE)
        shutil.rmtree(ARTIFACTS, ignore_errors=True)
        command = [
            sys.executable, "-m", "stackllm", "run", "--rounds", "2", "--json",
            "--train", str(source / "train.csv"), "--test", str(source / "test.csv"),
            "--truth", str(source / "solution.csv"), "--artifacts", str(ARTIFACTS),
            *(["--backbone", "none"] if quick else []),
        ]  # fmt: skip
        result, minutes, peak = _watched(command)
        seed = _seed_recipe(ARTIFACTS / "run", source)
    return _figures(result, seed, minutes, peak)


def _figures(result: dict[str, Any], seed: dict[str, float], minutes: float, peak: float) -> Result:
    board = pl.DataFrame(result["leaderboard"])
    final = board.filter(pl.col("model") == "blend").sort("round")
    best = final.row(result["best_round"], named=True)
    oof, test = final["posterior"].to_list(), final["test_posterior"].to_list()
    own = board.filter((pl.col("model") == "stack") & (pl.col("round") == 0)).row(0, named=True)
    figures = {
        "oof_raw": Figure(best["raw"], 1.0),
        "oof_posterior": Figure(best["posterior"], 0.48),
        "test_raw": Figure(best["test_raw"], 1.0),
        "test_posterior": Figure(best["test_posterior"], 0.52),
        "vs_seed_recipe": Figure(best["posterior"] / seed["oof_blend"], 0.75),
        "pseudo_gain_oof": Figure(oof[0] - oof[-1], 0.0, "higher"),
        "pseudo_gain_test": Figure(test[0] - test[-1], 0.0, "higher"),
        "minutes": Figure(minutes, 60.0),
        "peak_gib": Figure(peak, 8.0),
    }
    error = float(np.hypot(best["posterior_se"], best["test_se"]))
    gaps = {
        name: abs(best["posterior"] - best[name]) / error
        for name in ("test_one_fold", "test_posterior")
    }
    details = {
        "best_round": result["best_round"],
        "oof_posterior_by_round": oof,
        "test_posterior_by_round": test,
        "oof_to_test_in_standard_errors": gaps,
        "seed_recipe": seed,
        "own_raw_stack": own["raw"],
        "leaderboard": result["leaderboard"],
    }
    return Result(figures, details)


def _seed_recipe(run: Path, source: Path) -> dict[str, float]:
    """Out-of-fold log loss of the contest team's recipe on the members of round 0."""
    folds = pl.read_parquet(run / "folds" / "folds.parquet")
    fold, groups = folds["fold"].to_numpy(), folds["group_id"].to_numpy()
    model = json.loads((run / "model" / "model.json").read_text())
    names = [member["name"] for member in model["members"]]
    frames = [pl.read_parquet(run / "predictions" / "round0" / f"{n}_oof.parquet") for n in names]
    classes = frames[0].columns[1:]
    labels = pl.read_csv(source / "train.csv", infer_schema=False)["target"]
    y = labels.replace_strict(classes, list(range(len(classes))), return_dtype=pl.Int64).to_numpy()
    blocks = pl.read_parquet(run / "inputs" / "table" / "blocks.parquet")[: len(y)]
    text = blocks.select(
        [name for name in blocks.columns if name.startswith(("text_", "likelihood_"))]
    )
    logits = [log_probabilities(frame.drop("row_id").to_numpy()) for frame in frames]
    features = np.hstack([*logits, text.to_numpy()])
    raw, blended = np.empty((len(y), len(classes))), np.empty((len(y), len(classes)))
    for k in range(fold.max() + 1):
        rest = np.flatnonzero(fold != k)
        every = np.ones(len(rest))
        targets = Targets(rest, y[rest], every, every > 0, len(classes))
        with tempfile.TemporaryDirectory() as folder:
            fit_boosting(features[rest], targets, BoostingParams(), 0, Path(folder))
            raw[fold == k] = predict_boosting(features[fold == k], Path(folder))
    for k in range(fold.max() + 1):
        rest, own = fold != k, fold == k
        method = fit_method("blend", raw[rest], groups[rest], y[rest])
        blended[own] = optimise(raw[own], groups[own], method=method)
    return {"oof_raw": log_loss(raw, y), "oof_blend": log_loss(blended, y)}


def _watched(command: list[str]) -> tuple[dict[str, Any], float, float]:
    """What a command printed, the minutes it took, and the most memory its processes held at once."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = [0.0]
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(printed), (time.monotonic() - started) / 60, peak[0]


def _watch(process: subprocess.Popen[str], peak: list[float]) -> None:
    """Sum the proportional memory of a process and all it started, every three seconds (Linux)."""
    while process.poll() is None:
        peak[0] = max(peak[0], sum(_memory(pid) for pid in _tree(process.pid)) / 2**20)
        time.sleep(3)


def _tree(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            found += _tree(int(child))
    return found


def _memory(pid: int) -> int:
    """Proportional set size in KiB; 0 for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _shrink(source: Path, folder: Path) -> Path:
    """The first 60 training and 20 test groups of a contest."""
    for name, n_groups in (("train", 60), ("test", 20)):
        frame = pl.read_csv(source / f"{name}.csv", infer_schema=False)
        asked = frame["Question"].unique(maintain_order=True).head(n_groups)
        frame.filter(pl.col("Question").is_in(asked.implode())).write_csv(folder / f"{name}.csv")
    kept = pl.read_csv(folder / "test.csv", infer_schema=False).select("id")
    solution = pl.read_csv(source / "solution.csv", infer_schema=False)
    kept.join(solution, on="id", how="left", maintain_order="left").write_csv(
        folder / "solution.csv"
    )
    return folder


if __name__ == "__main__":
    main("quality", measure)
