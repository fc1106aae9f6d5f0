"""Fine-tuning folds x seeds from the cached trunk, against the same grid without it.

Two rivals in the same run, on the same rows, in the same precision, for as many epochs: plain LoRA on
all layers, and LoRA on the same top layers without the cache, which must reach the same losses. Time
counts everything from texts to out-of-fold predictions; the trunk's includes filling the cache.
``--data DIR`` names a folder with ``train.csv``; its first groups are used. Without it the shipped
sample is.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Figure, Result, main
from stackllm.crossfit.folds import group_folds
from stackllm.crossfit.targets import Targets
from stackllm.engine.local import Engine
from stackllm.engine.progress import Reporter
from stackllm.finetune import train as training
from stackllm.finetune.dataset import Examples, TrainingParams
from stackllm.finetune.model import LoraParams, new_classifier
from stackllm.llm.prompts import PromptParams
from stackllm.llm.trunk import cache_trunk
from stackllm.members import decoder
from stackllm.members.decoder import DecoderParams
from stackllm.members.inputs import Inputs, save_texts, save_trunk, trunk_folder
from stackllm.members.warm_head import warm_head
from stackllm.metrics import bootstrap_error, row_losses
from stackllm.tables.contest import TableParams, read_training

SAMPLE = Path(__file__).parents[1] / "examples" / "seven_voices"
TOP = 4


@dataclasses.dataclass(frozen=True)
class Grid:
    """Rows, folds and seeds of a grid."""

    inputs: Inputs
    labels: np.ndarray
    folds: np.ndarray
    seeds: tuple[int, ...]
    n_classes: int


def measure(quick: bool, data: Path | None) -> Result:
    """Run the three grids and compare their times and losses."""
    n_groups, n_folds, seeds = (6, 2, (0,)) if quick else (15, 5, (0, 1, 2))
    cached = DecoderParams(
        trainable_layers=TOP,
        prompt=PromptParams(max_length_prompt=64, max_length_answer=128),
        lora=LoraParams(r=8),
        training=TrainingParams(
            epochs=1, batch_size=8, learning_rate=1e-3, head_learning_rate=1e-3
        ),
    )
    plain = dataclasses.replace(cached, trainable_layers="all")
    with tempfile.TemporaryDirectory() as name:
        grid, rows, groups = _grid(data or SAMPLE, Path(name), n_groups, n_folds, seeds)
        started = time.perf_counter()
        engine = Engine(Path(name) / "cache", 1, Reporter(quiet=True))
        trunk = cached.trunk
        assert trunk is not None
        table = cache_trunk(rows, trunk, engine)
        index = Path(trunk_folder(grid.inputs.folder, trunk))
        index.mkdir()
        save_trunk(index, table)
        caching = time.perf_counter() - started
        of_trunk, trunk_seconds = _play(grid, cached, Path(name), cache=True)
        of_same, same_seconds = _play(grid, cached, Path(name), cache=False)
        of_plain, plain_seconds = _play(grid, plain, Path(name), cache=True)
    losses = {
        kind: row_losses(found, grid.labels)
        for kind, found in (("trunk", of_trunk), ("same", of_same), ("plain", of_plain))
    }
    difference = losses["trunk"] - losses["plain"]
    error = bootstrap_error(difference, groups, 0)
    figures = {
        "trunk_vs_peft_time": Figure((caching + trunk_seconds) / plain_seconds, 0.2),
        "trunk_vs_same_weights_time": Figure((caching + trunk_seconds) / same_seconds, 0.4),
        "trunk_vs_peft_logloss_delta": Figure(float(difference.mean()), error),
        "trunk_vs_same_weights_logloss_delta": Figure(
            float(abs((losses["trunk"] - losses["same"]).mean())), 0.01
        ),
    }
    return Result(
        figures,
        {
            "data": (data or SAMPLE).name,
            "rows": len(grid.labels),
            "groups": n_groups,
            "folds": n_folds,
            "seeds": len(seeds),
            "params": dataclasses.asdict(cached),
            "precision": cached.chosen_precision,
            "caching_seconds": caching,
            "trunk_seconds": trunk_seconds,
            "same_weights_seconds": same_seconds,
            "peft_seconds": plain_seconds,
            "logloss": {kind: float(loss.mean()) for kind, loss in losses.items()},
            "trunk_vs_peft_logloss_delta_error": error,
            "trunk_vs_same_weights_largest_probability_difference": float(
                np.abs(of_trunk - of_same).max()
            ),
        },
    )


def _grid(source: Path, folder: Path, n_groups: int, n_folds: int, seeds: tuple[int, ...]) -> tuple:
    params = TableParams(train=str(source / "train.csv"), test=str(source / "test.csv"))
    table = read_training(params)
    kept = table.train["group_id"].unique(maintain_order=True)[:n_groups]
    rows = table.train.filter(table.train["group_id"].is_in(kept.to_list()))
    groups = np.unique(rows["group_id"].to_numpy(), return_inverse=True)[1]
    inputs = folder / "inputs"
    inputs.mkdir()
    save_texts(inputs, rows)
    empty = np.zeros((len(rows), 0))
    folds = group_folds(rows["group_id"].to_numpy(), n_folds, 0)
    labels = rows["label"].to_numpy().astype(np.int64)
    own = Inputs(groups, empty, empty, (), {}, inputs)
    return Grid(own, labels, folds, seeds, len(table.classes)), rows, groups


def _play(grid: Grid, params: DecoderParams, folder: Path, cache: bool) -> tuple[np.ndarray, float]:
    """Out-of-fold probabilities, averaged over seeds, and seconds."""
    started = time.perf_counter()
    total = np.zeros((len(grid.labels), grid.n_classes))
    for fold in range(int(grid.folds.max()) + 1):
        train, own = np.flatnonzero(grid.folds != fold), np.flatnonzero(grid.folds == fold)
        every = np.ones(len(train))
        targets = Targets(train, grid.labels[train], every, every > 0, grid.n_classes)
        for seed in grid.seeds:
            if cache:
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    decoder.fit(grid.inputs, targets, params, seed, Path(place))
                    total[own] += decoder.predict(grid.inputs, own, Path(place))
            else:
                total[own] += _without_cache(grid, params, targets, own, seed, folder)
    return total / len(grid.seeds), time.perf_counter() - started


def _without_cache(
    grid: Grid, params: DecoderParams, targets: Targets, own: np.ndarray, seed: int, folder: Path
) -> np.ndarray:
    """The same weights trained, every text read through all layers."""
    model, tokenizer = new_classifier(
        params.backbone,
        params.chosen_precision,
        grid.n_classes,
        params.lora,
        params.n_trained,
        seed,
    )
    whole = dataclasses.replace(params, trainable_layers="all")
    lengths, collate = decoder.sequences(grid.inputs, whole, tokenizer)
    labels = np.eye(grid.n_classes)[targets.labels]
    warm_head(model, grid.inputs.groups, targets, lengths, collate, seed)
    examples = Examples(targets.rows, labels, targets.weights, lengths[targets.rows], collate)
    training.train(model, examples, params.training, seed, folder / "metrics.jsonl")
    model.eval()
    return training.predict(model, own, lengths[own], collate)


if __name__ == "__main__":
    main("decoder", measure)
