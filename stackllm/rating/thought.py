"""What an LLM thinks before it answers, taken off its reply.

Every family of LLMs has marks of its own for where thought begins and ends, and a template may have
written the first of them into the prompt. So there is one rule for all of them, nested, repeated or
left open: what counts stands after the last mark. Where that one opens a thought nothing has been
answered yet, and what was said before a thought may have been thought better of.

A text under rating can't decide where that is: what it holds of these marks was broken up before it
was shown (see :func:`~stackllm.rating.prompt.neutralise`), so an LLM that quotes it does not repeat
them.
"""

from __future__ import annotations

import re

_NAMES = "think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad"
_TAG = rf"(?:\w+[:_])?(?:{_NAMES})(?::\w+)?>"  # <think>, <seed:think>, <longcat_think>
_OPENS = (
    rf"<{_TAG}",
    r"\[(?:THINK|unused16)\]",  # Magistral, Pangu
    "◁think▷",  # Kimi
    r"<\|(?:START|begin)(?:_of)?_(?:THINKING|thought)\|>",  # Command A, Sky-T1
    r"<\|inner_prefix\|>",  # Apertus
    r"<\|open\|>\s*think\s*<\|sep\|>",
    r"<\|think\|>",  # Solar
    r"<\|channel\|?>",  # any other than gpt-oss's "final", which is looked for first; Gemma
    r"to=self\s*<\|message\|>",
)
_CLOSES = (
    rf"</{_TAG}",
    r"\[/THINK\]",
    r"\[unused17\]",
    "◁/think▷",
    r"<\|END(?:_of)?_(?:THINKING|thought)\|>",
    r"<\|inner_suffix\|>",
    r"<\|close\|>\s*think\s*<\|sep\|>",
    r"<\|/think\|>|<\|content\|>",
    r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
    "<channel[|]>",
    r"to=user\s*<\|message\|>",
    r"\[BEGIN FINAL RESPONSE\]",  # Apriel
)
_MARK = re.compile(f"(?P<closes>{'|'.join(_CLOSES)})|{'|'.join(_OPENS)}", re.IGNORECASE)

_IN_WORDS = (
    re.compile(r"\s*Here(?:['’]s| is) my thought process:.*Here(?:['’]s| is) my response:", re.DOTALL),  # Granite
    re.compile(r"\s*(?:analysis|commentary).*assistantfinal(?!ly\b)", re.DOTALL),  # gpt-oss, its marks lost
)  # fmt: skip
"""Thought between mere words, at the beginning of a reply; a text under rating may hold such words."""


def strip(text: str, cut: bool = False) -> tuple[str, bool]:
    """The text without thought of any form, and whether there was any.

    Parameters
    ----------
    text
        A reply.
    cut
        Whether it was cut at its limit. Thought between mere words has not ended then: its end may
        be a quotation.

    Examples
    --------
    >>> strip("<think>Hm.</think>7"), strip("7"), strip("Hm.</think>7")
    (('7', True), ('7', False), ('7', True))
    >>> strip("<think>Hm"), strip("7 <think>Or 8?"), strip("7<think>No.</think>8")
    (('', True), ('', True), ('8', True))
    """
    thought = False
    for words in _IN_WORDS:
        if ended := words.match(text):
            text, thought = ("" if cut else text[ended.end() :]), True
    marks = list(_MARK.finditer(text))
    if not marks:
        return text, thought
    return (text[marks[-1].end() :] if marks[-1]["closes"] else ""), True
