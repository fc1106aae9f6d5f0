"""The encoder's cache: every response is read once, whatever run asks for it.

Rows are cached by their text below a folder named after everything else that decides their numbers
(weights, template, layers, lengths, dtype). Shards hold whole groups of like length and are planned
from the whole table, so a stopped run goes on with the very batches it would have had.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
from annotated_types import Len

from stackllm.engine.local import Engine, Task
from stackllm.errors import StorageError
from stackllm.llm.backbone import (
    Attention,
    Devices,
    Dtype,
    choose_dtype,
    frozen_model,
    use_one_thread,
)
from stackllm.llm.encoder import LIKELIHOOD, read_groups
from stackllm.llm.locate import EMBEDDED, prepare, revision_of
from stackllm.llm.memory import within_memory
from stackllm.llm.prompts import PromptParams, make_prompts
from stackllm.parameters import BackboneName, Share, TokenCount, check
from stackllm.store.digest import digest
from stackllm.store.units import MANIFEST, Unit, make_unit, open_unit, stored_key

VERSION = 2


@dataclass(frozen=True)
class EncoderParams:
    """Settings of the encoder.

    Parameters
    ----------
    backbone
        ``"smollm2"`` (embedded), a folder, or a hub name. In a settings file ``"none"``: no encoder.
    dtype
        ``"auto"`` takes what the machine computes fastest in.
    depths
        Which layers are pooled, as shares of the network's depth, above 0 up to 1.
    max_question_tokens, max_response_tokens
        Longer texts are cut: questions in the middle, responses at the end.
    batch_tokens
        Response tokens of a batch. None takes 1,024 on a CPU and 16,384 on a GPU.
    attention
        How attention is computed; ``"auto"`` is as transformers chooses, and ``"flash_attention_2"``
        is a package of its own.
    devices
        ``"one"``: a GPU for each process; ``"all"`` shares the layers of a large model out over all.
    """

    backbone: BackboneName = EMBEDDED
    dtype: Dtype = "auto"
    depths: Annotated[tuple[Share, ...], Len(1, 1000)] = (1 / 2, 2 / 3, 5 / 6)
    max_question_tokens: TokenCount = 96
    max_response_tokens: TokenCount = 128
    batch_tokens: TokenCount | None = None
    attention: Attention = "auto"
    devices: Devices = "one"

    def __post_init__(self) -> None:
        check(self)


_SHARD_ROWS = 112
_TEMPLATE = ("Question: ", "\nAnswer:", " ")


def encode(
    rows: pl.DataFrame, params: EncoderParams, engine: Engine
) -> tuple[np.ndarray, pl.DataFrame, str]:
    """Read every row with the frozen LLM, or take it from the cache.

    Parameters
    ----------
    rows
        ``group_id, question, response``.
    params
        Settings.
    engine
        Runs the shards below ``engine.root``.

    Returns
    -------
    embedding
        float32 ``(n_rows, n_layers * hidden)``: mean-pooled layers side by side.
    likelihood
        Float64 columns :data:`~stackllm.llm.encoder.LIKELIHOOD`.
    identity
        Digest of everything but the texts that decides the numbers.
    """
    dtype, reason = choose_dtype(params.dtype)
    identity = digest(
        VERSION, revision_of(params.backbone), dtype, params.depths, _TEMPLATE,
        params.max_question_tokens, params.max_response_tokens, params.batch_tokens,
        params.attention,
    )  # fmt: skip
    keys = [
        digest(question, response)
        for question, response in rows.select("question", "response").iter_rows()
    ]
    folder = f"encoder/{identity[:16]}"
    known = known_rows(engine.root, folder)
    wanted = rows.with_columns(key=pl.Series(keys)).unique("key", maintain_order=True)
    plans = [[entry for entry in shard if entry[2] not in known] for shard in plan_shards(wanted)]
    plans = [shard for shard in plans if shard]
    if plans:
        engine.reporter.say(
            f"encoder {params.backbone}: {sum(map(len, plans))} of {len(wanted)} texts to read, in {dtype} ({reason})"
        )
        if not engine.dry_run:
            prepare(params.backbone, engine.reporter.say)
    tasks = [
        Task(
            shard_unit(folder, VERSION, identity, [key for *_, key in shard]),
            encode_shard,
            (shard, params, dtype),
        )
        for shard in reversed(plans)  # the longest texts first
    ]
    engine.ensure("encoder", tasks, n_jobs=workers())
    known = known_rows(engine.root, folder) if tasks else known
    places = [known[key] for key in keys]
    pooled = _take(places, "pooled.npy")  # (n_rows, n_layers, 2, hidden)
    likelihood = _take(places, "likelihood.npy")
    embedding = np.ascontiguousarray(pooled[:, :, 0].reshape(len(keys), -1))
    return embedding, pl.DataFrame(likelihood.astype(np.float64), schema=list(LIKELIHOOD)), identity


def encode_shard(
    folder: Path, rows: list[tuple[str, str, str]], params: EncoderParams, dtype: Dtype
) -> None:
    """Read ``(question, response, key)`` rows and write ``keys``, ``pooled`` and ``likelihood``."""
    import torch

    model, tokenizer = frozen_model(params.backbone, dtype, params.attention, params.devices)
    use_one_thread()
    depth = model.config.get_text_config().num_hidden_layers
    layers = tuple(max(1, round(share * depth)) for share in params.depths)
    budget = params.batch_tokens or (16_384 if torch.cuda.is_available() else 1_024)
    before_question, after_question, opening = _TEMPLATE
    shape = PromptParams(
        before_question=before_question,
        before_answer=after_question + opening,
        max_length_prompt=params.max_question_tokens,
        max_length_answer=params.max_response_tokens,
        max_length=2**30,
    )
    prompts = make_prompts(tokenizer, ((question, text) for question, text, _ in rows), shape)
    pooled, likelihood = within_memory(
        prompts, budget, lambda most: read_groups(model, prompts, layers, most)
    )
    np.save(folder / "keys.npy", np.array([key.encode() for *_, key in rows]))
    np.save(folder / "pooled.npy", pooled)
    np.save(folder / "likelihood.npy", likelihood)


def workers() -> int | None:
    """One process a GPU machine; on a CPU every worker holds a model of its own."""
    import torch

    return 1 if torch.cuda.is_available() else None


def plan_shards(rows: pl.DataFrame) -> list[list[tuple[str, str, str]]]:
    """Rows of the same question side by side, short groups first, cut into shards."""
    groups = (
        rows.group_by("question", maintain_order=True)
        .agg("response", "key", size=pl.col("response").str.len_chars().max())
        .sort("size", "question")
    )
    shards: list[list[tuple[str, str, str]]] = [[]]
    for question, responses, keys, _ in groups.iter_rows():
        if len(shards[-1]) >= _SHARD_ROWS:
            shards.append([])
        shards[-1] += [(question, *pair) for pair in zip(responses, keys, strict=True)]
    return [shard for shard in shards if shard]


def shard_unit(folder: str, version: int, identity: str, keys: list[str]) -> Unit:
    """The unit of a shard: what decides its numbers, and the keys of the rows that it holds."""
    rows = digest(keys)
    return make_unit(f"{folder}/{rows[:24]}", version, identity, rows)


def known_rows(root: Path, folder: str) -> dict[str, tuple[Path, int]]:
    """Where each cached row stands; shards that are damaged count as absent."""
    known: dict[str, tuple[Path, int]] = {}
    for manifest in sorted((root / folder).glob(f"*/{MANIFEST}")):
        try:
            unit = Unit(f"{folder}/{manifest.parent.name}", stored_key(manifest.parent))
            shard = open_unit(root, unit)
        except (StorageError, ValueError):
            continue
        for place, row in enumerate(np.load(shard / "keys.npy", allow_pickle=False)):
            known[row.decode()] = (shard, place)
    return known


def _take(places: list[tuple[Path, int]], name: str) -> np.ndarray:
    """Rows out of many shards, in order; one shard open at a time."""
    wanted: dict[Path, list[tuple[int, int]]] = {}
    for row, (shard, place) in enumerate(places):
        wanted.setdefault(shard, []).append((row, place))
    taken: np.ndarray | None = None
    for shard, pairs in wanted.items():
        stored = np.load(shard / name, allow_pickle=False)
        if taken is None:
            taken = np.empty((len(places), *stored.shape[1:]), stored.dtype)
        rows, found = np.array(pairs).T
        taken[rows] = stored[found]
    assert taken is not None
    return taken
