"""What a reply is worth: its thought, its words, its tokens, in whatever form a server sends them."""

from __future__ import annotations

import itertools
import json
import math
import time
from contextlib import suppress

import numpy as np
import pytest
from chat_server import completion
from hypothesis import given, settings
from hypothesis import strategies as st

from stackllm.rating.names import same_model
from stackllm.rating.prompt import neutralise
from stackllm.rating.question import Asked
from stackllm.rating.replies import BadReplyError, Reply, ToldError, judge, read_reply
from stackllm.rating.thought import strip
from stackllm.rating.wording import find_answer

SCALE = Asked("gpt_rating", "rating", "Rate it.", tuple(map(str, range(1, 11))))
LABELS = Asked("topic", "category", "Sort.", ("history", "science & nature", "blue", "U.S.", "other"))  # fmt: skip
PAIR = Asked("preferred", "comparison", "Which?", ("A", "B"))
END = "<|im_end|>"


def body(text, finish="stop", tokens=None, usage=None, **message):
    told = completion(text, tokens, **message)
    told["choices"][0]["finish_reason"] = finish
    return {**told, "usage": usage or {}}


def read(told):
    return read_reply(told if isinstance(told, bytes) else json.dumps(told).encode())


def judged(told, asked=SCALE):
    """Status and the answers that have a probability."""
    status, probabilities, *_ = judge(read(told), asked, "tiny")
    return status, {asked.answers[i]: p for i, p in enumerate(probabilities) if p > 0}


# Thought


FORMS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<reflection>", "</reflection>"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<THINK>", "</THINK>"),
    ("[THINK]", "[/THINK]"),
    ("[unused16]", "[unused17]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("<|think|>", "<|end|><|begin|>assistant<|content|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final <|constrain|>json<|message|>"),
    (" to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>"),
]
BEFORE = [*FORMS, ("Here are my reasoning steps:\n", "\n[BEGIN FINAL RESPONSE]\n")]
IN_WORDS = [
    ("Here is my thought process: ", "\n\nHere is my response: "),
    ("Here's my thought process:\n", "Here's my response:\n"),
    ("analysisWe need a rating. ", "assistantfinal"),
]


@pytest.mark.parametrize(("opens", "closes"), BEFORE)
def test_thought_is_taken_off_whatever_its_marks(opens, closes):
    for text in (
        f"{opens}It is no 3.{closes}7",
        f"{opens}\n\n{closes}\n\n7",
        f"It is no 3.{closes}7",  # the template opened it
        f"{opens}I{opens}no{closes}3{closes}7",  # nested
        f"{opens}no{closes} 3 {opens}or{closes}\n7\n",  # repeated, with an answer between
        f"3{opens}No.{closes}7",  # what was said before was thought better of
        f"{opens}{'3, ' * 50_000}{closes}7",
    ):
        assert judged(body(text)) == ("ok", {"7": 1})
        assert read(body(text)).thought


@pytest.mark.parametrize(("opens", "_"), FORMS)
def test_what_follows_an_open_thought_is_no_answer(opens, _):
    for text in (f"{opens}7", f"7{opens}", f"7\n{opens}\n7", f"3</think>7{opens}", opens):
        assert judged(body(text, "length")) == ("still thinking", {})
        assert judged(body(text)) == ("empty", {})


@pytest.mark.parametrize(("opens", "closes"), IN_WORDS)
def test_thought_between_words_has_ended_only_if_the_reply_has(opens, closes):
    text = f"{opens}It says{closes}3 and{closes}7"
    assert judged(body(text)) == ("ok", {"7": 1})
    assert judged(body(text, "length")) == ("still thinking", {})  # the last may be a quotation
    assert not read(body(f"Indeed. {text}")).thought


MARKS = [mark for pair in FORMS for mark in pair] + ["[BEGIN FINAL RESPONSE]", "</think>", "<｜end▁of▁thinking｜>"]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*MARKS, *"<[|]>◁▷/ ", "think", "7", "\u200b"]), max_size=12))
def test_no_text_under_rating_can_hold_a_mark_of_thought(parts):
    shown = neutralise("".join(parts))
    assert strip(shown) == (shown, False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*MARKS, "7", "a\n", " "]), max_size=8))
def test_stripping_twice_is_stripping_once(parts):
    once, thought = strip("".join(parts))
    assert strip(once) == (once, False)
    assert thought or once == "".join(parts)


USAGE = {"completion_tokens": 16, "completion_tokens_details": {"reasoning_tokens": 16}}
ASIDE = [
    ({"reasoning_content": "I think"}, {}),
    ({"reasoning": "I think"}, {}),
    ({"thinking": "I think"}, {}),
    ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "xyz"}]}, {}),
    ({}, USAGE),
]


@pytest.mark.parametrize(("message", "usage"), ASIDE)
def test_thought_that_the_server_tells_apart(message, usage):
    for nothing in ("", None, "\n"):
        assert judged(body(nothing, "length", usage=usage, **message)) == ("still thinking", {})
    assert judged(body("7", usage=usage, **message)) == ("ok", {"7": 1})
    assert judged(body("", usage=usage, **message))[0] in ("empty", "unknown answer")


def test_an_empty_reply_that_was_cut_without_thought_is_cut_off():
    for told in (body("", "length"), body(None, "length", reasoning_content=""), body("", "MAX_TOKENS")):  # fmt: skip
        assert judged(told) == ("cut off", {})
    assert judged(body("", reasoning_content=None)) == ("empty", {})
    assert judged(body("I would say that", "length")) == ("cut off", {})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_an_answer_that_the_server_files_under_thought(name):
    """As where the template opens a thought that the LLM skips. A thought of its own is no answer."""
    for nothing in ("", None):
        assert judged(body(nothing, **{name: "7"})) == ("ok", {"7": 1})
        assert judged(body(nothing, **{name: "\nRating: 7/10\n"})) == ("ok", {"7": 1})
        assert judged(body(nothing, **{name: "Quite good.\n7"})) == ("empty", {})
        assert judged(body(nothing, **{name: "Not a 7"})) == ("unknown answer", {})
        assert judged(body(nothing, "length", **{name: "7"})) == ("still thinking", {})
    tokens = [("7", {"7": 0.75, "8": 0.25}), (END, {END: 1.0})]
    assert judged(body("", tokens=tokens, **{name: "7"})) == ("ok", {"7": 0.75, "8": 0.25})


PARTS = [
    ([{"type": "text", "text": "7"}], "ok"),
    ([{"type": "output_text", "text": "7"}], "ok"),
    (["7"], "ok"),
    ([{"type": "thinking", "thinking": "3?"}, {"type": "text", "text": "7"}], "ok"),
    ([{"type": "thinking", "thinking": [{"type": "text", "text": "3"}]}, {"type": "text", "text": "7"}], "ok"),
    ([{"type": "reasoning", "text": "3"}, {"type": "text", "text": "\n"}, {"type": "text", "text": "7"}], "ok"),
    ([{"type": "thinking", "thinking": "7, or 8"}], "empty"),
    ([{"type": "refusal", "refusal": "No."}], "refusal"),
    ([{"type": "text", "text": "7"}, {"type": "reference", "reference_ids": [1]}], "ok"),
    ([], "empty"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "status"), PARTS)
def test_content_in_parts(content, status):
    assert judged(body(content)) == (status, {"7": 1} if status == "ok" else {})


def test_parts_that_nobody_knows_are_no_completion():
    for content in ([7], [{"type": "image", "url": "x"}], {"text": "7"}):
        with pytest.raises(BadReplyError, match="wrong schema"):
            read(body(content))


# Words


CLEAR = [
    "{'rating': 7}",
    '{"rating": 7',
    '{"rating": [7]}',
    "7", "7.", " 7\n", '"7"', "**7**", "`7`", "7!", "(7)", "[7]", "> 7", "7/10", "7 / 10", "7 out of 10", "**7**/10",
    "**7/10**", "Rating: 7", "rating = 7", "Rating 7", "Rating: **7**", "**Rating:** 7", "**Rating: 7/10**", "### Rating: 7",
    "Score: 7", "Answer: 7.", "The answer is 7", "The rating is **7**.", "My final rating is: 7", "Overall score: 7/10",
    "gpt_rating: 7", "GPT Rating: 7", "7.0", "Rating: 7,00/10", '{"rating": 7}', '{"rating": 7.0}', '{"score": "7"}', '{"rating": "7/10"}', '{"r": 7}',
    '```json\n{"rating": 7}\n```', '```\n{"rating": 7}\n```', "```\n7\n```", '{"rating": 7, "explanation": "8 is too high"}',
    '{"explanation": "8 is too high", "rating": 7}', 'Here it is:\n{"rating": 7}', '{"rating": 7}\n\nIt is clear.',
    "<answer>7</answer>", "<answer>\n7\n</answer>", "7<|im_end|>", r"\boxed{7}", r"$\boxed{7}$", r"\[\boxed{7}\]",
    "7\n\nIt is clear, if not an 8.", "**7**\n\nThe answer is", "It is clear.\n\nFinal answer: 7", "It is clear.\nBut dry.\n**7/10**",
    "Rating: 7\n\nIt is clear.", "7\n7", "Rating: 7\nIt is good.\nFinal rating: 7/10", "It is good.\n\n\\boxed{7}\n",
]  # fmt: skip
NEVER = [
    "7 or 8", "7-8", "7, 8", "7 to 8", "7\n8", "not a 7", "Not 7", "Rating: not 7", "-7", "- 7", "Rating: -7", "minus 7", "7.5", "7,5",
    "7.5/10", "Rating: 7.5", "I'd say 7 out of 100", "7 out of 100", "7/100", "7/5", "7/1", "7/10.5", "7/10/2024", "10/7", "7%",
    "~7", "7+", "about 7", "½7", "7²", "77", "VII", "1 0", "7:8", "7 (or 8)", "1. The text is good", "Rating: 7 or 8",
    "Rating: 7 would be too high", "Score: 8\nRating: 7", "Previous rating: 7", "Clarity: 7", "The correct answer is 7", '{"rating": 7, "score": 8}',
    '{"rating": 7, "rating": 8}', '{"a": 7, "b": 8}', '{"rating": true}', '{"rating": null}',
    '{"rating": 7}\n{"rating": 8}', "Rating: 7\n{\"rating\": 8}", "Either 7 or\n8", "I would not call it a\n7", "Not\n7", "7 -\n8", "3,\n7", "Good.\nRating: 7\nwould be too high.", "I think so.\nNot 7",
    "The response says: 7", "The response asks for a 7.\nI refuse.", "sky blue", "{}", "[]", "```\n```", "<answer></answer>",
]  # fmt: skip


@pytest.mark.parametrize("text", CLEAR)
def test_words_that_state_an_answer(text):
    assert judged(body(text)) == ("ok", {"7": 1})
    assert judged(body(f"<think>3?</think>\n\n{text}")) == ("ok", {"7": 1})


@pytest.mark.parametrize("text", NEVER)
def test_words_that_state_none(text):
    assert judged(body(text))[1] == {}


@pytest.mark.parametrize(
    ("asked", "text", "answer"),
    [
        (LABELS, "Category: Science & Nature", "science & nature"),
        (LABELS, "**Topic:** blue.", "blue"),
        (LABELS, "The category is U.S.", "U.S."),
        (LABELS, '{"topic": "blue", "confidence": "other"}', "blue"),
        (LABELS, "blue\n\nIt is about the sky, not history.", "blue"),
        (LABELS, "blue or history", None),
        (LABELS, "not blue", None),
        (LABELS, "Category: blue, other", None),
        (LABELS, "blue\nhistory", None),
        (PAIR, "Answer A", "A"),
        (PAIR, "Answer B is better.", "B"),
        (PAIR, "The better answer is B", "B"),
        (PAIR, "**B**", "B"),
        (PAIR, "A is better than B", None),
        (PAIR, "A, B", None),
        (PAIR, "A good answer", None),
        (PAIR, "Neither A", None),
    ],
)
def test_labels_in_words(asked, text, answer):
    assert judged(body(text), asked)[1] == ({answer: 1} if answer else {})


def test_the_last_line_of_a_reply_that_was_cut_is_not_its_last():
    for text in ("It is good.\nRating: 7", "Rating: 1", "It is good.\n7", '{"rating": 1', "10 or"):
        assert judged(body(text, "length")) == ("cut off", {})
    assert judged(body("7\nIt is goo", "length")) == ("ok", {"7": 1})
    assert judged(body("Rating: 1\nIt is goo", "length")) == ("ok", {"1": 1})


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["7", "10", "1", "8", "Rating", ": ", "\n", "**", "/10", '{"rating": ', "}", " or ", "not ", "-", "."]),
        max_size=9,
    )
)  # fmt: skip
def test_what_is_stated_stands_there_and_no_other_line_is_an_answer(parts):
    text = "".join(parts)
    stated = find_answer(text, SCALE)
    if stated is None:
        return
    answer = SCALE.answers[stated.number]
    assert text[stated.start : stated.end].strip(" *.\"'`{}") in (answer, f"{answer}/10")
    alone = {line.strip(" *\"'`").rstrip(".") for line in text.splitlines()}
    assert alone & {*SCALE.answers} <= {answer}


def test_a_long_reply_keeps_its_beginning_and_its_end():
    long = "It goes on. " * 500
    assert judged(body(f"7\n\n{long}")) == ("ok", {"7": 1})
    assert judged(body(f"{long}\n\nFinal answer: 7")) == ("ok", {"7": 1})
    assert judged(body("x" * 5000 + "7"))[0] == "unknown answer"
    assert judged(body("x" * 5000 + " " * 249 + "7"))[0] == "unknown answer"  # the end of a line
    assert len(read(body(long)).text) == 1000


@pytest.mark.parametrize(
    "text",
    ["7" + " " * 300_000 + "x", "<" * 300_000, "<a>" * 100_000 + "x", "{" * 300_000, "Rating " * 40_000, "*_ " * 100_000 + "7x",
     "<think>" * 40_000, "<|channel|>final" * 20_000, "analysis " * 30_000, "assistant " * 30_000, '{"a":' * 60_000],
)  # fmt: skip
def test_no_reply_takes_long_to_read(text):
    started = time.process_time()
    judged(body(text, tokens=[("x", {"x": 1.0})]))
    assert time.process_time() - started < 2


# Tokens


REPLIES = ["1", "10", "7", "8", "3", "100", "17", "x", "7x", "", "\n7"]


def tree(shares, n_top):
    """What a server tells of the likeliest reply, if the LLM gives each of them so often.

    Tokens are characters, and a mark at the end.
    """
    generated = max(shares, key=lambda reply: (shares[reply], reply))
    generated = [*generated, END]
    told = []
    for place, token in enumerate(generated):
        begun = {r: p for r, p in shares.items() if [*r, END][:place] == generated[:place]}
        top: dict[str, float] = {}
        for reply, share in begun.items():
            follows = [*reply, END][place]
            top[follows] = top.get(follows, 0) + share / sum(begun.values())
        likeliest = sorted(top, key=lambda other: -top[other])[:n_top]
        told.append((token, {other: top[other] for other in {*likeliest, token}}))
    return generated, told


def brute_force(shares, n_top):
    """The same by going through all replies: each counts for what it shows before it is out of sight."""
    generated, told = tree(shares, n_top)
    mass = dict.fromkeys(SCALE.answers, 0.0)
    for reply, share in shares.items():
        tokens = [*reply, END]
        for place, token in enumerate(tokens):
            if token not in told[place][1]:
                break
            seen = "".join(tokens[: place + 1])
            begun = seen.lstrip("\n")
            answers = [a for a in SCALE.answers if a.startswith(begun)]
            if token == END or (len(answers) == 1 and begun):
                exact = [a for a in SCALE.answers if begun in (a, f"{a}{END}")]
                for answer in exact or answers:
                    mass[answer] += share
                break
            if not answers or token != generated[place]:
                break
    total = sum(mass.values())
    if abs(total - 0.5) < 1e-9:
        return {}  # either will do
    return {a: p / total for a, p in mass.items() if p > 0} if total > 0.5 else None


some_shares = st.dictionaries(st.sampled_from(REPLIES), st.integers(1, 40), min_size=1).map(
    lambda counts: {reply: n / sum(counts.values()) for reply, n in counts.items()}
)
NONSENSE = [
    {"token": "4", "logprob": None},
    {"token": "5", "logprob": math.nan},
    {"token": "6", "logprob": -math.inf},
    {"token": "9", "logprob": -9999.0},
    {"token": "2", "logprob": "x"},
    {"logprob": -1.0},
    {"token": None, "logprob": -1.0},
    {"logprob": -1.0, "token": "2", "bytes": None} | {"logprob": -(10**400)},
    "y",
]


@settings(max_examples=200, deadline=None)
@given(
    some_shares,
    st.integers(1, 20),
    st.sampled_from(["", "<think>Hm 3.</think>", "<think>\n\n</think>\n\n"]),
    st.booleans(),
    st.lists(st.sampled_from(NONSENSE), max_size=3),
    st.booleans(),
)
def test_probabilities_are_those_of_going_through_all_replies(
    shares, n_top, thought, apart, nonsense, twice
):
    generated, told = tree(shares, n_top)
    said = "".join(generated[:-1])
    if said.strip() not in SCALE.answers:
        return
    tokens = [(token, {token: 1.0, "x": 1e-9}) for token in thought] + told
    answer = body(said if apart else thought + said, tokens=tokens)
    for entry in answer["choices"][0]["logprobs"]["content"]:
        others = entry["top_logprobs"]
        entry["top_logprobs"] = others[:1] * twice + others + nonsense
    expected = brute_force(shares, n_top)
    status, found = judged(answer)
    assert status == "ok"
    if expected == {}:
        return
    if expected is None or all(len(top) == 1 for _, top in told):
        assert found == {said.strip(): 1}
    else:
        found = {a: p for a, p in found.items() if p > 1e-8}
        assert found == pytest.approx(expected, abs=1e-6)


SEVEN = {"7": 0.6, " 8": 0.3, "x": 0.1}
WORDS = {"Rating": 0.9, "7": 0.1}
IN_PLACE = [
    ("Rating: 7", [("Rating", WORDS), (":", {":": 1.0}), (" 7", {" 7": 0.6, " 8": 0.3, " high": 0.1}), (END, {END: 1.0})]),
    ("Rating: 7", [("Rating", WORDS), (": 7", {": 7": 0.6, ": 8": 0.3, " of": 0.1})]),
    ("7/10", [("7", SEVEN), ("/", {"/": 1.0}), ("10", {"10": 1.0})]),
    ("**7**/10", [("**", {"**": 1.0}), ("7", SEVEN), ("**/", {"**/": 1.0}), ("10", {"10": 1.0})]),
    ('{"rating": 7}', [('{"', {'{"': 1.0}), ("rating", {"rating": 1.0}), ('": ', {'": ': 1.0}), ("7", SEVEN), ("}", {"}": 1.0})]),
    ('{"score": "7"}', [('{"score": "', {'{"score": "': 1.0}), ("7", SEVEN), ('"}', {'"}': 1.0})]),
    ("Fine.\n\nFinal answer: 7", [("Fine", {"Fine": 1.0}), (".\n\n", {".\n\n": 1.0}), ("Final answer:", {"Final answer:": 1.0}), ("▁7", {"▁7": 0.6, "▁8": 0.3})]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "tokens"), IN_PLACE)
def test_probabilities_are_read_where_the_answer_stands(text, tokens):
    expected = {"7": pytest.approx(2 / 3), "8": pytest.approx(1 / 3)}
    assert judged(body(text, tokens=tokens)) == ("ok", expected)
    thought = [(token, {token: 0.5, "7": 0.5}) for token in ("<think>", "3", "</think>")]
    thought.append(("\n\n", {"\n\n": 1.0}))
    for said in (text, f"<think>3</think>\n\n{text}"):
        assert judged(body(said, tokens=[*thought, *tokens])) == ("ok", expected)
        long = [thought[0], *[thought[1]] * 2000, *thought[2:], *tokens]
        assert judged(body(said.replace("3", "3" * 2000), tokens=long)) == ("ok", expected)


def test_the_beginning_of_a_longer_answer_is_told_from_it_in_words_too():
    tokens = [("Rating: ", {"Rating: ": 1.0}), ("1", {"1": 0.8, "2": 0.2}), ("/10", {"/10": 0.75, "0": 0.25})]  # fmt: skip
    assert judged(body("Rating: 1/10", tokens=tokens)) == (
        "ok",
        {"1": pytest.approx(0.6), "10": pytest.approx(0.2), "2": pytest.approx(0.2)},
    )


def with_scores(told, **more):
    answer = body("7")
    answer["choices"][0]["logprobs"] = told
    return {**answer, **more}


OLD = {"tokens": ["7"], "token_logprobs": [math.log(0.6)], "top_logprobs": [{"7": math.log(0.6), "8": math.log(0.3)}]}  # fmt: skip
PLACE = {
    "token": "7",
    "logprob": math.log(0.6),
    "top_logprobs": [{"token": "7", "logprob": math.log(0.6)}, {"token": "8", "logprob": math.log(0.3)}],
}  # fmt: skip
LLAMA_OLD = [{"content": "7", "probs": [{"tok_str": "7", "prob": 0.6}, {"tok_str": "8", "prob": 0.3}, {"tok_str": "9", "prob": 0}]}]  # fmt: skip
LLAMA = [{"token": "7", "prob": 0.6, "top_probs": [{"token": "7", "prob": 0.6}, {"token": "8", "prob": 0.3}]}]  # fmt: skip
SAMPLED = {**PLACE, "logprob": -9999.0}
SHAPES = [
    ("chat", with_scores({"content": [PLACE]})),
    ("a list", with_scores([PLACE])),
    ("completions", with_scores(OLD)),
    ("completions with offsets", with_scores({**OLD, "text_offset": [0]})),
    ("older llama.cpp", with_scores(None, completion_probabilities=LLAMA_OLD)),
    ("llama.cpp after sampling", with_scores(None, completion_probabilities=LLAMA)),
    ("what was sampled has no score", with_scores({"content": [SAMPLED]})),
]


@pytest.mark.parametrize(("_", "told"), SHAPES, ids=[name for name, _ in SHAPES])
def test_forms_of_log_probabilities(_, told):
    expected = {"7": pytest.approx(2 / 3), "8": pytest.approx(1 / 3)}
    assert judged(told) == ("ok", expected)


@pytest.mark.parametrize(
    "told",
    [
        None, 7, "x", {}, [], {"content": None}, {"content": 7}, {"content": [7]}, {"content": [{}]}, {"tokens": 7}, {"tokens": ["7"]},
        {"tokens": ["7"], "token_logprobs": 7}, {"tokens": ["7"], "token_logprobs": [-0.1], "top_logprobs": None},
        {"tokens": [None], "token_logprobs": [-0.1]}, {"content": [{**PLACE, "top_logprobs": None}]},
        {"content": [{**PLACE, "top_logprobs": []}]}, {"content": [{**PLACE, "top_logprobs": 7}]},
        {"content": [{"token": "7", "logprob": -0.1}]}, {"content": [{**PLACE, "logprob": 0.6}]},  # a probability
        {"content": [{**PLACE, "token": "3"}]}, {"content": [PLACE, PLACE]},  # another text's
        {"content": [{"token": "7", "logprob": None, "top_logprobs": [{"token": "8", "logprob": -0.1}]}]},
    ],
)  # fmt: skip
def test_log_probabilities_that_make_no_sense_leave_the_text(told):
    assert judged(with_scores(told)) == ("ok", {"7": 1})
    assert not judge(read(with_scores(told)), SCALE, "tiny").measured


# Streams


def events(pieces, end="data: [DONE]\n\n"):
    return ("".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + end).encode()


def cut_up(whole, draw):
    """A completion as a stream of pieces, cut where ``draw`` says."""
    choice = whole["choices"][0]
    pieces = [{"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}]
    for name in ("reasoning_content", "content"):
        text = choice["message"].get(name)
        cuts = sorted({0, len(text), *(cut for cut in draw if cut < len(text))}) if text else [0, 0]
        for begin, end in itertools.pairwise(cuts):
            delta = {name: (text or "")[begin:end]}
            pieces.append({"model": whole["model"], "choices": [{"index": 0, "delta": delta}]})
    for entry in (choice.get("logprobs") or {}).get("content", []):
        told = {"index": 0, "delta": {}, "logprobs": {"content": [entry]}}
        pieces.append({"choices": [told]})
    pieces.append(
        {"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    )
    return [*pieces, {"choices": [], "usage": whole["usage"]}]


WHOLE = body(
    "<think>3?</think>\n\nRating: 7",
    tokens=[(t, {t: 1.0}) for t in ("<think>", "3?", "</think>", "\n\n", "Rating:")] + [(" 7", {" 7": 0.7, " 8": 0.3})],
    usage={"prompt_tokens": 40, "total_tokens": 60},
    reasoning_content="Hm.",
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 30)), st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from(["", ": hm\n\n", "event: x\nid: 3\n", "\ufeff"])
)  # fmt: skip
def test_a_stream_is_read_like_the_whole(cuts, line_end, before):
    stream = before + events(cut_up(WHOLE, cuts)).decode()
    assert read(stream.replace("\n", line_end).encode()) == read(WHOLE)
    lines = "\n".join(json.dumps(piece) for piece in cut_up(WHOLE, cuts))
    assert read(lines.encode()) == read(WHOLE)


def test_a_stream_that_breaks_off_is_no_reply():
    pieces = cut_up(WHOLE, [2, 9])
    finish = next(i for i, piece in enumerate(pieces) if piece["choices"][0].get("finish_reason"))
    for n in range(1, len(pieces) + 1):
        stream = events(pieces[:n], end="")
        if n > finish:
            read(stream)
        else:
            with pytest.raises(BadReplyError, match="broken stream"):
                read(stream)
    for stream in (b": hm\n\n", b"data:", b"data: [DONE]\n\n"):
        with pytest.raises(BadReplyError, match=r"broken stream|no choices|bad JSON"):
            read(stream)
    for half in (events(pieces)[:-40], b"data: {\n\n", b"data: 7\n\n"):
        with pytest.raises(BadReplyError, match=r"bad JSON|wrong schema|broken stream"):
            read(half[: half.rfind(b"}")] if b"}" in half else half)


def test_a_whole_message_in_an_event():
    assert read(events([WHOLE])) == read(WHOLE)
    two = {**WHOLE, "choices": WHOLE["choices"] * 2}
    assert read(two) == read(WHOLE)
    other = [{"choices": [{"index": i, "delta": {"content": t}, "finish_reason": "stop"}]} for i, t in enumerate("78")]  # fmt: skip
    with pytest.raises(BadReplyError, match="several answers"):
        read(events(other))


def ollama(*pieces, done=True):
    lines = [{"model": "tiny", "message": {"role": "assistant", **piece}, "done": False} for piece in pieces]  # fmt: skip
    lines.append({"model": "tiny", "message": {"content": ""}, "done": done, "done_reason": "stop",
                  "prompt_eval_count": 40, "eval_count": 3})  # fmt: skip
    return "\n".join(json.dumps(line) for line in lines)


def test_lines_of_json_as_ollama_sends_them():
    reply = read(ollama({"thinking": "Hm"}, {"content": "Rating"}, {"content": ": 7"}).encode())
    assert (reply.text, reply.thought, reply.model) == ("Rating: 7", True, "tiny")
    assert (reply.n_prompt, reply.n_tokens, reply.finish) == (40, 43, "stop")
    scores = [{**PLACE, "token": "7"}]
    one = {"model": "tiny", "message": {"content": "7"}, "done": True, "done_reason": "stop", "logprobs": scores}  # fmt: skip
    assert judged(one)[1] == {"7": pytest.approx(2 / 3), "8": pytest.approx(1 / 3)}
    with pytest.raises(ToldError, match="no memory"):
        read(
            b'{"model": "tiny", "message": {"content": "7"}, "done": false}\n{"error": "no memory"}'
        )


@pytest.mark.parametrize(
    ("told", "code", "reason"),
    [
        ({"error": {"message": "Provider returned error", "code": 429}}, 429, "Provider returned error"),
        ({"error": {"message": "slow down", "code": "429"}}, 429, "slow down"),
        ({"error": {"message": "slow down", "type": "x", "status": 503}}, 503, "slow down"),
        ({"error": "Unexpected endpoint or method."}, 0, "Unexpected endpoint"),
        ({"object": "error", "message": "too long", "code": 400}, 400, "too long"),
        ({"detail": "Not Found"}, 0, "Not Found"),
        ({"detail": [{"msg": "field required", "loc": ["body", "model"]}]}, 0, "field required"),
        ({"message": "no Route matched", "status": 404}, 404, "no Route"),
        ({"errors": [{"message": "overloaded"}], "success": False}, 0, "overloaded"),
        ({"error": {"message": "x", "code": 10**30}}, 0, "x"),
        ({"choices": [{"error": {"message": "upstream", "code": 502}, "message": {"content": ""}}]}, 502, "upstream"),
        ({"choices": [], "error": {"message": "none left"}}, 0, "none left"),
    ],
)  # fmt: skip
def test_an_error_that_comes_with_200(told, code, reason):
    for content in (json.dumps(told).encode(), events([told])):
        with pytest.raises(ToldError, match=reason) as caught:
            read_reply(content, "sk-0123456789")
        assert caught.value.code == code


def test_an_error_does_not_tell_the_key():
    told = json.dumps({"error": {"message": "no key sk-0123456789\n" + "x" * 5000}}).encode()
    with pytest.raises(ToldError, match="no key") as caught:
        read_reply(told, "sk-0123456789")
    assert "0123" not in caught.value.reason
    assert len(caught.value.reason) < 300
    assert "\n" not in caught.value.reason


SCRAPS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["7", "length", "<think>", "\ud800", -math.inf, 10**400, "[DONE]"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["token", "logprob", "text", "type", "content", "error", "done", "message", "delta"]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
RICH = {
    **WHOLE,
    "completion_probabilities": None,
    "done": None,
    "error": None,
    "usage": {**USAGE, "prompt_tokens": 1},
}


def places(told, path=()):
    """Where in a value something can be put."""
    entries = told.items() if isinstance(told, dict) else enumerate(told)
    for key, value in entries:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*places(RICH)]), SCRAPS), max_size=3), st.booleans())
def test_whatever_a_server_sends_is_a_reply_or_none(changes, streamed):
    told = json.loads(json.dumps(RICH))
    for path, scrap in changes:
        inside = told
        with suppress(LookupError, TypeError):  # what was put there before has no such place
            for key in path[:-1]:
                inside = inside[key]
            inside[path[-1]] = scrap
    content = events([told]) if streamed else json.dumps(told).encode()
    try:
        reply = read_reply(content)
    except BadReplyError:
        return
    assert Reply.load(reply.dump()) == reply or "NaN" in reply.dump()
    assert len(reply.dump()) < 20_000
    reply.text.encode()
    _, found, measured, *_ = judge(reply, SCALE, "tiny")
    assert np.isnan(found).all() or found.sum() == pytest.approx(1)
    assert not measured or reply.tokens


# Journals


def test_what_older_journals_hold_is_judged_at_least_as_well():
    score = (("7", -0.5), ("8", -1.0))
    expected = [0.0] * 6 + [math.exp(-0.5), math.exp(-1.0), 0.0, 0.0]
    plain = ("7", (("7", score),))
    empty = tuple((t, ((t, 0.0),)) for t in ("<think>", "\n\n", "</think>", "\n\n"))
    thinking = ("<think>\n\n</think>\n\n7", (*empty, ("7", score)))
    for text, tokens in (plain, thinking):
        old = {"text": text, "tokens": tokens, "finish": "stop", "refused": False, "model": "tiny", "n_tokens": 9}  # fmt: skip
        status, found, measured, *_ = judge(Reply.load(json.dumps(old)), SCALE, "tiny")
        assert (status, measured) == ("ok", True)
        np.testing.assert_allclose(found, np.array(expected) / sum(expected))
    cut = Reply("<think>\nThe task" + "x" * 184, (), "length", False, "tiny", 16)
    assert judge(cut, SCALE, "tiny").status == "still thinking"


# Names


SAME = [
    ("gpt-4o", "gpt-4o"), ("GPT-4o", "gpt-4o"), ("openai/gpt-4o", "gpt-4o"), ("gpt-4o", "openai/gpt-4o"),
    ("gpt-4o-2024-08-06", "gpt-4o"), ("claude-3-5-haiku-20241022", "claude-3-5-haiku-latest"), ("mistral-small-2409", "mistral-small-latest"),
    ("claude-3@20240229", "claude-3"), ("claude-3-20240229", "claude-3-2024-02-29"), ("claude-3-20240229", "claude-3@20240229"),
    ("llama3:latest", "llama3"), ("llama3", "llama3:latest"), ("library/llama3:8b", "llama3:8b"),
    ("meta-llama/llama-3.3-70b-instruct", "meta-llama/llama-3.3-70b-instruct:free"), ("x:nitro", "x"), ("x:floor", "x"), ("x", "a/x:online"),
    ("x:exacto", "x"), ("X", "b/X:cheapest"), ("models/gemini-2.0-flash", "gemini-2.0-flash"),
    ("accounts/fireworks/models/llama-v3p1-8b-instruct", "llama-v3p1-8b-instruct"),
    ("/models/qwen2.5-7b-instruct-q4_k_m.gguf", "Qwen/Qwen2.5-7B-Instruct"), ("qwen2.5-7b-instruct-q4_k_m.gguf", "qwen2.5-7b-instruct-q4_k_m"),
    ("C:\\models\\Qwen2.5-7B-Instruct-Q4_K_M.gguf", "qwen2.5-7b-instruct"), ("mistral-7b-instruct-v0.2.Q8_0.gguf", "mistral-7b-instruct-v0.2"),
    ("X-UD-Q4_K_XL.gguf", "X"), ("X-IQ4_XS.gguf", "X"), ("X-f16.gguf", "X"), ("gpt-oss-20b-mxfp4.gguf", "openai/gpt-oss-20b"),
    ("X-Q4_K_M-00001-of-00003.gguf", "X"), ("X-00001-of-00002.safetensors", "X"), ("X.bin", "X"), ("X.gguf", "X.bin"),
    ("bartowski/X-GGUF", "X"), ("bartowski/X-GGUF:Q4_K_M", "X"), ("hf.co/bartowski/X-GGUF:Q4_K_M", "X-Q4_K_M.gguf"), ("X-GGUF", "X-Q8_0.gguf"),
    ("/data/hub/models--Qwen--Qwen3-8B/snapshots/ab12", "Qwen/Qwen3-8B"), ("./X/", "X"), (" X ", "X"), ("qwen3-8b@q4_k_m", "qwen3-8b"),
    ("Qwen3-4B-Instruct-2507-Q4_K_M.gguf", "Qwen3-4B-Instruct-2507"),
]  # fmt: skip
OTHER = [
    ("gpt-4o-mini", "gpt-4o"), ("gpt-4", "gpt-4o"), ("gpt-3.5-turbo", "hermes"), ("claude-3-5", "claude-3"), ("claude-3.5", "claude-3"),
    ("claude-3-70", "claude-3"), ("claude", "claude-3"), ("claude-3-5-haiku-20241022", "claude-3-latest"), ("llama3:8b", "llama3:70b"),
    ("llama3:8b", "llama3"), ("llama3", "llama3:70b"), ("llama-3.1-8b", "llama-3-8b"), ("llama-3-8b", "llama-3-8b-instruct"),
    ("X-7B-Q4_K_M.gguf", "X-70B"), ("X-Q4_K_M.gguf", "X-Q8_0.gguf"), ("X-Q4_K_M", "X"), ("X-AWQ", "X"), ("X-fp8", "X"),
    ("gpt-4o-2024-08-06", "gpt-4o-2024-05-13"), ("claude-3@20240229", "claude-3@20240307"), ("local-model", "qwen"), ("x:free", "x:nitro"),
    ("/models/qwen2.5-7b-instruct-q4_k_m.gguf", "local-model"), ("Qwen3-4B-Instruct-2507", "Qwen3-4B-Thinking-2507"), ("gguf", "X.gguf"),
    ("qwen2.5", "qwen2"), ("phi-3", "phi-3-mini"), ("o1", "o1-mini"), ("@x", "y"), (":latest", "x"), ("/", "x"), (".gguf", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("told", "asked"), SAME)
def test_names_of_one_model(told, asked):
    assert same_model(told, asked)
    assert same_model(asked, told)


@pytest.mark.parametrize(("told", "asked"), OTHER)
def test_names_of_two_models(told, asked):
    assert not same_model(told, asked)
    assert not same_model(asked, told)


@settings(max_examples=200, deadline=None)
@given(st.text("aX3-.:@/\\ggufq4_k_m0", max_size=14))
def test_every_name_is_its_own(name):
    assert same_model(name, name)
    assert same_model(name, name.upper())


def test_fences_and_tags_around_an_answer_may_be_many():
    around = "<answer>```" * 5000
    stated = find_answer(f"{around}\n2\n{around}", SCALE)
    assert stated is not None
    assert SCALE.answers[stated.number] == "2"
