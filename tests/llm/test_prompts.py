import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import UsageError
from stackllm.llm.prompts import PromptParams, cut, make_prompts

IDS = st.lists(st.integers(0, 9), max_size=30)


@given(IDS, st.integers(1, 12), st.sampled_from(["head", "tail", "both"]))
def test_what_stays_of_a_text_is_its_ends(ids, most, keep):
    kept = cut(ids, most, keep)
    assert len(kept) == min(most, len(ids))
    if len(ids) <= most:
        assert kept == ids
    else:
        last = {"head": 0, "tail": most, "both": most // 2}[keep]
        assert kept == ids[: most - last] + ids[len(ids) - last :]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20)), min_size=1, max_size=8),
    st.integers(1, 9),
    st.integers(12, 30),
)
def test_no_sequence_is_longer_than_asked_and_none_is_lost(words, answer, together):
    rows = [(f"w{question}", "w1 " * n) for question, n in words]
    params = PromptParams(max_length_prompt=4, max_length_answer=answer, max_length=together)
    prompts = make_prompts(Words(), rows, params)
    lengths = [(len(p.prefix), len(r)) for p in prompts for r in p.responses]
    assert len(lengths) == len(rows)
    for (prefix, response), (_, n) in zip(lengths, words, strict=True):
        assert prefix + response <= together
        assert response == min(n, answer, together - prefix)


def test_a_question_that_leaves_no_room_is_refused():
    params = PromptParams(max_length=4)
    with pytest.raises(UsageError, match="max_length 4 leaves no room"):
        make_prompts(Words(), [("w1 w2 w3 w4", "w5")], params)


def test_an_answer_with_nothing_in_front_of_it_is_refused():
    params = PromptParams(before_question="", before_answer="")
    with pytest.raises(UsageError, match="nothing in front of it"):
        make_prompts(Words(), [("", "w5")], params)


class Words:
    """A tokenizer of words: one id each."""

    bos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        return type("Encoding", (), {"input_ids": [len(word) for word in text.split()]})()
