"""Token scores against the plain model's own logits, families that scale or cap them among them."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from stackllm.errors import UsageError
from stackllm.llm import vocabulary
from stackllm.llm.encoder import read_groups
from stackllm.llm.prompts import Prompt
from stackllm.llm.scoring import score_answers
from stackllm.llm.vocabulary import score_among, score_tokens

SIZE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sliding_window": 200,
}  # fmt: skip
SIGHT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
CAP = {"final_logit_softcapping": 2.0}


def nested(family):
    """A model that sees and reads: all that its text model is made of stands one level down."""
    text = {**SIZE, **CAP, "model_type": f"{family}_text"}
    return {"text_config": text, "vision_config": SIGHT}


MODELS = {
    "plain": ("llama", SIZE),
    "capped": ("gemma2", {**SIZE, **CAP}),
    "nested, capped": ("gemma4", nested("gemma4")),
    "nested, its cap passed over": ("gemma3", nested("gemma3")),
    "multiplied": ("cohere", {**SIZE, "logit_scale": 0.3}),
    "divided": ("granite", {**SIZE, "logits_scaling": 3.0}),
    "multiplied by the layers' own": ("falcon_h1", {**SIZE, "lm_head_multiplier": 0.4}),
    "layers asked by themselves": ("opt", {**SIZE, "word_embed_proj_dim": 32, "ffn_dim": 64}),
    "with a bias": ("phi", SIZE),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request):
    family, settings = request.param
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    with torch.no_grad():  # spread the scores out, so that ranks differ and a cap is felt
        head = made.get_output_embeddings()
        head.weight.mul_(20)
        if head.bias is not None:
            head.bias.normal_()
    return made.requires_grad_(False)


@pytest.fixture
def read(model):
    """What the plain model makes of 150 tokens: last states, and logits of its own."""
    ids = torch.randint(5, 290, (1, 150), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        return hidden, model(input_ids=ids).logits[0].float()


def test_tokens_are_scored_as_by_the_models_own_logits(model, read):
    hidden, logits = read
    target = torch.randint(0, 300, (150,), generator=torch.Generator().manual_seed(2))
    scores = logits.log_softmax(-1)
    chosen = scores.gather(1, target[:, None])
    entropy = -(scores.exp() * scores).sum(1)
    rank = (scores > chosen).sum(1)
    made = score_tokens(model, hidden, target)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made[:, 0], chosen[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made[:, 1], entropy, rtol=1e-5, atol=1e-5)
    assert (made[:, 2] - rank).abs().max() <= 1  # where two scores are equal but for rounding


def test_a_few_tokens_among_all_others(model, read):
    hidden, logits = read
    made = score_among(model, hidden, [3, 250, 7])
    expected = logits.log_softmax(-1)[:, [3, 250, 7]]
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_the_model_is_left_as_it_was(model, read):
    hidden, logits = read
    score_among(model, hidden, [3])
    with torch.inference_mode():
        ids = torch.randint(5, 290, (1, 150), generator=torch.Generator().manual_seed(1))
        assert torch.equal(model(input_ids=ids).logits[0].float(), logits)


@pytest.mark.parametrize("columns", [7, 8_192])
def test_in_half_precision_a_few_tokens_are_told_apart(make_model, monkeypatch, columns):
    """The head's product is exact to float32, where bfloat16 has steps of an eighth near 20."""
    monkeypatch.setattr(vocabulary, "_COLUMNS", columns)
    model = make_model("llama").to(torch.bfloat16)
    hidden = torch.randn(70, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = hidden.double() @ model.get_output_embeddings().weight.double().T
    made = score_among(model, hidden, list(range(300)))
    expected = exact.log_softmax(-1)
    assert (made.double() - expected).abs().max() < 1e-4
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_rows_that_are_scored_at_once_change_nothing(make_model, monkeypatch):
    model = make_model("gemma2").to(torch.bfloat16)
    hidden = torch.randn(70, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.arange(70)
    whole = score_tokens(model, hidden, target), score_among(model, hidden, [3, 250])
    monkeypatch.setattr(vocabulary, "_ROWS", 9)
    monkeypatch.setattr(vocabulary, "SCORES_BYTES", 4 * 300 * 13)
    made = score_tokens(model, hidden, target), score_among(model, hidden, [3, 250])
    for some, all_ in zip(made, whole, strict=True):
        torch.testing.assert_close(some, all_, rtol=1e-4, atol=1e-4)


def test_the_head_is_widened_once_for_all_rows_and_never_as_a_whole(make_model, monkeypatch):
    model = make_model("llama").to(torch.bfloat16)
    monkeypatch.setattr(vocabulary, "_COLUMNS", 60)
    widened = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.float and args[0].ndim == 2 and args[0].shape[1] == 32:
                widened.append(len(args[0]))
            return function(*args, **(kwargs or {}))

    with Watched():
        score_among(model, torch.randn(500, 32).bfloat16(), [3])
    assert widened == [500, 60, 60, 60, 60, 60]  # the states, and each part of the head


def test_weights_that_are_fetched_for_each_pass(make_model):
    from accelerate import cpu_offload

    model = make_model("llama").to(torch.bfloat16)
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        expected = model.lm_head(hidden).float().log_softmax(-1)[:, [3, 250]]
    cpu_offload(model, torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    torch.testing.assert_close(score_among(model, hidden, [3, 250]), expected)


def test_nothing_to_score(make_model):
    nothing = score_tokens(make_model("llama"), torch.zeros(0, 32), torch.zeros(0).long())
    assert nothing.shape == (0, 3)


def test_a_model_whose_layers_are_asked_for_in_another_way_is_refused(make_model, monkeypatch):
    model = make_model("llama")
    other = make_model("llama")
    monkeypatch.setattr(type(model), "base_model", property(lambda self: other.model))
    monkeypatch.setattr(type(model), "get_decoder", lambda self: other.model)
    with pytest.raises(UsageError, match=r"LlamaForCausalLM: the scores .* another family"):
        score_among(model, torch.zeros(1, 32), [3])


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_encoder_and_rater_read_a_model_that_nests_its_text_model(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **nested(family))
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    prompts = [Prompt([5, 6, 7], [[10, 11, 12], [20] * 5]), Prompt([40, 41], [[50, 51]])]
    pooled, likelihood = read_groups(model, prompts, (1, 2))
    answers = score_answers(model, prompts, [[3], [7, 8]])
    rows = [(prompt.prefix, ids) for prompt in prompts for ids in prompt.responses]
    for i, (prefix, ids) in enumerate(rows):
        with torch.inference_mode():
            whole = model(input_ids=torch.tensor([prefix + ids]), output_hidden_states=True)
            longer = model(input_ids=torch.tensor([[*prefix, *ids, 7]])).logits[0].log_softmax(-1)
        scores = whole.logits[0].float().log_softmax(-1)
        chosen = scores[len(prefix) - 1 : -1].gather(1, torch.tensor(ids)[:, None])
        np.testing.assert_allclose(likelihood[i, 0], chosen.mean(), rtol=1e-4, atol=1e-4)
        mean = whole.hidden_states[1][0, len(prefix) :].mean(0)
        np.testing.assert_allclose(pooled[i, 0], mean, rtol=1e-3, atol=1e-4)
        expected = [scores[-1, 3], longer[-2, 7] + longer[-1, 8]]
        np.testing.assert_allclose(answers[i], expected, rtol=1e-3, atol=1e-3)
