"""The trunk's cache: what the lower, frozen layers make of every text, computed once.

The output of layers that are not trained is the same for every fold, seed and epoch.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from stackllm.engine.local import Engine
from stackllm.errors import StorageError
from stackllm.llm.backbone import Attention, Devices, check_length, load_config
from stackllm.llm.estimate import shown, width
from stackllm.llm.layers import check_layers, count_layers, lower_layers, positions
from stackllm.llm.locate import is_ready, revision_of
from stackllm.llm.machine import compute_dtype, packing, pass_tokens
from stackllm.llm.memory import within_memory
from stackllm.llm.prompts import Prompt, PromptParams, longest, make_prompts
from stackllm.llm.reading import opened, read_ends
from stackllm.llm.rows import RowCache, Text, Weights, texts_of
from stackllm.store.atomic import make_folder
from stackllm.store.digest import digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 2

_BATCH_TOKENS, _GPU_TOKENS = 2_048, 16_384
_OPEN_SHARDS = 256
_RESERVE = 2**30
"""Bytes of the disk that are left free."""


@dataclass(frozen=True)
class TrunkParams:
    """What decides the output of the lower layers.

    Parameters
    ----------
    backbone
        As for :func:`stackllm.llm.backbone.load_backbone`.
    precision
        Of the weights, not ``"auto"``.
    trainable_layers
        How many layers at the top are left to train: the trunk ends below them.
    prompt
        Template and lengths.
    attention, devices
        As for :func:`stackllm.llm.backbone.load_model`.
    """

    backbone: str
    precision: str
    trainable_layers: int
    prompt: PromptParams
    attention: Attention = "auto"
    devices: Devices = "one"

    @property
    def identity(self) -> str:
        """Digest of everything but the texts."""
        return digest(
            VERSION, revision_of(self.backbone), packing(self.precision), compute_dtype(self.precision),
            self.trainable_layers, self.prompt, self.attention,
        )  # fmt: skip


class Trunk:
    """Output of the lower layers for each row, memory-mapped.

    Parameters
    ----------
    table
        A row each: ``shard`` (folder), and where in its matrix the question (``question_start``,
        ``question_stop``) and the response (``response_start``, ``response_stop``) stand.
    """

    def __init__(self, table: pl.DataFrame) -> None:
        self._table = table
        spans = table.select(pl.exclude("shard")).to_numpy()
        self._spans = spans
        self.lengths = (spans[:, 1] - spans[:, 0]) + (spans[:, 3] - spans[:, 2])
        self._shards: OrderedDict[str, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self.lengths)

    def states(self, row: int) -> np.ndarray:
        """Question and response of a row, ``(n_tokens, hidden)``; bfloat16 as its bits, uint16."""
        name = self._table["shard"][row]
        if name not in self._shards:
            self._shards[name] = np.load(
                Path(name) / "states.npy", mmap_mode="r", allow_pickle=False
            )
            if len(self._shards) > _OPEN_SHARDS:  # each is an open file
                self._shards.popitem(last=False)
        shard = self._shards[name]
        a, b, c, d = self._spans[row]
        joined: np.ndarray = np.concatenate([shard[a:b], shard[c:d]])
        return joined


def cache_trunk(rows: pl.DataFrame, params: TrunkParams, engine: Engine) -> pl.DataFrame:
    """Read every row with the lower layers, or find where that stands.

    Parameters
    ----------
    rows
        ``question, response``.
    params
        Settings.
    engine
        Runs the shards below ``engine.root``.

    Returns
    -------
    polars.DataFrame
        The table of a :class:`Trunk`.

    Raises
    ------
    StorageError
        If the disk is too small for it.
    """
    cached = RowCache("trunk", VERSION, params.identity).ensure(
        texts_of(rows),
        engine,
        "trunk",
        f"texts to read with the lower layers of {params.backbone}, in {params.precision}",
        Weights(
            params.backbone,
            params.precision,
            params.attention,
            params.devices,
            params.trainable_layers,
        ),
        read_texts,
        params,
        check=lambda missing: _check(missing, params, engine),
    )
    spans = cached.take("spans").reshape(-1, 4)
    names = ["question_start", "question_stop", "response_start", "response_stop"]
    shards = [str(shard.resolve()) for shard, _ in cached.places]
    return pl.DataFrame({"shard": shards}).hstack(pl.DataFrame(spans, schema=names))


def _check(missing: Sequence[Text], params: TrunkParams, engine: Engine) -> None:
    """Refuse what the backbone has no layers or the disk has no room for, as far as it is here."""
    if engine.dry_run and not is_ready(params.backbone):
        return
    config = load_config(params.backbone, engine.reporter.say)
    check_layers(params.backbone, config.num_hidden_layers, params.trainable_layers)
    if not engine.dry_run:
        _check_disk(engine.root, missing, params, config.hidden_size)


def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    params: TrunkParams,
) -> dict[str, np.ndarray]:
    """Of texts ``states``, ``(n_tokens, hidden)`` of all, and ``spans``, int64 ``(n, 4)``: where each stands in it."""
    prompts = make_prompts(tokenizer, texts, params.prompt)
    check_length(params.backbone, positions(model), longest(prompts))
    layer = count_layers(model) - params.trainable_layers
    with lower_layers(model, layer) as outputs:
        groups = within_memory(
            longest(prompts),
            pass_tokens(_GPU_TOKENS, _BATCH_TOKENS),
            lambda most: _read(model, prompts, most, outputs),
            model,
        )
    states = np.concatenate([states for pieces in groups for states in pieces])
    return {"states": states, "spans": _spans(groups)}


def _read(
    model: PreTrainedModel, prompts: list[Prompt], budget: int, outputs: list[torch.Tensor]
) -> list[list[np.ndarray]]:
    """Of each group: states of its question without the last token, and of each response behind that.

    ``outputs`` is where every pass of the model leaves the last layer's states.
    """
    outputs.clear()
    questions: dict[int, np.ndarray] = {}
    responses: dict[int, np.ndarray] = {}
    group_of = [group for group, prompt in enumerate(prompts) for _ in prompt.responses]
    for ends in read_ends(model, opened(prompts), budget):
        if len(outputs) == 2:  # of questions as well, padded on the left
            for states, group in zip(outputs[0], ends.groups, strict=True):
                length = len(prompts[group].prefix) - 1
                questions[group] = _bits(states[len(states) - length :])
        each = zip(outputs[-1], ends.rows, ends.mask, ends.starts, strict=True)
        for states, row, mask, start in each:
            responses[row] = _bits(states[start : start + mask.sum()])
            if start:  # read with its question before it
                questions[group_of[row]] = _bits(states[:start])
        outputs.clear()
    groups, row = [], 0
    for group, prompt in enumerate(prompts):
        tails = [responses[row + i] for i in range(len(prompt.responses))]
        groups.append([questions.get(group, tails[0][:0]), *tails])
        row += len(tails)
    return groups


def _spans(groups: list[list[np.ndarray]]) -> np.ndarray:
    """Where question and response of every row stand when all is one matrix, int ``(n_rows, 4)``."""
    spans, at = [], 0
    for question, *responses in groups:
        start, at = at, at + len(question)
        head = (start, at)
        for response in responses:
            spans.append((*head, at, at + len(response)))
            at += len(response)
    return np.array(spans, dtype=np.int64)


def _bits(states: torch.Tensor) -> np.ndarray:
    """A tensor as NumPy; bfloat16, which NumPy does not know, as its bits."""
    import torch

    states = states.detach().cpu()
    if states.dtype == torch.bfloat16:
        states = states.view(torch.uint16)
    array: np.ndarray = states.numpy()
    return array


def _check_disk(root: Path, missing: Sequence[Text], params: TrunkParams, hidden: int) -> None:
    """Refuse what the disk cannot hold; a text has about a token for three characters."""
    prompt = params.prompt
    questions = {text.question for text in missing}
    tokens = sum(min(len(text) // 3, prompt.max_length_prompt) for text in questions)
    tokens += sum(min(text.size // 3, prompt.max_length_answer) for text in missing)
    needed = tokens * hidden * width(params.precision)
    make_folder(root)
    free = shutil.disk_usage(root).free
    if needed > free - _RESERVE:
        raise StorageError(
            f"{root}: the cached trunk needs about {shown(needed)} and {shown(free)} are free. "
            'Free some, lower max_length_answer, or set trainable_layers = "all".'
        )
