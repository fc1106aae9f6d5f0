"""Small tables with a planted signal: who writes how is decided by us, so we know what to expect."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# tests run side by side, and threads that wait do so busily
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for helpers.py and its like
sys.path.append(str(Path(__file__).parents[1]))  # for benchmarks, which is in no wheel

pytest_plugins = ["small_models", "machines", "fake_hub"]

# how long an example takes says more about the machine than about the code
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

VOICES = ("terse", "bullets", "shouting")


SLOWEST = (
    "test_clusters", "test_campaign", "test_ranks", "test_encoders", "test_recipe", "test_resuming",
    "test_own", "test_decoder_run", "test_model", "test_local", "test_pools", "test_rater_pipeline",
)  # fmt: skip
"""Files that take longest: begun first, so that no worker is left alone with one of them at the end."""


def pytest_collection_modifyitems(items):
    """The slowest files first; within a file the order stays."""
    place = {name: i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(SLOWEST)))


def make_table(
    n_groups: int, seed: int = 0, signal: bool = True, first: int = 0
) -> list[tuple[str, str, int]]:
    """Rows ``question, response, label`` of whole groups, shuffled.

    Without ``signal`` labels are shuffled within each group, so nothing can be learnt.
    """
    draw = np.random.default_rng(seed)
    nouns = ["river", "engine", "poem", "market", "planet", "garden", "battle", "theory"]
    rows = []
    for group in range(first, first + n_groups):
        question = f"What should one know about the {nouns[group % 8]} of case {group}?"
        labels = np.arange(3) if signal else draw.permutation(3)
        for voice, label in zip(range(3), labels, strict=True):
            rows.append((question, _answer(voice, nouns[group % 8], draw), int(label)))
    return [rows[i] for i in draw.permutation(len(rows))]


def _answer(voice: int, noun: str, draw: np.random.Generator) -> str:
    """One answer; a third of the answers imitate another voice, so no model can be perfect."""
    if draw.random() < 0.3:
        voice = int(draw.integers(3))
    facts = [f"the {noun} has {draw.integers(2, 99)} parts" for _ in range(draw.integers(2, 5))]
    if VOICES[voice] == "bullets":
        return "Here you are:\n" + "\n".join(f"- {fact}" for fact in facts)
    if VOICES[voice] == "shouting":
        return "! ".join(fact.capitalize() for fact in facts) + "!"
    return ". ".join(facts[:2]) + "."


def write_table(
    folder: Path, n_train: int, n_test: int, signal: bool = True, seed: int = 0
) -> Path:
    """``train.csv``, ``test.csv`` and ``solution.csv`` in Kaggle's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    train = make_table(n_train, seed, signal)
    test = make_table(n_test, seed + 1, signal, first=n_train)
    names = ["Question", "Response", "target"]
    pl.DataFrame(train, schema=names, orient="row").write_csv(folder / "train.csv")
    whole = pl.DataFrame(test, schema=names, orient="row").with_row_index("id")
    whole.drop("target").write_csv(folder / "test.csv")
    whole.select("id", "target").write_csv(folder / "solution.csv")
    return folder


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A working directory with a small contest in it."""
    folder = write_table(tmp_path / "contest", 24, 10)
    monkeypatch.chdir(folder)
    return folder
