"""Numbers that a model overflows to are refused before they are stored, whoever reads with it.

Some families' states grow beyond what float16 holds (65,504): Gemma 3's do. From there on every number
is infinite or none, and whatever is learnt from it is chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from stackllm.errors import DataError
from stackllm.llm.machine import choose_dtype, compute_dtype, packing

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def finite_only(
    model: PreTrainedModel,
    backbone: str,
    precision: str,
    read: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """What ``read`` gives, if all that the model made of real tokens are numbers.

    Parameters
    ----------
    model
        Who reads.
    backbone, precision
        What it is, for the sentence.
    read
        Gives arrays by name, a row each; one that is all NaN says that there was nothing to read.

    Raises
    ------
    DataError
        If a state of a real token, or a part of a row, is infinite or no number.
    """
    passes: list[Tensor] = []

    def look(_: Any, args: Any, given: dict[str, Any], output: Any) -> None:
        states, mask = getattr(output, "last_hidden_state", None), given.get("attention_mask")
        if states is None or mask is None:
            return
        real = mask[:, -states.shape[1] :].to(states.device).bool()
        # stays where it is: to look at it now would wait for the device
        passes.append((states.isfinite().all(-1) | ~real).all())

    hook = model.base_model.register_forward_hook(look, with_kwargs=True)
    try:
        arrays = read()
    finally:
        hook.remove()
    whole = all(_is_whole(array) for array in arrays.values())
    if not (whole and all(bool(it) for it in passes)):
        raise DataError(_sentence(backbone, precision))
    return arrays


def _is_whole(array: np.ndarray) -> bool:
    """Has every row finite numbers, or none at all?"""
    if array.dtype.kind != "f" or not array.size:
        return True
    rows = array.reshape(len(array), -1)
    nothing = np.isnan(rows).all(axis=1)
    return bool(np.isfinite(rows[~nothing]).all())


def _sentence(backbone: str, precision: str) -> str:
    stored, computed = packing(precision), compute_dtype(precision)
    said = f'backbone "{backbone}" in {stored}'
    said += "" if computed == stored else f", computed in {computed}"
    said += ": the states that it makes of a text are no finite numbers. "
    if computed != "float16":
        return f"{said}Its weights may be damaged: fetch them again, or take another backbone."
    native = choose_dtype("auto")[0] == "bfloat16"
    slowly = "" if native else ", which this machine only emulates (slow),"
    return (
        f"{said}They grow beyond 65,504, the most that float16 holds. Set dtype (of a member: precision) "
        f'to "bfloat16"{slowly} or "float32"; where memory is short, to "nf4-float32".'
    )
