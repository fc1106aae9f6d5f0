"""Reading with a frozen model: the encoder and the rater, beside plain transformers.

Utilisation is the arithmetic that the layers' weights ask for over the time it took, as a share of
what the machine reaches in matrix products: attention and the vocabulary are left out, so it is a lower bound.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.measure import Watch, compared, peak, seconds
from benchmarks.gpu.models import FIRST_BYTE, build, device, make_rows
from stackllm.llm.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_QUESTION = 96
"""Tokens of each question."""


def encoder(bench: Bench, name: str, n_groups: int, longest: int) -> dict[str, Any]:
    """Two layers pooled and each response's likelihood, against two layers pooled by plain transformers."""
    from stackllm.llm.encoder import read_groups
    from stackllm.llm.estimate import reading_bytes, sizes_of_skeleton

    shape, model = bench.shape(name), build(bench.shape(name))
    prompts = _prompts(bench.size(2, n_groups), _QUESTION, bench.size(24, longest))
    rows = _rows(prompts)
    layers = (shape.layers // 2, shape.layers)
    budget = 16_384 if device() == "cuda" else 1_024
    of_layers = shape.layers * shape.layer_weights
    result: dict[str, Any] = {"rows": len(rows), "tokens": sum(map(len, rows))}
    with peak(result, "peak_gib"):
        taken = seconds(lambda: read_groups(model, prompts, layers, budget), bench.repeats)
    with peak(result, "plain_peak_gib"):
        plain = seconds(lambda: _pool(model, rows, layers, budget), bench.repeats)
    estimated = reading_bytes(sizes_of_skeleton(model), "bfloat16", budget, len(layers))
    result |= compared(estimated, result["peak_gib"])
    read = sum(
        len(it.prefix) - 1 + sum(len(ids) + 1 for ids in it.responses) for it in prompts
    )  # a question is read once, but for its last token, which each response begins with
    return result | {
        "seconds": taken,
        "tokens_s": result["tokens"] / taken,
        "utilisation": bench.utilisation(of_layers, read, taken),
        "plain_tokens_s": result["tokens"] / plain,
        "plain_utilisation": bench.utilisation(of_layers, result["tokens"], plain),
        "vs_plain": plain / taken,
        "relative_error": _error(model, prompts, layers, budget),
    }


def units(bench: Bench, name: str) -> dict[str, Any]:
    """The encoder from texts to files: loading, tokenising, reading, writing; and all that found again."""
    from stackllm.engine.local import Engine
    from stackllm.engine.progress import Reporter
    from stackllm.llm.encode import EncoderParams, encode

    rows = make_rows(bench.size(2, 256), bench.size(24, 128))
    params = EncoderParams(backbone=bench.backbone(name))
    root = bench.folder / "units"
    result: dict[str, Any] = {"rows": len(rows)}

    def read() -> float:
        start = time.perf_counter()
        encode(rows, params, Engine(root, 1, Reporter(quiet=True)))
        return time.perf_counter() - start

    with Watch().watching() as watch:
        result["seconds"] = read()
    result["loading_seconds"] = watch.seconds["loading"]
    result["rows_s"] = len(rows) / (result["seconds"] - result["loading_seconds"])
    result["again_seconds"] = read()
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return result | {"stored_mib": size / 2**20, "loads": len(watch.copies)}


def rater(bench: Bench, name: str, n_groups: int) -> dict[str, Any]:
    """Seven answers of a token each scored, against a forward pass of every row and four tokens generated."""
    import torch

    from stackllm.llm.scoring import score_answers

    shape, model = bench.shape(name), build(bench.shape(name))
    opening = _tokens(np.random.default_rng(1), 150)  # the instruction, which all rows begin with
    prompts = [
        Prompt([*opening, *it.prefix], it.responses)
        for it in _prompts(bench.size(2, n_groups), 60, bench.size(24, 150))
    ]
    answers = [[FIRST_BYTE + i] for i in range(7)]
    rows = _rows(prompts)
    budget = 32_768 if device() == "cuda" else 1_024

    def forward() -> None:
        for ids, mask, _ in _batches(rows, budget, left=True):
            model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits.cpu()

    def generate() -> None:
        for ids, mask, _ in _batches(rows, budget, left=True):
            model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=4,
                min_new_tokens=4, pad_token_id=0,
            ).cpu()  # fmt: skip

    result: dict[str, Any] = {"rows": len(rows), "tokens": sum(map(len, rows))}
    with peak(result, "peak_gib"):
        taken = seconds(lambda: score_answers(model, prompts, answers, budget), bench.repeats)
    with torch.inference_mode():
        forwarded, generated = (seconds(run, bench.repeats) for run in (forward, generate))
    read = len(opening) + sum(
        len(it.prefix) - len(opening) + sum(map(len, it.responses)) for it in prompts
    )
    weights = shape.layers * shape.layer_weights
    return result | {
        "seconds": taken,
        "rows_s": len(rows) / taken,
        "utilisation": bench.utilisation(weights, read, taken),
        "forward_rows_s": len(rows) / forwarded,
        "generate4_rows_s": len(rows) / generated,
        "vs_forward": forwarded / taken,
        "vs_generate4": generated / taken,
    }


def _tokens(draw: np.random.Generator, n: int) -> list[int]:
    return draw.integers(FIRST_BYTE, FIRST_BYTE + 256, n).tolist()


def _prompts(n_groups: int, question: int, longest: int) -> list[Prompt]:
    """Groups of seven; responses have a third of ``longest`` tokens up to all."""
    draw = np.random.default_rng(0)
    return [
        Prompt(
            _tokens(draw, question),
            [_tokens(draw, int(draw.integers(longest // 3, longest + 1))) for _ in range(7)],
        )
        for _ in range(n_groups)
    ]


def _rows(prompts: list[Prompt]) -> list[list[int]]:
    return [[*prompt.prefix, *ids] for prompt in prompts for ids in prompt.responses]


def _batches(
    rows: list[list[int]], budget: int, left: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
    """Ids, mask and numbers of rows of like length, the longest first, as many as ``budget`` tokens hold."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        width = len(rows[order[0]])
        chosen = order[: max(1, budget // width)]
        order = order[len(chosen) :]
        ids = torch.zeros(len(chosen), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(chosen):
            n = len(rows[row])
            where = slice(width - n, width) if left else slice(0, n)
            ids[place, where] = torch.tensor(rows[row])
            mask[place, where] = 1
        yield ids.to(device()), mask.to(device()), chosen


def _pool(
    model: PreTrainedModel, rows: list[list[int]], layers: tuple[int, ...], budget: int
) -> np.ndarray:
    """Means of some layers over whole rows, as one writes it with transformers: ``(n_rows, n_layers, hidden)``."""
    import torch

    pooled = np.empty((len(rows), len(layers), model.config.hidden_size), dtype=np.float32)
    for ids, mask, chosen in _batches(rows, budget):
        with torch.inference_mode():
            states = model.base_model(
                input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True
            ).hidden_states
            weight = (mask / mask.sum(1, keepdim=True))[..., None]
            means = [(states[layer].float() * weight).sum(1) for layer in layers]
            pooled[chosen] = torch.stack(means, dim=1).cpu().numpy()
    return pooled


def _error(
    model: PreTrainedModel, prompts: list[Prompt], layers: tuple[int, ...], budget: int
) -> float:
    """Largest relative difference of a response's mean state from the same row read alone; rounding is a percent."""
    import torch

    from stackllm.llm.encoder import read_groups

    pooled = read_groups(model, prompts, layers, budget)[0][:7, 0]
    errors = []
    for ids, mean in zip(prompts[0].responses, pooled, strict=True):
        row = torch.tensor([[*prompts[0].prefix, *ids]], device=device())
        with torch.inference_mode():
            states = model(row, output_hidden_states=True).hidden_states[layers[0]]
        expected = states[0, -len(ids) :].float().mean(0).cpu().numpy()
        errors.append(np.linalg.norm(mean - expected) / np.linalg.norm(expected))
    return float(max(errors))
