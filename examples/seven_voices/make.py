"""Make the sample: one small LLM answers our questions in seven voices.

A voice is a system prompt with an example and its sampling settings. Each question is one batch of
seven prompts with a seed of its own, so an answer depends on its question and on the table of
voices, and never on which other questions are asked.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import polars as pl
import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from stackllm.errors import StackllmError
from stackllm.llm.backbone import load_backbone
from stackllm.store.atomic import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stackllm.llm.backbone import Backbone

HERE = Path(__file__).parent
TEST_QUESTIONS = 20
SEED = 7


@dataclass(frozen=True)
class Voice:
    """One of the writers that the sample asks to tell apart; its place in the table is its label.

    Parameters
    ----------
    name
        For people; the files hold the label only.
    system
        System prompt.
    example
        Its answer to ``EXAMPLE``, shown before the question: so small an LLM follows an example
        far better than a description.
    temperature
        Divides the logits: below 1 is steadier, above 1 is freer.
    top_p
        Tokens are drawn from the smallest set that holds this share of the probability.
    repetition_penalty
        1 is none; what an answer has said already gets less likely above it.
    max_tokens
        Where an answer is cut off.
    """

    name: str
    system: str
    example: str
    temperature: float
    top_p: float
    repetition_penalty: float
    max_tokens: int


EXAMPLE = "Why should I drink enough water?"
VOICES = (
    Voice(
        "terse",
        system="Answer in one or two plain sentences.",
        example="Your body loses water all day and works badly without it. About two litres a day "
        "is enough.",
        temperature=0.4,
        top_p=0.9,
        repetition_penalty=1.1,
        max_tokens=64,
    ),
    Voice(
        "lists",
        system="Answer with a list of short points.",
        example="- It keeps your head clear.\n- It helps you digest your food.\n"
        "- It cools you when you sweat.\n- It costs almost nothing.",
        temperature=0.6,
        top_p=0.9,
        repetition_penalty=1.1,
        max_tokens=80,
    ),
    Voice(
        "friend",
        system="You are a warm, chatty friend.",
        example="Oh, I love that you ask! Water is such an easy win, honestly. You feel brighter, "
        "your skin is happier, and it costs next to nothing! I keep a big bottle on my desk so "
        "that I never forget. Give it a try!",
        temperature=0.65,
        top_p=0.9,
        repetition_penalty=1.1,
        max_tokens=96,
    ),
    Voice(
        "scholar",
        system="You are a professor who writes formal academic prose.",
        example="Adequate hydration is a condition of normal physiological function. Water serves "
        "as the medium of transport within the body, regulates its temperature through "
        "perspiration, and permits the kidneys to excrete metabolic waste.",
        temperature=0.5,
        top_p=0.9,
        repetition_penalty=1.1,
        max_tokens=96,
    ),
    Voice(
        "sceptic",
        system="You are careful and seldom certain. You hedge.",
        example="It probably does you good, although it may depend on the person. Some people seem "
        "to need more than others, and the usual advice of two litres is perhaps only a rough "
        "guide. I would not be too sure about any exact number.",
        temperature=0.6,
        top_p=0.95,
        repetition_penalty=1.05,
        max_tokens=96,
    ),
    Voice(
        "narrator",
        system="You are a storyteller who answers with a small scene.",
        example="Old Marta set her basket down by the well. “You look pale,” she said to the boy, "
        "who had worked in the field since dawn and drunk nothing. She filled a cup for him, and "
        "slowly the colour came back to his face.",
        temperature=0.65,
        top_p=0.9,
        repetition_penalty=1.1,
        max_tokens=96,
    ),
    Voice(
        "coach",
        system="You are a coach who makes the reader think.",
        example="What happens when you forget to drink? Notice how tired you get by the afternoon. "
        "Your body needs water to think and to move, so start small: one glass when you wake up, "
        "one with each meal. Which moment of your day would be the easiest to begin with?",
        temperature=0.6,
        top_p=0.85,
        repetition_penalty=1.05,
        max_tokens=96,
    ),
)


class EachItsOwn(LogitsProcessor):
    """Shape the logits of each row of a batch by the settings of that row's voice.

    A puzzled LLM recites its example, so four tokens of it in a row are forbidden.

    Parameters
    ----------
    tokenizer
        For the examples.
    prompt_tokens
        Length of the padded prompt, which the repetition penalty leaves out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> None:
        self.chains = [
            LogitsProcessorList(
                [
                    EncoderNoRepeatNGramLogitsProcessor(
                        4, tokenizer(voice.example, return_tensors="pt")["input_ids"]
                    ),
                    RepetitionPenaltyLogitsProcessor(
                        voice.repetition_penalty, prompt_ignore_length=prompt_tokens
                    ),
                    TemperatureLogitsWarper(voice.temperature),
                    TopPLogitsWarper(voice.top_p),
                ]
            )
            for voice in VOICES
        ]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of shape (n_voices, n_vocabulary), row by row."""
        rows = [
            chain(input_ids[i : i + 1], scores[i : i + 1]) for i, chain in enumerate(self.chains)
        ]
        return torch.cat(rows)


def answer(backbone: Backbone, question: str) -> list[str]:
    """Answer one question in every voice.

    Parameters
    ----------
    backbone
        The LLM and its tokenizer.
    question
        What the user asks; its digest seeds the draws.

    Returns
    -------
    list of str
        One response a voice, in the order of the table.
    """
    tokenizer = backbone.tokenizer
    tokenizer.padding_side = "left"
    chats = [
        [
            {"role": "system", "content": voice.system},
            {"role": "user", "content": EXAMPLE},
            {"role": "assistant", "content": voice.example},
            {"role": "user", "content": question},
        ]
        for voice in VOICES
    ]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    prompt_tokens = prompts["input_ids"].shape[1]
    torch.manual_seed(int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big"))
    tokens = backbone.model.generate(
        **prompts,
        do_sample=True,
        top_k=0,
        min_new_tokens=4,
        max_new_tokens=max(voice.max_tokens for voice in VOICES),
        logits_processor=LogitsProcessorList([EachItsOwn(tokenizer, prompt_tokens)]),
    )
    responses = []
    for voice, row in zip(VOICES, tokens[:, prompt_tokens:], strict=True):
        kept = row[: voice.max_tokens]
        text = tokenizer.decode(kept, skip_special_tokens=True).strip()
        responses.append(text if tokenizer.eos_token_id in kept else whole_sentences(text))
    return responses


def whole_sentences(text: str) -> str:
    r"""Drop what follows the last full sentence or line, unless nothing would be left.

    Examples
    --------
    >>> whole_sentences("It is red. It was")
    'It is red.'
    >>> whole_sentences("1. Rope\n2. Sa")
    '1. Rope'
    """
    whole = re.match(r".*(?:\D[.!?][\"'”)*]*(?=\s|$)|(?=\n))", text, re.DOTALL)
    return whole[0].strip() if whole else text


def tables(answers: dict[str, list[str]]) -> dict[str, pl.DataFrame]:
    """Split by question, shuffle the rows, and lay them out as a contest does.

    Parameters
    ----------
    answers
        The responses to each question, one a voice.

    Returns
    -------
    dict of str to polars.DataFrame
        What each CSV file holds, by its name.
    """
    draw = random.Random(SEED)
    held_out = set(draw.sample(list(answers), TEST_QUESTIONS))
    rows = [
        {"Question": question, "Response": response, "target": label}
        for question, responses in answers.items()
        for label, response in enumerate(responses)
    ]
    draw.shuffle(rows)
    both = pl.DataFrame(rows)
    in_test = pl.col("Question").is_in(held_out)
    test = both.filter(in_test).with_row_index("id")
    share = pl.lit(1 / len(VOICES))
    return {
        "train.csv": both.filter(~in_test),
        "test.csv": test.drop("target"),
        "solution.csv": test.select("id", "target"),
        "sample_submission.csv": test.select(
            "id", *(share.alias(f"target_{label}") for label in range(len(VOICES)))
        ),
    }


def first_difference(answers: dict[str, list[str]]) -> str | None:
    """Where ``answers`` differ from the files beside this script; None where they do not."""
    test = pl.read_csv(HERE / "test.csv").join(pl.read_csv(HERE / "solution.csv"), on="id")
    both = pl.concat([pl.read_csv(HERE / "train.csv"), test.drop("id")])
    shipped = {(question, label): response for question, response, label in both.iter_rows()}
    for question, responses in answers.items():
        for label, response in enumerate(responses):
            if response != shipped.get((question, label)):
                return (
                    f'"{question}": {VOICES[label].name} now says {response!r}; '
                    f"the files have {shipped.get((question, label))!r}."
                )
    return None


@click.command()
@click.option(
    "--check",
    type=click.IntRange(1),
    metavar="N",
    help="Answer the first N questions again and compare with the files; write nothing.",
)
def main(check: int | None) -> None:
    """Write train.csv, test.csv, solution.csv and sample_submission.csv beside this script."""
    torch.set_num_threads(1)
    questions = (HERE / "questions.txt").read_text("utf-8").splitlines()[:check]
    try:
        backbone = load_backbone("smollm2", "float32", lambda line: click.echo(line, err=True))
        backbone.model.to("cpu")
        answers = {}
        for question in questions:
            click.echo(question, err=True)
            answers[question] = answer(backbone, question)
        if check is None:
            for name, table in tables(answers).items():
                write_text(HERE / name, table.write_csv())
    except StackllmError as error:
        raise click.ClickException(str(error)) from error
    if check is not None and (difference := first_difference(answers)):
        raise click.ClickException(
            f"{difference} Other CPUs and versions round differently; "
            "run without --check to make the files anew."
        )


if __name__ == "__main__":
    main()
