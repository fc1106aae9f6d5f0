"""How likely the frozen LLM finds a response: what the encoder measured while it read it."""

import polars as pl

NEEDS = ("encoder",)


def build(frame: pl.DataFrame) -> pl.DataFrame:
    measured = [name for name in frame.columns if name.startswith("encoder_")]
    return frame.select(
        "row_id",
        *(pl.col(name).alias(name.removeprefix("encoder_")) for name in measured),
        (pl.col("encoder_logprob_mean") + pl.col("encoder_entropy_mean")).alias("surprise"),
    )
