"""transformers' Trainer for label probabilities, weights, steps of one size, and several processes."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stackllm.engine import ranks
from stackllm.errors import StackllmError
from stackllm.llm import resuming
from stackllm.llm.classifier import HEAD, Batch, logits, trained

if TYPE_CHECKING:
    from stackllm.llm.training import Collate, TrainingParams


class TrainingError(StackllmError):
    """A fine-tuning that cannot go on: its loss is no number any more."""

    exit_code = 65


class Steps:
    """Rows of like length, dealt to steps, to ranks and to passes; a batch sampler.

    Every step is of ``of_a_step`` rows, the last of an epoch of what is left, whatever the number
    of ranks and however many rows a pass can hold.

    Parameters
    ----------
    lengths
        Tokens of every row, ``(n,)``.
    of_a_step
        Rows of a step, over all ranks.
    batch_size
        Most rows of a pass of one rank.
    seed
        Of the order, which is another in each epoch.
    """

    def __init__(self, lengths: np.ndarray, of_a_step: int, batch_size: int, seed: int) -> None:
        self._lengths = lengths.tolist()
        self._of_a_step = of_a_step
        self._batch_size = batch_size
        self._seed = seed
        self.epoch = 0

    def passes(self, n_rows: int) -> int:
        """Passes of each rank for a step of ``n_rows``."""
        of_a_rank = -(-n_rows // ranks.size())
        return -(-of_a_rank // self._batch_size)

    def __len__(self) -> int:
        whole, left = divmod(len(self._lengths), self._of_a_step)
        return whole * self.passes(self._of_a_step) + self.passes(left)

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        """Passes of this rank: rows, and what each counts in its step; 0 for what only fills up."""
        order = self._order()
        for at in range(0, len(order), self._of_a_step):
            step = order[at : at + self._of_a_step]
            own = [(row, 1 / len(step)) for row in step[ranks.rank() :: ranks.size()]]
            for number in range(self.passes(len(step))):
                first = number * self._batch_size
                yield own[first : first + self._batch_size] or [(step[0], 0.0)]

    def _order(self) -> list[int]:
        import torch
        from transformers.trainer_pt_utils import LengthGroupedSampler

        generator = torch.Generator().manual_seed(self._seed)
        sampler = LengthGroupedSampler(self._of_a_step, lengths=self._lengths, generator=generator)
        return [list(sampler) for _ in range(self.epoch + 1)][-1]


def make_trainer(
    model: Any,
    rows: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    lengths: np.ndarray,
    collate: Collate,
    params: TrainingParams,
    batch_size: int,
    seed: int,
) -> Any:
    """A Trainer whose steps are of ``params.batch_size * params.accumulation`` rows.

    Parameters
    ----------
    model, rows, labels, weights, lengths, collate, params, seed
        As for :func:`stackllm.llm.training.train`.
    batch_size
        Most rows of a pass, over all ranks.
    """
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    of_a_step = params.batch_size * params.accumulation
    steps = Steps(lengths, of_a_step, max(1, batch_size // ranks.size()), seed)

    class Network(torch.nn.Module):  # type: ignore[misc]
        """The classifier as a module of its own, so that distributed training can wrap it."""

        def __init__(self) -> None:
            super().__init__()
            self.classifier = model

        def forward(self, batch: Batch) -> torch.Tensor:
            scores: torch.Tensor = logits(self.classifier, batch)
            return scores

    class Rows(torch.utils.data.Dataset[tuple[int, float]]):  # type: ignore[misc]
        """What :class:`Steps` names, as it is named: a pass is made at once, by ``gather``."""

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, entry: tuple[int, float]) -> tuple[int, float]:
            return entry

    def gather(entries: list[tuple[int, float]]) -> dict[str, Any]:
        chosen = np.array([row for row, _ in entries])
        shares = weights[chosen] * np.array([share for _, share in entries])
        return {
            "batch": collate(rows[chosen]),
            "labels": torch.from_numpy(labels[chosen].astype(np.float32)),
            "share": torch.from_numpy(shares.astype(np.float32)),
        }

    class WeightedTrainer(Trainer):  # type: ignore[misc]
        """Cross-entropy against label probabilities, a weight a row, rows of like length together."""

        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Rows(), batch_sampler=steps, collate_fn=gather)

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            scores = model(inputs["batch"])
            labels, share = (inputs[name].to(scores.device) for name in ("labels", "share"))
            losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
            self.state.num_input_tokens_seen += int(inputs["batch"].mask.sum()) * ranks.size()
            # ranks' gradients are averaged, and the loss is the sum over all of them
            loss = (losses * share).sum() * ranks.size()
            of_all = self.accelerator.reduce(loss.detach(), "mean")
            if not torch.isfinite(of_all):
                raise TrainingError(
                    f"the loss is {of_all.item()} at step {self.state.global_step + 1}. "
                    "Lower learning_rate, or take bfloat16 or float32 weights."
                )
            return (loss, scores) if return_outputs else loss

        def _prepare_input(self, data: Any) -> Any:
            return (
                data.to(self.args.device)
                if isinstance(data, Batch)
                else (super()._prepare_input(data))
            )

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            resuming.load_weights(self.model, Path(resume_from_checkpoint))

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                resuming.load_optimiser(self, Path(checkpoint))

        def _load_rng_state(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                resuming.load_randomness(Path(checkpoint))

    class Epochs(TrainerCallback):  # type: ignore[misc]
        """Tells the sampler which epoch it is, also when it goes on with one."""

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.epoch = int(state.epoch or 0)

    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written there: the unit saves the model
        num_train_epochs=params.epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps.passes(of_a_step),
        lr_scheduler_type="cosine",
        warmup_steps=params.warmup,
        max_grad_norm=params.max_grad_norm,
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        logging_steps=1,
        report_to=list(params.report_to) if ranks.rank() == 0 else [],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for several processes
    network = Network()
    placed = getattr(model.get_base_model(), "hf_device_map", None)
    if placed is not None:  # on its devices, where it stays
        network.hf_device_map = placed
    named = trained(network)
    groups = [
        {"params": [p for name, p in named.items() if f".{HEAD}." not in name],
         "lr": params.learning_rate, "weight_decay": params.weight_decay},
        {"params": [p for name, p in named.items() if f".{HEAD}." in name],
         "lr": params.head_learning_rate, "weight_decay": params.weight_decay},
    ]  # fmt: skip
    trainer = WeightedTrainer(
        model=network,
        args=arguments,
        optimizers=(torch.optim.AdamW(groups), None),
        callbacks=[Epochs()],
    )
    trainer.loss_is_scaled_for_ga = True  # rows have their shares of the step
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    return trainer
