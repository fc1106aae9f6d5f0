"""A corpus of bad and odd tables, each with the exit code and the words that a user gets."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.campaign.figures import Case, play
from benchmarks.campaign.inside import stackllm

HEADER = "Question,Response,target\n"
TEST = "id,Question,Response\n" + "".join(
    f"{3 * group + row},test {group},answer {row} {group}\n"
    for group in range(3)
    for row in range(3)
)
SETTINGS = '[run]\nfolds = 2\n[encoder]\nbackbone = "none"\n[[member]]\nkind = "lexical"\n'


def train_rows(mark: Callable[[str], str] = lambda text: text) -> str:
    """Six groups of three rows; ``mark`` changes each response."""
    return "".join(
        f"question {group},{mark(f'answer {row} of {group}')},{row}\n"
        for group in range(6)
        for row in range(3)
    )


TRAIN = HEADER + train_rows()


@dataclass(frozen=True)
class Bad:
    """A contest with something wrong or odd in it.

    Parameters
    ----------
    name
        What is wrong.
    status
        The exit code it gets.
    words
        A part of the sentence it gets; empty for odd tables that are fine.
    train, test
        Contents of the two files; None leaves the file out.
    settings
        Content of ``stackllm.toml``.
    arguments
        Further options of ``stackllm features``.
    """

    name: str
    status: int
    words: str
    train: str | bytes | None = TRAIN
    test: str | bytes | None = TEST
    settings: str = SETTINGS
    arguments: tuple[str, ...] = field(default=())


def parquet(columns: dict[str, Any]) -> bytes:
    """A Parquet file of these columns."""
    import polars as pl

    target = io.BytesIO()
    pl.DataFrame(columns).write_parquet(target)
    return target.getvalue()


def figures(home: Path, draws: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The one figure of this file; every table is played once, whatever the number of draws."""
    from benchmarks.campaign.corpus import CORPUS

    home.mkdir(parents=True, exist_ok=True)
    yield play("bad tables", [(bad.name, case(bad, home)) for bad in CORPUS])


def case(bad: Bad, home: Path) -> Case:
    """Play one contest."""

    def played() -> str | None:
        folder = home / "".join(char if char.isalnum() else "_" for char in bad.name.lower())
        folder.mkdir()
        files = {"train.csv": bad.train, "test.csv": bad.test, "stackllm.toml": bad.settings}
        for name, content in files.items():
            if content is not None:
                raw = content.encode() if isinstance(content, str) else content
                (folder / name).write_bytes(raw)
        done = stackllm(folder, "features", "--quiet", "--jobs", "1", *bad.arguments)
        said = " ".join(done.said.split())
        if done.status != bad.status or bad.words not in said or "Traceback" in said:
            return f"exit {done.status}, not {bad.status}, saying {said[-300:]!r}"
        sentences = [line for line in done.said.splitlines() if line.startswith("error: ")]
        if len(sentences) != bool(bad.status) or max(map(len, sentences), default=0) > 800:
            return f"not one sentence: {done.said[-300:]!r}"
        return None

    return played
