"""The same bytes whoever works: workers, hash seeds, several processes at once; and what nobody may do."""

from __future__ import annotations

import json
import random
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.campaign.commands import environment, python, run
from benchmarks.campaign.contest import Stage, digests, stages
from benchmarks.campaign.figures import Case, MissedError, difference, play

HASH_SEEDS = ("0", "1", "2", "12345", "random")
FORBIDDEN = (
    "pickle.find_class",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
)
WATCHED = ("features", "stack", "pseudo", "predict", "optim")


def figures(home: Path, draws: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """One run a worker count and hash seed, ``draws`` races, and each command watched once."""
    known = stages(home)
    jobs = [(f"{n} workers", same(known["pseudo"], ("--jobs", str(n)))) for n in (1, 2, 3)]
    seeds = [
        (f"PYTHONHASHSEED={value}", same(known["pseudo"], (), PYTHONHASHSEED=value))
        for value in HASH_SEEDS
    ]
    yield play("one digest whatever the workers and the hash seed", jobs + seeds)
    draw = random.Random(seed)
    races = [(f"race {i}", race(known["features"], draw.randint(2, 8))) for i in range(draws)]
    yield play("processes that want the same run", races)
    watched = [(name, watched_command(known["pseudo"], name)) for name in WATCHED]
    watched.append(("features with LLMs", watched_command(known["llm"], "features")))
    yield play("pickle, socket and shell events", watched)


def same(stage: Stage, more: tuple[str, ...], **variables: str) -> Case:
    def case() -> str | None:
        folder = stage.copy("again")
        done = run([*stage.command, *more], folder, **variables)
        return (
            done.stderr[-300:] if done.returncode else difference(digests(folder), stage.expected)
        )

    return case


def race(stage: Stage, count: int) -> Case:
    """One wins, the others name its number and machine, and nothing is corrupt."""

    def case() -> str | None:
        folder = stage.copy("raced")
        racers = [
            subprocess.Popen(
                python("-m", "stackllm", *stage.alone), cwd=folder, env=environment(), text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )
            for _ in range(count)
        ]  # fmt: skip
        said = {racer.pid: racer.communicate(timeout=300)[1] for racer in racers}
        codes = {racer.pid: racer.returncode for racer in racers}
        winners = [pid for pid, code in codes.items() if code == 0]
        losers = [pid for pid, code in codes.items() if code == 75]
        if len(winners) + len(losers) != count or not winners:
            return f"exit codes {sorted(codes.values())}: {list(said.values())}"
        if not losers:
            raise MissedError  # they came one after the other
        if any("was damaged" in words for words in said.values()):
            return f"damage was told: {list(said.values())}"
        for pid in losers:
            if not any(f"process {w} on {socket.gethostname()}" in said[pid] for w in winners):
                return f"the loser said {said[pid]!r}, the winners were {winners}"
        return difference(digests(folder), stage.expected)

    return case


def watched_command(stage: Stage, name: str) -> Case:
    """A case: a command under an audit hook, and no event that is forbidden."""
    arguments = {
        "predict": ["predict", "test.csv", "--quiet", "--jobs", "1"],
        "optim": ["optim", "sub.csv", "--groups", "test.csv", "--group", "Question"],
    }.get(name, [name, "--quiet", "--jobs", "1"])

    def case() -> str | None:
        folder = stage.copy("watched")
        done = run(python("-m", "benchmarks.campaign.watch", *arguments), folder)
        if done.returncode:
            return done.stderr[-300:]
        told = json.loads((folder / "events.json").read_text())
        bad = [event for event in told["events"] if event[0] in FORBIDDEN or event[0] == "pickle"]
        if told["opened"] < 10:
            return "the hook saw no work"
        return f"{len(bad)} events, first {bad[0]}" if bad else None

    return case
