"""What stage-one members read: label-free matrices of all rows, made once and memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from scipy.sparse import csr_matrix

from stackllm.errors import StorageError

VIEWS = ("words", "characters", "skeleton", "edges")
"""Names of the hashed n-gram matrices."""


@dataclass(frozen=True)
class Inputs:
    """Matrices of the same rows in the same order.

    Parameters
    ----------
    groups
        Number of each row's group, int ``(n_rows,)``.
    embedding
        Mean-pooled layers side by side, float32 ``(n_rows, n_layers * hidden)``.
    blocks
        Recipe columns, float64 ``(n_rows, n_columns)``.
    names
        Names of the recipe columns.
    counts
        Hashed n-gram counts of each view in :data:`VIEWS`, sparse ``(n_rows, n_buckets)``.
    """

    groups: np.ndarray
    embedding: np.ndarray
    blocks: np.ndarray
    names: tuple[str, ...]
    counts: dict[str, csr_matrix]


def save_inputs(folder: Path, inputs: Inputs) -> None:
    """Write inputs as ``.npy`` and Parquet files into ``folder``."""
    np.save(folder / "groups.npy", inputs.groups)
    np.save(folder / "embedding.npy", inputs.embedding)
    pl.DataFrame(inputs.blocks, schema=list(inputs.names)).write_parquet(folder / "blocks.parquet")
    for view, matrix in inputs.counts.items():
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
            np.load(folder / "embedding.npy", mmap_mode="r", allow_pickle=False),
            blocks.to_numpy(),
            tuple(blocks.columns),
            counts,
        )
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be read ({error.strerror}). Run the same command again."
        ) from error
