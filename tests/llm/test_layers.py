"""Which layers are a decoder's, in models that do more than read."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stackllm.llm.layers import count_layers, layers_of, lower_layers

SIZE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 256,
}  # fmt: skip
SIGHT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def test_layers_that_see_are_not_taken_for_those_that_read():
    """As many of the former as of the latter, and named first."""
    text = {**SIZE, "model_type": "gemma3_text"}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=SIGHT)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert count_layers(model) == 3
    assert layers_of(model)[0] is model.get_decoder()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        whole = model(input_ids=ids, output_hidden_states=True).hidden_states
        with lower_layers(model, 2) as outputs:
            model.base_model(input_ids=ids)
        again = model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(outputs[0], whole[2])
    torch.testing.assert_close(again[-1], whole[-1])
