"""Stage three against what there is: scipy's Hungarian loop, POT's batched Sinkhorn, a plain CSV copy.

``posterior_vs_pot`` compares with POT at equal accuracy of the sums: POT balances until its marginal
error is below 1e-9, and ours are exact to rounding. (How far POT's balanced matrix still is from the
posterior stands in the details.)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.harness import Figure, Result, interleaved, interleaved_children, main
from stackllm.group.posterior import posterior

CLI = [sys.executable, "-c", "from stackllm.cli import main; main()", "optim"]
COPY = "import sys, polars as pl; pl.read_csv(sys.argv[1]).write_csv(sys.argv[2])"
N_CLASSES = 7


def measure(quick: bool, data: Path | None) -> Result:
    """All figures of one run."""
    figures: dict[str, Figure] = {}
    details: dict[str, object] = {}
    # files first: a child's peak counts the parent's memory at the fork, so that must still be small
    with tempfile.TemporaryDirectory() as folder:
        _files(Path(folder), quick, figures, details)
    _library(20_000 if quick else 150_000, 3 if quick else 5, figures, details)
    return Result(figures, details)


def predictions(n_groups: int, seed: int = 0) -> np.ndarray:
    """Probabilities that are right about two times in three: ``(n_groups * 7, 7)``."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n_groups, N_CLASSES, N_CLASSES)) + 2.0 * np.eye(N_CLASSES)
    powers = np.exp(1.5 * scores).reshape(-1, N_CLASSES)
    return powers / powers.sum(axis=1, keepdims=True)


def _library(n_groups: int, repeats: int, figures: dict, details: dict) -> None:
    from scipy.optimize import linear_sum_assignment

    p = predictions(n_groups)
    groups = np.repeat(np.arange(n_groups), N_CLASSES)

    def ours() -> np.ndarray:
        return posterior(p, groups)

    def hungarian() -> list:
        costs = -np.log(p).reshape(n_groups, N_CLASSES, N_CLASSES)
        return [linear_sum_assignment(cost)[1] for cost in costs]

    posterior(p[:700], groups[:700])
    exact, loop = interleaved(repeats, ours, hungarian)
    figures["posterior_vs_scipy_loop"] = Figure(exact / loop, 1.0)
    details |= {"n_groups": n_groups, "posterior_seconds": exact, "scipy_loop_seconds": loop}

    try:
        from ot.batch import solve_batch
    except ImportError:
        details["posterior_vs_pot"] = "not measured: pip install pot"
        return
    few = min(n_groups, 5_000)  # POT is much slower: a part of the groups is enough
    q, few_groups = p[: few * N_CLASSES], groups[: few * N_CLASSES]
    answer = {}

    def pot() -> None:
        costs = -np.log(q).reshape(few, N_CLASSES, N_CLASSES)
        ones = np.ones((few, N_CLASSES))
        answer["pot"] = solve_batch(
            costs, reg=1.0, a=ones, b=ones, max_iter=10_000, tol=1e-9, method="log_sinkhorn"
        ).plan

    exact, balanced = interleaved(3, lambda: posterior(q, few_groups), pot)
    plans = np.asarray(answer["pot"]).reshape(-1, N_CLASSES)
    figures["posterior_vs_pot"] = Figure(exact / balanced, 0.2)
    details |= {
        "pot_groups": few,
        "pot_seconds": balanced,
        "pot_mean_distance_from_posterior": float(np.abs(plans - posterior(q, few_groups)).mean()),
    }


def _files(folder: Path, quick: bool, figures: dict, details: dict) -> None:
    powers = (10**4, 10**5) if quick else (10**4, 10**5, 10**6)
    name = "rows_1435.csv"
    _write(folder / name, 1435)
    (small,) = interleaved_children(7, [*CLI, name, "-o", "out.csv"], cwd=folder)
    figures["small_file_seconds"] = Figure(small.seconds, 0.8)
    for rows in powers:
        name = f"rows_{rows}.csv"
        subprocess.run(
            [sys.executable, "-m", "benchmarks.optim", "--write", folder / name, str(rows)],
            check=True,
        )
        copy = [sys.executable, "-c", COPY, name, "copy.csv"]
        repeats = 3 if rows == 10**6 else 5
        ours, plain = interleaved_children(repeats, [*CLI, name, "-o", "out.csv"], copy, cwd=folder)
        details[f"rows_{rows}"] = {
            "seconds": ours.seconds,
            "copy_seconds": plain.seconds,
            "peak_gib": ours.peak_gib,
            "copy_peak_gib": plain.peak_gib,
        }
    largest = powers[-1]
    figures["csv_1m_vs_polars_copy"] = Figure(ours.seconds / plain.seconds, 2.5)
    figures["csv_1m_peak_gib"] = Figure(ours.peak_gib, 1.5)
    figures["growth_1e4_1e6"] = Figure(_growth(largest), 1.3)
    details["largest_file_rows"] = largest


def _growth(largest: int) -> float:
    """Seconds a row at the largest size over seconds a row at 10^4: 1 is linear."""
    times = []
    for rows in (10**4, largest):
        n_groups = rows // N_CLASSES
        p, groups = predictions(n_groups), np.repeat(np.arange(n_groups), N_CLASSES)
        (taken,) = interleaved(7, lambda p=p, groups=groups: posterior(p, groups))
        times.append(taken / rows)
    return times[1] / times[0]


def _write(path: Path, rows: int) -> None:
    n_groups = -(-rows // N_CLASSES)
    p = predictions(n_groups)[:rows]
    columns = {f"target_{j}": p[:, j] for j in range(N_CLASSES)}
    ids = [f"{i:07d}" for i in range(rows)]
    groups = [f"q{i // N_CLASSES}" for i in range(rows)]
    pl.DataFrame({"id": ids, "group": groups, **columns}).write_csv(path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:  # in a process of its own, so that its memory is given back
        _write(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main("optim", measure)
