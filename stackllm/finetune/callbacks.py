"""What happens beside a training: its history, early stopping, and states that it can resume from."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from stackllm.engine import ranks
from stackllm.engine.progress import note
from stackllm.engine.trackers import Track
from stackllm.finetune.model import trained
from stackllm.finetune.resume import save_state
from stackllm.store.checkpoints import keep
from stackllm.store.records import append_json, read_json, write_json

SAVE_SECONDS = 300.0
"""Least time between two states of a training on disk: most of what a killed one repeats."""

HISTORY, _EPOCHS, _BEST = "metrics.jsonl", "epochs.json", "best.safetensors"


class History(TrainerCallback):  # type: ignore[misc]
    """Writes every step's loss as it comes, and tells those who watch how fast it goes.

    Parameters
    ----------
    path
        Gets one JSON object a line.
    batch_size
        Rows of a pass.
    before
        State that the training resumes from.
    track
        Tells trackers.
    """

    def __init__(self, path: Path, batch_size: int, before: Path | None, track: Track) -> None:
        self.path = path
        self._track = track
        self._batch_size, self._newest = batch_size, 0
        path.write_bytes((before / HISTORY).read_bytes() if before else b"")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()
        self._tokens, self._step = state.num_input_tokens_seen, state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write a step."""
        if "loss" not in (logs or {}):
            return
        step, of = state.global_step, state.max_steps
        seconds = time.perf_counter() - self._started
        speed = {
            "tokens_per_second": round((state.num_input_tokens_seen - self._tokens) / seconds, 1),
            "seconds_left": round(seconds / (step - self._step) * (of - step), 1),
        }
        self.record({"step": step, "of": of, "batch_size": self._batch_size, **logs}, **speed)

    def record(self, entry: dict[str, Any], **speed: float) -> None:
        """Write a line; its speed goes to those who watch only, so that files are the same again."""
        append_json(self.path, entry)
        note({**entry, **speed})
        self._newest = entry.get("step", self._newest)  # an epoch's loss is of after its last step
        self._track({**entry, **speed}, self._newest)


class EarlyStopping(TrainerCallback):  # type: ignore[misc]
    """Stops when held-out groups gain no more, and takes the best epoch's weights.

    Parameters
    ----------
    model
        The model that is trained.
    validate
        Gives its loss on held-out groups, asked after each epoch.
    patience
        Epochs without a lower loss after which it stops.
    history
        Told each loss.
    before
        State that the training resumes from.
    """

    def __init__(
        self,
        model: Any,
        validate: Callable[[], float],
        patience: int,
        history: History,
        before: Path | None,
    ) -> None:
        from safetensors.torch import load_file

        self._model, self._validate = model, validate
        self._patience, self._history = patience, history
        self.losses: list[float] = []
        self.best: dict[str, Any] = {}
        if before and (before / _EPOCHS).exists():
            self.losses = read_json(before / _EPOCHS)
            self.best = load_file(before / _BEST)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for the loss."""
        self._model.eval()
        self.losses.append(ranks.from_first(self._validate()))
        self._model.train()
        self._history.record({"epoch": state.epoch, "held_loss": self.losses[-1]})
        if self.losses[-1] <= min(self.losses):
            self.best = {name: p.detach().clone() for name, p in trained(self._model).items()}
        at = self.losses.index(min(self.losses))
        control.should_training_stop |= len(self.losses) - 1 - at >= self._patience

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go back to the best epoch."""
        for name, value in trained(self._model).items():
            value.data.copy_(self.best[name])

    def save(self, folder: Path) -> None:
        """Write what it has seen."""
        from safetensors.torch import save_file

        if self.losses:
            write_json(folder / _EPOCHS, self.losses)
            save_file(self.best, folder / _BEST)


class Saving(TrainerCallback):  # type: ignore[misc]
    """Stores the state of a long training now and then; stands behind the other callbacks.

    A state is of after a step whose loss stands in the history, and not of an epoch's last step
    before its held-out loss is known.

    Parameters
    ----------
    trainer
        Whose state.
    history, stopping
        What belongs to it.
    """

    def __init__(self, trainer: Any, history: History, stopping: EarlyStopping | None) -> None:
        self._trainer, self._history, self._stopping = trainer, history, stopping
        self._saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """After a step within an epoch."""
        if "loss" in (logs or {}) and state.epoch != int(state.epoch):
            self._save(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After an epoch, unless it was the last one."""
        if not control.should_training_stop:
            self._save(state)

    def _save(self, state: Any) -> None:
        late = time.monotonic() - self._saved >= SAVE_SECONDS
        if not late or ranks.rank() or state.global_step >= state.max_steps:
            return
        keep(self._fill, f"step{state.global_step:09d}")
        self._saved = time.monotonic()

    def _fill(self, folder: Path) -> None:
        save_state(self._trainer, folder)
        (folder / HISTORY).write_bytes(self._history.path.read_bytes())
        if self._stopping:
            self._stopping.save(folder)
