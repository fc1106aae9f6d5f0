"""Shared-prefix scoring against the plain model: one full forward pass for every row and answer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stackllm.llm.prompts import Prompt
from stackllm.llm.scoring import (
    answer_probabilities,
    calibrate,
    continuations,
    score_answers,
)

FAMILIES = ("llama", "mistral", "qwen2", "gpt_neox", "gemma2")
torch.set_num_threads(1)  # small matrices: more threads only wait for each other

PROMPTS = [
    Prompt([5, 6, 7, 8, 9], [[10, 11, 12], [20] * 9, [31]]),
    Prompt([40, 41], [[50, 51, 52, 53, 54, 55], [60, 61]]),
    Prompt([], [[71, 72]]),
]
ANSWERS = [[3], [4], [3, 2], [7, 8, 9], [7, 8, 1], [7, 5], [11]]


def plain(model, prompt, answer):
    """Log-probability of ``answer`` after ``prompt``, computed the long way."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
    scores = logits.log_softmax(-1)
    return sum(scores[len(prompt) + j - 1, token].item() for j, token in enumerate(answer))


def rows_of(prompts):
    return [(prompt.prefix, tail) for prompt in prompts for tail in prompt.responses]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_plain_model_on_each_row_and_answer_alone(make_model, family):
    model = make_model(family)
    scores = score_answers(model, PROMPTS, ANSWERS)
    assert scores.shape == (6, len(ANSWERS))
    for i, (prefix, tail) in enumerate(rows_of(PROMPTS)):
        expected = [plain(model, prefix + tail, answer) for answer in ANSWERS]
        np.testing.assert_allclose(scores[i], expected, rtol=1e-3, atol=1e-3)


def test_one_row_alone_equals_the_row_in_a_batch(make_model):
    model = make_model("llama")
    together = score_answers(model, PROMPTS, ANSWERS)
    alone = np.concatenate(
        [
            score_answers(model, [Prompt(prefix, [tail])], ANSWERS)
            for prefix, tail in rows_of(PROMPTS)
        ]
    )
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


def test_answers_of_one_token_need_no_second_pass(make_model):
    model = make_model("llama")
    assert continuations([[1], [2], [3]]) == []
    passes = []
    model.base_model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    score_answers(model, PROMPTS[:2], [[1], [2], [3]])
    assert len(passes) == 2  # the prefixes, then the tails
    score_answers(model, PROMPTS[:2], [[1], [2, 3], [4, 5, 6]])
    assert len(passes) == 5  # and one for all longer answers together


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_padding_pushes_nothing_out_of_a_sliding_window(make_model, family):
    """Prompts of the same length, but a long question's padding stands between the others and their root."""
    model = make_model(family)
    root = list(range(3, 13))
    prompts = [Prompt([*root, *[20] * 20], [[30, 31]]), Prompt([*root, 40], [[50] * 21])]
    model.config.sliding_window = 36
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 36
    together = score_answers(model, prompts, ANSWERS)
    alone = [
        score_answers(model, [Prompt([], [[*prompt.prefix, *prompt.responses[0]]])], ANSWERS)
        for prompt in prompts
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 20, 10_000])
@pytest.mark.parametrize("root", [[], [80, 81, 82]])
def test_neither_batches_nor_a_common_beginning_change_a_score(make_model, budget, root):
    model = make_model("qwen2")
    prompts = [Prompt([*root, *prompt.prefix], prompt.responses) for prompt in PROMPTS]
    scores = score_answers(model, prompts, ANSWERS, budget)
    for i, (prefix, tail) in enumerate(rows_of(prompts)):
        expected = [plain(model, prefix + tail, answer) for answer in ANSWERS]
        np.testing.assert_allclose(scores[i], expected, rtol=1e-3, atol=1e-3)


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=3)
answer_sets = st.lists(tokens, min_size=2, max_size=8, unique_by=tuple)


@given(answer_sets, st.integers(0, 2**32 - 1))
def test_probabilities_are_those_of_the_longest_answer_a_reply_begins_with(answers, seed):
    """Brute force: every reply of 3 tokens over 4 letters, each with its probability."""
    draw = np.random.default_rng(seed)
    replies = draw.dirichlet(np.full(64, 0.5)).reshape(4, 4, 4)
    expected = np.zeros(len(answers))
    begins = np.zeros(len(answers))
    for reply in np.ndindex(4, 4, 4):
        fitting = [i for i, ids in enumerate(answers) if tuple(ids) == reply[: len(ids)]]
        for i in fitting:
            begins[i] += replies[reply]
        if fitting:
            expected[max(fitting, key=lambda i: len(answers[i]))] += replies[reply]
    made = answer_probabilities(np.log(begins)[None], answers)[0]
    np.testing.assert_allclose(made, expected / expected.sum(), atol=1e-9)


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_calibration_removes_exactly_a_bias_that_multiplies(n_answers, seed):
    draw = np.random.default_rng(seed)
    bias = draw.uniform(0.05, 1, n_answers)
    true = draw.dirichlet(np.ones(n_answers), 5)
    seen = true * bias / (true * bias).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(calibrate(seen, bias / bias.sum()), true, atol=1e-9)


def test_scores_that_are_no_numbers_give_no_probabilities():
    scores = np.array([[np.nan, -1.0], [-np.inf, -np.inf], [-1.0, -2.0]])
    made = answer_probabilities(scores, [[1], [2]])
    assert np.isnan(made[:2]).all()
    assert made[2].sum() == pytest.approx(1)
