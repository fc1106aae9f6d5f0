"""What the frozen LLM says of every response: pooled layers and likelihood, from the row cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import polars as pl
from annotated_types import Len

from stackllm.engine.local import Engine
from stackllm.llm.backbone import Attention, Devices, load_config
from stackllm.llm.encoder import LIKELIHOOD, read_groups
from stackllm.llm.families import check_pools
from stackllm.llm.locate import EMBEDDED, is_ready, revision_of
from stackllm.llm.machine import Precision, choose_dtype, pass_tokens
from stackllm.llm.memory import within_memory
from stackllm.llm.prompts import PromptParams, longest, make_prompts
from stackllm.llm.rows import RowCache, Rows, Text, Weights, texts_of
from stackllm.parameters import BackboneName, Share, TokenCount, check
from stackllm.store.digest import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 4


@dataclass(frozen=True)
class EncoderParams:
    """Settings of the encoder.

    Parameters
    ----------
    backbone
        ``"smollm2"`` (embedded), a folder, or a hub name. In a settings file ``"none"``: no encoder.
        ``revision`` beside it names a commit, branch or tag of the hub, as ``"org/name@revision"`` does; a
        run stays with the commit that it began with.
    dtype
        ``"auto"`` takes what the machine that begins the run computes fastest in; ``"int8"`` and ``"nf4"``
        pack the weights, and compute in what follows the dash, or as ``"auto"``.
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
    dtype: Precision = "auto"
    depths: Annotated[tuple[Share, ...], Len(1, 1000)] = (1 / 2, 2 / 3, 5 / 6)
    max_question_tokens: TokenCount = 96
    max_response_tokens: TokenCount = 128
    batch_tokens: TokenCount | None = None
    attention: Attention = "auto"
    devices: Devices = "one"

    def __post_init__(self) -> None:
        check(self)


_TEMPLATE = ("Question: ", "\nAnswer:", " ")


def encode(
    rows: pl.DataFrame, params: EncoderParams, engine: Engine
) -> tuple[Rows, pl.DataFrame, str]:
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
    read
        Where the rows stand: its ``pooled`` are mean-pooled layers side by side,
        ``(n_rows, n_layers * hidden)``, float16 or float32.
    likelihood
        Float64 columns :data:`~stackllm.llm.encoder.LIKELIHOOD`.
    identity
        Digest of everything but the texts that decides the numbers.

    Raises
    ------
    PendingError
        In a dry run, if a row is not in the cache.
    MissingInputError, UsageError, StorageError
        If the backbone cannot be loaded, or memory does not even hold one text.
    """
    dtype, reason = choose_dtype(params.dtype)
    told = f"{dtype} ({reason})" if params.dtype == "auto" else dtype
    layers = choose_layers(params, engine)
    identity = digest(
        VERSION, revision_of(params.backbone), dtype, layers, _TEMPLATE,
        params.max_question_tokens, params.max_response_tokens, params.batch_tokens,
        params.attention,
    )  # fmt: skip
    cached = RowCache("encoder", VERSION, identity).ensure(
        texts_of(rows),
        engine,
        "encoder",
        f"texts to read with {params.backbone}, in {told}",
        Weights(params.backbone, dtype, params.attention, params.devices),
        read_texts,
        params,
        layers,
        pass_rows=_budget(params) // params.max_response_tokens,
    )
    likelihood = pl.DataFrame(cached.take("likelihood").astype(np.float64), schema=list(LIKELIHOOD))
    return cached, likelihood, identity


def choose_layers(params: EncoderParams, engine: Engine) -> tuple[int, ...]:
    """Which hidden states are pooled: two settings that name the same layers are one to the cache.

    In a dry run a backbone may not be here to count its layers; nothing that it reads is cached then.
    """
    if engine.dry_run and not is_ready(params.backbone):
        engine.reporter.say(
            f"backbone {params.backbone} is not here yet, or not converted: all texts count as unread."
        )
        return ()
    config = load_config(params.backbone, engine.reporter.say)
    check_pools(params.backbone, config)
    depth = config.num_hidden_layers
    return tuple(max(1, round(share * depth)) for share in params.depths)


def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    params: EncoderParams,
    layers: tuple[int, ...],
) -> dict[str, np.ndarray]:
    """``pooled``, ``(n, n_layers * hidden)``, and ``likelihood``, float32 ``(n, len(LIKELIHOOD))``.

    See :func:`~stackllm.llm.encoder.read_groups`.
    """
    before_question, after_question, opening = _TEMPLATE
    shape = PromptParams(
        before_question=before_question,
        before_answer=after_question + opening,
        max_length_prompt=params.max_question_tokens,
        max_length_answer=params.max_response_tokens,
        max_length=2**30,
    )
    prompts = make_prompts(tokenizer, texts, shape)
    pooled, likelihood = within_memory(
        longest(prompts),
        _budget(params),
        lambda most: read_groups(model, prompts, layers, most),
        model,
    )
    return {"pooled": halved(pooled.reshape(len(texts), -1)), "likelihood": likelihood}


def _budget(params: EncoderParams) -> int:
    """Tokens of a pass."""
    return params.batch_tokens or pass_tokens(16_384)


def halved(values: np.ndarray) -> np.ndarray:
    """Float16 where it holds all values, else as they are.

    Its 11 bits are no less than the 8 that a model in bfloat16 has computed with. But states of some
    families reach beyond 65,504.

    Examples
    --------
    >>> halved(np.float32([1, 2])).dtype, halved(np.float32([1, 70_000])).dtype
    (dtype('float16'), dtype('float32'))
    """
    fits = len(values) and np.abs(values).max() < 60_000  # which NaN is not
    return values.astype(np.float16) if fits else values
