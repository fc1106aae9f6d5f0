"""What all sections share: how large they are, the folders of models, the rate of the machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.models import SHAPES, Shape, store


@dataclass
class Bench:
    """One run of the benchmark.

    Parameters
    ----------
    folder
        Where models and results stand while it runs.
    tiny
        Everything as small as it can be: whether it runs, not how fast.
    rate
        Operations a second of the machine's matrix products in bfloat16, once they are measured.
    stored
        Seconds that writing each model took.
    """

    folder: Path
    tiny: bool = False
    rate: float | None = None
    stored: dict[str, float] = field(default_factory=dict)

    @property
    def repeats(self) -> int:
        """Of what is timed."""
        return 1 if self.tiny else 3

    def size(self, small: int, full: int) -> int:
        """A number of rows or groups."""
        return small if self.tiny else full

    def shape(self, name: str) -> Shape:
        """The shape of that name; of a tiny run always the same."""
        return SHAPES["tiny" if self.tiny else name]

    def backbone(self, name: str) -> str:
        """Folder of a model of that shape, written when first asked for."""
        name = "tiny" if self.tiny else name
        path = self.folder / name
        if name not in self.stored:
            start = time.perf_counter()
            store(SHAPES[name], path)
            self.stored[name] = time.perf_counter() - start
        return str(path)

    def utilisation(self, weights: float, tokens: int, taken: float) -> float | None:
        """Share of the machine's rate that so many weights, used once a token, asked for; None before it is measured."""
        return 2.0 * weights * tokens / taken / self.rate if self.rate else None
