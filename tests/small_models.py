"""Small decoders of several families with random weights, and a tokenizer of single bytes."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session")
def libraries():
    """What models are made with is imported, and no collection goes through it again.

    Whoever frees a model collects, which would look at half a million objects of these libraries.
    """
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

    gc.collect()  # what is garbage by now would stay for ever
    gc.freeze()


@pytest.fixture(scope="session")
def make_model(libraries):
    """Build a randomly initialised causal LM of a family."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(family: str, layers: int = 4):
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 4}
        if family not in ("gpt_neox", "gpt2", "opt", "bloom"):
            heads |= {"num_key_value_heads": 2, "head_dim": 8}
        extra = {"sliding_window": 6} if family in ("mistral", "gemma2", "gemma3_text") else {}
        if family == "opt":
            extra = {"word_embed_proj_dim": 32, "ffn_dim": 64}
        if family == "gemma3_text":
            extra["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
        config = AutoConfig.for_model(
            family,
            vocab_size=300,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            **size,
            **heads,
            **extra,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # spread the scores out, so that ranks and entropies differ
            model.get_output_embeddings().weight.mul_(20)
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def make_backbone(tmp_path_factory, make_model):
    """Write a random decoder of a family and a tokenizer of words into a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def build(family: str, layers: int = 4) -> str:
        folder = tmp_path_factory.mktemp(family)
        words = ["<unk>", "<s>", "Question", ":", "Answer", *(f"w{i}" for i in range(200))]
        tokenizer = Tokenizer(
            models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
        fast.save_pretrained(folder)
        make_model(family, layers).save_pretrained(folder)
        return str(folder)

    return build


@pytest.fixture
def watcher(monkeypatch):
    """A tracker called "json", which writes what it is told into a file; gives that of a folder."""
    import json

    from stackllm.engine import trackers

    class Watcher:
        def __init__(self, folder, settings):
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / "told.jsonl"
            self.path.write_text("")

        def log(self, scores, step):
            with self.path.open("a") as file:
                file.write(json.dumps({**scores, "at": step}) + "\n")

        def close(self):
            pass

    monkeypatch.setitem(trackers._TRACKERS, "json", Watcher)
    return lambda folder: [
        json.loads(it) for it in (folder / "told.jsonl").read_text().splitlines()
    ]
