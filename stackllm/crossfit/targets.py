"""What a model is fitted to: labels of training rows and, in later rounds, pseudo-labels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Targets:
    """Weighted labels; a row may stand here several times, once for each label it may have.

    Parameters
    ----------
    rows
        Which row of the inputs, int ``(n,)``.
    labels
        Class index, int ``(n,)``.
    weights
        Weight of each entry in the loss, above 0, ``(n,)``.
    given
        Whether the label was given, bool ``(n,)``; else it is a pseudo-label, on which no setting
        may be chosen: it agrees with the models that made it.
    n_classes
        Number of classes.
    classes
        What they are called, where that is known: no number depends on it.
    """

    rows: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    given: np.ndarray
    n_classes: int
    classes: tuple[str, ...] = ()

    def only(self, keep: np.ndarray) -> Targets:
        """The entries where ``keep``, bool ``(n,)``, holds."""
        return replace(
            self,
            rows=self.rows[keep],
            labels=self.labels[keep],
            weights=self.weights[keep],
            given=self.given[keep],
        )

    def likeliest(self) -> Targets:
        """The heaviest label of each row alone, for models that take no weights."""
        order = np.lexsort((np.arange(len(self.rows)), -self.weights, self.rows))
        first = np.r_[True, np.diff(self.rows[order]) != 0] if len(order) else np.zeros(0, bool)
        keep = np.zeros(len(self.rows), dtype=bool)
        keep[order[first]] = True
        return self.only(keep)
