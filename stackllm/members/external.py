"""Member ``external``: somebody else's out-of-fold and test predictions."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stackllm.crossfit.design import CrossFit, Design
from stackllm.errors import DataError, MissingInputError
from stackllm.metrics import CLIP, log_loss, mean_with_error
from stackllm.parameters import FileName, Name, check
from stackllm.probabilities import log_probabilities
from stackllm.tables.ids import Rows
from stackllm.tables.imports import read_predictions

_ERRORS, _SHARE, _ENTROPY = 4.0, 0.2, 0.75
"""What must be seen before predictions look as if they had seen their rows; see :func:`in_sample_sign`."""


@dataclass(frozen=True)
class ExternalParams:
    """Where an external member's predictions are.

    Parameters
    ----------
    name
        What it is called in tables.
    oof
        A file of predictions of every training row, as :func:`~stackllm.tables.imports.read_outside` takes: its
        rows are matched by id (where the training table has none, the row's number from 0), else by
        text, else by their order. In a settings file, a pattern such as ``oofs/*.csv`` stands for as many
        members as there are files, called as they are.
    test
        The same for every test row; in a pattern, ``*`` stands for what it does in ``oof``.
    """

    name: Name
    oof: FileName
    test: FileName

    def __post_init__(self) -> None:
        check(self)


def expanded(label: str, given: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What a ``[[member]]`` of kind ``external`` says, once for every file that a pattern in ``oof`` stands for.

    Parameters
    ----------
    label
        What sentences begin with.
    given
        Its keys. ``name`` stands before the names of the files where there is a pattern.
    folder
        What file names are relative to.

    Returns
    -------
    list of dict
        ``given`` itself where there is no pattern; else ``name``, ``oof`` and ``test`` of each.

    Raises
    ------
    DataError
        If two patterns do not go together.
    MissingInputError
        If no file is called so, or a member lacks its test predictions.
    """
    oof, test = given.get("oof"), given.get("test")
    if not isinstance(oof, str) or "*" not in oof:
        return [dict(given)]
    if oof.count("*") != 1 or not isinstance(test, str) or test.count("*") != 1:
        raise DataError(
            f'{label}: a pattern has one *, in oof as in test (oof = "oofs/*.csv", test = "tests/*.csv").'
        )
    root, pattern = folder, os.path.expanduser(oof)  # noqa: PTH111 - as other names in settings are read
    before, after = pattern.split("*")
    members = []
    names = glob.glob(f"{glob.escape(before)}*{glob.escape(after)}", root_dir=root)  # noqa: PTH207 - a name may lead out of the folder
    for name in sorted(names):
        middle = name[len(before) : len(name) - len(after)]
        beside = test.replace("*", middle)
        if not (root / os.path.expanduser(beside)).is_file():  # noqa: PTH111
            raise MissingInputError(
                f"{label}: {root / beside}: there is no such file, and {name} needs its test predictions. Add it, or "
                "move the other elsewhere."
            )
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", middle).strip("-_") or "member"
        prefix = f"{given['name']}_" if "name" in given else ""
        members.append({**given, "name": f"{prefix}{plain}", "oof": name, "test": beside})
    if not members:
        raise MissingInputError(
            f'{label}: no file is called {root / oof}. Check the pattern in "oof".'
        )
    return members


def read_external(
    params: ExternalParams, design: Design, train: Rows, test: Rows, classes: tuple[str, ...]
) -> tuple[CrossFit, list[str]]:
    """An external member's predictions, and whether they look as if they had seen their rows.

    Parameters
    ----------
    params
        Where they are.
    design
        Folds and labels.
    train, test, classes
        The rows and classes that they must hold.

    Returns
    -------
    CrossFit
        Its predictions; the same test predictions for every fold.
    list of str
        Warnings.

    Raises
    ------
    MissingInputError, DataError, StorageError
        With the file, column and row that is wrong.
    """
    oof, of_oof = read_predictions(Path(params.oof), train, classes)
    new, of_test = read_predictions(Path(params.test), test, classes)
    crossfit = CrossFit(oof, np.broadcast_to(new, (design.n_folds, *new.shape)).copy())
    told = in_sample_sign(oof, new, design)
    signs = [f"external member {params.name}: {told}"] if told else []
    return crossfit, [*of_oof, *of_test, *signs]


def in_sample_sign(oof: np.ndarray, test: np.ndarray, design: Design) -> str | None:
    """What says that predictions were made by models that saw the rows, if anything does.

    Models are surer of rows that they saw: the likeliest class leads the second by more. If no model saw
    its row, the lead (in log-odds, which a temperature scales everywhere alike) is as large on the test rows, but for
    their models being averaged, which takes some of it: so it must be larger by more than four standard errors
    over groups *and* by a fifth. Where single models are too sure of themselves averages lose more of
    it, but those lose on labels, too: so the log loss out of fold must also be less than three quarters of the
    test rows' mean entropy, which it estimates.

    Parameters
    ----------
    oof, test
        Row probabilities, ``(n_train, n_classes)`` and ``(n_test, n_classes)``.
    design
        Labels and groups.

    Returns
    -------
    str or None
        A sentence with both leads and their errors.
    """
    if not len(test):
        return None
    entropy = float(-(test * np.log(np.maximum(test, CLIP))).sum(axis=1).mean())
    loss = log_loss(oof, design.labels)
    here, here_error = mean_with_error(_leads(oof), design.train_groups)
    there, there_error = mean_with_error(_leads(test), design.test_groups)
    if here_error is None or there_error is None or loss > _ENTROPY * entropy:
        return None
    if here - there <= max(_ERRORS * math.hypot(here_error, there_error), _SHARE * there):
        return None
    return (
        f"out of fold the likeliest class leads the second by {here:.2f} ± {here_error:.2f} in log-odds, on the test rows by "
        f"{there:.2f} ± {there_error:.2f} only, and it loses {loss:.3f} where those are sure enough for {entropy:.3f}. Were its "
        "OOF rows in its training data?"
    )


def _leads(probabilities: np.ndarray) -> np.ndarray:
    """How far the likeliest class is ahead of the second, in log-odds, ``(n_rows,)``."""
    ordered = np.sort(log_probabilities(probabilities), axis=1)
    leads: np.ndarray = ordered[:, -1] - ordered[:, -2]
    return leads
