"""The encoder against the plain model: one full forward pass a row, no cache, no padding."""

import weakref

import numpy as np
import pytest
import torch

from stackllm.llm.backbone import load_backbone
from stackllm.llm.encoder import LIKELIHOOD, read_groups
from stackllm.llm.prompts import Prompt

FAMILIES = ("llama", "mistral", "qwen2", "gpt_neox", "gemma2", "gpt2", "opt", "bloom")
LAYERS = (1, 2, 4)
PROMPTS = [
    Prompt([5, 6, 7, 8, 9], [[10, 11, 12], [20] * 9, [31]]),
    Prompt([40, 41], [[50, 51, 52, 53, 54, 55], [60, 61]]),
    Prompt([70], [[71, 72]]),
]


def plain(model, prefix, response):
    """What the encoder should say, computed the long way."""
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([prefix + response]), output_hidden_states=True)
    start = len(prefix)
    pooled = [output.hidden_states[layer][0, start:].mean(0).numpy() for layer in LAYERS]
    scores = output.logits[0, start - 1 : -1].float().log_softmax(-1)
    target = torch.tensor(response)
    chosen = scores.gather(1, target[:, None])
    rank = (scores > chosen).sum(1).numpy()
    chosen = chosen[:, 0].numpy()
    entropy = -(scores.exp() * scores).sum(1).mean().item()
    shares = [(rank < top).mean() for top in (1, 10, 100)]
    return np.array(pooled), [chosen.mean(), chosen.std(), chosen.min(), entropy, *shares]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_in_a_batch_equals_the_plain_model_on_it_alone(make_model, family):
    model = make_model(family)
    pooled, likelihood = read_groups(model, PROMPTS, LAYERS)
    assert pooled.shape == (6, 3, 32)
    assert likelihood.shape == (6, len(LIKELIHOOD))
    rows = [(prompt.prefix, response) for prompt in PROMPTS for response in prompt.responses]
    for i, (prefix, response) in enumerate(rows):
        expected, measured = plain(model, prefix, response)
        np.testing.assert_allclose(pooled[i], expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(likelihood[i], measured, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_half_precision_a_batch_is_as_near_to_the_truth_as_a_row_alone(make_model, family):
    """bfloat16 has 8 bits: what a batch rounds away may be no more than what rounding costs anyhow."""
    exact, _ = read_groups(make_model(family), PROMPTS, LAYERS)
    model = make_model(family).to(torch.bfloat16)
    together, _ = read_groups(model, PROMPTS, LAYERS)
    rows = [(prompt.prefix, response) for prompt in PROMPTS for response in prompt.responses]
    alone = np.concatenate([
        read_groups(model, [Prompt(prefix, [response])], LAYERS)[0]
        for prefix, response in rows
    ])  # fmt: skip
    rounding = np.abs(alone - exact).max()
    assert 0 < rounding < 0.2
    assert np.abs(together - alone).max() <= 2 * rounding


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_llm_reads_a_row_in_a_batch_as_alone(dtype):
    loaded = load_backbone(dtype=dtype, echo=lambda _: None)
    ids = lambda text: loaded.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    prompts = [
        Prompt(ids("Question: Why is the sky blue?\nAnswer:"), [ids(" It scatters."), ids(" Rayleigh, mostly. " * 9)]),
        Prompt(ids("Question: " + "How does one tell a long story? " * 5), [ids(" Slowly."), []]),
    ]  # fmt: skip
    together, scores = read_groups(loaded.model, prompts, (10, 20))
    rows = [Prompt(prompt.prefix, [ids]) for prompt in prompts for ids in prompt.responses]
    each = [read_groups(loaded.model, [row], (10, 20)) for row in rows]
    alone = np.concatenate([pooled for pooled, _ in each])
    scale = np.abs(alone).mean(axis=(0, 2), keepdims=True)
    tolerance = {"float32": 1e-3, "bfloat16": 0.25}[dtype]
    assert np.abs((together - alone) / scale).mean() < tolerance / 10
    np.testing.assert_allclose(
        scores[:3, 0], np.concatenate([own for _, own in each])[:3, 0], atol=tolerance / 2
    )


def test_an_empty_response_has_no_likelihood_and_pools_the_question(make_model):
    model = make_model("llama")
    pooled, likelihood = read_groups(model, [Prompt([5, 6, 7], [[], [8, 9]])], LAYERS)
    assert np.isnan(likelihood[0]).all()
    assert np.isfinite(likelihood[1]).all()
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    last = output.hidden_states[2][0, -1].numpy()
    np.testing.assert_allclose(pooled[0, 1], last, rtol=1e-3, atol=1e-5)


def test_rows_do_not_see_each_other(make_model):
    model = make_model("llama")
    both, _ = read_groups(model, PROMPTS, LAYERS)
    changed = [PROMPTS[0], Prompt([40, 41], [[50, 51, 52, 53, 54, 55], [99, 98, 97]]), PROMPTS[2]]
    other, _ = read_groups(model, changed, LAYERS)
    np.testing.assert_allclose(both[[0, 1, 2, 3, 5]], other[[0, 1, 2, 3, 5]], rtol=1e-4, atol=1e-5)
    assert np.abs(both[4] - other[4]).max() > 1e-2


def test_a_pass_keeps_the_outputs_of_the_wanted_layers_and_no_others(make_model):
    """Of all layers, the states that one pass leaves are the largest thing in a GPU's memory."""
    model, made, alive = make_model("llama"), [], []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, args, output: made.append(weakref.ref(output)))
    model.model.register_forward_hook(
        lambda *_: alive.append(sum(output() is not None for output in made))
    )
    read_groups(model, PROMPTS, (2, 4))
    assert len(made) >= 2 * 4
    assert max(alive) <= 2  # the second layer's, and the last one's that is being normalised


def test_a_layer_named_twice_is_pooled_twice(make_model):
    pooled, _ = read_groups(make_model("llama"), PROMPTS, (2, 4, 2, 4))
    assert np.array_equal(pooled[:, :2], pooled[:, 2:])
    assert not np.array_equal(pooled[:, 0], pooled[:, 1])


def test_a_score_that_is_no_number_is_not_passed_over(make_model):
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    _, likelihood = read_groups(model, PROMPTS, LAYERS)
    assert np.isnan(likelihood[:, :4]).all()
