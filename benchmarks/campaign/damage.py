"""Flipped bits and truncations of everything that is stored, and LightGBM models that nobody wrote."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.campaign import inside
from benchmarks.campaign.contest import Stage, digests, stages
from benchmarks.campaign.figures import Case, difference, play


def figures(home: Path, draws: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """``draws`` damages of every unit, of a stack and of what LLMs leave, and 25 times as many mutated models."""
    known = stages(home)
    draw = random.Random(seed)
    for name in ("stack", "llm"):
        for how in ("flipped bit", "truncation"):
            struck: Counter[str] = Counter()
            cases = [
                (f"{how} {i}", damaged_units(known[name], how, draw, struck)) for i in range(draws)
            ]
            figure = play(f"one {how} in a file of every unit of {name}", cases)
            yield {**figure, "files": dict(struck)}
    yield play("mutated LightGBM models", mutated_models(known["stack"], 25 * draws, draw))


def damaged_units(stage: Stage, how: str, draw: random.Random, struck: Counter[str]) -> Case:
    """Damage one file of every unit, of a kind that was rare so far: all must be found and made again."""

    def case() -> str | None:
        folder = stage.home / f"{stage.name}-damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(stage.undisturbed, folder)
        artifacts = folder / "artifacts"
        units = {path.parent.relative_to(artifacts) for path in artifacts.rglob("manifest.json")}
        for unit in sorted(units):
            files = {path: _kind(unit, path) for path in sorted((artifacts / unit).iterdir())}
            victim = min(files, key=lambda path: (struck[files[path]], draw.random()))
            damage(victim, how, draw)
            struck[files[victim]] += 1
        done = stage.finish(folder)
        if done.returncode:
            return f"exit {done.returncode}: {done.stderr[-300:]}"
        lost = [
            str(unit)
            for unit in sorted(units)
            if f"{Path(*unit.parts[1:])} was damaged; moved to" not in done.stderr
        ]
        aside = len(list(artifacts.glob("*/quarantine/*")))
        if lost or aside != len(units):
            return f"not found: {lost}; {aside} of {len(units)} set aside"
        return difference(digests(folder), stage.expected)

    return case


def damage(path: Path, how: str, draw: random.Random) -> None:
    """Flip one bit of a file, or cut it short."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if how == "truncation":
        path.write_bytes(content[:place])
    else:
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def _kind(unit: Path, path: Path) -> str:
    """What a file is, as far as its place and name tell."""
    kind = path.name if path.suffix == ".json" else f"*{path.suffix}"
    return f"{unit.parts[1]} {kind}" if unit.parts[0] == "cache" else kind


def mutated_models(stage: Stage, count: int, draw: random.Random) -> Iterator[tuple[str, Case]]:
    """``predict`` on a run one of whose models is not as it was written."""
    import lightgbm

    folder = stage.home / f"{stage.name}-models"
    shutil.copytree(stage.undisturbed, folder, dirs_exist_ok=True)
    assert inside.stackllm(folder, "predict", "test.csv", "--quiet", "--jobs", "1").status == 0
    models = sorted((folder / "artifacts" / "run").rglob("model_0.txt"))
    for i in range(count):
        yield f"model {i}", lambda: _mutated(folder, draw.choice(models), draw, lightgbm)


def _mutated(folder: Path, path: Path, draw: random.Random, lightgbm: Any) -> str | None:
    content = path.read_text()
    loaded: list[str] = []
    real = lightgbm.Booster.__init__

    def noted(self: Any, *args: Any, **options: Any) -> None:
        loaded.append(str(options.get("model_str")))
        real(self, *args, **options)

    changed = mutate(content, draw)
    path.write_text(changed)
    try:
        with mock.patch.object(lightgbm.Booster, "__init__", noted):
            done = inside.stackllm(folder, "predict", "test.csv", "--quiet", "--jobs", "1")
    finally:
        path.write_text(content)
    if changed in loaded:
        return "the mutated model was loaded"
    if done.status != 74 or "is corrupt. Run the command that made the run" not in done.said:
        return f"exit {done.status}: {done.said[-300:]}"
    return None


def mutate(content: str, draw: random.Random) -> str:
    """A model's text with some of its numbers, lines or characters changed."""
    lines = content.splitlines(keepends=True)
    while "".join(lines) == content:
        at = draw.randrange(len(lines))
        match draw.randrange(4):
            case 0:
                lines[at] = "".join(
                    draw.choice("0123456789") if c.isdigit() else c for c in lines[at]
                )
            case 1:
                del lines[at : at + draw.randint(1, 30)]
            case 2:
                lines.insert(at, draw.choice(lines))
            case _:
                place = draw.randrange(len(lines[at]))
                lines[at] = lines[at][:place] + chr(draw.randint(32, 126)) + lines[at][place + 1 :]
        lines = lines or ["tree\n"]
    return "".join(lines)
