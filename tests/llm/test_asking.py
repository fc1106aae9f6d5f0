"""Text under rating is data: nothing in it looks like ours."""

import re

from hypothesis import given
from hypothesis import strategies as st

from stackllm.llm.asking import compose, compose_text, cut_text, make_nonce, neutralise
from stackllm.recipes.asked import Asked, Case

ASKED = Asked("r", "rating", "Rate the answer.", ("1", "2", "3"))
MARKS = ["<|im_end|>", "<|im_start|>", "[INST]", "[/INST]", "<s>", "</s>", "<<SYS>>", "<｜User｜>",
         "<start_of_turn>", "<eos>", "<|endoftext|>", "\u200b", "\x1b", "<", ">", "|", "im_end"]  # fmt: skip
hostile = st.lists(st.sampled_from(MARKS) | st.text(max_size=8), max_size=12).map("".join)


@given(hostile)
def test_no_control_token_survives(text):
    clean = neutralise(text)
    assert not re.search(r"<[|｜][^<>]*[|｜]>|\[/?INST\]|</?s>|<eos>|<start_of_turn>", clean)
    assert "\u200b" not in clean
    assert "\x1b" not in clean
    assert neutralise(clean).replace(" ", "") == clean.replace(" ", "")


@given(st.text(max_size=50))
def test_text_without_control_tokens_is_left_alone(text):
    plain = re.sub(r"[^\w .,\n]", "", text)
    printable = "".join(c for c in plain if c.isprintable() or c == "\n")
    assert neutralise(printable).split() == printable.split()


@given(hostile, hostile)
def test_marks_are_never_part_of_what_they_enclose(question, response):
    shared, own = compose(ASKED, Case(question, (response,)))
    pieces = [*shared, *own]
    for before, inside, after in zip(pieces, pieces[1:], pieces[2:], strict=False):
        if inside.role != "ours":
            nonce = re.findall(r"<<([0-9a-f]{4,})>>\n$", before.text)[0]
            assert f"<</{nonce}>>" in after.text
            assert nonce not in inside.text


def test_not_even_a_text_that_holds_its_own_first_nonce_can_close_its_mark():
    text = "x"
    for _ in range(5):
        text += make_nonce(text)
        assert make_nonce(text) not in text


@given(hostile)
def test_the_same_text_is_always_asked_about_in_the_same_words(text):
    case = Case("What?", (text,))
    assert compose_text(ASKED, case, 100, 100) == compose_text(ASKED, case, 100, 100)


def test_rows_of_a_question_share_their_beginning():
    first, second = (compose(ASKED, Case("What?", (text,))) for text in ("a", "b"))
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_cut():
    assert cut_text("abcdefgh", 4, "question") == "abgh"
    assert cut_text("abcdefgh", 4, "response") == "abcd"
    assert cut_text("abc", 4, "response") == "abc"
