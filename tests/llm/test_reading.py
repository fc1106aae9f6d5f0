"""Batches of like length, and questions that are read once."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import StorageError
from stackllm.llm.memory import within_memory
from stackllm.llm.prompts import Prompt, longest
from stackllm.llm.reading import Reading, like_length, opened, pad, read_ends

PROMPTS = [
    Prompt([5, 6, 7, 8], [[10, 11, 12], [20] * 9, [31]]),
    Prompt([40, 41], [[50] * 6, [], [60, 61]]),
]
COST = 32


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=7),
    budget=st.sampled_from([1, 80, 999]),
)
def test_no_other_cut_into_batches_costs_less(lengths, budget):
    def cost(batches):
        return sum(max(batch) * len(batch) + COST for batch in batches)

    found = [[lengths[i] for i in batch] for batch in like_length(lengths, budget, COST)]
    assert sorted(itertools.chain(*found)) == sorted(lengths)
    assert all(len(batch) == 1 or max(batch) * len(batch) <= budget for batch in found)
    ordered = sorted(lengths)
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        other = [[ordered[0]]]
        for cut, length in zip(cuts, ordered[1:], strict=True):
            if cut:
                other.append([])
            other[-1].append(length)
        if all(len(batch) == 1 or max(batch) * len(batch) <= budget for batch in other):
            assert cost(found) <= cost(other)


@pytest.mark.parametrize("budget", [1, 12, 1_000])
def test_beginnings_are_read_once_and_every_pass_is_within_the_budget(make_model, budget):
    model = make_model("llama")
    passes = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, given: passes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    prompts = opened(PROMPTS)
    batches = list(read_ends(model, prompts, budget))
    assert all(n == 1 or n * width <= budget for n, width in passes)
    begun = {tuple(batch.groups) for batch in batches}
    assert len(passes) == len(batches) + len(begun)
    assert sorted(itertools.chain(*begun)) == [0, 1]
    tails = [ids for prompt in prompts for ids in prompt.responses]
    seen = {}
    for batch in batches:
        assert batch.output.last_hidden_state.shape[:2] == batch.ids.shape
        for i, row in enumerate(batch.rows):
            seen[row] = batch.ids[i][batch.mask[i].bool()].tolist()
    assert [seen[row] for row in range(len(tails))] == tails


def test_a_copy_reads_on_without_its_original(make_model):
    model = make_model("llama")
    begun, _ = Reading().go_on(model, *pad(model, [[5, 6, 7], [8]], left=True))
    copies = [begun.copy([1, 0, 1]), begun.copy([1, 0, 1])]
    texts = pad(model, [[9, 3], [4], [9, 3]], left=False)
    outputs = [it.go_on(model, *texts)[1] for it in copies]
    first, second = (output.last_hidden_state for output in outputs)
    assert torch.equal(first, second)
    torch.testing.assert_close(first[0], first[2])
    alone = begun.copy([1]).go_on(model, *pad(model, [[9, 3]], left=False))[1].last_hidden_state
    torch.testing.assert_close(first[0], alone[0], rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        whole = model.base_model(input_ids=torch.tensor([[8, 9, 3]])).last_hidden_state
    torch.testing.assert_close(first[0], whole[0, 1:], rtol=1e-4, atol=1e-5)


@given(budget=st.integers(1, 500), room=st.integers(1, 500))
def test_where_memory_runs_out_passes_get_smaller(budget, room):
    tried = []

    def read(most):
        tried.append(most)
        if most > room:
            raise torch.OutOfMemoryError("this device is small")
        return most

    found = within_memory(longest(PROMPTS), budget, read)
    assert found <= room
    assert found == budget or 2 * found + 1 > room  # no smaller than need be
    assert tried == sorted(set(tried), reverse=True)


def test_memory_for_nothing_is_one_sentence():
    def read(most):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")

    with pytest.raises(StorageError, match="one text at a time, the longest of 13 tokens"):
        within_memory(longest(PROMPTS), 100, read)


def test_other_errors_are_not_about_memory():
    def read(most):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        within_memory(longest(PROMPTS), 100, read)
