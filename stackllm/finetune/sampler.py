"""Which rows a step of a training is of, and in how many passes of which process they are read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stackllm.engine import ranks


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
            rows = [(row, 1 / len(step)) for row in step[ranks.rank() :: ranks.size()]]
            for number in range(self.passes(len(step))):
                first = number * self._batch_size
                yield rows[first : first + self._batch_size] or [(step[0], 0.0)]

    def _order(self) -> list[int]:
        import torch
        from transformers.trainer_pt_utils import LengthGroupedSampler

        generator = torch.Generator().manual_seed(self._seed)
        sampler = LengthGroupedSampler(self._of_a_step, lengths=self._lengths, generator=generator)
        return [list(sampler) for _ in range(self.epoch + 1)][-1]
