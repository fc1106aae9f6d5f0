"""The main features against the other responses to the same question: what each group is like."""

import polars as pl

from stackllm.recipes.within import aggregate

NEEDS = ("text", "likelihood", "overlap", "asked")

MAIN = (
    "text_characters",
    "text_words",
    "text_newlines",
    "text_sentence_length",
    "text_distinct_words",
    "likelihood_logprob_mean",
    "likelihood_entropy_mean",
    "likelihood_rank1_share",
    "overlap_others_mean",
)


def build(frame: pl.DataFrame) -> pl.DataFrame:
    ratings = [name for name in frame.columns if name.startswith("asked_")]
    return aggregate(frame, [*(name for name in MAIN if name in frame.columns), *ratings])
