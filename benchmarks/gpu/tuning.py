"""Fine-tuning: a small grid of folds and seeds as a run plays it, beside peft with transformers' Trainer."""

from __future__ import annotations

import hashlib
import importlib.util
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.measure import Watch, compared, peak, wait
from benchmarks.gpu.models import N_CLASSES, byte_tokenizer, device, free, make_rows
from stackllm.crossfit.design import Design, Fit
from stackllm.finetune.dataset import TrainingParams
from stackllm.finetune.model import LoraParams
from stackllm.llm.prompts import PromptParams, make_prompts
from stackllm.members.decoder import DecoderParams

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

    from stackllm.members.build import StoredInputs

FOLDS = 2
_LONGEST = 256
_NAME = "grid"


@dataclass(frozen=True)
class Task:
    """Rows, who is in which fold, and how the member is trained.

    Parameters
    ----------
    rows
        As of :func:`~benchmarks.gpu.models.make_rows`; the last groups are the test's.
    design
        Folds and labels.
    params
        The member's settings.
    """

    rows: pl.DataFrame
    design: Design
    params: DecoderParams


@dataclass(frozen=True)
class Played:
    """A grid that was played: what was watched, and what it left in ``folder``.

    Parameters
    ----------
    watch
        Loads, and seconds.
    caching, units
        Seconds of filling the trunk's cache, and of each unit.
    folder
        The run's.
    peaks
        Peaks of memory in GiB.
    """

    watch: Watch
    caching: float
    units: list[float]
    folder: Path
    peaks: dict[str, Any]

    @property
    def digests(self) -> dict[str, str]:
        """Of each model's adapter, by unit."""
        return {
            str(path.parent.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("adapter_model.safetensors"))
        }


def make_task(
    bench: Bench,
    name: str,
    layers: int | Literal["all"],
    precision: str = "auto",
    n_groups: int = 256,
) -> Task:
    """Whole groups dealt to two folds, and two for the test."""
    n_groups = bench.size(4, n_groups)
    longest = bench.size(24, _LONGEST)
    rows = make_rows(n_groups + 2, longest)
    groups = np.repeat(np.arange(n_groups + 2), N_CLASSES)
    of_train = groups[: n_groups * N_CLASSES]
    labels = np.arange(len(of_train)) % N_CLASSES
    design = Design(labels, of_train % FOLDS, np.repeat([0, 1], N_CLASSES), groups, N_CLASSES)
    params = DecoderParams(
        bench.backbone(name),
        precision,
        layers,
        seeds=(0,) if bench.tiny else (0, 1),
        prompt=PromptParams(max_length_answer=longest),
        lora=LoraParams(r=8, target_modules=TARGETS),
        training=TrainingParams(epochs=1, batch_size=16, learning_rate=1e-3),
    )
    return Task(rows, design, params)


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def play(bench: Bench, task: Task, backwards: bool = False, room: int | None = None) -> Played:
    """Cross-fit the member as a run does: its inputs, its trunk, its units one after the other.

    Parameters
    ----------
    bench
        Gives the folder.
    task
        What is trained.
    backwards
        The last fold and seed first.
    room
        As for :class:`~benchmarks.gpu.measure.Watch`.
    """
    from stackllm.engine.local import read_timings
    from stackllm.members.build import index_trunk
    from stackllm.members.registry import Member
    from stackllm.members.stage import cross_fit_members

    params, fits = task.params, task.design.first_fits()
    if backwards:
        params, fits = replace(params, seeds=params.seeds[::-1]), fits[::-1]
    peaks: dict[str, Any] = {}
    with _workspace(bench) as workspace, Watch(room).watching() as watch:
        inputs = store_inputs(task, workspace.root)
        start = time.perf_counter()
        with peak(peaks, "caching"):
            if params.trunk:
                index_trunk(_NAME, task.rows, params.trunk, workspace)
        caching = time.perf_counter() - start
        before = dict(watch.seconds)
        with peak(peaks, "units"):
            cross_fit_members(
                [Member("decoder", "decoder", params)],
                fits,
                task.design,
                inputs,
                0,
                workspace.run,
                lambda trunk: index_trunk(_NAME, task.rows, trunk, workspace),
            )
        watch.seconds["loading"] -= before.get("loading", 0.0)
        timings = read_timings(workspace.root)
    of_units = [taken for unit, taken in timings.items() if unit.startswith("members/")]
    return Played(watch, caching, of_units, workspace.root, peaks)


def store_inputs(task: Task, root: Path) -> StoredInputs:
    """Write what the member reads, which is texts; matrices that others read are empty."""
    from scipy.sparse import csr_matrix

    from stackllm.members.build import StoredInputs
    from stackllm.members.inputs import VIEWS, Inputs, save_inputs, save_texts

    folder, n = root / "inputs" / _NAME, len(task.rows)
    folder.mkdir(parents=True)
    empty, counts = np.zeros((n, 0), np.float32), csr_matrix((n, 1), dtype=np.float32)
    none = Inputs(task.design.groups, empty, empty, (), dict.fromkeys(VIEWS, counts))
    save_inputs(folder, none)
    save_texts(folder, task.rows)
    return StoredInputs(folder, {"inputs": "none", "texts": _NAME})


@contextmanager
def _workspace(bench: Bench) -> Iterator[Any]:
    """A run of its own among the artifacts of this benchmark; its units are computed by this process."""
    from stackllm.workspace import open_workspace

    artifacts = Path(mkdtemp(dir=bench.folder))
    with open_workspace("run", artifacts, n_jobs=1, quiet=True) as workspace:
        yield workspace


def grid(
    bench: Bench,
    name: str,
    layers: int | Literal["all"],
    precision: str = "auto",
    n_groups: int = 256,
) -> dict[str, Any]:
    """Two folds and two seeds: what a unit takes, how much of it is loading and saving, what memory it wants."""
    if precision == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        return {"skipped": "bitsandbytes is not installed"}
    task = make_task(bench, name, _top(bench, layers), precision, n_groups)
    played = play(bench, task)
    watch, shape = played.watch, bench.shape(name)
    trained = _tokens(task, task.design.first_fits()[0])
    training = watch.seconds["training"] / len(played.units)
    n_layers = shape.layers if task.params.n_trained is None else task.params.n_trained
    return {
        "layers": task.params.trainable_layers,
        "precision": task.params.chosen_precision,
        "rows": len(task.design.labels) // FOLDS,
        "tokens": trained,
        "caching_seconds": played.caching,
        "unit_seconds": statistics.median(played.units),
        "units_seconds": played.units,
        "training_tokens_s": trained / training,
        # forwards once, backwards once: no gradients of the weights themselves
        "utilisation": bench.utilisation(2 * n_layers * shape.layer_weights, trained, training),
        "loading_seconds": watch.seconds["loading"],
        "saving_seconds": watch.seconds["saving"],
        "loading_saving_share": (watch.seconds["loading"] + watch.seconds["saving"])
        / sum(played.units),
        "loads": len(watch.copies),
        "copies_alive": watch.copies,
        "peak_gib": played.peaks["units"],
        "caching_peak_gib": played.peaks["caching"],
        **compared(_estimate(task), played.peaks["units"]),
    }


def _estimate(task: Task) -> int:
    """Bytes that the product expects a unit to take, with the passes that it plans on this machine."""
    from stackllm.finetune.memory import training_needs
    from stackllm.llm.backbone import load_skeleton
    from stackllm.llm.estimate import sizes_of_skeleton
    from stackllm.members.decoder import plan

    params = replace(task.params, precision=task.params.chosen_precision)
    longest = max(map(len, _sequences(task, np.arange(len(task.rows)))))
    needs = training_needs(
        sizes_of_skeleton(load_skeleton(params.backbone)), params.precision, params.lora,
        params.training, longest, params.n_trained, params.trunk is not None,
    )  # fmt: skip
    planned = plan(params, params.training, longest)
    if planned is None:  # without a GPU
        return needs.of(params.training.batch_size, checkpointing=False)
    return needs.of(planned.batch_size, planned.checkpointing)


def _top(bench: Bench, layers: int | Literal["all"]) -> int | Literal["all"]:
    return 1 if bench.tiny and layers != "all" else layers


def _tokens(task: Task, fit: Fit) -> int:
    """Tokens of the rows that a fit trains on."""
    return sum(map(len, _sequences(task, fit.targets.rows)))


def _sequences(task: Task, rows: np.ndarray) -> list[list[int]]:
    """Token ids of some rows, as the member reads them."""
    texts = task.rows.select("question", "response").iter_rows()
    prompts = make_prompts(byte_tokenizer(), texts, task.params.prompt)
    every = [[*prompt.prefix, *ids] for prompt in prompts for ids in prompt.responses]
    return [every[row] for row in rows]


def peft_unit(bench: Bench, name: str, n_groups: int = 256) -> dict[str, Any]:
    """The first unit with all layers as notebooks do it: peft and Trainer, autocast, batches of like length.

    The same token ids, adapters, batches, rates and rows, trained on and predicted.
    """
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    task = make_task(bench, name, "all", n_groups=n_groups)
    fit = task.design.first_fits()[0]
    folder = Path(mkdtemp(dir=bench.folder))
    lora, training = task.params.lora, task.params.training
    strategy = "train_sampling_strategy"  # older releases have a switch instead
    known = strategy in {it.name for it in fields(TrainingArguments)}
    like_length = {strategy: "group_by_length"} if known else {"group_by_length": True}
    result: dict[str, Any] = {}
    with peak(result, "peak_gib"):
        start = time.perf_counter()
        model = AutoModelForSequenceClassification.from_pretrained(
            task.params.backbone, num_labels=N_CLASSES, dtype=torch.bfloat16
        ).to(device())
        model = get_peft_model(
            model,
            LoraConfig(
                task_type=TaskType.SEQ_CLS, r=lora.r, lora_alpha=lora.alpha,
                lora_dropout=lora.dropout, target_modules=list(TARGETS), modules_to_save=["score"],
            ),
        )  # fmt: skip
        result["loading_seconds"] = time.perf_counter() - start
        trainer = Trainer(
            model,
            TrainingArguments(
                str(folder), num_train_epochs=training.epochs,
                per_device_train_batch_size=training.batch_size, per_device_eval_batch_size=32,
                learning_rate=training.learning_rate, bf16=True, bf16_full_eval=True,
                **like_length, save_strategy="no", report_to=[],
                disable_tqdm=True, logging_strategy="no", use_cpu=device() == "cpu",
            ),
            train_dataset=_labelled(task, fit.targets.rows),
            data_collator=DataCollatorWithPadding(byte_tokenizer()),
        )  # fmt: skip
        trained = time.perf_counter()
        trainer.train()
        wait()
        result["training_seconds"] = time.perf_counter() - trained
        trainer.predict(_labelled(task, fit.predict))
        model.save_pretrained(folder / "adapter")
        result["unit_seconds"] = time.perf_counter() - start
    tokens = _tokens(task, fit)
    return result | {"tokens": tokens, "training_tokens_s": tokens / result["training_seconds"]}


def _labelled(task: Task, rows: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(row) % N_CLASSES}
        for row, ids in zip(rows, _sequences(task, rows), strict=True)
    ]


def room_for_one(bench: Bench, name: str, layers: int | Literal["all"]) -> dict[str, Any]:
    """The grid where one copy of the model has room and two have not. Does it end?

    On a GPU this process may take half as much again as the weights; on a CPU loading a second copy
    raises what a full GPU raises.
    """
    import torch

    task = make_task(bench, name, _top(bench, layers), "bfloat16", n_groups=24)
    weights = sum(path.stat().st_size for path in Path(task.params.backbone).glob("*.safetensors"))
    on_gpu = device() == "cuda"
    result: dict[str, Any] = {"weights_gib": weights / 2**30, "layers": layers}
    free()
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5 * weights / total))
    try:
        played = play(bench, task, room=None if on_gpu else 1)
    except Exception as error:  # whatever it is, the figure is that it did not end
        return result | {"ended": False, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    finally:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return result | {
        "ended": True, "loads": len(played.watch.copies), "peak_gib": played.peaks["units"],
    }  # fmt: skip


def same_bytes(bench: Bench, name: str) -> dict[str, Any]:
    """The grid from the trunk twice, the second time from its end: does a model depend on those before it?"""
    task = make_task(bench, name, _top(bench, 4), n_groups=24)
    first, second = (play(bench, task, backwards).digests for backwards in (False, True))
    return {
        "units": len(first),
        "same": sum(first[unit] == second[unit] for unit in first) / len(first),
        "distinct": len(set(first.values())) / len(first),
    }
