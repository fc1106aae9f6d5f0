"""What a server says when it refuses, whatever the shape, and what of ours is dropped for it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.rating.advice import lasting_refusals
from stackllm.rating.dialect import Dialect, blind, guided
from stackllm.rating.refusal import Refusal, count_reasons, read_reason
from stackllm.rating.requests import ServerParams

KEY = "sk-0123456789abcdef"
QUOTED = json.dumps({"error": {"message": f"upstream: no, {KEY}"}})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "too long", "code": 400}}, "too long"),
        ({"error": "model 'm' not found"}, "model 'm' not found"),
        ({"message": "too long", "object": "error"}, "too long"),
        ({"detail": "Method Not Allowed"}, "Method Not Allowed"),
        ({"detail": [{"loc": ["body", "n"], "msg": "too many"}, {"msg": "b"}]}, "n: too many; b"),
        ({"errors": ["a", {"message": "b"}]}, "a; b"),
        ([{"error": {"code": 400, "message": "of a list"}}], "of a list"),
        ({"error": {"message": "no", "param": "temperature"}}, "no (temperature)"),
        ({"error": {"message": "no", "code": "insufficient_quota"}}, "no (insufficient_quota)"),
        (
            {"error": {"message": "failed", "metadata": {"raw": QUOTED}}},
            "failed: upstream: no, [key]",
        ),
        ({"object": "error", "message": {"detail": [{"msg": "deep"}]}}, "deep"),
        (b"plain\n text\x1b[31m\x00", "plain text[31m"),
        (b"<!DOCTYPE html><title>Sign &amp;\n in</title>", 'an HTML page ("Sign & in")'),
        (b"<html>no title</html>", "an HTML page"),
        (b'data: {"error": {"message": "in a stream"}}\n\n', "in a stream"),
        (b'{"error": {"code": 400, "message": "cut \\"in two', 'cut "in two'),
        ({"a": 1}, ""),
        (b"", ""),
        (b"[" * 100_000, "[" * 200 + "…"),
    ],
)
def test_the_servers_own_words(body, said):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert read_reason(content, KEY) == said


@given(
    st.text(), st.text(), st.sampled_from(["plain", "json", "html", "twice", "escaped", "percent"])
)
def test_no_reason_holds_the_key_or_more_than_a_line(before, after, form):
    text = f"{before}{KEY}{after}"
    escaped = "".join(f"\\u{ord(c):04x}" for c in KEY)
    quoted = json.dumps({"error": {"message": text}})
    body = {
        "plain": text,
        "json": quoted,
        "html": f"<html><title>{text}</title>",
        "twice": json.dumps({"message": quoted}),
        "escaped": json.dumps({"message": f"{before}{escaped}"}),
        "percent": f"{before}{''.join(f'%{ord(c):02X}' for c in KEY)}",
    }[form]
    said = read_reason(body.encode("utf-8", "surrogatepass"), KEY)
    assert KEY not in said
    assert escaped not in said
    assert "%73%6b" not in said.casefold()
    assert said.isprintable()
    assert len(said) <= 201


def test_an_invisible_mark_in_the_key_hides_it_from_nobody():
    assert read_reason(f"{KEY[:5]}\u200b{KEY[5:]}".encode(), KEY) == "[key]"


@given(st.binary(max_size=300))
def test_any_body_has_a_reason_of_one_line(content):
    said = read_reason(content)
    assert said.isprintable()
    assert len(said) <= 201


def test_reasons_that_differ_in_numbers_are_one():
    reasons = [f"HTTP 400: {n} tokens are too many" for n in range(90)]
    assert count_reasons(reasons) == "90 HTTP 400: 0 tokens are too many"
    more = [*reasons, "HTTP 500", "HTTP 500", "HTTP 413", "a", "b"]
    told = "90 HTTP 400: 0 tokens are too many, 2 HTTP 500, 1 HTTP 413 and 2 others"
    assert count_reasons(more) == told


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [
        (401, "", "key"),
        (403, "an HTML page", "key"),
        (403, "You are not allowed to request logprobs from this model", "prompt"),
        (400, "API key not valid. Please pass a valid API key.", "key"),
        (400, '"nomic-embed-text" does not support chat', "model"),
        (400, 'Failed to load model "m". Error: insufficient system resources.', "model"),
        (400, "Model is unloaded.", "model"),
        (402, "", "quota"),
        (429, "You exceeded your current quota (insufficient_quota)", "quota"),
        (429, "You exceeded your current quota. Please retry in 31s", "busy"),
        (429, "Rate limit reached: quota of 3 requests per minute", "busy"),
        (404, "page not found", "path"),
        (404, 'model "m" not found, try pulling it first', "model"),
        (404, "The model `m` does not exist or you do not have access to it.", "model"),
        (400, "m is not a valid model ID", "model"),
        (405, "Method Not Allowed", "path"),
        (0, "Unexpected endpoint or method. (POST /chat/completions)", "path"),
        (0, "Provider returned error", "busy"),
        (413, "", "context"),
        (400, "the request exceeds the available context size, try increasing it", "context"),
        (400, "This model's maximum context length is 4096 tokens. Reduce max_tokens.", "context"),
        (422, "inputs tokens + max_new_tokens must be <= 4096", "context"),
        (400, "max_tokens is too large: 100000", "tokens"),
        (400, "Unsupported 'max_tokens': use 'max_completion_tokens' instead.", "prompt"),
        (400, "This model only support stream mode", "stream"),
        (400, "only streaming is supported, set stream=true", "stream"),
        (400, "bad request", "prompt"),
        (503, "Loading model", "loading"),
        (503, "overloaded", "busy"),
        (0, "Not Found", "path"),
        (500, "Requested tokens (600) exceed context window of 512", "context"),
        (400, "input length exceeds maximum context length", "context"),
        (400, "The decoder prompt (length 700) is longer than the maximum model length", "context"),
        (400, "The input token count (9) exceeds the maximum number allowed", "context"),
        (400, "Please reduce the length of the messages or completion.", "context"),
        (400, "Your credit balance is too low to access the API.", "quota"),
        (400, "top_logprobs: Input should be less than or equal to 5", "prompt"),
        (400, "`temperature` must be strictly positive", "prompt"),
        (404, "No endpoints found that can handle the requested parameters.", "prompt"),
        (404, "No endpoints found for m.", "path"),
        (403, "Your input was flagged for violence. No credits were charged.", "flagged"),
        (400, "filtered by the content management policy (content_filter)", "flagged"),
        (400, "Content Exists Risk", "flagged"),
        (403, "Key limit exceeded (total limit).", "quota"),
        (400, "Could not finish the message because max_tokens or model output limit was reached. "
         "Please try again with higher max_tokens.", "tokens"),
    ],
)  # fmt: skip
def test_what_a_refusal_is_about(status, said, kind):
    assert Refusal(status, said).kind == kind


@pytest.mark.parametrize(
    ("said", "limit", "temperature", "alternatives"),
    [
        ("'max_tokens' is not supported; use 'max_completion_tokens'", "max_completion_tokens", "meant", 20),
        ("'temperature' does not support 0 with this model", "max_tokens", "left out", 20),
        ("Requested sample logprobs of 20, which is greater than max allowed: 8", "max_tokens", "meant", 8),
        ("qwen2.5-7b: top_logprobs: Input should be <= 11", "max_tokens", "meant", 11),
        ("top_logprobs must be between 0 and 5, got 20", "max_tokens", "meant", 5),
        ("logprobs are not implemented", "max_tokens", "meant", 5),
    ],
)  # fmt: skip
def test_a_reason_guides(said, limit, temperature, alternatives):
    assert guided(Dialect(), said, ()) == Dialect(limit, temperature, alternatives)


@given(st.text(alphabet="max_tokens logprob temperature 0123456789"), st.booleans())
def test_the_steps_of_any_server_end(said, fixed):
    fields = ["temperature", "top_logprobs"] if fixed else []
    for reason in (said, "top_logprobs: 19 18 17 16 temperature max_tokens max_completion_tokens"):
        step, steps = Dialect(), 0
        while step := guided(step, reason, fields):
            steps += 1
            assert not fixed or (step.temperature == "meant" and step.alternatives == 20)
        assert steps <= 7
    assert len({*blind(Dialect(), fields)}) <= 7


def test_a_quota_with_a_time_to_come_again_is_no_lasting_refusal():
    spent, soon = (Refusal(429, "You exceeded your current quota", wait) for wait in (0.0, 20.0))
    assert "refuses 1 prompts" in lasting_refusals([spent, soon], ServerParams())
    assert lasting_refusals([soon], ServerParams()) == ""


def test_a_field_of_the_user_s_that_merely_speaks_of_logprobs_is_sent():
    meant = {"logprobs": True, "top_logprobs": 20, "prompt_logprobs": 0}
    assert Dialect(alternatives=0).apply(meant) == {"prompt_logprobs": 0}
