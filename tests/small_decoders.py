"""Small tables, settings and inputs to train random decoders on."""

import numpy as np
import polars as pl

from stackllm.crossfit.targets import Targets
from stackllm.engine.local import Engine
from stackllm.engine.progress import Reporter
from stackllm.finetune.dataset import TrainingParams
from stackllm.finetune.model import LoraParams
from stackllm.llm.prompts import PromptParams
from stackllm.llm.trunk import cache_trunk
from stackllm.members.decoder import DecoderParams
from stackllm.members.inputs import Inputs, save_texts, save_trunk, trunk_folder

N_CLASSES = 3
LORA = LoraParams(r=2, dropout=0.0)


def make_rows(n_groups: int = 6) -> pl.DataFrame:
    """Questions with three answers each; an answer's last word tells its class."""
    draw = np.random.default_rng(0)
    words = lambda n: " ".join(f"w{i}" for i in draw.integers(10, 200, n))  # noqa: E731
    rows = [
        (question, words(draw.integers(0, 6)) + f" w{label}")
        for question in (words(5) for _ in range(n_groups))
        for label in range(N_CLASSES)
    ]
    return pl.DataFrame(rows, schema=["question", "response"], orient="row")


def make_inputs(folder, params: DecoderParams, rows: pl.DataFrame) -> Inputs:
    stand = folder / "inputs"
    stand.mkdir(exist_ok=True)
    save_texts(stand, rows)
    if params.trunk:
        table = cache_trunk(rows, params.trunk, Engine(folder / "cache", 1, Reporter(quiet=True)))
        (folder / trunk_folder("inputs", params.trunk)).mkdir(exist_ok=True)
        save_trunk(folder / trunk_folder("inputs", params.trunk), table)
    empty = np.zeros((len(rows), 0))
    return Inputs(np.repeat(np.arange(len(rows) // 3), 3), empty, empty, (), {}, stand)


def make_targets(rows: pl.DataFrame) -> Targets:
    n = len(rows)
    every = np.ones(n)
    return Targets(np.arange(n), np.arange(n) % 3, every, every.astype(bool), N_CLASSES)


def make_params(backbone: str, layers=2, precision="float32", **changes) -> DecoderParams:
    defaults = {
        "prompt": PromptParams(max_length_prompt=4, max_length_answer=8),
        "lora": LORA,
        "training": TrainingParams(epochs=1, batch_size=4, learning_rate=1e-2),
    }
    return DecoderParams(backbone, precision, layers, **{**defaults, **changes})
