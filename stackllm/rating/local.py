"""The local rater: allowed answers scored by a decoder LLM on this machine, from the row cache.

What decides an answer besides the texts that are shown: weights, precision, wording, allowed
answers, lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Len

from stackllm.engine.local import Engine
from stackllm.errors import UsageError
from stackllm.llm.backbone import Devices
from stackllm.llm.locate import EMBEDDED, revision_of
from stackllm.llm.machine import Precision, choose_dtype, pass_tokens
from stackllm.llm.memory import within_memory
from stackllm.llm.prompts import Prompt, longest
from stackllm.llm.rows import RowCache, Weights
from stackllm.llm.scoring import answer_probabilities, calibrate, score_answers
from stackllm.parameters import BackboneName, Name, TokenCount, check
from stackllm.rating import prompt as asking
from stackllm.rating.prompt import CUT, Piece, about_tokens, compose, compose_text
from stackllm.rating.question import AskedRecipe, Case, Rubric, split_answers
from stackllm.store.digest import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 5


@dataclass(frozen=True)
class RaterParams:
    """Settings of the rater.

    Parameters
    ----------
    ask
        Asked recipes that are turned on; none by default: the embedded LLM is too small to judge,
        and asking it costs about as long as the encoder.
    backbone
        The LLM on this machine: ``"smollm2"`` (embedded), a folder, or a hub name.
        ``revision`` beside it names a commit, branch or tag of the hub, as ``"org/name@revision"`` does; a
        run stays with the commit that it began with.
    dtype
        ``"auto"`` takes what the machine that begins the run computes fastest in; ``"int8"`` and ``"nf4"``
        pack the weights, and compute in what follows the dash, or as ``"auto"``.
    max_question_tokens, max_response_tokens
        Longer texts are cut: questions in the middle, responses at the end.
    batch_tokens
        Tokens of a batch. None takes 1,024 on a CPU and 32,768 on a GPU.
    devices
        On which GPUs the LLM stands; as for the encoder.
    url, model
        An OpenAI-compatible endpoint and the model to ask there, instead of the LLM on this
        machine, such as ``"https://host/v1"``. The URL ends before ``/chat/completions``; a key
        stands in the environment variable ``STACKLLM_API_KEY``.
    """

    ask: tuple[Name, ...] = ()
    backbone: BackboneName = EMBEDDED
    dtype: Precision = "auto"
    max_question_tokens: TokenCount = 128
    max_response_tokens: TokenCount = 128
    batch_tokens: TokenCount | None = None
    devices: Devices = "one"
    url: str = ""
    model: Annotated[str, Len(0, 1000)] = ""

    def __post_init__(self) -> None:
        check(self)
        if bool(self.url) != bool(self.model):
            raise UsageError("url and model go together: give both, or neither.")


_CHARACTERS = 5
"""Characters a token of what is cut, where the tokenizer is not loaded to count."""


def rate(recipe: AskedRecipe, cases: list[Case], params: RaterParams, engine: Engine) -> np.ndarray:
    """Probabilities of the allowed answers to every case, computed or taken from the cache.

    Parameters
    ----------
    recipe
        What is asked.
    cases
        What to show, without repetition.
    params
        Settings.
    engine
        Runs the shards below ``engine.root``.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_cases, n_answers)``, rows sum to 1; a row of NaN where the LLM gave no number.
        The answers to a rubric's questions stand side by side, and each question's sum to 1; see
        :func:`~stackllm.rating.question.split_answers`.

    Raises
    ------
    PendingError
        In a dry run, if a case is not in the cache.
    """
    dtype, reason = choose_dtype(params.dtype)
    told = f"{dtype} ({reason})" if params.dtype == "auto" else dtype
    cached = _cache(recipe, params, dtype).ensure(
        cases,
        engine,
        recipe.block,
        f"prompts to put to {params.backbone}, in {told}",
        Weights(params.backbone, dtype, devices=params.devices),
        answer_cases,
        recipe,
        params,
        pass_rows=_budget(params) // params.max_response_tokens,
    )
    n_answers = sum(len(asked.answers) for asked in recipe.questions)
    return cached.take("answers").reshape(len(cases), n_answers)


def _budget(params: RaterParams) -> int:
    """Tokens of a pass."""
    return params.batch_tokens or pass_tokens(32_768)


def count_missing(
    recipe: AskedRecipe, cases: list[Case], params: RaterParams, root: Path
) -> tuple[int, int]:
    """How many cases the cache below ``root`` lacks, and about how many tokens their prompts have."""
    known = _cache(recipe, params, choose_dtype(params.dtype)[0]).known(root)
    missing = [case for case in cases if case.key not in known]
    return len(missing), count_tokens(recipe, missing, params)


def count_tokens(recipe: AskedRecipe, cases: Sequence[Case], params: RaterParams) -> int:
    """About how many tokens the prompts of cases have: our own words, and as much of each text as is shown.

    No prompt is made for it: that takes a third of a second per thousand, and every run counts.
    """
    if not cases:
        return 0
    words = prompt_text(recipe, Case("", ("",) * len(cases[0].responses)), params)

    def shown(text: str, most: int) -> int:
        return min(most, about_tokens(text[: _CHARACTERS * most]))

    return len(cases) * about_tokens(words) + sum(
        shown(case.question, params.max_question_tokens)
        + sum(shown(response, params.max_response_tokens) for response in case.responses)
        for case in cases
    )


def prompt_digests(
    recipe: AskedRecipe, cases: Sequence[Case], params: RaterParams
) -> tuple[str, ...]:
    """For each case a digest of all that its prompt is made of: wording, lengths and texts."""
    wording = digest(asking.VERSION, recipe, params.max_question_tokens, params.max_response_tokens)
    return tuple(digest(wording, case.key) for case in cases)


def prompt_text(recipe: AskedRecipe, case: Case, params: RaterParams) -> str:
    """The prompt of a case as one text, cut by characters where no tokenizer counts."""
    lengths = (params.max_question_tokens, params.max_response_tokens)
    return compose_text(recipe, case, *(_CHARACTERS * length for length in lengths))


def _cache(recipe: AskedRecipe, params: RaterParams, dtype: str) -> RowCache:
    """Where answers are kept, by all that decides them besides the texts."""
    identity = digest(
        VERSION, asking.VERSION, revision_of(params.backbone), dtype, recipe,
        params.max_question_tokens, params.max_response_tokens,
    )  # fmt: skip
    return RowCache("rater", VERSION, identity)


def answer_cases(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    recipe: AskedRecipe,
    params: RaterParams,
) -> dict[str, np.ndarray]:
    """``answers`` to cases, ``(n_cases, n_answers)``, as :func:`rate_cases` gives them."""
    return {"answers": rate_cases(model, tokenizer, recipe, list(cases), params)}


def rate_cases(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: AskedRecipe,
    cases: list[Case],
    params: RaterParams,
) -> np.ndarray:
    """Calibrated probabilities ``(n_cases, n_answers)`` from a loaded LLM; see :func:`rate`.

    Cases with the same question next to each other share its computation.
    """
    form = ChatForm.of(tokenizer)
    lines = _lines(recipe)
    replies = [[form.answer_ids(tokenizer, line) for line in own] for own in lines]
    every = [ids for own in replies for ids in own]
    for text, ids in zip((line for own in lines for line in own), every, strict=True):
        if not ids or every.count(ids) > 1:
            raise UsageError(
                f"{recipe.block}: this LLM's tokenizer can't tell the answer \"{text}\" from the others."
            )
    empty = Case("", ("",) * (len(cases[0].responses)))
    budget = _budget(params)

    def scores(prompts: list[Prompt]) -> np.ndarray:
        return within_memory(
            longest(prompts),
            budget,
            lambda most: score_answers(model, prompts, every, most),
            model,
        )

    prior, made = (
        split_answers(recipe, scores(make_prompts(tokenizer, recipe, shown, params)))
        for shown in ([empty], cases)  # apart, so that what nothing gets never depends on the rest
    )
    # A question's lines begin alike, with its name, and no line goes on after another: how likely the
    # name is cancels out, and no question is told the answer to another.
    calibrated = [
        calibrate(answer_probabilities(own, ids), answer_probabilities(nothing, ids)[0])
        for nothing, own, ids in zip(prior, made, replies, strict=True)
    ]
    return np.concatenate(calibrated, axis=1)


def _lines(recipe: AskedRecipe) -> list[list[str]]:
    """For each question the replies that are scored: its answers, in a rubric after its name."""
    if not isinstance(recipe, Rubric):
        return [list(recipe.answers)]
    return [
        [f"{name}: {answer}" for answer in asked.answers]
        for name, asked in zip(recipe.names, recipe.questions, strict=True)
    ]


def make_prompts(
    tokenizer: PreTrainedTokenizerBase, recipe: AskedRecipe, cases: list[Case], params: RaterParams
) -> list[Prompt]:
    """Token ids of cases, those next to each other with the same question sharing its beginning."""
    form = ChatForm.of(tokenizer)
    return [
        _prompt(tokenizer, form, recipe, list(group), params)
        for _, group in groupby(cases, key=lambda case: case.question if case.responses else "")
    ]


@dataclass(frozen=True)
class ChatForm:
    """What stands around a user's words in the form that an LLM was trained to read.

    Parameters
    ----------
    before, after
        Text before them and from their end to where the reply begins, with control tokens.
    opening
        What the reply's first token is joined to.
    """

    before: str
    after: str
    opening: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatForm:
        """The tokenizer's chat template; a plain cue for an LLM that has none."""
        if not tokenizer.chat_template:
            return cls(tokenizer.bos_token or "", "\nReply:", " ")
        mark = "0f3a9c"
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = whole.partition(mark)
        return cls(before, after, "")

    def answer_ids(self, tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
        """Token ids of an answer as the reply would begin with it."""
        return list(tokenizer(self.opening + answer, add_special_tokens=False).input_ids)


def _prompt(
    tokenizer: PreTrainedTokenizerBase,
    form: ChatForm,
    recipe: AskedRecipe,
    cases: list[Case],
    params: RaterParams,
) -> Prompt:
    """Token ids of cases that share everything up to their own part."""
    special = control_ids(tokenizer)
    gap = list(tokenizer(" ", add_special_tokens=False).input_ids)

    @cache  # the question is the same for all
    def shorten(text: str, role: str) -> str:
        most = params.max_question_tokens if role == "question" else params.max_response_tokens
        return _shorten(tokenizer, text, most, role)

    def ids_of(pieces: list[Piece]) -> list[int]:
        ids_so_far = []
        for piece in pieces:
            ids = tokenizer(piece.text, add_special_tokens=False).input_ids
            for i in ids:  # a gap, for what stands around a control token may not become a word
                ids_so_far += gap if piece.role != "ours" and i in special else [i]
        return ids_so_far

    composed = [compose(recipe, case, shorten) for case in cases]
    prefix = ids_of([Piece(form.before), *composed[0][0]])
    return Prompt(prefix, [ids_of([*rest, Piece(form.after)]) for _, rest in composed])


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that no text may become.

    Those that the tokenizer calls special are often but a few of them: whatever was added to the
    vocabulary as a word of its own may steer the LLM, but for runs of white space.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(i for i, token in added if str(token).strip())}


def _shorten(tokenizer: PreTrainedTokenizerBase, text: str, most: int, role: str) -> str:
    """At most so many tokens of a text: a question loses its middle, a response its end."""
    if role == "response":
        text = text[: 16 * most]  # spares tokenising what is cut anyway
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) <= most:
        return text
    half = most // 2 if role == "question" else 0
    parts = [ids[: most - half], ids[len(ids) - half :] if half else []]
    return CUT.join(
        str(tokenizer.decode(part, clean_up_tokenization_spaces=False)) for part in parts if part
    )
