"""Death and errors at every single write of a command."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.campaign.commands import forked
from benchmarks.campaign.contest import Stage, digests, stages
from benchmarks.campaign.faulty import limited, strike
from benchmarks.campaign.figures import Case, difference, play

ERRORS = ("ENOSPC", "EACCES", "EIO", "EMFILE")
NEVER = 2**31
STAGES = ("optim", "features", "stack", "pseudo")


def figures(home: Path, draws: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The figures of this file: so many writes of each command, at most all of them."""
    draw = random.Random(seed)
    known = stages(home)
    for kind in ("kill", "tear", *ERRORS):
        for name in STAGES:
            stage = known[name]
            count = count_writes(stage, kind)
            cases = [
                (f"{kind} at write {at} of {count}", faulty_write(stage, kind, at))
                for at in _drawn(range(count), draws, draw)
            ]
            yield play(f"{kind} at every write of {name}", cases)
    sizes = _drawn(range(1_000, 60_000, 1_000), draws, draw)
    cases = [
        (f"{name} {n} bytes", too_large(known[name], n))
        for name in ("features", "stack")
        for n in sizes
    ]
    yield play("no file may grow past a size (EFBIG of the system itself)", cases)


def _drawn(every: range, draws: int, draw: random.Random) -> Sequence[int]:
    return sorted(draw.sample(every, min(draws, len(every))))


def _faulty(stage: Stage, kind: str, at: int, folder: Path) -> subprocess.CompletedProcess[str]:
    return forked(folder, strike, kind, at, *stage.alone)


def count_writes(stage: Stage, kind: str) -> int:
    """How many boundaries for faults of this kind a command meets that nobody disturbs."""
    folder = stage.copy("counted")
    done = _faulty(stage, kind, NEVER, folder)
    assert done.returncode == 0, done.stderr
    assert digests(folder) == stage.expected
    return len(folder.with_suffix(".boundaries").read_text().splitlines())


def faulty_write(stage: Stage, kind: str, at: int) -> Case:
    """A case: one fault at one write, what it says, and the same command after it."""

    def case() -> str | None:
        folder = stage.copy("struck")
        done = _faulty(stage, kind, at, folder)
        met = folder.with_suffix(".boundaries").read_text().splitlines()
        if len(met) <= at:
            return f"only {len(met)} writes were met: {done.stderr[-300:]}"
        if kind in {"kill", "tear"}:
            if done.returncode != -signal.SIGKILL:
                return f"it was not killed: exit {done.returncode}"
        elif done.returncode == 0:
            if not met[-1].startswith("after") and len(met) - at > 1:
                return f"exit 0 in spite of {kind} at {met[at]}"
        else:
            said = sentence(done, 74)
            if said:
                return f"{met[at]}: {said}"
        return _goes_on(stage, folder)

    return case


def sentence(done: subprocess.CompletedProcess[str], status: int) -> str | None:
    """None if a command ended with this status and one sentence, else what it did."""
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    one = len(errors) == 1 and errors[0].startswith("error: ")
    if done.returncode == status and one:
        return None
    return f"exit {done.returncode}, not {status}, and it said {done.stderr[-400:]!r}"


def _goes_on(stage: Stage, folder: Path) -> str | None:
    again = stage.finish(folder)
    if again.returncode:
        return f"the same command ended with {again.returncode}: {again.stderr[-300:]}"
    return difference(digests(folder), stage.expected)


def too_large(stage: Stage, n_bytes: int) -> Case:
    def case() -> str | None:
        folder = stage.copy("limited")
        done = forked(folder, limited, n_bytes, *stage.alone)
        if done.returncode:
            said = sentence(done, 74)
            if said:
                return said
        elif max(path.stat().st_size for path in folder.rglob("artifacts/**/*")) > n_bytes:
            return "the limit was not in force"
        return _goes_on(stage, folder)

    return case
