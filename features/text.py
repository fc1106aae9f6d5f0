"""Shape of a response's text: how long, how it is laid out, which turns of phrase."""

import polars as pl

COUNTED = {
    "words": r"\S+",
    "newlines": r"\n",
    "paragraphs": r"\n\s*\n",
    "sentences": r"[.!?](\s|$)",
    "commas": r",",
    "colons": r":",
    "semicolons": r";",
    "dashes": r"[–—]| - ",
    "parentheses": r"\(",
    "quotes": r"[\"“”]",
    "apostrophes": r"['’]",
    "exclamations": r"!",
    "questions": r"\?",
    "digits": r"[0-9]",
    "capitals": r"\p{Lu}",
    "non_ascii": r"[^\x00-\x7f]",
    "bold": r"\*\*[^*\n]+\*\*",
    "headings": r"(?m)^#{1,6} ",
    "bullets": r"(?m)^\s*[-*•+] ",
    "numbered": r"(?m)^\s*\d+[.)] ",
    "code_ticks": r"`",
    "code_blocks": r"```",
    "table_rows": r"(?m)^\s*\|",
    "links": r"https?://",
    "emoji": r"[\x{1F300}-\x{1FAFF}\x{2600}-\x{27BF}]",
    "double_spaces": r"\S  +\S",
    "first_person": r"(?i)\b(i|i'm|i've|i'd|my|me)\b",
    "second_person": r"(?i)\b(you|your|you're)\b",
    "hedges": r"(?i)\b(may|might|could|perhaps|possibly|generally|typically|often)\b",
    "connectives": r"(?i)\b(however|therefore|additionally|furthermore|moreover|overall|finally)\b",
    "refusals": r"(?i)\b(as an ai|language model|i cannot|i can't|i'm unable|i am unable|i'm not able|sorry)\b",
    "courtesies": r"(?i)\b(sure|certainly|of course|great question|happy to|hope this helps|let me know)\b",
}
"""Counted patterns; each becomes the logarithm of one plus its count."""


def build(frame: pl.DataFrame) -> pl.DataFrame:
    text = pl.col("response")
    words = text.str.count_matches(r"\S+")
    characters = text.str.len_chars()
    stripped = text.str.strip_chars()
    return frame.select(
        "row_id",
        characters.cast(pl.Float64).log1p().alias("characters"),
        *(
            text.str.count_matches(pattern).cast(pl.Float64).log1p().alias(name)
            for name, pattern in COUNTED.items()
        ),
        (characters / (words + 1)).alias("word_length"),
        (words / (text.str.count_matches(r"[.!?](\s|$)") + 1)).alias("sentence_length"),
        (text.str.to_lowercase().str.extract_all(r"\w+").list.n_unique() / (words + 1)).alias(
            "distinct_words"
        ),
        (characters / (pl.col("question").str.len_chars() + 1)).log1p().alias("question_ratio"),
        stripped.str.contains(r"^\p{Lu}").cast(pl.Float64).alias("opens_capital"),
        stripped.str.contains(r"[.!?\"”)]$").cast(pl.Float64).alias("closes_sentence"),
        stripped.str.contains(r":$").cast(pl.Float64).alias("closes_colon"),
        (text != stripped).cast(pl.Float64).alias("outer_space"),
        stripped.str.split("\n")
        .list.first()
        .str.len_chars()
        .cast(pl.Float64)
        .log1p()
        .alias("first_line"),
        stripped.str.split("\n")
        .list.last()
        .str.len_chars()
        .cast(pl.Float64)
        .log1p()
        .alias("last_line"),
    )
