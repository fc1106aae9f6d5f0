"""The encoder against transformers' pipeline and sentence-transformers, and against the processor.

All read the same questions and answers with the same weights on as many threads. The rivals run at
their defaults; the encoder also measures the likelihood of every response, which they do not.
``gemm_fraction`` is the arithmetic that the weights of the layers and of the vocabulary ask for, over the
time it took, as a share of what the machine reaches in plain matrix products of that type.
``--data DIR`` names a folder with ``train.csv``; without it the shipped sample is used.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, Result, interleaved, main
from stackllm.llm.backbone import load_backbone
from stackllm.llm.encoder import read_groups
from stackllm.llm.locate import EMBEDDED, prepare
from stackllm.llm.prompts import Prompt, PromptParams, make_prompts
from stackllm.tables.contest import TableParams, read_training

SAMPLE = Path(__file__).parents[1] / "examples" / "seven_voices"
PARAMS = PromptParams(before_answer="\nAnswer: ", max_length_prompt=96, max_length_answer=128)
LAYERS = (15, 20, 25)


def measure(quick: bool, data: Path | None) -> Result:
    """Tokens a second of each, in turns."""
    import torch

    source = data or SAMPLE
    table = read_training(
        TableParams(train=str(source / "train.csv"), test=str(source / "test.csv"))
    )
    rows = table.train.sort("group_id").head(14 if quick else 140)
    backbone = load_backbone(EMBEDDED, echo=lambda _: None)
    pairs = list(rows.select("question", "response").iter_rows())
    prompts = make_prompts(backbone.tokenizer, pairs, PARAMS)
    alone = [Prompt(prompt.prefix, [ids]) for prompt in prompts for ids in prompt.responses]
    sequences = [[*prompt.prefix, *prompt.responses[0]] for prompt in alone]
    texts = [backbone.tokenizer.decode(ids) for ids in sequences]

    def read(given: list[Prompt]) -> None:
        read_groups(backbone.model, given, LAYERS)

    pipeline, sentences = _pipeline(), _sentence_transformer()
    runs = [lambda: read(prompts), lambda: read(alone), lambda: pipeline(texts)]
    if sentences is not None:
        runs.append(lambda: sentences.encode(texts, show_progress_bar=False))
    read(prompts[:1])
    times = interleaved(1 if quick else 3, *runs)
    flops = _flops(backbone.model, prompts)
    rate = _matrix_rate(getattr(torch, backbone.dtype))
    figures = {
        "vs_hf_pipeline": Figure(times[2] / times[0], 5.0, "higher"),
        "gemm_fraction": Figure(flops / times[0] / rate, 0.6, "higher"),
        "prefix_saving": Figure(times[1] / times[0], 1.0, "higher"),
    }
    details: dict[str, Any] = {
        "rows": len(texts),
        "tokens": sum(map(len, sequences)),
        "dtype": backbone.dtype,
        "threads": torch.get_num_threads(),
        "tokens_per_second": sum(map(len, sequences)) / times[0],
        "machine_gflops": rate / 1e9,
        "seconds": times,
    }
    if sentences is None:
        details["vs_sentence_transformers"] = "not measured: pip install sentence-transformers"
    else:
        figures["vs_sentence_transformers"] = Figure(times[3] / times[0], 1.0, "higher")
    return Result(figures, details)


def _pipeline() -> Any:
    from transformers import pipeline

    return pipeline("feature-extraction", model=prepare(EMBEDDED), framework="pt")


def _sentence_transformer() -> Any:
    try:
        from sentence_transformers import SentenceTransformer, models
    except ImportError:
        return None
    transformer = models.Transformer(prepare(EMBEDDED), max_seq_length=512)
    transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
    pooling = models.Pooling(transformer.get_embedding_dimension())
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def _flops(model: Any, prompts: list[Prompt]) -> float:
    """Multiplications and additions of the weights, attention left out."""
    layers = sum(p.numel() for p in model.base_model.layers.parameters())
    vocabulary = model.get_output_embeddings().weight.numel()
    responses = sum(len(ids) for prompt in prompts for ids in prompt.responses)
    prefixes = sum(len(prompt.prefix) - 1 + len(prompt.responses) for prompt in prompts)
    return 2.0 * (layers * (prefixes + responses) + vocabulary * responses)


def _matrix_rate(dtype: Any) -> float:
    """Operations a second of a large matrix product."""
    import torch

    size = 2048
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


if __name__ == "__main__":
    main("encoder", measure)
