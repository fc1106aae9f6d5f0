"""Scores over the whole vocabulary: what a language model makes of its last hidden states.

Between the last hidden state and the logits, families differ: some scale, some cap, and of two that
carry the same setting one may pass it over. So nothing of that is done here; the model's own code
runs from its last hidden state on. Only the product with the head is ours to choose, because in
half precision logits near 20 come in steps of an eighth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from stackllm.errors import UsageError
from stackllm.llm.heads import body_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_ROWS = 64
"""States whose scores a processor makes at once: few, so that they stay in its cache."""
SCORES_BYTES = 2**28
"""Of the scores that are in memory at once where a pass over the head's weights is what costs."""
_COLUMNS = 8_192
"""Tokens of the vocabulary whose weights are widened at once: a copy of the whole head may be of GiB."""


def score_tokens(
    model: PreTrainedModel, hidden: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """How likely a token was, how sure the model, and how many tokens it held likelier.

    Parameters
    ----------
    model
        A transformers causal LM in evaluation mode.
    hidden
        Last hidden states ``(n_tokens, hidden)``, each before its token.
    target
        Token ids ``(n_tokens,)``.

    Returns
    -------
    torch.Tensor
        float32 ``(n_tokens, 3)``: log-probability, entropy in nats, rank (0 is the likeliest).

    Raises
    ------
    UsageError
        If the model cannot be run from its last hidden states on.
    """
    import torch

    if not len(target):
        return torch.empty((0, 3))
    size = rows_at_once(model, in_cache=True)
    pieces = zip(_logits(model, hidden, size), target.split(size), strict=True)
    return torch.cat([_measure(logits, ids) for logits, ids in pieces])


def score_among(model: PreTrainedModel, hidden: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Log-probability of each of a few tokens after each state, multiplied in float32.

    Parameters
    ----------
    model, hidden
        As for :func:`score_tokens`; ``(n_rows, hidden)``.
    tokens
        Token ids.

    Returns
    -------
    torch.Tensor
        float32 ``(n_rows, len(tokens))``.

    Raises
    ------
    UsageError
        As for :func:`score_tokens`.
    """
    import torch

    pieces = [
        logits[:, tokens] - logits.logsumexp(1, keepdim=True)
        for logits in _logits(model, hidden, rows_at_once(model, in_cache=False), exact=True)
    ]
    return torch.cat(pieces)


def _measure(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Log-probability, entropy and rank: from float32 ``(n, vocabulary)`` to float32 ``(n, 3)``."""
    import torch

    chosen = logits.gather(1, target.to(logits.device)[:, None])  # (n, 1)
    rank = (logits > chosen).sum(1)
    top = logits.amax(1, keepdim=True)
    weights = (logits - top).exp_()
    total = weights.sum(1)
    log_total = total.log() + top[:, 0]
    entropy = log_total - torch.linalg.vecdot(weights, logits) / total
    return torch.stack([chosen[:, 0] - log_total, entropy, rank.float()], dim=1)


def rows_at_once(model: PreTrainedModel, in_cache: bool) -> int:
    """How many states to score at once; ``in_cache``: few enough for a processor's cache."""
    head: Any = model.get_output_embeddings()
    if in_cache and head.weight.device.type == "cpu":
        return _ROWS
    vocabulary: int = model.config.get_text_config().vocab_size
    return max(1, SCORES_BYTES // (4 * vocabulary))


def _logits(
    model: PreTrainedModel, hidden: torch.Tensor, size: int, exact: bool = False
) -> Iterator[torch.Tensor]:
    """Logits of some states after the other, float32 ``(up to size, vocabulary)``.

    ``exact`` multiplies with the head as in float32 whatever its weights are in.
    """
    import torch

    with torch.inference_mode(), _head_alone(model, exact) as logits_of:
        for states in hidden.split(size):
            yield logits_of(states)


@functools.cache
def _sums_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Can a device multiply in half precision and give the sums, which it keeps in float32, as they are?"""
    import torch

    square = torch.zeros((16, 16), dtype=dtype, device=device)
    try:
        torch.mm(square, square, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # a NotImplementedError is one
        return False
    return True


def _product(head: Any, states: torch.Tensor) -> torch.Tensor | None:
    """Logits in float32 that nothing has rounded on the way, without a copy of the whole head.

    None where the head itself does that, or its weights are packed or elsewhere, and only it knows how.
    """
    import torch

    weight, bias = head.weight, getattr(head, "bias", None)
    if weight.dtype == torch.float32 or weight.is_meta or not weight.is_floating_point():
        return None
    rows = states.flatten(0, -2).to(weight.device)
    if rows.dtype == weight.dtype and _sums_in_float32(weight.dtype, weight.device):
        logits = torch.mm(rows, weight.T, out_dtype=torch.float32)
    else:
        rows = rows.float()
        logits = rows.new_empty((len(rows), len(weight)))
        blocks = zip(weight.split(_COLUMNS), logits.split(_COLUMNS, dim=1), strict=True)
        for columns, block in blocks:
            torch.mm(rows, columns.float().T, out=block)
    if bias is not None:
        logits += bias.float()
    return logits.unflatten(0, states.shape[:-1])


@contextmanager
def _head_alone(
    model: PreTrainedModel, exact: bool
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A function from last hidden states to logits: all that the model does but for its layers."""
    import torch

    head: Any = model.get_output_embeddings()
    multiply = head.forward  # its own, or what accelerate has put in its place
    dtype, device = head.weight.dtype, head.weight.device
    exact = exact or _sums_in_float32(dtype, device)  # costs nothing there

    def product(states: torch.Tensor) -> torch.Tensor:
        logits = _product(head, states) if exact else None
        return multiply(states).float() if logits is None else logits

    def logits_of(states: torch.Tensor) -> torch.Tensor:
        given.last_hidden_state = states[None]
        ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)  # not looked at
        logits: torch.Tensor = model(input_ids=ids).logits[0].float()
        if not given.was_read:
            raise UsageError(
                f"{type(model).__name__}: the scores of such a model cannot be had from its last hidden states. "
                "Choose a backbone of another family."
            )
        return logits

    given = _Given()
    with ExitStack() as stack:
        stack.enter_context(_replaced(head, product))
        for layers in {body_of(model), model.get_decoder()}:  # OPT asks the latter by itself
            if layers not in (model, head):  # which others call their decoder
                stack.enter_context(_replaced(layers, given))
        yield logits_of


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else inside."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class _Given:
    """Stands for layers, and for their output: last hidden states ``(1, n, hidden)`` and nothing else."""

    last_hidden_state: torch.Tensor
    was_read = False

    def __call__(self, *_: Any, **__: Any) -> _Given:
        self.was_read = True
        return self

    def __getitem__(self, place: int | slice) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None
