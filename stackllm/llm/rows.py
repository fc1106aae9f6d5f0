"""The row cache: what a language model makes of a text is computed once, whatever run asks for it.

Encoder, trunk and rater keep their rows here. A row is found again by its text below a folder named
after everything else that decides its numbers. Shards hold whole groups of like length and are
planned from all rows, so a stopped run goes on with the very batches it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import polars as pl

from stackllm.engine.local import Engine, Task
from stackllm.errors import StorageError
from stackllm.llm.backbone import Attention, Devices, frozen_model
from stackllm.llm.finite import finite_only
from stackllm.llm.locate import prepare
from stackllm.llm.machine import gpus, matrix_products, use_one_thread
from stackllm.store.digest import digest
from stackllm.store.units import MANIFEST, Unit, make_unit, open_unit, stored_key

_SHARD_ROWS = 112
"""Rows after which a shard is closed, once its last question is complete: of a GPU's, at least so many."""
_SHARD_PASSES = 8
"""Full passes that a shard gives a GPU, for which tokenising, hashing and publishing are then little."""
_SHARDS_EACH = 2
"""Shards that each of several GPUs gets at least, or some would wait for the last to end."""


class Item(Protocol):
    """What is read of one row."""

    @property
    def key(self) -> str:
        """Digest of its texts."""

    @property
    def question(self) -> str:
        """What it shares with its neighbours, which is read once for all of them."""

    @property
    def size(self) -> int:
        """Characters of what it does not share."""


class Text(NamedTuple):
    """A question and one response to it."""

    question: str
    response: str

    @property
    def key(self) -> str:
        """Digest of both."""
        return digest(self.question, self.response)

    @property
    def size(self) -> int:
        """Characters of the response."""
        return len(self.response)


def texts_of(rows: pl.DataFrame) -> list[Text]:
    """The texts of a table with columns ``question`` and ``response``, in its order."""
    return [Text(*pair) for pair in rows.select("question", "response").iter_rows()]


Reader = Callable[..., dict[str, np.ndarray]]
"""A function of a module that gets model, tokenizer, the items of a shard and what else it was given.

Items that share their question stand side by side. It gives arrays by name, a row or more an item."""


@dataclass(frozen=True)
class Weights:
    """A frozen language model as workers load it; see :func:`~stackllm.llm.backbone.frozen_model`."""

    backbone: str
    precision: str
    attention: Attention = "auto"
    devices: Devices = "one"
    without_top: int = 0


@dataclass(frozen=True)
class Rows:
    """Where rows stand in the cache, in the order in which they were asked for.

    Parameters
    ----------
    places
        Of each row, its shard's folder and its number in there.
    """

    places: Sequence[tuple[Path, int]]

    def take(self, name: str, path: Path | None = None) -> np.ndarray:
        """The rows of an array that every shard holds, ``(n_rows, …)``; one shard open at a time.

        Shards may hold it in different precisions: it is given in one that suits all. With ``path``
        it is a file there, written shard by shard, for what memory is not to hold at once.
        """
        wanted: dict[Path, list[tuple[int, int]]] = {}
        for row, (shard, place) in enumerate(self.places):
            wanted.setdefault(shard, []).append((row, place))
        each = (_open(shard, name) for shard in wanted)
        stored = [(it.shape[1:], it.dtype) for it in each]
        shape = (len(self.places), *(stored[0][0] if stored else ()))
        dtype = np.result_type(*{dtype for _, dtype in stored}) if stored else np.dtype(float)
        taken = (
            np.lib.format.open_memmap(path, "w+", dtype, shape) if path else np.empty(shape, dtype)
        )
        for shard, pairs in wanted.items():
            rows, numbers = np.array(pairs).T
            taken[rows] = _open(shard, name)[numbers]
        return taken


def _open(shard: Path, name: str) -> np.ndarray:
    """An array of a shard, memory-mapped."""
    array: np.ndarray = np.load(shard / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return array


@dataclass(frozen=True)
class RowCache:
    """Rows that one model reads in one way.

    Parameters
    ----------
    kind
        Folder below the root that runs share.
    version
        Of the code that reads.
    identity
        Digest of everything but the texts that decides the numbers.
    """

    kind: str
    version: int
    identity: str

    @property
    def folder(self) -> str:
        """Where the shards stand, below the root."""
        return f"{self.kind}/{self.identity[:16]}"

    def known(self, root: Path) -> dict[str, tuple[Path, int]]:
        """Shard and number of each cached row, by its key; shards that are damaged count as absent."""
        known: dict[str, tuple[Path, int]] = {}
        for manifest in sorted((root / self.folder).glob(f"*/{MANIFEST}")):
            try:
                unit = Unit(f"{self.folder}/{manifest.parent.name}", stored_key(manifest.parent))
                shard = open_unit(root, unit)
            except (StorageError, ValueError):
                continue
            for number, row in enumerate(np.load(shard / "keys.npy", allow_pickle=False)):
                known[row.decode()] = (shard, number)
        return known

    def ensure(
        self,
        items: Sequence[Item],
        engine: Engine,
        label: str,
        doing: str,
        weights: Weights,
        read: Reader,
        *args: Any,
        pass_rows: int = 0,
        check: Callable[[list[Any]], None] = lambda missing: None,
    ) -> Rows:
        """Read whatever is not in the cache.

        Parameters
        ----------
        items
            What is wanted; the same text may come again.
        engine
            Runs a unit a shard below ``engine.root``.
        label, doing
            What this work is called, and what is done with so many of so many.
        weights
            What reads.
        read, args
            Reads a shard.
        pass_rows
            Rows that fill a GPU's pass, if the reader has a budget that suits a GPU.
        check
            Told which items are missing, before any is read; may refuse.

        Raises
        ------
        PendingError
            In a dry run, if an item is not in the cache.
        StorageError
            If memory does not even hold one text, or a worker died again and again.
        """
        keys = [item.key for item in items]
        distinct = dict(zip(keys, items, strict=True))
        known = self.known(engine.root)
        planned = [
            [(key, item) for key, item in shard if key not in known]
            for shard in plan_shards(
                list(distinct.items()), _most(len(distinct), pass_rows, weights)
            )
        ]
        shards = [shard for shard in planned if shard]
        if shards:
            missing = [item for shard in shards for _, item in shard]
            engine.reporter.say(f"{label}: {len(missing)} of {len(distinct)} {doing}")
            check(missing)
            if not engine.dry_run:  # here and not in every worker at once
                prepare(weights.backbone, engine.reporter.say)
        tasks = [
            Task(
                self._unit([key for key, _ in shard]), read_shard, (shard, weights, read, args),
                gpu=weights.devices,
            )
            for shard in reversed(shards)  # the longest texts first
        ]  # fmt: skip
        engine.ensure(label, tasks)
        known = self.known(engine.root) if tasks else known
        return Rows([known[key] for key in keys])

    def _unit(self, keys: list[str]) -> Unit:
        """The unit of a shard: what decides its numbers, and the keys of the rows that it holds."""
        rows = digest(keys)
        return make_unit(f"{self.folder}/{rows[:24]}", self.version, self.identity, rows)


def read_shard(
    folder: Path,
    shard: list[tuple[str, Any]],
    weights: Weights,
    read: Reader,
    args: tuple[Any, ...],
) -> None:
    """Read the items of a shard and write ``keys`` and whatever arrays the reader gives."""
    model, tokenizer = frozen_model(
        weights.backbone, weights.precision, weights.attention, weights.devices, weights.without_top
    )
    use_one_thread()
    items = [item for _, item in shard]
    with matrix_products(weights.precision):
        arrays = finite_only(
            model, weights.backbone, weights.precision, lambda: read(model, tokenizer, items, *args)
        )
    np.save(folder / "keys.npy", np.array([key.encode() for key, _ in shard]))
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def _most(n_rows: int, pass_rows: int, weights: Weights) -> int:
    """Rows after which a shard is closed on this machine; the cache finds a row in whatever shard it is."""
    n_gpus = len(gpus())
    if not n_gpus:
        return _SHARD_ROWS
    n_shards = _SHARDS_EACH * n_gpus if n_gpus > 1 and weights.devices == "one" else 1
    return max(_SHARD_ROWS, min(_SHARD_PASSES * pass_rows, math.ceil(n_rows / n_shards)))


def plan_shards(
    rows: Sequence[tuple[str, Item]], most: int = _SHARD_ROWS
) -> list[list[tuple[str, Any]]]:
    """Rows, with their keys, of the same question side by side, short ones first, cut into shards.

    A shard is closed by the first question after it has ``most`` rows.
    """
    size: dict[str, int] = {}
    for _, item in rows:
        size[item.question] = max(size.get(item.question, 0), item.size)
    ordered = sorted(rows, key=lambda row: (size[row[1].question], row[1].question))
    shards: list[list[tuple[str, Any]]] = [[]]
    for _, group in groupby(ordered, key=lambda row: row[1].question):
        if len(shards[-1]) >= most:
            shards.append([])
        shards[-1] += group
    return [shard for shard in shards if shard]
