"""What is read and trained: decoders of well-known shapes with random weights, and texts of random letters.

How fast a model is and what memory it takes does not depend on what it has learnt, so nothing has to
be fetched. A token is a byte: lengths are known without a vocabulary.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

N_CLASSES = 7
FIRST_BYTE = 3
"""The token of the first byte; those before it fill, begin and end a text."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of Llama's kind; ``tied`` is whether it reads and writes with one embedding."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrix products."""
        attention = self.hidden * self.hidden * (2 + 2 * self.key_heads / self.heads)
        return int(attention) + 3 * self.hidden * self.inner


SHAPES = {
    "tiny": Shape(32, 64, 3, 4, 2, 384, True),
    "1b": Shape(2048, 8192, 16, 32, 8, 128_256, True),
    "3b": Shape(3072, 8192, 28, 24, 8, 128_256, True),
    "8b": Shape(4096, 14_336, 32, 32, 8, 128_256, False),
}


def device() -> str:
    """Where everything is computed."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def config_of(shape: Shape) -> LlamaConfig:
    """A configuration that transformers knows."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def build(shape: Shape) -> LlamaForCausalLM:
    """The decoder in bfloat16, frozen, made where it is going to compute: copying 8B there takes longer."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device()):
            model = LlamaForCausalLM(config_of(shape))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def store(shape: Shape, folder: Path) -> None:
    """Write the decoder and a tokenizer of bytes into a folder."""
    from stackllm.llm.backbone import quiet_libraries

    quiet_libraries()
    byte_tokenizer().save_pretrained(folder)
    build(shape).save_pretrained(folder)
    free()


def free() -> None:
    """Give back what nobody holds any more, cycles of references too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def byte_tokenizer():  # noqa: ANN201 (transformers is imported late)
    """A tokenizer without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: FIRST_BYTE + i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=special | words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_rows(n_groups: int, longest: int) -> pl.DataFrame:
    """Columns ``row_id, group_id, question, response``: groups of seven, a row of each class, in the classes' order.

    Each class prefers letters of its own, so that there is something to learn.

    Parameters
    ----------
    n_groups
        Number of questions, each of 80 letters.
    longest
        Most letters of a response; the shortest have a third of that.
    """
    draw = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz     ", dtype=np.uint8)
    rows = []
    for group in range(n_groups):
        question = bytes(draw.choice(letters, 80)).decode()
        for label in range(N_CLASSES):
            liked = np.ones(len(letters))
            liked[3 * label : 3 * label + 3] = 5.0
            n = int(draw.integers(longest // 3, longest + 1))
            response = bytes(draw.choice(letters, n, p=liked / liked.sum())).decode()
            rows.append((f"{group}-{label}", f"{group}", question, response))
    return pl.DataFrame(rows, schema=["row_id", "group_id", "question", "response"], orient="row")
