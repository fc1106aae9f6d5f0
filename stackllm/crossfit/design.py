"""Cross-fitting: which model trains on which rows and predicts which, in every round.

Round 0 trains a model per fold on the other folds and predicts the fold and the whole test set. In a
later round test groups are dealt to parts, and there is a model for each fold k and part p: it
trains on the other folds and on part p, with labels made by fold-k models that never trained on
part p, and predicts fold k and the other parts. So no model predicts a row on whose own label,
true or pseudo, it trained, and no label of fold k reaches a model that is scored on fold k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stackllm.crossfit.targets import Targets


@dataclass(frozen=True)
class Fit:
    """One model's place in a cross-fit.

    Parameters
    ----------
    round, fold
        From 0.
    part
        Test part whose pseudo-labels it trains on; None in round 0.
    targets
        What it trains on; rows from ``n_train`` on are test rows.
    predict
        Rows it predicts, int ``(n,)``.
    """

    round: int
    fold: int
    part: int | None
    targets: Targets
    predict: np.ndarray

    @property
    def name(self) -> str:
        """Such as ``round1_fold0_part1``."""
        part = "" if self.part is None else f"_part{self.part}"
        return f"round{self.round}_fold{self.fold}{part}"


@dataclass(frozen=True)
class CrossFit:
    """Predictions of one member, blend or stack, none of them by a model that saw the row.

    Parameters
    ----------
    oof
        Training rows, ``(n_train, n_classes)``.
    test
        Test rows by the models of each fold, ``(n_folds, n_test, n_classes)``.
    """

    oof: np.ndarray
    test: np.ndarray

    def fold(self, fold: int) -> np.ndarray:
        """Out-of-fold training rows above the test rows as the fold's models see them: ``(n_rows, n_classes)``."""
        return np.concatenate([self.oof, self.test[fold]])

    def test_mean(self) -> np.ndarray:
        """Test rows, averaged over the folds' models: ``(n_test, n_classes)``."""
        mean: np.ndarray = self.test.mean(axis=0)
        return mean


@dataclass(frozen=True)
class Design:
    """Who is in which fold, part and class.

    Parameters
    ----------
    labels, folds
        Class index and fold of each training row, ``(n_train,)``.
    parts
        Part of each test row, ``(n_test,)``.
    groups
        Group number of each row, training rows first, ``(n_train + n_test,)``.
    n_classes
        Number of classes.
    classes
        What they are called, where that is known.
    """

    labels: np.ndarray
    folds: np.ndarray
    parts: np.ndarray
    groups: np.ndarray
    n_classes: int
    classes: tuple[str, ...] = ()

    @property
    def n_train(self) -> int:
        """Number of training rows."""
        return len(self.labels)

    @property
    def n_folds(self) -> int:
        """Number of folds."""
        return int(self.folds.max()) + 1

    @property
    def train_groups(self) -> np.ndarray:
        """Group number of each training row, ``(n_train,)``."""
        return self.groups[: self.n_train]

    @property
    def test_groups(self) -> np.ndarray:
        """Group number of each test row, ``(n_test,)``."""
        return self.groups[self.n_train :]

    def true_targets(self, fold: int) -> Targets:
        """The true labels of every fold but one."""
        rows = np.flatnonzero(self.folds != fold)
        every = np.ones(len(rows))
        return Targets(
            rows, self.labels[rows], every, every.astype(bool), self.n_classes, self.classes
        )

    def first_fits(self) -> list[Fit]:
        """The models of round 0."""
        test = self.n_train + np.arange(len(self.parts))
        held_out = [np.flatnonzero(self.folds == fold) for fold in range(self.n_folds)]
        return [
            Fit(0, fold, None, self.true_targets(fold), np.r_[rows, test])
            for fold, rows in enumerate(held_out)
        ]

    def full_fit(self) -> Fit:
        """A model on all true labels, for test rows only: of a fold that no row is in.

        It saw every fold's labels, so nothing that it predicts may become a pseudo-label.
        """
        test = self.n_train + np.arange(len(self.parts))
        return Fit(0, self.n_folds, None, self.true_targets(self.n_folds), test)

    def next_fits(self, number: int, pseudo: Callable[[int, int], Targets]) -> list[Fit]:
        """The models of round ``number``.

        Parameters
        ----------
        number
            1 or more.
        pseudo
            Called with a fold and a part; gives the pseudo-labels of that part's rows, made by
            that fold's models of the round before.
        """
        fits = []
        for fold in range(self.n_folds):
            held_out = np.flatnonzero(self.folds == fold)
            for part in range(int(self.parts.max()) + 1):
                others = self.n_train + np.flatnonzero(self.parts != part)
                targets = join(self.true_targets(fold), pseudo(fold, part))
                fits.append(Fit(number, fold, part, targets, np.r_[held_out, others]))
        return fits

    def gather(self, fits: Sequence[Fit], predictions: Sequence[np.ndarray]) -> CrossFit:
        """Put the predictions of a cross-fit's models together; several of one row are averaged.

        Parameters
        ----------
        fits
            The models' places, at least one of every fold.
        predictions
            For each of them ``(len(fit.predict), n_classes)``.
        """
        n_rows = len(self.groups)
        total = np.zeros((self.n_folds, n_rows, self.n_classes))
        count = np.zeros((self.n_folds, n_rows, 1))
        for fit, predicted in zip(fits, predictions, strict=True):
            total[fit.fold, fit.predict] += predicted
            count[fit.fold, fit.predict] += 1
        test = total[:, self.n_train :] / count[:, self.n_train :]
        of_fold = (self.folds, np.arange(self.n_train))  # each row by the models of its fold
        return CrossFit(total[of_fold] / count[of_fold], test)


def join(first: Targets, second: Targets) -> Targets:
    """Both sets of labels, ``first`` above ``second``."""
    return Targets(
        np.concatenate([first.rows, second.rows]),
        np.concatenate([first.labels, second.labels]),
        np.concatenate([first.weights, second.weights]),
        np.concatenate([first.given, second.given]),
        first.n_classes,
        first.classes,
    )
