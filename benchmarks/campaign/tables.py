"""Bad and odd tables, each with the exit code and the words that a user gets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.campaign.corpus import CORPUS, Bad
from benchmarks.campaign.figures import Case, play
from benchmarks.campaign.inside import stackllm


def figures(home: Path, draws: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The one figure of this file; every table is played once, whatever the number of draws."""
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
