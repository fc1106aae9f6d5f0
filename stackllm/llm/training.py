"""Fine-tuning a classifier with transformers' Trainer, and predicting with it."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stackllm.engine.progress import note
from stackllm.errors import StackllmError, UsageError
from stackllm.llm.classifier import HEAD, Batch, logits

Collate = Callable[[np.ndarray], Batch]
"""Rows, int ``(n,)``, as a batch on the CPU."""


@dataclass(frozen=True)
class TrainingParams:
    """Settings of the optimiser.

    Parameters
    ----------
    epochs
        How often every row is seen.
    batch_size, accumulation
        Rows a pass, and passes a step. Out of memory lowers the first and raises the second, so that
        a step is of as many rows as before.
    learning_rate, head_learning_rate
        Of the adapters and of the head; both fall along a cosine after a warm-up.
    warmup
        Share of the steps in which the rates rise.
    weight_decay, max_grad_norm
        Decay of the weights; length to which gradients are clipped.
    label_smoothing
        Share of every label that is spread over all classes.
    patience
        Stop after so many epochs without a lower loss on a fifth of the *training* groups, which are
        then not trained on, and go back to the best epoch. 0 trains on everything for all epochs.
    report_to
        Trackers that transformers knows and that are installed, such as ``("tensorboard",)``.
    """

    epochs: float = 2.0
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-5
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    patience: int = 0
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.batch_size < 1 or self.accumulation < 1:
            raise UsageError("[member.training] epochs must be above 0, batch_size 1 or more.")
        if self.learning_rate <= 0 or self.head_learning_rate < 0:
            raise UsageError("[member.training] learning rates must be above 0.")
        if self.patience < 0:
            raise UsageError("[member.training] patience must be 0 or more.")
        if not 0 <= self.warmup < 1 or not 0 <= self.label_smoothing < 1:
            raise UsageError("[member.training] warmup and label_smoothing must be in [0, 1).")


class TrainingError(StackllmError):
    """A fine-tuning that cannot go on: its loss is no number any more."""

    exit_code = 65


def train(
    model: Any,
    rows: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    lengths: np.ndarray,
    collate: Collate,
    params: TrainingParams,
    seed: int,
    history: Path,
    validate: Callable[[], float] | None = None,
) -> None:
    """Fit adapters and head.

    Parameters
    ----------
    model
        From :func:`stackllm.llm.classifier.new_classifier`; trained in place.
    rows
        Which rows, int ``(n,)``.
    labels
        Their label probabilities, ``(n, n_classes)``.
    weights
        Their weights in the loss, ``(n,)``.
    lengths
        Their tokens, ``(n,)``: rows of like length go into one batch.
    collate
        Makes a batch of rows.
    params
        Settings.
    seed
        Of order and dropout.
    history
        Where each step's loss is written, a JSON object a line. Those who watch the unit get the
        same with its speed.
    validate
        Gives the loss that ``params.patience`` watches, after each epoch. None: no early stopping.

    Raises
    ------
    TrainingError
        If the loss is not finite.
    """
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    smoothed = (1 - params.label_smoothing) * labels + params.label_smoothing / labels.shape[1]
    items = [
        {"row": int(row), "labels": label.astype(np.float32), "weight": float(weight)}
        for row, label, weight in zip(rows, smoothed, weights, strict=True)
    ]
    of_a_step = params.batch_size * params.accumulation
    batch_size = params.batch_size
    start = {name: value.detach().clone() for name, value in _trained(model).items()}
    while True:
        try:
            trainer = _trainer(model, items, lengths, collate, params, batch_size, of_a_step, seed)
            trainer.add_callback(_history(history, batch_size))
            if validate is not None:
                trainer.add_callback(_early_stopping(model, validate, params.patience, history))
            trainer.train()
            _check_finite(model, "after the last step")
            break
        except RuntimeError as error:
            of_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
            if batch_size == 1 or not of_memory:
                raise
            batch_size = next(n for n in range(batch_size // 2, 0, -1) if of_a_step % n == 0)
            for name, value in _trained(model).items():
                value.data.copy_(start[name])
            model.zero_grad(set_to_none=True)


def predict(
    model: Any, rows: np.ndarray, lengths: np.ndarray, collate: Collate, batch_size: int = 32
) -> np.ndarray:
    """Class probabilities of rows, float64 ``(len(rows), n_classes)``.

    Parameters
    ----------
    model
        In evaluation mode.
    rows, lengths, collate
        As for :func:`train`.
    batch_size
        Rows a pass; halved when memory runs out.
    """
    import torch

    scores = read(logits, model, rows, lengths, collate, batch_size)
    probabilities: np.ndarray = torch.softmax(torch.from_numpy(scores).double(), dim=1).numpy()
    return probabilities


def read(
    function: Callable[[Any, Batch], Any],
    model: Any,
    rows: np.ndarray,
    lengths: np.ndarray,
    collate: Collate,
    batch_size: int = 32,
) -> np.ndarray:
    """What a function of model and batch gives for rows, in their order and without gradients.

    Parameters
    ----------
    function
        Such as :func:`~stackllm.llm.classifier.logits`: gives a tensor ``(n, width)``.
    model, rows, lengths, collate, batch_size
        As for :func:`predict`.

    Returns
    -------
    numpy.ndarray
        ``(len(rows), width)``.
    """
    import torch

    device = next(model.parameters()).device
    order = np.argsort(lengths, kind="stable")
    pieces: list[np.ndarray] = []
    at = 0
    while at < len(order):
        try:
            with torch.inference_mode():
                found = function(model, _moved(collate(rows[order[at : at + batch_size]]), device))
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            continue
        pieces.append(found.float().cpu().numpy())
        at += batch_size
    result = np.concatenate(pieces)
    back = np.empty_like(result)
    back[order] = result
    return back


def _history(path: Path, batch_size: int) -> Any:
    """A callback that writes every step's loss as it comes, and tells those who watch how fast it goes."""
    from transformers import TrainerCallback

    path.write_text("")

    class History(TrainerCallback):  # type: ignore[misc]
        """One JSON object a line."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in (logs or {}):
                return
            step, of = state.global_step, state.max_steps
            seconds = time.perf_counter() - self.started
            speed = {
                "tokens_per_second": round(state.num_input_tokens_seen / seconds, 1),
                "seconds_left": round(seconds / step * (of - step), 1),
            }
            _record(path, {"step": step, "of": of, "batch_size": batch_size, **logs}, **speed)

    return History()


def _record(path: Path, entry: dict[str, Any], **speed: float) -> None:
    """Write a line of the history; its speed goes to those who watch only, so that files are the same again."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    note({**entry, **speed})


def _early_stopping(model: Any, validate: Callable[[], float], patience: int, history: Path) -> Any:
    """A callback that stops when held-out groups gain no more, and takes the best epoch's weights."""
    from transformers import TrainerCallback

    class EarlyStopping(TrainerCallback):  # type: ignore[misc]
        """Watches the loss after each epoch."""

        def __init__(self) -> None:
            self.losses: list[float] = []
            self.best: dict[str, Any] = {}

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            model.eval()
            self.losses.append(validate())
            model.train()
            _record(history, {"epoch": state.epoch, "held_loss": self.losses[-1]})
            if self.losses[-1] <= min(self.losses):
                self.best = {name: p.detach().clone() for name, p in _trained(model).items()}
            at = self.losses.index(min(self.losses))
            control.should_training_stop |= len(self.losses) - 1 - at >= patience

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for name, value in _trained(model).items():
                value.data.copy_(self.best[name])

    return EarlyStopping()


def _trainer(
    model: Any,
    items: list[dict[str, Any]],
    lengths: np.ndarray,
    collate: Collate,
    params: TrainingParams,
    batch_size: int,
    of_a_step: int,
    seed: int,
) -> Any:
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_pt_utils import LengthGroupedSampler

    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)

    class Network(torch.nn.Module):  # type: ignore[misc]
        """The classifier as a module of its own, so that distributed training can wrap it."""

        def __init__(self) -> None:
            super().__init__()
            self.classifier = model

        def forward(self, batch: Batch) -> torch.Tensor:
            scores: torch.Tensor = logits(self.classifier, batch)
            return scores

    class WeightedTrainer(Trainer):  # type: ignore[misc]
        """Cross-entropy against label probabilities, a weight a row, rows of like length together."""

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            scores, labels = model(inputs["batch"]), inputs["labels"]
            losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
            self.state.num_input_tokens_seen += int(inputs["batch"].mask.sum())
            # the step's entries, not the pass's: each row counts alike however a step is cut
            entries = labels.numel() if num_items_in_batch is None else num_items_in_batch
            loss = (losses * inputs["weight"]).sum() * labels.shape[1] / entries
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss.item()} at step {self.state.global_step + 1}. "
                    "Lower learning_rate, or take bfloat16 or float32 weights."
                )
            return (loss, scores) if return_outputs else loss

        def _prepare_input(self, data: Any) -> Any:
            return (
                _moved(data, self.args.device)
                if isinstance(data, Batch)
                else (super()._prepare_input(data))
            )

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            generator = torch.Generator().manual_seed(seed)
            return LengthGroupedSampler(of_a_step, lengths=lengths.tolist(), generator=generator)

    def gather(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "batch": collate(np.array([item["row"] for item in chosen])),
            "labels": torch.from_numpy(np.stack([item["labels"] for item in chosen])),
            "weight": torch.tensor([item["weight"] for item in chosen]),
        }

    network = Network()
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written there: the unit saves the model
        num_train_epochs=params.epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=of_a_step // batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=params.warmup,
        max_grad_norm=params.max_grad_norm,
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        logging_steps=1,
        report_to=list(params.report_to),
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for several processes
    named = _trained(network)
    groups = [
        {"params": [p for name, p in named.items() if f".{HEAD}." not in name],
         "lr": params.learning_rate, "weight_decay": params.weight_decay},
        {"params": [p for name, p in named.items() if f".{HEAD}." in name],
         "lr": params.head_learning_rate, "weight_decay": params.weight_decay},
    ]  # fmt: skip
    trainer = WeightedTrainer(
        model=network,
        args=arguments,
        train_dataset=items,
        data_collator=gather,
        optimizers=(torch.optim.AdamW(groups), None),
    )
    trainer.model_accepts_loss_kwargs = True  # compute_loss is told how many rows a step has
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    return trainer


def _check_finite(model: Any, when: str) -> None:
    import torch

    for name, value in _trained(model).items():
        if not torch.isfinite(value).all():
            raise TrainingError(f"{name} is no number {when}. Lower learning_rate.")


def _trained(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _moved(batch: Batch, device: Any) -> Batch:
    def move(tensor: Any) -> Any:
        return None if tensor is None else tensor.to(device)

    return Batch(move(batch.ids), move(batch.states), move(batch.mask))
