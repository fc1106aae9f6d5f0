"""Layers that are not used are not loaded, whatever stands in the files; the others give what they give in the whole model."""

import shutil

import pytest
import torch
from small_decoders import N_CLASSES
from transformers import AutoConfig, AutoModelForCausalLM

from stackllm.finetune.model import Batch, bare_classifier, last_states
from stackllm.finetune.structure import structure_of
from stackllm.llm.backbone import frozen_model
from stackllm.llm.layers import goes_on_from_states, layers_of, lower_layers
from stackllm.llm.resident import release

SIZE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 256,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def n_bytes(module):
    return sum(it.numel() * it.element_size() for it in module.parameters())


@pytest.fixture
def reads(monkeypatch):
    """Names of the weights that are read from safetensors."""
    from transformers.core_model_loading import WeightTransform

    names, whole = [], WeightTransform.add_tensor

    def add_tensor(self, target_key, *args):
        names.append(target_key)
        return whole(self, target_key, *args)

    monkeypatch.setattr(WeightTransform, "add_tensor", add_tensor)
    yield names
    release()


def check_parts(backbone, reads, precision="float32", devices="one"):
    """The lower three layers and then the top one, each loaded alone, against all four."""
    ids = torch.randint(10, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    assert structure_of(backbone).goes_on_from_states
    whole, _ = bare_classifier(backbone, precision, N_CLASSES, devices=devices)
    layers = [n_bytes(layer) for layer in layers_of(whole)[2]]
    size, embedding = n_bytes(whole), n_bytes(whole.get_input_embeddings())
    head = n_bytes(whole.score)
    with torch.inference_mode():
        expected = last_states(whole, Batch(ids, None, mask))
    del whole
    reads.clear()
    lower, _ = frozen_model(backbone, precision, "auto", devices, 1)
    assert not [name for name in reads if ".3." in name or "lm_head" in name]
    assert n_bytes(lower) == size - layers[3] - head
    with torch.inference_mode(), lower_layers(lower, 3) as outputs:
        lower.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    del lower
    reads.clear()
    upper, _ = bare_classifier(backbone, precision, N_CLASSES, devices=devices, n_layers=1)
    assert not [name for name in reads if any(f".{layer}." in name for layer in range(3))]
    assert n_bytes(upper) == size - sum(layers[:3]) - embedding
    with torch.inference_mode():
        found = last_states(upper, Batch(None, outputs[0], mask))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("precision", "devices"),
    [("float32", "all"), ("bfloat16", "one"), ("int8", "one"), ("nf4", "one"), ("nf4", "all")],
)
def test_in_every_precision_and_placed_on_several_devices(make_backbone, reads, precision, devices):
    check_parts(make_backbone("llama"), reads, precision, devices)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next", "mpt", "jamba", "gpt_oss", "opt"])
def test_of_every_build_and_from_many_files(make_backbone, tmp_path, reads, family):
    """Experts that are put together while they are loaded, layers of two types, layers that give tuples."""
    own = {"mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4}, "opt": {"word_embed_proj_dim": 16}}
    config = AutoConfig.for_model(family, **{**SIZE, **own.get(family, {})})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(
        tmp_path / "base", max_shard_size="40KB"
    )
    source = make_backbone("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{source}/{name}", tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    check_parts(str(tmp_path / "base"), reads)


def test_layers_that_need_more_than_states_are_told_apart():
    """Gemma 4's small models read embeddings and keys of lower layers; its large ones do not."""
    small = {
        **SIZE, "num_hidden_layers": 6, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300, "layer_types": ["sliding_attention", "full_attention"] * 3,
    }  # fmt: skip
    large = {**small, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    for settings, expected in ((small, False), (large, True)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model("gemma4_text", **settings)
            )
        assert goes_on_from_states(model) == expected
