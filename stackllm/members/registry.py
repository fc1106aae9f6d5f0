"""The kinds of members and what each is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stackllm.crossfit.targets import Targets
from stackllm.errors import UsageError
from stackllm.llm.trunk import TrunkParams
from stackllm.members import decoder, features, frozen, lexical
from stackllm.members.boosting import BoostingParams
from stackllm.members.decoder import DecoderParams
from stackllm.members.frozen import FrozenParams
from stackllm.members.inputs import Inputs
from stackllm.members.lexical import LexicalParams


@dataclass(frozen=True)
class Kind:
    """A kind of member that stackllm trains itself.

    Parameters
    ----------
    params
        Dataclass of its settings.
    version
        Number of its code: a higher one makes stored models stale.
    fit
        ``fit(inputs, targets, params, seed, folder)`` writes a model.
    predict
        ``predict(inputs, rows, folder)`` gives probabilities ``(len(rows), n_classes)``.
    reads
        ``"texts"`` if it reads nothing but the texts, so that another recipe leaves it as it is.
    of_gpu
        Does it want the GPU, where there is one, for itself?
    """

    params: type
    version: int
    fit: Callable[[Inputs, Targets, Any, int, Path], None]
    predict: Callable[[Inputs, np.ndarray, Path], np.ndarray]
    reads: Literal["inputs", "texts"] = "inputs"
    of_gpu: bool = False


KINDS = {
    "lexical": Kind(LexicalParams, lexical.VERSION, lexical.fit, lexical.predict),
    "frozen": Kind(FrozenParams, frozen.VERSION, frozen.fit, frozen.predict),
    "decoder": Kind(
        DecoderParams, decoder.VERSION, decoder.fit, decoder.predict, reads="texts", of_gpu=True
    ),
    "features": Kind(BoostingParams, features.VERSION, features.fit, features.predict),
}


@dataclass(frozen=True)
class Member:
    """A member of stage one.

    Parameters
    ----------
    name
        What it is called in tables and folders.
    kind
        A key of :data:`KINDS`.
    params
        Its settings, of the kind's dataclass.
    """

    name: str
    kind: str
    params: Any

    @property
    def seeds(self) -> tuple[int, ...]:
        """Added to the run's seed, a model for each."""
        seeds: tuple[int, ...] = getattr(self.params, "seeds", (0,))
        return seeds

    @property
    def of_one_model(self) -> Any:
        """The settings that decide a single one of its models."""
        return getattr(self.params, "of_one_model", self.params)

    @property
    def weights(self) -> str:
        """Digest of language-model weights that the settings only name; empty if there are none."""
        return str(getattr(self.params, "identity", ""))

    @property
    def every_round(self) -> bool:
        """Is it trained anew in every round of pseudo-labels?"""
        return bool(getattr(self.params, "every_round", True))

    @property
    def refitted(self) -> bool:
        """Is there also a model on all training rows, for the test?"""
        return bool(getattr(self.params, "refit", "folds") == "full")

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of its tables of predictions: its own, a seed's each, the full models'."""
        singles = [f"{self.name}_seed{seed}" for seed in self.seeds if len(self.seeds) > 1]
        return (self.name, *singles, *([f"{self.name}_full"] if self.refitted else []))

    @property
    def trunk(self) -> TrunkParams | None:
        """What is to be cached for it, if anything."""
        trunk: TrunkParams | None = getattr(self.params, "trunk", None)
        return trunk


def check_tables(members: Sequence[Member], others: Sequence[str]) -> None:
    """Refuse members whose tables of predictions would overwrite each other.

    Parameters
    ----------
    members
        The members.
    others
        Names of tables that are not theirs.

    Raises
    ------
    UsageError
        With the name that two tables would have.
    """
    names = [*others, *(name for member in members for name in member.tables)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f'"{twice[0]}" is the name of a member and of what one of another\'s models predicts. '
            "Call the member otherwise."
        )


DEFAULT_MEMBERS = (
    Member("lexical", "lexical", LexicalParams()),
    Member("skeleton", "lexical", LexicalParams(views=("skeleton",), c=10.0)),
    Member("edges", "lexical", LexicalParams(views=("edges",), c=10.0)),
    Member("frozen", "frozen", FrozenParams()),
    Member("frozen_centred", "frozen", FrozenParams(centred=True)),
    Member("features", "features", BoostingParams()),
)
