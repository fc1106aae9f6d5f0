"""A small model with random weights of every type that transformers generates text with, beside transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from stackllm.finetune.model import Batch, LoraParams, _targets, logits
from stackllm.finetune.structure import _layers, may_start_from_states, reads_last_token
from stackllm.llm.encoder import read_groups
from stackllm.llm.heads import add_classifier, body_of
from stackllm.llm.layers import count_layers, layers_of, lower_layers, without_lower
from stackllm.llm.prompts import Prompt
from stackllm.llm.reading import pad
from stackllm.llm.scoring import score_answers
from stackllm.llm.trunk import _read as read_trunk

_SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "n_embd": 32, "d_model": 32, "embed_dim": 32, "emb_dim": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32, "dim_model": 32,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 4,
    "encoder_layers": 2, "num_decoder_layers": 4, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "dim_head": 8,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "d_ff": 64, "dim_ff": 64, "dff": 64,
    "decoder_ffn_dim": 64, "encoder_ffn_dim": 64, "ffn_hidden_size": 64, "intermediate_size_mlp": 64,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "shared_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "num_experts_per_token": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16,
    "sliding_window": 6, "attention_chunk_size": 6, "window_size": 6, "attention_window_size": 6,
    "local_attention": 6,
    "linear_num_heads": 4, "linear_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_expand": 2, "mamba_n_groups": 1, "n_groups": 1,
    "mamba_dt_rank": 4, "time_step_rank": 4, "chunk_size": 4, "mamba_chunk_size": 4, "lru_width": 32,
    "image_size": 16, "patch_size": 8, "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300, "num_kv_shared_layers": 2,
    "rotary_dim": 4, "index_topk": 4, "laurel_rank": 8, "global_head_dim": 8,
}  # fmt: skip
_WHERE_NONE = (
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "n_shared_experts",
    "head_dim",
)
_MIXED = ["sliding_attention", "full_attention"] * 2
_SIGHT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
_HYBRID = ["linear_attention", "hybrid"] * 2
_CHOICE = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 100,
}  # fmt: skip
_OF: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": _MIXED,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _MIXED},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16},
    },
    "gemma3_text": {"layer_types": _MIXED},
    "gemma3n_text": {"layer_types": _MIXED},
    "gemma4_text": {"layer_types": _MIXED, "num_kv_shared_layers": 2},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "kolibri1": {"layer_types": _MIXED},
    "gemma3": {"vision_config": _SIGHT},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "nemotron": {"num_key_value_heads": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": _CHOICE,
    "zamba": {"layers_block_type": _HYBRID},
    "zamba2": {"layers_block_type": _HYBRID, "n_mamba_heads": 8},
}


def small_config(family: str) -> Any:
    """The configuration of a model of that type with four layers and 32 columns."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**_shrunk(CONFIG_MAPPING[family], _OF.get(family, {})))


def _shrunk(kind: Any, of: dict[str, Any]) -> dict[str, Any]:
    """What stands in a small configuration otherwise than in the one that nobody sets."""
    small = dict(of)
    for name in kind.sub_configs:
        inner = kind.sub_configs[name]
        if name not in of and hasattr(inner, "sub_configs") and inner.model_type:
            small[name] = _shrunk(inner, _OF.get(inner.model_type, {}))
    names = {field.name for field in dataclasses.fields(kind)}
    if "kv_lora_rank" in names:  # such attention has keys and values of every head
        small["num_key_value_heads"] = _SMALL["num_attention_heads"]
    for field in dataclasses.fields(kind):
        default = field.default
        if field.name in small or field.name not in _SMALL:
            continue
        if field.name.endswith("_token_id") or (default is None and field.name in _WHERE_NONE):
            small[field.name] = _SMALL[field.name]
        elif isinstance(default, int) and not isinstance(default, bool) and default > 0:
            many = field.name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
            small[field.name] = _SMALL[field.name] if many else min(_SMALL[field.name], default)
    return small


_DRAW = np.random.default_rng(0)


def _tokens(n: int) -> list[int]:
    return list(map(int, _DRAW.integers(5, 290, n)))


_ROOT = _tokens(5)
PROMPTS = [
    Prompt(_ROOT + _tokens(9), [_tokens(14), _tokens(3), _tokens(8)]),
    Prompt(_ROOT + _tokens(3), [_tokens(2), _tokens(11)]),
    Prompt(_ROOT + _tokens(9), [_tokens(5), _tokens(1)]),
]
"""Questions that begin alike, longer than windows and chunks are, and two of them of one length."""
ROWS = [(prompt.prefix, ids) for prompt in PROMPTS for ids in prompt.responses]
ANSWERS = [[3], [4], [3, 2], [7, 8, 9], [7, 8, 1], [11]]
N_CLASSES = 3
MOST_WEIGHTS = 90_000_000


class TooLargeError(Exception):
    """A type of which no small model is known."""


def small_model(family: str) -> Any:
    """A causal LM of that type, its scores spread out so that a fault is felt.

    Raises
    ------
    TooLargeError
        If it has more than :data:`MOST_WEIGHTS`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = small_config(family)
    with torch.device("meta"):
        n_weights = sum(it.numel() for it in AutoModelForCausalLM.from_config(config).parameters())
    if n_weights > MOST_WEIGHTS:
        raise TooLargeError(f"the smallest that is known has {n_weights} weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    for value in model.parameters():
        if value.ndim >= 2:
            value.normal_(0, 1.2 / value.shape[-1] ** 0.5, generator=draw)
    head = model.get_output_embeddings()
    if head is not None:
        head.weight.normal_(0, 0.5, generator=draw)
    return model


def encoder_error(model: Any) -> float:
    """How far pooled layers and likelihoods are off what transformers says of each row alone."""
    import torch

    depth = count_layers(model)
    pooled, likelihood = read_groups(model, PROMPTS, (2, depth))
    seen: list[Any] = []
    layers_of(model)[2][1].register_forward_hook(lambda *given: seen.append(given[-1]))
    errors = []
    for i, (prefix, ids) in enumerate(ROWS):
        seen.clear()
        with torch.inference_mode():
            row = torch.tensor([prefix + ids])
            last = body_of(model)(input_ids=row, use_cache=False).last_hidden_state
            second = seen[0][0] if isinstance(seen[0], tuple | list) else seen[0]
            alone = model(input_ids=row, use_cache=False)
        inside = [it[0, len(prefix) :] for it in (second, last)]
        expected = torch.stack([it.mean(0) for it in inside]).numpy()
        scores = alone.logits[0].float().log_softmax(-1)[len(prefix) - 1 : -1]
        chosen = scores.gather(1, torch.tensor(ids)[:, None]).numpy()
        errors.append(np.abs(pooled[i] - expected).max() / np.abs(expected).max())
        errors.append(abs(likelihood[i, 0] - chosen.mean()) / np.abs(chosen).max())
    return float(max(errors))


def rater_error(model: Any) -> float:
    """How far the scores of answers are off those of each row and answer alone."""
    import torch

    made, expected = score_answers(model, PROMPTS, ANSWERS), np.empty((len(ROWS), len(ANSWERS)))
    for i, (prefix, ids) in enumerate(ROWS):
        for k, answer in enumerate(ANSWERS):
            row = torch.tensor([[*prefix, *ids, *answer]])
            with torch.inference_mode():
                scores = model(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1)
            first = len(prefix) + len(ids) - 1
            places = range(first, first + len(answer))
            expected[i, k] = sum(
                scores[j, token].item() for j, token in zip(places, answer, strict=True)
            )
    return float(np.abs(made - expected).max() / np.abs(expected).max())


def classifier(model: Any, folder: Path) -> Any:
    """The model's weights as a classifier, through a folder.

    Raises
    ------
    AssertionError
        If other weights than a head are not in there.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    model.save_pretrained(folder)
    add_classifier(model.config)
    torch.manual_seed(2)
    config = AutoConfig.from_pretrained(folder, num_labels=N_CLASSES)
    config.get_text_config().pad_token_id = 0
    made, account = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    body = f"{made.base_model_prefix}."
    lacking = [name for name in account["missing_keys"] if name.startswith(body)]
    lacking = [name for name in lacking if "pooler" not in name]
    assert not lacking, f"weights are not loaded: {lacking[:3]}"
    return made.eval().requires_grad_(False)


def classifier_error(model: Any, made: Any) -> float:
    """How far the logits of rows side by side are off those of each row alone; float."""
    import torch

    ids, mask = pad(model, [prefix + end for prefix, end in ROWS], left=False)
    with torch.inference_mode():
        together = logits(made, Batch(ids, None, mask))
        alone = torch.cat([_alone(model, made, prefix + end) for prefix, end in ROWS])
    return _relative(together, alone)


def trunk_error(model: Any, made: Any) -> float:
    """The same for logits of the upper two layers, from what the lower ones make of the texts."""
    import torch

    with torch.inference_mode():
        alone = torch.cat([_alone(model, made, prefix + end) for prefix, end in ROWS])
    depth = model.config.get_text_config().num_hidden_layers
    with lower_layers(model, depth - 2) as outputs:
        groups = read_trunk(model, PROMPTS, 1_024, outputs)
    without_lower(made, 2)
    rows = [np.concatenate([group[0], end]) for group in groups for end in group[1:]]
    states = torch.zeros(len(rows), max(map(len, rows)), rows[0].shape[-1])
    mask = torch.zeros(states.shape[:2], dtype=torch.long)
    for i, row in enumerate(rows):
        states[i, : len(row)] = torch.from_numpy(row)
        mask[i, : len(row)] = 1
    with torch.inference_mode():
        return _relative(logits(made, Batch(None, states, mask)), alone)


def has_classifier(family: str) -> bool:
    """Has transformers a classifier of that type?"""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    return family in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def adapters_that_learn(made: Any) -> tuple[set[str], set[str]]:
    """Adapters by the name of what they adapt: those that a step changes, and all. It uses the classifier up."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    targets = _targets("", made, LoraParams(dropout=0.0), ())
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=targets)
    adapted = get_peft_model(made, config).train()
    ids, mask = pad(made, [prefix + end for prefix, end in ROWS], left=False)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    scores = logits(adapted, Batch(ids, None, mask))
    torch.nn.functional.cross_entropy(scores, torch.arange(len(ids)) % N_CLASSES).backward()
    found = {
        name.partition(".lora_A")[0].removeprefix("base_model.model."): value.grad
        for name, value in adapted.named_parameters()
        if "lora_A" in name
    }
    learn = {name for name, grad in found.items() if grad is not None and bool(grad.any())}
    return learn, set(targets)


def starts_from_trunk(made: Any) -> bool:
    """Would a member train it from a cached trunk?"""
    return bool(_layers(made)) and may_start_from_states(made)


def _alone(model: Any, made: Any, row: list[int]) -> Any:
    """Logits of one row, ``(1, N_CLASSES)``: of the head on the generating model's body, or of its own class."""
    import torch

    ids = torch.tensor([row])
    if reads_last_token(made):
        states = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        return made.score(states[:, -1])
    return made(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def _relative(made: Any, expected: Any) -> float:
    return float((made - expected).abs().max() / expected.abs().max())
