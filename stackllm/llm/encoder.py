"""Frozen decoder LLM as an encoder: one forward pass a response, pooled layers and likelihood features.

The rows of a group share their question, so its keys and values are computed once and every
response is read on top of them (:mod:`stackllm.llm.reading`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from stackllm.llm.layers import layers_of
from stackllm.llm.prompts import Prompt
from stackllm.llm.reading import opened, read_ends
from stackllm.llm.vocabulary import score_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LIKELIHOOD = (
    "logprob_mean",
    "logprob_std",
    "logprob_min",
    "entropy_mean",
    "rank1_share",
    "rank10_share",
    "rank100_share",
)
"""Names of the likelihood features of a response, in the order in which the encoder returns them."""


def read_groups(
    model: PreTrainedModel, prompts: list[Prompt], layers: tuple[int, ...], budget: int = 1_024
) -> tuple[np.ndarray, np.ndarray]:
    """Read groups with a frozen causal LLM.

    Parameters
    ----------
    model
        A transformers causal LM in evaluation mode.
    prompts
        The groups.
    layers
        Which layers to pool, counted from 1: ``n`` is the output of the n-th block, and that of the
        last one what the head reads, its normalisation included.
    budget
        Most tokens of a batch of responses.

    Returns
    -------
    pooled
        float32 ``(n_rows, n_layers, hidden)``: the mean over the response's tokens; for an empty
        response the last token of the question.
    likelihood
        float32 ``(n_rows, len(LIKELIHOOD))``; NaN for an empty response.
    """
    import torch

    lengths = np.array([len(ids) for prompt in prompts for ids in prompt.responses])
    rows: list[int] = []
    means, scores = [], []
    with _outputs_of(model, layers) as outputs:
        for ends in read_ends(model, opened(prompts), budget):
            last = ends.output.last_hidden_state
            means.append(_pool([ends.of(outputs.get(layer, last)) for layer in layers], ends.mask))
            outputs.clear()
            scores.append(_likelihood(model, ends.of(last), ends.ids, lengths[ends.rows]))
            rows += ends.rows
    back = np.argsort(rows)
    # copied here only now: each copy waits for all that the device has been given to do
    pooled, likelihood = (torch.cat(it).cpu().numpy()[back] for it in (means, scores))
    return pooled, likelihood


@contextmanager
def _outputs_of(model: PreTrainedModel, layers: tuple[int, ...]) -> Iterator[dict[int, Any]]:
    """Where every pass leaves the outputs of some layers, but for the last: the model gives that itself.

    All layers' outputs, which transformers would give, are the largest thing in a GPU's memory after
    the weights.
    """
    outputs: dict[int, Any] = {}
    blocks = layers_of(model)[2]

    def keep(layer: int) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, (tuple, list)) else output

        return blocks[layer - 1].register_forward_hook(hook)

    hooks = [keep(layer) for layer in set(layers) - {len(blocks)}]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _pool(states: list[torch.Tensor], tail_mask: torch.Tensor) -> torch.Tensor:
    """Mean over response tokens of each layer, float32 ``(n_rows, n_layers, hidden)``."""
    import torch

    count = tail_mask.sum(1)  # question's last token included
    inside = tail_mask.clone()
    inside[:, 0] = (count == 1).long()  # an empty response pools the question's last token
    ones = inside.float()  # divided afterwards: TensorFloat-32 would round a share, and no 0 or 1
    sums = [torch.einsum("rt,rth->rh", ones.to(state.device), state.float()) for state in states]
    return torch.stack([it.to(ones.device) for it in sums], dim=1) / ones.sum(1)[:, None, None]


def _likelihood(
    model: PreTrainedModel, hidden: torch.Tensor, ids: torch.Tensor, lengths: np.ndarray
) -> torch.Tensor:
    """Likelihood features of each row, float32 ``(n_rows, len(LIKELIHOOD))``.

    ``lengths`` of the responses, which ``hidden`` and ``ids`` have one place more for, are known here:
    to ask the device which places are real would wait for it.
    """
    import torch

    real = np.arange(ids.shape[1]) < lengths[:, None]  # (n_rows, width): a token comes after it
    places = torch.from_numpy(np.flatnonzero(real))
    before = hidden.flatten(0, 1)[places.to(hidden.device)]  # (n_tokens, hidden)
    places, count = places.to(ids.device), torch.from_numpy(lengths).to(ids.device)
    scores = score_tokens(model, before, ids.flatten()[places + 1]).to(ids.device)
    table = scores.new_zeros((ids.numel(), 3))
    table[places] = scores
    logprob, entropy, rank = table.view(*ids.shape, 3).unbind(-1)  # (n_rows, width) each
    inside = torch.from_numpy(real).to(ids.device)
    mean = logprob.sum(1) / count  # of no tokens NaN
    deviation = (((logprob - mean[:, None]) * inside) ** 2).sum(1) / count
    least = torch.where(inside, logprob, torch.inf).amin(1)
    shares = [((rank < top) & inside).sum(1) / count for top in (1, 10, 100)]
    features = [mean, deviation.sqrt(), least, entropy.sum(1) / count, *shares]
    return torch.stack(features, dim=1).where((count > 0)[:, None], torch.nan)
