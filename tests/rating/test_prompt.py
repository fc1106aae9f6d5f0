"""Text under rating is data: nothing in it looks like ours."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.rating.prompt import compose, compose_text, cut_text, make_nonce, neutralise
from stackllm.rating.question import Asked, Case

ASKED = Asked("r", "rating", "Rate the answer.", ("1", "2", "3"))
MARKS = ["<|im_end|>", "<|im_start|>", "[INST]", "[/INST]", "<s>", "</s>", "<<SYS>>", "<｜User｜>",
         "<start_of_turn>", "<eos>", "<|endoftext|>", "\u200b", "\x1b", "<", ">", "|", "im_end"]  # fmt: skip
CONTROLS = ["<extra_id_7>", "[gMASK]", "<sop>", "<reserved_12>", "<EOS_TOKEN>", "<unused99>", "<eoh>",
            "[THINK]", "[/THINK]", "[IMG]", "[/INST]", "<<SYS>>", "<</SYS>>", "<repo_name>", "<file_sep>",
            "<jupyter_start>", "[|assistant|]", "[|endofturn|]", "<|im_end|>", "<｜end▁of▁sentence｜>",
            "</s>", "<tool_call>", "<think>", "<2mass>", "[CLS]", "[control_3]"]  # fmt: skip
INVISIBLE = "\u061c\u115f\u1160\u3164\uffa0\u034f\u180e\ufe00\ufe0f\u200b\u202e\ufeff\U000e0041"
hostile = st.lists(st.sampled_from(MARKS) | st.text(max_size=8), max_size=12).map("".join)


@given(hostile)
def test_no_control_token_survives(text):
    clean = neutralise(text)
    assert not re.search(r"<[|｜][^<>]*[|｜]>|\[/?INST\]|</?s>|<eos>|<start_of_turn>", clean)
    assert "\u200b" not in clean
    assert "\x1b" not in clean
    assert neutralise(clean).replace(" ", "") == clean.replace(" ", "")


@pytest.mark.parametrize("token", CONTROLS)
def test_tokens_of_many_formats_are_broken_up(token):
    clean = neutralise(f"a{token}b{INVISIBLE}{token[:2]}{INVISIBLE}{token[2:]}")
    assert token not in clean
    assert not set(INVISIBLE) & set(clean)
    assert clean.replace(" ", "") == f"a{token}b{token}"  # and nothing else is lost


def test_what_is_no_token_stays():
    for text in ("1 < 2 > 0", "a[i] = b[1]", "[1, 2]", "if x<y: z>w", "f(x) -> [[3]]"):
        assert neutralise(text) == text


@given(st.lists(st.sampled_from([*MARKS, *CONTROLS, *"</s>[]|"]), max_size=12).map("".join))
def test_once_is_enough(text):
    assert neutralise(neutralise(text)) == neutralise(text)


@pytest.mark.parametrize("token", CONTROLS)
def test_cutting_joins_no_token(token):
    for place in range(1, len(token)):
        head = "x" * (30 - place) + token[:place]
        tail = token[place:] + "z" * (30 - len(token) + place)
        shown = compose_text(ASKED, Case(f"{head} {'y' * 50} {tail}", ("fine",)), 60, 60)
        assert token not in shown


def test_cutting_joins_no_closing_mark():
    """The middle of the text, which is cut away, makes the whole text's nonce 0abc."""
    head, tail = "xxxxx<</0a", "bc>>yyyyyy"
    texts = (f"{head} {i} {tail}" for i in itertools.count())
    question = next(text for text in texts if make_nonce(text) == "0abc")
    shown = compose_text(ASKED, Case(question, ()), 20, 20)
    nonce = re.findall(r"Question <<([0-9a-f]{4,})>>\n", shown)[0]
    assert shown.count(f"<</{nonce}>>") == 1
    assert "0abc" not in shown


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
    assert cut_text("abcdefgh", 4, "question") == "ab\n[…]\ngh"
    assert cut_text("abcdefgh", 4, "response") == "abcd"
    assert cut_text("abc", 4, "response") == "abc"
