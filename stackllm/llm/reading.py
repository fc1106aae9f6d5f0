"""Reading token sequences with a causal LLM, what many of them begin with only once.

Rows are read in batches of like length: padding, which is computed like any token, is most of what a
careless batch costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from stackllm.llm.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_BATCH_COST = 32
"""What a pass costs beside its tokens, in tokens, at least;"""
_SHARE = 1 / 32
"""and at least this share of the largest pass: who has room for much has many processors to keep busy."""
_SPLIT_COST = 1 / 4
"""What another pass of beginnings costs, as a share of the largest: their ends are read apart from others'."""


@dataclass(frozen=True)
class Reading:
    """What some rows have read so far: keys and values of every layer, and which of them are real.

    Parameters
    ----------
    cache
        A transformers cache; None if nothing has been read.
    mask
        1 for real tokens, ``(n_rows, n_read)``; None if nothing has been read.
    """

    cache: Any = None
    mask: torch.Tensor | None = None

    def copy(self, rows: list[int]) -> Reading:
        """A reading of these rows, any of them as often as wanted, without what pads all of them."""
        import torch
        from transformers import DynamicCache

        if self.mask is None:
            return self
        index = torch.tensor(rows, device=self.mask.device)
        cache = DynamicCache()
        with torch.inference_mode():
            mask = self.mask[index]
            start = int(mask.any(0).int().argmax())  # where the first row begins
            for number, layer in enumerate(self.cache.layers):
                keys, values = (states[index, :, start:] for states in (layer.keys, layer.values))
                cache.update(keys, values, number)
            return Reading(cache, mask[:, start:])

    def go_on(
        self, model: PreTrainedModel, ids: torch.Tensor, new: torch.Tensor, **options: Any
    ) -> tuple[Reading, Any]:
        """Read on, one text per row, and use this reading up.

        Parameters
        ----------
        model
            A transformers causal LM in evaluation mode.
        ids, new
            Token ids for each row and which of them are real, from :func:`pad`.
        options
            Further arguments of the model.

        Returns
        -------
        reading
            What the rows have read now.
        output
            The model's, without its head; hidden states are ``(n_rows, longest, hidden)``.
        """
        import torch
        from transformers import DynamicCache

        before = ids.new_zeros((len(ids), 0)) if self.mask is None else self.mask
        mask = torch.cat([before, new], dim=1)
        cache = DynamicCache() if self.cache is None else self.cache
        with torch.inference_mode():
            output = model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=before.sum(1, keepdim=True) + (new.cumsum(1) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                **options,
            )
        return Reading(cache, mask), output


class Ends(NamedTuple):
    """A batch of ends that have been read.

    Parameters
    ----------
    groups
        Whose beginnings had been read together, counted over all.
    rows
        Which ends, counted over all groups.
    reading
        What these rows have read.
    output
        The model's for the ends, padded on the right.
    ids, mask
        Token ids of the ends and which are real, ``(len(rows), longest)``.
    """

    groups: list[int]
    rows: list[int]
    reading: Reading
    output: Any
    ids: torch.Tensor
    mask: torch.Tensor


def read_ends(
    model: PreTrainedModel,
    prompts: list[Prompt],
    budget: int,
    root: Reading | None = None,
    **options: Any,
) -> Iterator[Ends]:
    """Read what each prompt's texts begin with once, and then their ends, all in batches of like length.

    Parameters
    ----------
    model
        A transformers causal LM in evaluation mode.
    prompts
        Groups of texts that begin alike; each goes on with at least one token.
    budget
        Most tokens of a batch, padding included, unless it is of a single text.
    root
        A reading of one row that all of them go on from.
    options
        Further arguments of the model when it reads ends.
    """
    firsts = [0, *itertools.accumulate(len(prompt.responses) for prompt in prompts)]
    heads = [prompt.prefix for prompt in prompts]
    cost = max(_BATCH_COST, _SHARE * budget)
    for groups in like_length(list(map(len, heads)), budget, cost + _SPLIT_COST * budget):
        begun = Reading() if root is None else root.copy([0] * len(groups))
        if any(heads[g] for g in groups):
            begun, _ = begun.go_on(model, *pad(model, [heads[g] for g in groups], left=True))
        members = [
            (place, firsts[g] + i, end)
            for place, g in enumerate(groups)
            for i, end in enumerate(prompts[g].responses)
        ]
        for batch in like_length([len(end) for *_, end in members], budget, cost):
            places, rows, ends = (list(it) for it in zip(*(members[i] for i in batch), strict=True))
            ids, mask = pad(model, ends, left=False)
            reading, output = begun.copy(places).go_on(model, ids, mask, **options)
            yield Ends(groups, rows, reading, output, ids, mask)


def opened(prompts: list[Prompt]) -> list[Prompt]:
    """The same texts, each prefix's last token in front of its responses: it predicts their first.

    Examples
    --------
    >>> opened([Prompt([1, 2], [[3], []])])
    [Prompt(prefix=[1], responses=[[2, 3], [2]])]
    """
    return [
        Prompt(prompt.prefix[:-1], [[prompt.prefix[-1], *ids] for ids in prompt.responses])
        for prompt in prompts
    ]


def pad(
    model: PreTrainedModel, rows: list[list[int]], left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask where the model wants them, both ``(len(rows), longest)``.

    Rows are padded on the left or on the right, with an id that is never attended to.
    """
    import torch

    width = max(map(len, rows))
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    device = model.get_input_embeddings().weight.device
    return ids.to(device), mask.to(device)


def like_length(lengths: list[int], budget: int, cost: float) -> list[list[int]]:
    """Rows of like length side by side, cut so that padding and batches cost least.

    Parameters
    ----------
    lengths
        Tokens of each row.
    budget
        Most tokens of a batch, padding included, unless it is one row.
    cost
        What a batch costs beside its tokens, in tokens.

    Examples
    --------
    >>> like_length([3, 100, 4, 90], budget=400, cost=20)
    [[0, 2], [3, 1]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    costs, starts = [0.0], [0]  # of the first n rows, and where their last batch begins
    for stop in range(1, len(order) + 1):
        width = max(1, lengths[order[stop - 1]])
        most = min(stop, max(1, budget // width))
        least, start = min(
            (costs[stop - n] + n * width + cost, stop - n) for n in range(1, most + 1)
        )
        costs.append(least)
        starts.append(start)
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.insert(0, order[starts[stop] : stop])
        stop = starts[stop]
    return batches
