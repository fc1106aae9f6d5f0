"""transformers' Trainer for label probabilities, weights, steps of one size, and several processes.

Weights in float16 get their loss scaled, as accelerate's mixed precision does on a GPU: small gradients
would round to zero on their way through them. Where they overflow, the step is computed again with half
the scale rather than left out, as trainings of a few rows have but a few steps. Of mixed precision it is that
part only. Without autocast a model computes while it learns what it computes when it predicts, and a CPU
does what a GPU does.
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from stackllm.engine import ranks
from stackllm.errors import TrainingError
from stackllm.finetune import resume
from stackllm.finetune.dataset import Examples, TrainingParams
from stackllm.finetune.model import Batch, logits, of_head, trained
from stackllm.finetune.sampler import Steps
from stackllm.llm.machine import device


def make_trainer(
    model: Any, examples: Examples, params: TrainingParams, batch_size: int, seed: int
) -> Trainer:
    """A Trainer whose steps are of ``params.batch_size * params.accumulation`` rows.

    Parameters
    ----------
    model, examples, params, seed
        As for :func:`stackllm.finetune.train.train`.
    batch_size
        Most rows of a pass, over all ranks.
    """
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    of_a_step = params.batch_size * params.accumulation
    steps = Steps(examples.lengths, of_a_step, max(1, batch_size // ranks.size()), seed)
    network = Network(model)
    trainer = WeightedTrainer(
        examples,
        steps,
        model=network,
        args=_arguments(params, batch_size, steps.passes(of_a_step), seed),
        optimizers=(_optimiser(network, params), None),
        callbacks=[Epochs(steps)],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    return trainer


class Network(torch.nn.Module):  # type: ignore[misc]
    """The classifier as a module of its own, so that distributed training can wrap it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.classifier = model
        placed = getattr(model.get_base_model(), "hf_device_map", None)
        if placed is not None:  # on its devices, where it stays
            self.hf_device_map = placed

    def forward(self, batch: Batch) -> torch.Tensor:
        """Scores of each class, ``(n, n_classes)``."""
        scores: torch.Tensor = logits(self.classifier, batch)
        return scores


class Rows(torch.utils.data.Dataset[tuple[int, float]]):  # type: ignore[misc]
    """What :class:`~stackllm.finetune.sampler.Steps` names, as it is named: a pass is made all at once."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples.rows)

    def __getitem__(self, entry: tuple[int, float]) -> tuple[int, float]:
        return entry

    def gather(self, entries: list[tuple[int, float]]) -> dict[str, Any]:
        """A pass: its batch, its label probabilities, and what each row counts in the step."""
        examples = self._examples
        chosen = np.array([row for row, _ in entries])
        shares = examples.weights[chosen] * np.array([share for _, share in entries])
        batch = examples.collate(examples.rows[chosen])
        return {
            "batch": batch,
            "tokens": int(batch.mask.sum()),  # here: on a GPU it would be waited for
            "labels": torch.from_numpy(examples.labels[chosen].astype(np.float32)),
            "share": torch.from_numpy(shares.astype(np.float32)),
        }


class Ahead(torch.utils.data.DataLoader[dict[str, Any]]):  # type: ignore[misc]
    """Makes the next pass, on a thread, while a GPU computes this one."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        passes = super().__iter__()
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(next, passes, None)
            while (ready := coming.result()) is not None:
                coming = thread.submit(next, passes, None)
                yield ready


class WeightedTrainer(Trainer):  # type: ignore[misc]
    """Cross-entropy against label probabilities, a weight per row, rows of like length together.

    Parameters
    ----------
    examples
        What it learns from.
    steps
        In which order.
    options
        Of Trainer.
    """

    def __init__(self, examples: Examples, steps: Steps, **options: Any) -> None:
        super().__init__(**options)
        self._rows, self._steps = Rows(examples), steps
        self._passes: list[Any] = []  # of a step
        self._losses: list[torch.Tensor] = []  # of its passes
        self.loss_is_scaled_for_ga = True  # rows have their shares of the step

    def create_accelerator_and_postprocess(self) -> None:
        """Have the loss scaled where gradients pass through float16; accelerate would refuse a CPU."""
        super().create_accelerator_and_postprocess()
        if any(value.dtype == torch.float16 for value in self.model.parameters()):
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type)

    def get_train_dataloader(self) -> Any:
        """Passes in order."""
        on_gpu = self.args.device.type == "cuda"
        loader = Ahead if on_gpu else torch.utils.data.DataLoader
        return loader(
            self._rows, batch_sampler=self._steps, collate_fn=self._rows.gather, pin_memory=on_gpu
        )

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        """The passes of a step, which may be needed again."""
        self._passes, count = super().get_batch_samples(*arguments)
        return self._passes, count

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of a pass, as a share of its step's."""
        scores = model(inputs["batch"])
        labels, share = (inputs[name].to(scores.device) for name in ("labels", "share"))
        losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
        self.state.num_input_tokens_seen += inputs["tokens"] * ranks.size()
        # ranks' gradients are averaged, and the loss is the sum over all of them
        loss = (losses * share).sum() * ranks.size()
        self._losses.append(loss.detach())
        return (loss, scores) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Once a step, before its weights change: is its loss a number, and of what loss are its gradients?"""
        loss = self.accelerator.reduce(torch.stack(self._losses).sum(), "mean")
        self._losses.clear()
        scaler = self.accelerator.scaler
        if not torch.isfinite(loss):
            way = 'precision = "bfloat16" or "float32"' if scaler else "float32 weights"
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}. "
                f"Lower learning_rate, or take {way}."
            )
        if not scaler:
            return super()._clip_grad_norm(model)
        seen = self.state.num_input_tokens_seen
        while not torch.isfinite(length := self._unscaled(model)):
            scaler.update()  # halves the scale
            if scaler.get_scale() < 1:
                raise TrainingError(
                    f"gradients overflow float16 at step {self.state.global_step + 1}. Lower learning_rate, "
                    'or set precision = "bfloat16" or "float32".'
                )
            model.zero_grad()
            for inputs in self._passes:
                self.training_step(model, inputs)
        self._losses.clear()
        self.state.num_input_tokens_seen = seen
        return length

    def _unscaled(self, model: Any) -> torch.Tensor:
        """Length of the gradients, which no longer are of the scaled loss; accelerate would leave them so."""
        self.accelerator.scaler.unscale_(self.optimizer.optimizer)
        length: torch.Tensor = super()._clip_grad_norm(model)
        return length

    def log(self, logs: dict[str, Any], *args: Any, **options: Any) -> None:
        """What is told of a step, with what its loss was multiplied by."""
        if "loss" in logs and self.accelerator.scaler:
            logs["loss_scale"] = self.accelerator.scaler.get_scale()
        super().log(logs, *args, **options)

    def _prepare_input(self, data: Any) -> Any:
        return (
            data.to(self.args.device) if isinstance(data, Batch) else super()._prepare_input(data)
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        resume.load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            resume.load_optimiser(self, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            resume.load_randomness(Path(checkpoint))


class Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler which epoch it is, also when it goes on with one."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A new epoch."""
        self._steps.epoch = int(state.epoch or 0)


def _optimiser(network: Network, params: TrainingParams) -> torch.optim.Optimizer:
    groups = _parameters(network, params)
    if params.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    from bitsandbytes.optim.adamw import AdamW8bit

    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    paged = params.optimizer == "paged_adamw_8bit"
    kind: Any = AdamW8bit
    optimiser: torch.optim.Optimizer = kind(groups, is_paged=paged)
    return optimiser


def _parameters(network: Network, params: TrainingParams) -> list[dict[str, Any]]:
    """What the optimiser changes: the adapters at one rate, the head at another."""
    named = trained(network)
    rates = {False: params.learning_rate, True: params.head_learning_rate}
    return [
        {
            "params": [p for name, p in named.items() if of_head(name) == head],
            "lr": rate,
            "weight_decay": params.weight_decay,
        }
        for head, rate in rates.items()
    ]


def _arguments(
    params: TrainingParams, batch_size: int, accumulation: int, seed: int
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written: units save models
        num_train_epochs=params.epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="cosine",
        warmup_steps=params.warmup,
        max_grad_norm=params.max_grad_norm or math.inf,  # the length is told all the same
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it asks the GPU after every pass; we do after every step
        report_to=[],  # the history tells trackers
        disable_tqdm=True,
        use_cpu=device().type == "cpu",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
    )
    # whatever "accelerate launch" was told: numbers are the settings'
    arguments.mixed_precision = "no"
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for several processes
    return arguments
