"""Frozen decoder LLM as an encoder: one forward pass a response, pooled layers and likelihood features.

The rows of a group share their question, so its keys and values are computed once and every
response is read on top of them (:mod:`stackllm.llm.reading`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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
        Which hidden states to pool: 0 is the embedding, ``n`` the output of the n-th block.
    budget
        Most tokens of a batch of responses.

    Returns
    -------
    pooled
        float32 ``(n_rows, n_layers, 2, hidden)``: the mean over the response's tokens and its last
        real token. For an empty response both are the last token of the question.
    likelihood
        float32 ``(n_rows, len(LIKELIHOOD))``; NaN for an empty response.
    """
    n_rows = sum(len(prompt.responses) for prompt in prompts)
    hidden = model.config.get_text_config().hidden_size
    pooled = np.empty((n_rows, len(layers), 2, hidden), dtype=np.float32)
    likelihood = np.empty((n_rows, len(LIKELIHOOD)), dtype=np.float32)
    for ends in read_ends(model, opened(prompts), budget, output_hidden_states=True):
        states = [ends.output.hidden_states[layer] for layer in layers]
        pooled[ends.rows] = _pool(states, ends.mask)
        likelihood[ends.rows] = _likelihood(
            model, ends.output.last_hidden_state, ends.ids, ends.mask
        )
    return pooled, likelihood


def _pool(states: list[torch.Tensor], tail_mask: torch.Tensor) -> np.ndarray:
    """Mean over response tokens and last real token of each layer, float32."""
    import torch

    count = tail_mask.sum(1)  # question's last token included
    inside = tail_mask.clone()
    inside[:, 0] = (count == 1).long()  # an empty response pools the question's last token
    weight = inside.float() / inside.sum(1, keepdim=True)
    rows = torch.arange(len(count), device=count.device)
    pooled = torch.stack(
        [
            torch.stack(
                [torch.einsum("rt,rth->rh", weight, state.float()), state[rows, count - 1].float()],
                dim=1,
            )
            for state in states
        ],
        dim=1,
    )  # (n_rows, n_layers, 2, hidden)
    result: np.ndarray = pooled.cpu().numpy()
    return result


def _likelihood(
    model: PreTrainedModel, hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> np.ndarray:
    """Likelihood features of each row, float32 ``(n_rows, len(LIKELIHOOD))``."""
    real = mask[:, 1:].bool()  # (n_rows, n_response)
    before, target = hidden[:, :-1][real], ids[:, 1:][real]  # (n_tokens, hidden), (n_tokens,)
    scores = score_tokens(model, before, target).cpu().numpy()
    result = np.full((len(mask), len(LIKELIHOOD)), np.nan, dtype=np.float32)
    counts = real.sum(1).cpu().numpy()
    for row, tokens in enumerate(np.split(scores, np.cumsum(counts)[:-1])):
        if len(tokens):
            logprob, entropy, rank = tokens.T
            result[row] = [
                logprob.mean(),
                logprob.std(),
                logprob.min(),
                entropy.mean(),
                *((rank < top).mean() for top in (1, 10, 100)),
            ]
    return result
