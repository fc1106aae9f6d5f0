"""Peak memory of ``stackllm features`` and ``stack`` without an LLM, of all their processes together.

``--quick`` takes 10,000 rows instead of 200,000. What counts is the proportional set size, which
shares a page that several processes map among them.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Figure, Result, main

ROWS, CLASSES, FOLDS = 200_000, 7, 2
GOAL_GIB = 6.0
_SYLLABLES = [consonant + vowel for consonant in "bdklm" for vowel in "aeiou"]


def measure(quick: bool, data: Path | None) -> Result:
    """Both commands, one after the other, on a table of our own making."""
    rows = 10_000 if quick else ROWS
    figures, details = {}, {"rows": rows, "folds": FOLDS}
    with tempfile.TemporaryDirectory(prefix="stackllm-memory-") as home:
        folder = Path(home)
        write_table(folder, rows)
        for name in ("features", "stack"):
            command = [sys.executable, "-m", "stackllm", name, "--backbone", "none"]
            peak, seconds = run_measured([*command, "--folds", str(FOLDS)], folder)
            figures[f"{name}_peak_gib"] = Figure(peak, GOAL_GIB)
            details[f"{name}_seconds"] = round(seconds)
            print(f"{name}: {peak:.2f} GiB, {seconds:.0f} s", file=sys.stderr, flush=True)
    return Result(figures, details)


def write_table(folder: Path, rows: int) -> None:
    """Nine tenths of the groups in ``train.csv``; responses of about 60 words, some told apart by label."""
    draw = random.Random(0)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(20_000)]
    groups = rows // CLASSES
    with (folder / "train.csv").open("w") as train, (folder / "test.csv").open("w") as test:
        train.write("Question,Response,target\n")
        test.write("id,Question,Response\n")
        for group in range(groups):
            topic = " ".join(draw.choices(words, k=8))
            for label in draw.sample(range(CLASSES), CLASSES):
                text = " ".join(draw.choices(words[label * 50 :], k=draw.randint(30, 90)))
                if group < groups * 9 // 10:
                    train.write(f"{topic} {group},{text}.,{label}\n")
                else:
                    test.write(f"{group * CLASSES + label},{topic} {group},{text}.\n")


def run_measured(command: list[str], cwd: Path) -> tuple[float, float]:
    """Peak GiB of a command with all its children, and its seconds.

    Raises
    ------
    RuntimeError
        If it fails, with what it said.
    """
    started, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=said, stderr=said, start_new_session=True
        )
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.5)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read().decode()[-2000:])
    return peak, time.perf_counter() - started


def _memory(session: int) -> float:
    """GiB of all processes of a session."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rsplit(")", 1)[1].split()[3]) != session:
                continue
            rollup = (status.parent / "smaps_rollup").read_text()
        except (OSError, ValueError):
            continue
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line[:4] == "Pss:")
    return total / 2**20


if __name__ == "__main__":
    main("memory", measure)
