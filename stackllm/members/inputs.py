"""What stage-one members read: label-free matrices of all rows, made once and memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import polars as pl
from scipy.sparse import csr_matrix

from stackllm.errors import StorageError
from stackllm.llm.trunk import Trunk, TrunkParams

View = Literal["words", "characters", "skeleton", "edges"]
VIEWS: tuple[str, ...] = get_args(View)
"""Names of the hashed n-gram matrices."""

EMBEDDING = "embedding.npy"
"""File in the folder of the inputs that holds the embedding."""

_TEXTS, _TRUNK = "texts.parquet", "trunk.parquet"


@dataclass(frozen=True)
class Inputs:
    """Matrices of the same rows in the same order.

    Parameters
    ----------
    groups
        Number of each row's group, int ``(n_rows,)``.
    embedding
        Mean-pooled layers side by side, float16 or float32 ``(n_rows, n_layers * hidden)``. Compute
        with it in float32.
    blocks
        Recipe columns, float64 ``(n_rows, n_columns)``.
    names
        Names of the recipe columns.
    counts
        Hashed n-gram counts of each view in :data:`VIEWS`, sparse ``(n_rows, n_buckets)``.
    folder
        Where they stand; :func:`read_texts` and :func:`read_trunk` look there.
    start
        Where that stands which the models of a place start from, if they share it.
    """

    groups: np.ndarray
    embedding: np.ndarray
    blocks: np.ndarray
    names: tuple[str, ...]
    counts: dict[str, csr_matrix]
    folder: Path = Path()
    start: Path | None = None


def categorical(names: Sequence[str]) -> list[int]:
    """Places of the columns that hold the number of a category: those whose names end in ``_code``."""
    return [i for i, name in enumerate(names) if name.endswith("_code")]


def save_inputs(folder: Path, inputs: Inputs) -> None:
    """Write inputs as ``.npy`` and Parquet files into ``folder``."""
    np.save(folder / EMBEDDING, inputs.embedding)
    save_blocks(folder, inputs.groups, pl.DataFrame(inputs.blocks, schema=list(inputs.names)))
    for view, matrix in inputs.counts.items():
        save_counts(folder, view, matrix)


def save_blocks(folder: Path, groups: np.ndarray, blocks: pl.DataFrame) -> None:
    """Write each row's group number and recipe columns into ``folder``."""
    np.save(folder / "groups.npy", groups)
    blocks.write_parquet(folder / "blocks.parquet")


def save_counts(folder: Path, view: str, matrix: csr_matrix) -> None:
    """Write the n-gram counts of one view, float32 ``(n_rows, n_buckets)``, into ``folder``."""
    for part in ("data", "indices", "indptr"):
        np.save(folder / f"{view}_{part}.npy", getattr(matrix, part))
    np.save(folder / f"{view}_shape.npy", np.array(matrix.shape))


def load_inputs(folder: Path) -> Inputs:
    """Open inputs; matrices are memory-mapped, so that workers share them.

    Raises
    ------
    StorageError
        If a file is missing.
    """
    try:
        blocks = pl.read_parquet(folder / "blocks.parquet")
        counts = {}
        for view in VIEWS:
            data, indices, indptr, shape = (
                np.load(folder / f"{view}_{part}.npy", mmap_mode="r", allow_pickle=False)
                for part in ("data", "indices", "indptr", "shape")
            )
            counts[view] = csr_matrix((data, indices, indptr), shape=tuple(shape), copy=False)
        return Inputs(
            np.load(folder / "groups.npy", allow_pickle=False),
            np.load(folder / EMBEDDING, mmap_mode="r", allow_pickle=False),
            blocks.to_numpy(),
            tuple(blocks.columns),
            counts,
            folder,
        )
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be read ({error.strerror}). Run the same command again."
        ) from error


def save_texts(folder: Path, rows: pl.DataFrame) -> None:
    """Write ``question, response`` of every row into the folder of the inputs."""
    rows.select("question", "response").write_parquet(folder / _TEXTS)


def read_texts(inputs: Inputs) -> pl.DataFrame:
    """``question, response`` of every row."""
    return pl.read_parquet(inputs.folder / _TEXTS)


def trunk_folder(inputs: str | Path, params: TrunkParams) -> str:
    """Where the index of a trunk's output stands: beside the folder of the inputs."""
    return f"{inputs}_trunk_{params.identity[:16]}"


def save_trunk(folder: Path, table: pl.DataFrame) -> None:
    """Write the table of :func:`stackllm.llm.trunk.cache_trunk`, its shards as seen from ``folder``.

    So artifacts that are moved as a whole stay what they are.
    """
    here = folder.resolve()
    shards = [os.path.relpath(shard, here) for shard in table["shard"]]
    table.with_columns(shard=pl.Series(shards)).write_parquet(folder / _TRUNK)


def read_trunk(inputs: Inputs, params: TrunkParams) -> Trunk:
    """The trunk's output of every row.

    Raises
    ------
    StorageError
        If it was not cached for these inputs.
    """
    path = Path(trunk_folder(inputs.folder, params)) / _TRUNK
    if not path.is_file():
        raise StorageError(f"{path}: the trunk is not cached. Run the same command again.")
    table = pl.read_parquet(path)
    shards = [str(path.parent / shard) for shard in table["shard"]]
    return Trunk(table.with_columns(shard=pl.Series(shards)))
