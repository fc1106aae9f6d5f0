"""Memory told from a configuration, against what is really allocated."""

import pytest
from machines import T4

from stackllm.llm.backbone import load_model
from stackllm.llm.estimate import reading_bytes, sizes_of, sizes_of_skeleton
from stackllm.llm.resident import release


def allocated(model):
    """Bytes of all that a model holds, what bitsandbytes keeps beside its packed weights included."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        tensors += [] if state is None else [state.absmax, state.code]
        scales = getattr(parameter, "SCB", None)
        tensors += [] if scales is None else [scales]
    unique = {it.untyped_storage().data_ptr(): it for it in tensors}
    return sum(it.numel() * it.element_size() for it in unique.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_weights_take_what_was_estimated(make_backbone, family, precision):
    name = make_backbone(family, 2)
    release()
    model, _ = load_model("AutoModelForCausalLM", name, precision, lambda _: None)
    assert sizes_of(name).weights(precision) == pytest.approx(allocated(model), rel=0.05)


def skeleton(**options):
    """Of Llama's family, as no weights at all."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**options))


def test_an_eight_billion_llama_is_as_large_as_its_card_says(pretend_gpus):
    pretend_gpus(T4)  # what nf4 does not pack is float16 there
    sizes = sizes_of_skeleton(
        skeleton(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
        )
    )  # fmt: skip
    assert sizes.parameters == 8_030_261_248
    assert sizes.weights("float16") == 2 * sizes.parameters
    linear = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14_336 * 4096)
    by_hand = linear * (1 / 2 + 4 / 64) + 2 * (sizes.parameters - linear)
    assert sizes.weights("nf4") == pytest.approx(by_hand, rel=0.001)
    assert sizes.cache("float16") == 32 * 2 * 8 * 128 * 2  # 128 KiB per token, as is well known
    # from the trunk, a classifier: 4 of 32 layers
    top = sizes.weights("float16", layers=4, embeddings=False, head=False)
    assert top == pytest.approx(2 * linear / 8, rel=0.001)
    assert reading_bytes(sizes, "float16", 16_384) < 24 * 2**30


def test_shared_weights_count_once(make_backbone):
    tied = sizes_of_skeleton(skeleton(vocab_size=500, hidden_size=32, tie_word_embeddings=True))
    apart = sizes_of_skeleton(skeleton(vocab_size=500, hidden_size=32, tie_word_embeddings=False))
    assert apart.parameters - tied.parameters == 500 * 32
    assert tied.weights("float16", embeddings=False) == tied.weights("float16")
    assert tied.weights("float16", embeddings=False, head=False) < tied.weights("float16")
    assert (
        sizes_of(make_backbone("llama", 2)).layers[1].matrices[0].name.startswith("model.layers.1")
    )
