"""Reading token sequences with a causal LLM, what many of them begin with only once.

Rows are read in batches of like length: padding, which is computed like any token, is most of what a
careless batch costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from stackllm.errors import StorageError
from stackllm.llm.prompts import Prompt

if TYPE_CHECKING:
    import torch

Read = TypeVar("Read")

_BATCH_COST = 1 / 32
"""What a batch costs beside its tokens, as a share of the largest batch."""


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
            start = int(
                mask.any(0).int().argmax()
            )  # (n, n_read): the first that is real for any row
            for number, layer in enumerate(self.cache.layers):
                keys, values = (states[index, :, start:] for states in (layer.keys, layer.values))
                cache.update(keys, values, number)
            return Reading(cache, mask[:, start:])

    def go_on(
        self, model: Any, texts: list[list[int]], left: bool, **options: Any
    ) -> tuple[Reading, Any]:
        """Read on, one text a row, and use this reading up.

        Parameters
        ----------
        model
            A transformers causal LM in evaluation mode.
        texts
            Token ids for each row, padded on the left or on the right.
        left
            On which side.
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

        ids, new = pad(texts, left, model.get_input_embeddings().weight.device)
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


class Responses(NamedTuple):
    """A batch of responses that have been read.

    Parameters
    ----------
    rows
        Which, counted over all groups.
    output
        The model's for each response, the question's last token in front of it: it predicts the first.
    ids, mask
        Token ids and which are real, ``(len(rows), longest)``, padded on the right.
    """

    rows: list[int]
    output: Any
    ids: torch.Tensor
    mask: torch.Tensor


def read_responses(
    model: Any, prompts: list[Prompt], budget: int, **options: Any
) -> Iterator[Responses]:
    """Read questions once, all together, and then their responses, in batches of like length.

    Parameters
    ----------
    model
        A transformers causal LM in evaluation mode.
    prompts
        Groups.
    budget
        Most tokens of a batch of responses, padding included, unless it is a single one.
    options
        Further arguments of the model when it reads responses.
    """
    heads = [prompt.prefix[:-1] for prompt in prompts]
    questions = Reading()
    if any(heads):
        questions, _ = questions.go_on(model, heads, left=True)
    owners = [g for g, prompt in enumerate(prompts) for _ in prompt.responses]
    tails = [[prompt.prefix[-1], *ids] for prompt in prompts for ids in prompt.responses]
    for rows in like_length(list(map(len, tails)), budget, _BATCH_COST * budget):
        own = questions.copy([owners[row] for row in rows])
        texts = [tails[row] for row in rows]
        ids, mask = pad(texts, left=False, device=model.get_input_embeddings().weight.device)
        yield Responses(rows, own.go_on(model, texts, left=False, **options)[1], ids, mask)


def within_memory(
    prompts: list[Prompt], budget: int, read: Callable[[list[Prompt], int], Read]
) -> list[Read]:
    """What ``read`` gives for groups and a budget of tokens; less of both where memory runs out.

    Raises
    ------
    StorageError
        If memory does not even hold one text and its question.
    """
    import torch

    results: list[Read] = []
    waiting = [(prompts, budget)]
    while waiting:
        groups, most = waiting.pop(0)
        try:
            results.append(read(groups, most))
        except torch.OutOfMemoryError as error:
            longest = 1 + max(len(ids) for prompt in groups for ids in prompt.responses)
            if most > longest:
                waiting.insert(0, (groups, most // 2))
            elif len(groups) > 1:
                middle = len(groups) // 2
                waiting[:0] = [(groups[:middle], most), (groups[middle:], most)]
            else:
                raise StorageError(
                    f"out of memory with one text of {longest} tokens. Lower the most tokens that are read "
                    "of a text, or take a smaller backbone or precision."
                ) from error
    return results


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
