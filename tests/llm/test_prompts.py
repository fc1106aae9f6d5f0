import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import UsageError
from stackllm.llm.locate import prepare
from stackllm.llm.prompts import PromptParams, cut, make_prompts, special_ends

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


PIECES = st.text(st.sampled_from("ab \n w12[SEP]é"), max_size=8)


@given(
    st.lists(st.tuples(PIECES, PIECES), min_size=1, max_size=12),
    st.sampled_from(["", " ", "; A: "]),
    st.sampled_from(["head", "tail", "both"]),
    st.booleans(),
)
def test_texts_in_one_call_become_the_ids_of_each_alone(
    small_tokenizers, rows, opening, keep, closed
):
    """The long way, a call for each text."""
    params = PromptParams("Hi.", "Q: ", opening, 5, 4, 40, "both", keep)
    for tokenizer in small_tokenizers:
        plain = {"split_special_tokens": True} if closed else {}
        ids = lambda text: tokenizer(text, add_special_tokens=False, **plain).input_ids  # noqa: E731, B023
        head, tail = special_ends(tokenizer) if closed else ([], [])
        expected = []
        for question, response in rows:
            prefix = [*head, *ids("Hi."), *ids("Q: "), *cut(ids(question), 5, "both")]
            prefix += ids(opening.rstrip(" "))
            space = opening[len(opening.rstrip(" ")) :]
            answer = cut(ids(space + response) if response else [], 4, keep)
            expected.append((prefix, [*answer, *tail]))
        prompts = make_prompts(tokenizer, rows, params, closed)
        assert [(p.prefix, r) for p in prompts for r in p.responses] == expected
        assert len(prompts) == 1 + sum(a[0] != b[0] for a, b in itertools.pairwise(rows))


@pytest.fixture(scope="module")
def small_tokenizers():
    """Of bytes between a beginning and an end, and the embedded LLM's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    ends = [("[CLS]", 0), ("[SEP]", 1)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = dict(ends) | {piece: i + 2 for i, piece in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]")
    return [fast, AutoTokenizer.from_pretrained(prepare("smollm2", lambda _: None))]


class Words:
    """A tokenizer of words: one id each."""

    bos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        many = isinstance(text, list)
        ids = [[len(word) for word in one.split()] for one in (text if many else [text])]
        return type("Encoding", (), {"input_ids": ids if many else ids[0]})()
