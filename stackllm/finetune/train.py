"""Fine-tuning a classifier with transformers' Trainer, and predicting with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stackllm.engine import ranks
from stackllm.engine.progress import trackers_folder
from stackllm.engine.trackers import tracking
from stackllm.errors import TrainingError, UsageError
from stackllm.finetune.dataset import Collate, Examples, TrainingParams
from stackllm.finetune.memory import Fitting, Plan
from stackllm.finetune.model import Batch, logits, trained
from stackllm.finetune.resume import load_batch_size
from stackllm.llm.layers import plain
from stackllm.llm.machine import matrix_products
from stackllm.llm.memory import halving, within_memory
from stackllm.store.checkpoints import checkpoint

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn


def train(
    model: PeftModel,
    examples: Examples,
    params: TrainingParams,
    seed: int,
    history: Path,
    validate: Callable[[], float] | None = None,
    plan: Plan | None = None,
) -> None:
    """Fit adapters and head.

    Parameters
    ----------
    model
        From :func:`stackllm.finetune.model.new_classifier`; trained in place.
    examples
        What it learns from.
    params
        Settings.
    seed
        Of order and dropout.
    history
        Where each step's loss is written, a JSON object a line. Those who watch the unit get the
        same with its speed.
    validate
        Gives the loss that ``params.patience`` watches, after each epoch. None: no early stopping.
    plan
        Rows per pass to begin with, and whether layers are computed twice. None: as ``params`` say,
        where ``"auto"`` is no checkpointing. What fits where it does not is remembered, for this
        process and beside the units, so that no later training finds it out again.

    A training that was cut off goes on from its last state on disk, to the same weights.

    Raises
    ------
    TrainingError
        If the loss is not finite, or gradients overflow float16 however little the loss is scaled up.
    StorageError
        If memory does not even hold one row per pass.
    """
    from stackllm.finetune.callbacks import EarlyStopping, History, Saving
    from stackllm.finetune.trainer import make_trainer

    examples = examples.smoothed(params.label_smoothing)
    start = {name: value.detach().clone() for name, value in trained(model).items()}
    before = checkpoint()
    plan = plan or Plan(params.batch_size, params.checkpointing is True)
    set_checkpointing(model, plan.checkpointing, params.checkpointing is True)
    fitting = Fitting(model, int(examples.lengths.max()), plan)

    def attempt(batch_size: int) -> None:
        nonlocal before
        state, before = before, None  # one that ran out of memory starts anew
        for name, value in trained(model).items():
            value.data.copy_(start[name])
        model.zero_grad(set_to_none=True)
        trainer = make_trainer(model, examples, params, batch_size, seed)
        watchers = params.report_to if not ranks.rank() else ()
        with tracking(watchers, trackers_folder(), dataclasses.asdict(params)) as track:
            record = History(history, batch_size, state, track)
            trainer.add_callback(record)
            stopping = None
            if validate is not None:
                stopping = EarlyStopping(model, validate, params.patience, record, state)
                trainer.add_callback(stopping)
            trainer.add_callback(Saving(trainer, record, stopping))
            with matrix_products(_half_precision(model)):
                trainer.train(resume_from_checkpoint=None if state is None else str(state))
        if not is_finite(model):
            raise TrainingError("weights are no numbers after the last step. Lower learning_rate.")
        fitting.save(batch_size)

    batch_size = ranks.from_first(fitting.load() if before is None else load_batch_size(before))
    if ranks.rank():  # rank 0 may have had room, and must not wait for us
        attempt(batch_size)
        return
    least = 1 if ranks.size() == 1 else batch_size
    halving(
        batch_size,
        attempt,
        f"{least} rows per pass. Lower batch_size (and raise accumulation as much), max_length_answer or "
        'trainable_layers, or set checkpointing = true, optimizer = "adamw_8bit" or precision = "nf4".',
        least,
    )


def predict(
    model: PeftModel, rows: np.ndarray, lengths: np.ndarray, collate: Collate, batch_size: int = 32
) -> np.ndarray:
    """Class probabilities of rows, float64 ``(len(rows), n_classes)``.

    Parameters
    ----------
    model
        In evaluation mode.
    rows, lengths, collate
        As for :class:`Examples`.
    batch_size
        Rows a pass; halved when memory runs out.
    """
    import torch

    scores = read(logits, model, rows, lengths, collate, batch_size)
    probabilities: np.ndarray = torch.softmax(torch.from_numpy(scores).double(), dim=1).numpy()
    return probabilities


def read(
    function: Callable[[PeftModel, Batch], Tensor],
    model: PeftModel,
    rows: np.ndarray,
    lengths: np.ndarray,
    collate: Collate,
    batch_size: int = 32,
) -> np.ndarray:
    """What a function of model and batch gives for rows, in their order and without gradients.

    Parameters
    ----------
    function
        Such as :func:`~stackllm.finetune.model.logits`: gives a tensor ``(n, width)``.
    model, rows, lengths, collate, batch_size
        As for :func:`predict`.

    Returns
    -------
    numpy.ndarray
        ``(len(rows), width)``.

    Raises
    ------
    TrainingError
        If a number of it is not finite: some families' states overflow float16.
    StorageError
        If memory does not even hold one row per pass.
    """
    import torch

    device = next(model.parameters()).device
    order = np.argsort(lengths, kind="stable")
    pieces: list[np.ndarray] = []

    def go_on(size: int) -> None:
        for at in range(sum(map(len, pieces)), len(order), size):
            with torch.inference_mode():
                result = function(model, collate(rows[order[at : at + size]]).to(device))
            pieces.append(result.float().cpu().numpy())

    within_memory(int(lengths.max()), batch_size, go_on, model)
    result = np.concatenate(pieces)
    if not np.isfinite(result).all():  # before anything is stored or learnt of it
        raise TrainingError(
            "what the model makes of a text are no finite numbers. Set precision to "
            '"bfloat16" or "float32", or take another backbone.'
        )
    back = np.empty_like(result)
    back[order] = result
    return back


def set_checkpointing(model: PeftModel, wanted: bool, asked: bool = False) -> None:
    """Have layers computed again for their gradients, or kept.

    Raises
    ------
    UsageError
        If the user ``asked`` for it, and transformers does not do it for such a model.
    """
    inner = plain(model)
    if not wanted:
        if inner.is_gradient_checkpointing:
            inner.gradient_checkpointing_disable()
        return
    if not inner.supports_gradient_checkpointing:
        if asked:
            raise UsageError(
                f"checkpointing: transformers has none for {type(inner).__name__}. Leave it out, and lower "
                "batch_size (and raise accumulation as much) where memory runs out."
            )
        return
    # newer transformers warn of the older name
    newer = getattr(inner, "activation_checkpointing_enable", None)
    (newer or inner.gradient_checkpointing_enable)({"use_reentrant": False})
    if hasattr(inner, "_require_grads_hooks") or hasattr(inner, "_require_grads_hook"):
        inner.disable_input_require_grads()  # or gradients would go down through layers that learn nothing


def _half_precision(model: PeftModel) -> str:
    """The half precision that frozen weights are computed in; else "float32"."""
    kinds = {str(value.dtype).removeprefix("torch.") for value in model.parameters()}
    return next((kind for kind in ("bfloat16", "float16") if kind in kinds), "float32")


def is_finite(model: nn.Module) -> bool:
    """Are all trained weights numbers?"""
    import torch

    return all(bool(torch.isfinite(value).all()) for value in trained(model).values())
