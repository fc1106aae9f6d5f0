"""The local rater: allowed answers scored by a decoder LLM on this machine, cached row by row.

Answers are cached by the texts that were shown, below a folder named after everything else that
decides their numbers: weights, precision, wording, allowed answers, lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Len

from stackllm.engine.local import Engine, Task
from stackllm.errors import UsageError
from stackllm.llm.backbone import Dtype, choose_dtype, frozen_model, use_one_thread
from stackllm.llm.encode import known_rows, shard_unit, workers
from stackllm.llm.locate import EMBEDDED, prepare, revision_of
from stackllm.llm.memory import within_memory
from stackllm.llm.prompts import Prompt
from stackllm.llm.scoring import answer_probabilities, calibrate, score_answers
from stackllm.parameters import BackboneName, Name, TokenCount, check
from stackllm.rating import prompt as asking
from stackllm.rating.prompt import CUT, Piece, compose, compose_text
from stackllm.rating.question import Asked, Case
from stackllm.store.digest import digest

VERSION = 3


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
    dtype
        ``"auto"`` takes what the machine computes fastest in.
    max_question_tokens, max_response_tokens
        Longer texts are cut: questions in the middle, responses at the end.
    batch_tokens
        Tokens of a batch. None takes 1,024 on a CPU and 32,768 on a GPU.
    url, model
        An OpenAI-compatible endpoint and the model to ask there, instead of the LLM on this
        machine, such as ``"https://host/v1"``. The URL ends before ``/chat/completions``; a key
        stands in the environment variable ``STACKLLM_API_KEY``.
    """

    ask: tuple[Name, ...] = ()
    backbone: BackboneName = EMBEDDED
    dtype: Dtype = "auto"
    max_question_tokens: TokenCount = 128
    max_response_tokens: TokenCount = 128
    batch_tokens: TokenCount | None = None
    url: str = ""
    model: Annotated[str, Len(0, 1000)] = ""

    def __post_init__(self) -> None:
        check(self)
        if bool(self.url) != bool(self.model):
            raise UsageError("url and model go together: give both, or neither.")


_SHARD_CASES = 112

_CHARACTERS = 5
"""Characters a token of what is cut, where the tokenizer is not loaded to count."""


def rate(asked: Asked, cases: list[Case], params: RaterParams, engine: Engine) -> np.ndarray:
    """Probabilities of the allowed answers to every case, computed or taken from the cache.

    Parameters
    ----------
    asked
        The recipe.
    cases
        What to ask, without repetition.
    params
        Settings.
    engine
        Runs the shards below ``engine.root``.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_cases, n_answers)``, rows sum to 1; a row of NaN where the LLM gave no number.

    Raises
    ------
    PendingError
        In a dry run, if a case is not in the cache.
    """
    dtype, reason = choose_dtype(params.dtype)
    folder, identity = _folder(asked, params, dtype)
    keys = [case.key for case in cases]
    known = known_rows(engine.root, folder)
    plans = [
        [(case, key) for case, key in shard if key not in known]
        for shard in _plan_shards(cases, keys)
    ]
    plans = [shard for shard in plans if shard]
    if plans:
        engine.reporter.say(
            f"{asked.block}: {sum(map(len, plans))} of {len(cases)} prompts to put to {params.backbone}, "
            f"in {dtype} ({reason})"
        )
        if not engine.dry_run:
            prepare(params.backbone, engine.reporter.say)
    tasks = [
        Task(
            shard_unit(folder, VERSION, identity, [key for _, key in shard]),
            rate_shard,
            (asked, shard, params, dtype),
        )
        for shard in reversed(plans)  # the longest texts first
    ]
    engine.ensure(asked.block, tasks, n_jobs=workers())
    known = known_rows(engine.root, folder) if tasks else known
    shards = {path: np.load(path / "answers.npy") for path in {known[key][0] for key in keys}}
    found = [shards[path][place] for path, place in (known[key] for key in keys)]
    return np.array(found).reshape(len(keys), len(asked.answers))


def count_missing(
    asked: Asked, cases: list[Case], params: RaterParams, root: Path
) -> tuple[int, int]:
    """How many cases the cache below ``root`` lacks, and about how many tokens their prompts have."""
    known = known_rows(root, _folder(asked, params, choose_dtype(params.dtype)[0])[0])
    missing = [case for case in cases if case.key not in known]
    lengths = (
        _CHARACTERS * params.max_question_tokens,
        _CHARACTERS * params.max_response_tokens,
    )
    return len(missing), sum(
        -(-len(compose_text(asked, case, *lengths).encode()) // 4) for case in missing
    )


def _folder(asked: Asked, params: RaterParams, dtype: str) -> tuple[str, str]:
    """Where answers are cached, and the digest of what decides them besides the texts."""
    identity = digest(
        VERSION, asking.VERSION, revision_of(params.backbone), dtype, asked,
        params.max_question_tokens, params.max_response_tokens,
    )  # fmt: skip
    return f"rater/{identity[:16]}", identity


def rate_shard(
    folder: Path, asked: Asked, shard: list[tuple[Case, str]], params: RaterParams, dtype: Dtype
) -> None:
    """Answer ``(case, key)`` pairs and write ``keys`` and ``answers``."""
    model, tokenizer = frozen_model(params.backbone, dtype)
    use_one_thread()
    probabilities = rate_cases(model, tokenizer, asked, [case for case, _ in shard], params)
    np.save(folder / "keys.npy", np.array([key.encode() for _, key in shard]))
    np.save(folder / "answers.npy", probabilities)


def rate_cases(
    model: Any, tokenizer: Any, asked: Asked, cases: list[Case], params: RaterParams
) -> np.ndarray:
    """Calibrated probabilities ``(n_cases, n_answers)`` from a loaded LLM; see :func:`rate`.

    Cases with the same question next to each other share its computation.
    """
    import torch

    form = ChatForm.of(tokenizer)
    answers = [form.answer_ids(tokenizer, answer) for answer in asked.answers]
    for text, ids in zip(asked.answers, answers, strict=True):
        if not ids or answers.count(ids) > 1:
            raise UsageError(
                f"{asked.block}: this LLM's tokenizer can't tell the answer \"{text}\" from the others."
            )
    empty = Case("", ("",) * (len(cases[0].responses)))
    budget = params.batch_tokens or (32_768 if torch.cuda.is_available() else 1_024)

    def scores(prompts: list[Prompt]) -> np.ndarray:
        return within_memory(
            prompts, budget, lambda most: score_answers(model, prompts, answers, most)
        )

    prior, made = (
        answer_probabilities(scores(make_prompts(tokenizer, asked, shown, params)), answers)
        for shown in ([empty], cases)  # apart, so that what nothing gets never depends on the rest
    )
    return calibrate(made, prior[0])


def make_prompts(
    tokenizer: Any, asked: Asked, cases: list[Case], params: RaterParams
) -> list[Prompt]:
    """Token ids of cases, those next to each other with the same question sharing its beginning."""
    form = ChatForm.of(tokenizer)
    return [
        _prompt(tokenizer, form, asked, list(group), params)
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
    def of(cls, tokenizer: Any) -> ChatForm:
        """The tokenizer's chat template; a plain cue for an LLM that has none."""
        if not tokenizer.chat_template:
            return cls(tokenizer.bos_token or "", "\nReply:", " ")
        mark = "0f3a9c"
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = whole.partition(mark)
        return cls(before, after, "")

    def answer_ids(self, tokenizer: Any, answer: str) -> list[int]:
        """Token ids of an answer as the reply would begin with it."""
        return list(tokenizer(self.opening + answer, add_special_tokens=False).input_ids)


def _prompt(
    tokenizer: Any, form: ChatForm, asked: Asked, cases: list[Case], params: RaterParams
) -> Prompt:
    """Token ids of cases that share everything up to their own part."""
    special = control_ids(tokenizer)
    gap = list(tokenizer(" ", add_special_tokens=False).input_ids)

    @cache  # the question is the same for all
    def shorten(text: str, role: str) -> str:
        most = params.max_question_tokens if role == "question" else params.max_response_tokens
        return _shorten(tokenizer, text, most, role)

    def ids_of(pieces: list[Piece]) -> list[int]:
        found = []
        for piece in pieces:
            ids = tokenizer(piece.text, add_special_tokens=False).input_ids
            for i in ids:  # a gap, for what stands around a control token may not become a word
                found += gap if piece.role != "ours" and i in special else [i]
        return found

    composed = [compose(asked, case, shorten) for case in cases]
    prefix = ids_of([Piece(form.before), *composed[0][0]])
    return Prompt(prefix, [ids_of([*own, Piece(form.after)]) for _, own in composed])


def control_ids(tokenizer: Any) -> set[int]:
    """Token ids that no text may become.

    Those that the tokenizer calls special are often but a few of them: whatever was added to the
    vocabulary as a word of its own may steer the LLM, but for runs of white space.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(i for i, token in added if str(token).strip())}


def _shorten(tokenizer: Any, text: str, most: int, role: str) -> str:
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


def _plan_shards(cases: list[Case], keys: list[str]) -> list[list[tuple[Case, str]]]:
    """Cases of the same question side by side, short ones first, cut into shards."""
    size: dict[str, int] = {}
    for case in cases:
        longest = max((len(text) for text in case.responses), default=len(case.question))
        size[case.question] = max(size.get(case.question, 0), longest)
    order = sorted(
        zip(cases, keys, strict=True), key=lambda pair: (size[pair[0].question], pair[0].question)
    )
    shards: list[list[tuple[Case, str]]] = [[]]
    for _, group in groupby(order, key=lambda pair: pair[0].question):
        if len(shards[-1]) >= _SHARD_CASES:
            shards.append([])
        shards[-1] += group
    return [shard for shard in shards if shard]
