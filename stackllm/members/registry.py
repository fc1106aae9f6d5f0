"""The kinds of members and what each is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stackllm.errors import UsageError, did_you_mean
from stackllm.members import decoder, features, frozen, lexical, warm_head
from stackllm.members.boosting import BoostingParams
from stackllm.members.decoder import DecoderParams
from stackllm.members.frozen import FrozenParams
from stackllm.members.lexical import LexicalParams
from stackllm.members.own import is_own, own_kind
from stackllm.members.protocol import Kind, Start, Traits

KINDS = {
    "lexical": Kind(LexicalParams, lexical.VERSION, lexical.fit, lexical.predict),
    "frozen": Kind(FrozenParams, frozen.VERSION, frozen.fit, frozen.predict),
    "decoder": Kind(
        DecoderParams,
        decoder.VERSION,
        decoder.fit,
        decoder.predict,
        decoder.traits,
        reads="texts",
        of_gpu=True,
        told_before=decoder.told_before,
        start=Start(decoder.read_start, warm_head.fit_start),
    ),
    "features": Kind(BoostingParams, features.VERSION, features.fit, features.predict),
}


def kind_of(name: str) -> Kind:
    """The kind of that name, or that ``file.py:Class`` stands for.

    Raises
    ------
    MissingInputError, UsageError
        If there is no such kind, file or class.
    """
    if is_own(name):
        return own_kind(name)
    if name not in KINDS:
        raise UsageError(f'there is no kind "{name}" of member. {did_you_mean(name, KINDS)}')
    return KINDS[name]


@dataclass(frozen=True)
class Member:
    """A member of stage one.

    Parameters
    ----------
    name
        What it is called in tables and folders.
    kind
        A key of :data:`KINDS`, or ``file.py:Class``.
    params
        Its settings, of the kind's dataclass.
    """

    name: str
    kind: str
    params: Any

    @property
    def traits(self) -> Traits:
        """What its settings mean for the stages."""
        return kind_of(self.kind).traits(self.params)

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of its tables of predictions: its own, one per seed if there are several, the full models'."""
        traits = self.traits
        seeds = traits.seeds or ()
        singles = [f"{self.name}_seed{seed}" for seed in seeds if len(seeds) > 1]
        return (self.name, *singles, *([f"{self.name}_full"] if traits.refitted else []))


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
    folders = [name.casefold() for name in names]  # Windows and macOS know no case in names
    twice = sorted(name for name in names if folders.count(name.casefold()) > 1)
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
