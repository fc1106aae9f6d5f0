"""What a member of stage one is: what every stage may ask of it, and nothing else.

A *kind* knows how to fit and to predict; a *member* is a kind with a name and settings. The stages
never look into a member's settings: what they need to know beside fitting and predicting are its
:class:`Traits`, which its kind works out from the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stackllm.crossfit.targets import Targets
from stackllm.engine.devices import Wanted
from stackllm.llm.trunk import TrunkParams
from stackllm.members.inputs import Inputs


@dataclass(frozen=True)
class Traits:
    """What a member's settings mean for the stages.

    Parameters
    ----------
    params
        The settings that decide a single one of its models: part of the model's key.
    weights
        Digest of what the settings only name, such as the weights of an LLM; part of the key too.
    seeds
        Added to the run's seed, one model for each. None: one model, with the run's seed.
    every_round
        Is it trained anew in every round of pseudo-labels?
    refitted
        Is there also a model on all training rows, for what is submitted?
    trunk
        What is to be cached before it is fitted, if anything.
    remark
        What a user should be told before it is fitted, if anything.
    backbone
        The LLM that its models stand on, if any: predicting needs the very weights.
    starts
        The settings that decide what its models start from, if its kind has a :class:`Start` for them.
    devices
        Does each of its models want ``"one"`` GPU for itself, or ``"all"``, where there are any? None
        for what a processor fits, which sees no GPU.
    """

    params: Any
    weights: str = ""
    seeds: tuple[int, ...] | None = None
    every_round: bool = True
    refitted: bool = False
    trunk: TrunkParams | None = None
    remark: str = ""
    backbone: str | None = None
    starts: Any = None
    devices: Wanted | None = None


@dataclass(frozen=True)
class Start:
    """What all models of a place start from, whatever their seed: computed once, before them.

    Parameters
    ----------
    read
        ``read(inputs, params, n_classes, folder)`` writes what depends on no label: once for all places.
    fit
        ``fit(inputs, states, targets, seed, folder)`` writes what the models of a place start from, with the
        run's seed. ``states`` is the folder of the former. The models find it in ``inputs.start``.
    """

    read: Callable[[Inputs, Any, int, Path], None]
    fit: Callable[[Inputs, Path, Targets, int, Path], None]


@dataclass(frozen=True)
class Kind:
    """A kind of member.

    Parameters
    ----------
    params
        Dataclass of its settings.
    version
        Number of its code: a higher one makes stored models stale.
    fit
        ``fit(inputs, targets, params, seed, folder)`` writes a model into ``folder``.
    predict
        ``predict(inputs, rows, folder)``: float64 ``(len(rows), n_classes)``, rows sum to 1.
    traits
        Works out :class:`Traits` from settings. The default suits a kind whose models are decided by
        nothing but its settings and the run's seed.
    reads
        ``"texts"`` if it reads nothing but the texts, so that another recipe leaves it as it is.
    of_gpu
        Is it so slow without a GPU that its models are fitted first, and by all ranks together?
    told_before
        ``told_before(inputs, params)``: what a user should know of what fitting is going to take, in
        lines; it refuses what cannot fit. None: nothing.
    """

    params: type
    version: int
    fit: Callable[[Inputs, Targets, Any, int, Path], None]
    predict: Callable[[Inputs, np.ndarray, Path], np.ndarray]
    traits: Callable[[Any], Traits] = Traits
    reads: Literal["inputs", "texts"] = "inputs"
    of_gpu: bool = False
    told_before: Callable[[Inputs, Any], tuple[str, ...]] | None = None
    start: Start | None = None
