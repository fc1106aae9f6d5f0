"""How much a response shares with its question and with the other responses of its group."""

import polars as pl

_NO_WORDS: frozenset[str] = frozenset()


def build(frame: pl.DataFrame) -> pl.DataFrame:
    words = [frozenset(text.lower().split()) for text in frame["response"]]
    asked = [frozenset(text.lower().split()) for text in frame["question"]]
    opening = [" ".join(text.lower().split()[:3]) for text in frame["response"]]
    members = frame.with_row_index("place").group_by("group_id").agg("place")["place"].to_list()
    mean = [0.0] * frame.height
    most = [0.0] * frame.height
    same_opening = [0.0] * frame.height
    for places in members:
        for i in places:
            shares = [jaccard(words[i], words[j]) for j in places if j != i]
            mean[i] = sum(shares) / len(shares) if shares else 0.0
            most[i] = max(shares, default=0.0)
            same_opening[i] = float(sum(opening[j] == opening[i] for j in places if j != i))
    return pl.DataFrame(
        {
            "row_id": frame["row_id"],
            "question": [jaccard(a, b) for a, b in zip(words, asked, strict=True)],
            "others_mean": mean,
            "others_most": most,
            "same_opening": same_opening,
        }
    )


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared part of two sets of words, 0 to 1."""
    return len(a & b) / len(a | b) if a or b else 0.0
