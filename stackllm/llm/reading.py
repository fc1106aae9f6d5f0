"""Reading token sequences with a causal LLM, what many of them begin with only once.

Rows are read in batches of like length: padding, which is computed like any token, is most of what a
careless batch costs.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from stackllm.errors import UsageError
from stackllm.llm.families import Level, level_of
from stackllm.llm.heads import body_of
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
    """What some rows have read so far: the model's own cache of it, and which tokens were real.

    Parameters
    ----------
    cache
        What the model made to go on from: keys and values, and states of layers that are no attention;
        None if nothing has been read.
    mask
        1 for real tokens, ``(n_rows, n_read)``; None if nothing has been read.
    """

    cache: Any = None
    mask: torch.Tensor | None = None

    def copy(self, rows: list[int]) -> Reading:
        """A reading of these rows, any of them as often as wanted."""
        import torch

        if self.mask is None:
            return self
        index = torch.tensor(rows, device=self.mask.device)
        with torch.inference_mode():
            # tensors are no part of the copy: picking rows makes new ones
            cache = deepcopy(self.cache, {id(it): it for it in _tensors(self.cache)})
            cache.reorder_cache(index)
            return Reading(cache, self.mask[index])

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

        before = ids.new_zeros((len(ids), 0)) if self.mask is None else self.mask
        mask = torch.cat([before, new], dim=1)
        body = body_of(model)
        known = _parameters(type(body).forward)
        place = _CACHES[0] if _CACHES[0] in known else _CACHES[1]
        given = {
            "attention_mask": mask,
            "position_ids": before.sum(1, keepdim=True) + (new.cumsum(1) - 1).clamp(min=0),
            "use_cache": True,
        }
        if place == _CACHES[1]:  # without attention nothing looks back at what was masked before
            given["attention_mask"] = new
        given = {name: value for name, value in given.items() if name in known}
        with torch.inference_mode():
            output = body(input_ids=ids, **{**given, place: self.cache, **options})
        return Reading(getattr(output, place, None), mask), output


_CACHES = ("past_key_values", "cache_params")
"""What models call their cache: with attention, and without."""


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """What a model takes."""
    return frozenset(inspect.signature(forward).parameters)


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    """All tensors of a cache, of its layers and of what they hold by name or number."""
    import torch

    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, dict):
        yield from itertools.chain.from_iterable(map(_tensors, part.values()))
    elif isinstance(part, list | tuple):
        yield from itertools.chain.from_iterable(map(_tensors, part))
    elif hasattr(part, "__dict__") and not isinstance(part, type):
        yield from _tensors(vars(part))


class Ends(NamedTuple):
    """A batch of ends that have been read.

    Parameters
    ----------
    groups
        Whose beginnings had been read together, counted over all.
    rows
        Which ends, counted over all groups.
    reading
        What these rows have read; empty where they were read without anything to go on from.
    output
        The model's for the pass in which the ends were read; see :meth:`of`.
    ids, mask
        Token ids of the ends and which are real, padded on the right, ``(len(rows), longest)``.
    starts
        Of each row, how many tokens were read in that pass before its end.
    """

    groups: list[int]
    rows: list[int]
    reading: Reading
    output: Any
    ids: torch.Tensor
    mask: torch.Tensor
    starts: list[int]

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """The ends' part ``(len(rows), longest, hidden)`` of what the pass made of its tokens.

        Raises
        ------
        UsageError
            If that are other than ``(len(rows), width, hidden)``.
        """
        import torch

        if states.ndim != 3:
            raise UsageError(
                "the layers of this backbone do not hand on one state of each token. Choose another."
            )
        longest = self.ids.shape[1]
        if not any(self.starts):
            return states[:, :longest]
        rows, starts = (
            torch.tensor(it, device=states.device)[:, None]
            for it in (range(len(self.rows)), self.starts)
        )
        places = starts + torch.arange(longest, device=states.device)
        return states[rows, places.clamp(max=states.shape[1] - 1)]


def read_ends(
    model: PreTrainedModel,
    prompts: list[Prompt],
    budget: int,
    root: Sequence[int] = (),
    level: Level | None = None,
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
        Token ids that stand before all of them.
    level
        How much rows share; None is what is right for the model.
    options
        Further arguments of the model when it reads ends.
    """
    level = level or level_of(model)
    firsts = [0, *itertools.accumulate(len(prompt.responses) for prompt in prompts)]
    cost = max(_BATCH_COST, _SHARE * budget)
    if level in ("whole", "alone"):
        yield from _read_whole(model, prompts, budget, cost, root, level, **options)
        return
    begun = Reading()
    if root:
        begun, _ = begun.go_on(model, *pad(model, [list(root)], left=True))
    heads = [prompt.prefix for prompt in prompts]
    lengths = list(map(len, heads))
    most = cost + _SPLIT_COST * budget
    apart = root and level == "front"  # padding would stand behind the root
    cut = equal_length if apart else like_length
    for groups in cut(lengths, budget, most):
        head = begun.copy([0] * len(groups))
        if any(heads[g] for g in groups):
            head, _ = head.go_on(model, *pad(model, [heads[g] for g in groups], left=True))
        members = [
            (place, firsts[g] + i, end)
            for place, g in enumerate(groups)
            for i, end in enumerate(prompts[g].responses)
        ]
        for batch in like_length([len(end) for *_, end in members], budget, cost):
            places, rows, ends = (list(it) for it in zip(*(members[i] for i in batch), strict=True))
            ids, mask = pad(model, ends, left=False)
            reading, output = head.copy(places).go_on(model, ids, mask, **options)
            yield Ends(groups, rows, reading, output, ids, mask, [0] * len(rows))


def _read_whole(
    model: PreTrainedModel,
    prompts: list[Prompt],
    budget: int,
    cost: float,
    root: Sequence[int],
    level: Level,
    **options: Any,
) -> Iterator[Ends]:
    """Read every text from its first token on, in batches or alone."""
    texts = [
        (g, [*root, *prompt.prefix], end)
        for g, prompt in enumerate(prompts)
        for end in prompt.responses
    ]
    lengths = [len(head) + len(end) for _, head, end in texts]
    batches = like_length(lengths, budget, cost)
    for rows in batches if level == "whole" else [[row] for row in range(len(texts))]:
        groups, heads, ends = zip(*(texts[row] for row in rows), strict=True)
        whole = [[*head, *end] for head, end in zip(heads, ends, strict=True)]
        ids, mask = pad(model, whole, left=False)
        _, output = Reading().go_on(model, ids, mask, use_cache=False, **options)
        ids, mask = pad(model, list(ends), left=False)
        starts = list(map(len, heads))
        yield Ends(sorted(set(groups)), rows, Reading(), output, ids, mask, starts)


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


def equal_length(lengths: list[int], budget: int, cost: float) -> list[list[int]]:
    """The same for rows that nothing may pad: those of one length side by side.

    Examples
    --------
    >>> equal_length([3, 4, 3, 3], budget=6, cost=20)
    [[0, 2], [3], [1]]
    """
    batches = []
    for length in sorted(set(lengths)):
        rows = [i for i, each in enumerate(lengths) if each == length]
        most = max(1, budget // max(1, length))
        batches += [rows[i : i + most] for i in range(0, len(rows), most)]
    return batches
