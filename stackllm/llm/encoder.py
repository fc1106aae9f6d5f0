"""Frozen decoder LLM as an encoder: one forward pass a response, pooled layers and likelihood features.

The rows of a group share their question, so its keys and values are computed once and every
response is read on top of them. Batches are whole groups, so what a row's numbers are never
depends on which other groups happen to be missing from the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stackllm.llm.prompts import Prompt

if TYPE_CHECKING:
    import torch

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

_VOCABULARY_CHUNK = 64
"""Response tokens whose full-vocabulary scores are in memory at once: few, so that they stay in the cache."""


def read_group_batch(
    model: Any, prompts: list[Prompt], layers: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Read a batch of groups with a frozen causal LLM.

    Parameters
    ----------
    model
        A transformers causal LM in evaluation mode.
    prompts
        The groups of the batch.
    layers
        Which hidden states to pool: 0 is the embedding, ``n`` the output of the n-th block.

    Returns
    -------
    pooled
        float32 ``(n_rows, n_layers, 2, hidden)``: the mean over the response's tokens and its last
        real token. For an empty response both are the last token of the question.
    likelihood
        float32 ``(n_rows, len(LIKELIHOOD))``; NaN for an empty response.
    """
    _, output, tail_ids, tail_mask = read_prompts(model, prompts, output_hidden_states=True)
    pooled = _pool([output.hidden_states[layer] for layer in layers], tail_mask)
    likelihood = _likelihood(model, output.last_hidden_state, tail_ids, tail_mask)
    return pooled, likelihood


def read_prompts(
    model: Any, prompts: list[Prompt], **options: Any
) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """Run a batch of groups through a frozen LLM without its head: questions once, then responses.

    The question's last token opens the response: its output predicts the response's first token.

    Parameters
    ----------
    model
        A transformers causal LM in evaluation mode.
    prompts
        The groups of the batch.
    options
        Further arguments of the model when it reads the responses.

    Returns
    -------
    questions
        The model's output for questions without their last token, left-padded; None if there are
        none.
    responses
        Its output for the responses, right-padded.
    ids, mask
        Token ids and attention mask of the responses, ``(n_rows, longest)``.
    """
    import torch
    from transformers import DynamicCache

    device = model.get_input_embeddings().weight.device
    owner = torch.tensor(
        [g for g, prompt in enumerate(prompts) for _ in prompt.responses], device=device
    )
    heads = [prompt.prefix[:-1] for prompt in prompts]
    tails = [[prompt.prefix[-1], *response] for prompt in prompts for response in prompt.responses]
    prefix_ids, prefix_mask = pad(heads, left=True, device=device)  # (n_groups, n_prefix)
    tail_ids, tail_mask = pad(tails, left=False, device=device)  # (n_rows, 1 + n_response)

    cache = DynamicCache()
    body = model.base_model
    questions = None
    with torch.inference_mode():
        if prefix_ids.shape[1]:
            questions = body(
                input_ids=prefix_ids,
                attention_mask=prefix_mask,
                position_ids=(prefix_mask.cumsum(1) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
            )
            cache.batch_select_indices(owner)
        start = prefix_mask.sum(1)[owner]  # (n_rows,)
        responses = body(
            input_ids=tail_ids,
            attention_mask=torch.cat([prefix_mask[owner], tail_mask], dim=1),
            position_ids=start[:, None] + torch.arange(tail_ids.shape[1], device=device),
            past_key_values=cache,
            use_cache=True,
            **options,
        )
    return questions, responses, tail_ids, tail_mask


def pad(rows: list[list[int]], left: bool, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both ``(len(rows), longest)``; the padding id is never attended to."""
    import torch

    width = max(map(len, rows))
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return ids.to(device), mask.to(device)


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
    model: Any, hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> np.ndarray:
    """Likelihood features of each row, float32 ``(n_rows, len(LIKELIHOOD))``."""
    import torch

    real = mask[:, 1:].bool()  # (n_rows, n_response)
    before, target = hidden[:, :-1][real], ids[:, 1:][real]  # (n_tokens, hidden), (n_tokens,)
    pieces = [
        _score_tokens(model, before[i : i + _VOCABULARY_CHUNK], target[i : i + _VOCABULARY_CHUNK])
        for i in range(0, len(target), _VOCABULARY_CHUNK)
    ]
    result = np.full((len(mask), len(LIKELIHOOD)), np.nan, dtype=np.float32)
    if not pieces:
        return result
    scores = torch.cat(pieces).cpu().numpy()  # (n_tokens, 3): log-probability, entropy, rank
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


def _score_tokens(model: Any, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Log-probability, entropy and rank (0 is the likeliest) of each token: float32 ``(n_tokens, 3)``."""
    import torch

    logits = model.get_output_embeddings()(hidden).float()  # (n_tokens, vocabulary)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    chosen = logits.gather(1, target[:, None])  # (n_tokens, 1)
    rank = (logits > chosen).sum(1)
    top = logits.amax(1, keepdim=True)
    weights = (logits - top).exp_()
    total = weights.sum(1)
    log_total = total.log() + top[:, 0]
    entropy = log_total - torch.linalg.vecdot(weights, logits) / total
    return torch.stack([chosen[:, 0] - log_total, entropy, rank.float()], dim=1)
