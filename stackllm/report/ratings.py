"""What an LLM answered, in a few lines a recipe: how answers are distributed, whom they tell apart, what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import polars as pl

from stackllm.rating.answers import Cost
from stackllm.rating.cost import told_of_cost
from stackllm.rating.question import Asked
from stackllm.rating.table import Rated, said_of
from stackllm.report.text import cut, folded, one_line

_MOST_BARS = 12
_BAR = 30
"""Characters of the longest bar."""
_MOST_NAMES = 8
_EDGES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
"""Where log-odds are cut for their distribution."""


@dataclass(frozen=True)
class Distribution:
    """How the answers to one question are distributed over the rows.

    Parameters
    ----------
    block
        The question's.
    kind
        ``"rating"``, ``"category"`` or ``"comparison"``.
    answered, measured
        Prompts with a valid answer, and with probabilities read from token scores.
    missing
        Why the others have none, counted.
    rows
        Rows with an answer.
    counts
        How many of them have each answer as the likeliest; of a comparison, log-odds in each interval.
    mean
        Of ratings or log-odds; None of a category, or where there are none.
    entropy
        Mean in nats; None of a comparison, or where there are none.
    by_class
        Mean over the training rows of each class. Empty for a category, and where all who wrote to a question
        share its answer.
    explained, chance
        Share of the variance within groups of training rows that is between classes, and the share that would
        be between them if the answers told nothing. None where there is none.
    """

    block: str
    kind: str
    answered: int
    measured: int
    missing: dict[str, int]
    rows: int
    counts: dict[str, int]
    mean: float | None
    entropy: float | None
    by_class: dict[str, float]
    explained: float | None
    chance: float | None


@dataclass(frozen=True)
class Account:
    """What one asked recipe was answered.

    Parameters
    ----------
    recipe
        Its name.
    rows
        How many rows it asked about; the same texts are asked about once.
    models
        Who answered how many prompts.
    cost
        What that took.
    questions
        One, or those of a rubric.
    """

    recipe: str
    rows: int
    models: dict[str, int]
    cost: Cost
    questions: tuple[Distribution, ...]


def account(
    rated: Sequence[Rated], table: pl.DataFrame, train: pl.DataFrame, classes: Sequence[str]
) -> tuple[Account, ...]:
    """What each asked recipe was answered.

    Parameters
    ----------
    rated
        From :func:`~stackllm.rating.ask.ask`, about the training rows and then others.
    table
        The same as :func:`~stackllm.rating.table.ratings_table` gives it.
    train
        The training rows, with ``group_id`` and ``label``. Labels are looked at here, after everything was
        answered, and nothing but what is printed comes of it.
    classes
        Label texts.
    """
    accounts = []
    for recipe, questions in groupby(rated, lambda it: it.recipe):
        of_recipe = list(questions)
        models = Counter(name for name in of_recipe[0].answers.models if name)
        told = tuple(
            _distribution(it, table.filter(block=it.asked.block), train, classes)
            for it in of_recipe
        )
        accounts.append(
            Account(
                recipe,
                of_recipe[0].columns.height,
                dict(models.most_common()),
                of_recipe[0].cost,
                told,
            )
        )
    return tuple(accounts)


def _distribution(
    rated: Rated, table: pl.DataFrame, train: pl.DataFrame, classes: Sequence[str]
) -> Distribution:
    asked, answers = rated.asked, rated.answers
    column = {"rating": "rating", "category": "answer", "comparison": "logodds"}[asked.kind]
    answered = table.filter(status="ok")
    values = answered[column]
    by_class: dict[str, float] = {}
    explained, chance = None, None
    # an answer about the question alone is the same for all who wrote to it
    if asked.kind != "category" and "response" in asked.sees:
        known = train.select("group_id", "label", value=table[column].head(train.height))
        known = known.drop_nulls("value")
        means = dict(known.group_by("label").agg(pl.col("value").mean()).iter_rows())
        by_class = {name: means[i] for i, name in enumerate(classes) if i in means}
        explained, chance = _explained(known)
    return Distribution(
        asked.block,
        asked.kind,
        sum(status == "ok" for status in answers.status),
        sum(answers.measured),
        dict(sorted(answers.failures.items())),
        answered.height,
        _counts(asked, answered["logodds" if asked.kind == "comparison" else "answer"]),
        _mean(values) if values.dtype.is_numeric() else None,
        _mean(answered["entropy"]),
        by_class,
        explained,
        chance,
    )


def _counts(asked: Asked, values: pl.Series) -> dict[str, int]:
    """How often each answer was the likeliest; whole numbers and log-odds in at most so many intervals."""
    if asked.kind == "comparison":
        bins = np.digitize(values.to_numpy(), _EDGES)
        ends = [f"{edge:g}" for edge in _EDGES]
        names = [
            f"below {ends[0]}",
            *(f"{a} to {b}" for a, b in pairwise(ends)),
            f"{ends[-1]} or more",
        ]
        return {name: int((bins == i).sum()) for i, name in enumerate(names)}
    counted = Counter(values.to_list())
    if asked.kind == "category":
        return {name: counted[name] for name in asked.answers}
    width = -(-len(asked.answers) // _MOST_BARS)
    runs = [asked.answers[i : i + width] for i in range(0, len(asked.answers), width)]
    return {
        run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}": sum(counted[it] for it in run)
        for run in runs
    }


def _mean(values: pl.Series) -> float | None:
    mean = values.mean()
    return float(mean) if isinstance(mean, float) else None


def _explained(known: pl.DataFrame) -> tuple[float | None, float | None]:
    """Share of ``value``'s variance within groups that is between labels, and what it is by chance.

    What all who wrote to a question have in common is taken off first: it tells none of them apart.
    """
    centred = known.with_columns(pl.col("value") - pl.col("value").mean().over("group_id"))
    total = float((centred["value"] ** 2).sum())
    left = known.height - known["group_id"].n_unique()
    if total < 1e-12 or left < 1:
        return None, None
    means = centred.group_by("label").agg(pl.col("value").mean(), pl.len())
    between = float((means["value"] ** 2 * means["len"]).sum())
    return between / total, min(1.0, (means.height - 1) / left)


def render_accounts(accounts: Sequence[Account]) -> str:
    """Accounts for people: a few lines for each recipe, whatever stands in labels and names."""
    return "\n\n".join("\n".join(map(folded, _lines(it))) for it in accounts)


def _lines(told: Account) -> Iterator[str]:
    alone = len(told.questions) == 1
    yield f"{told.recipe}: {told.cost.prompts:,} prompts about {told.rows:,} rows" + (
        f", {_answered(told.questions[0])}" if alone else f", {len(told.questions)} questions each"
    )
    for question in told.questions:
        if alone:
            yield from _bars(question)
        else:
            yield f"  {question.block}: {_answered(question)}"
            yield f"    {_listed(question)}"
        if question.rows:
            yield from (f"  {'' if alone else '  '}{line}" for line in _means(question))
    yield f"  cost: {told_of_cost(told.cost)}"
    if told.models:
        names = [_shown(name) for name in told.models]
        more = f" and {len(names) - 3} others" if len(names) > 3 else ""
        yield f"  answered by {', '.join(names[:3])}{more}"


def _answered(question: Distribution) -> str:
    said = f"{question.answered:,} answered, {question.measured:,} of them with probabilities"
    n_missing = sum(question.missing.values())
    if n_missing:
        said += f"; {n_missing:,} missing ({_shown(said_of(Counter(question.missing)), 200)})"
    return said


def _bars(question: Distribution) -> Iterator[str]:
    counts = question.counts
    if question.kind == "category":  # numbers stay in their order
        counts = _most_frequent(counts)
    if not question.rows:
        return
    names = [_shown(name) for name in counts]
    width, digits = max(map(len, names)), len(f"{max(counts.values()):,}")
    for name, count in zip(names, counts.values(), strict=True):
        bar = "#" * -(-_BAR * count // max(counts.values()))
        yield f"  {name:>{width}}  {count:{digits},}  {bar}".rstrip()


def _most_frequent(counts: dict[str, int]) -> dict[str, int]:
    """The most frequent labels, and the others as one."""
    given = {name: count for name, count in counts.items() if count}
    ordered = sorted(given, key=lambda name: -given[name])
    most = ordered if len(ordered) <= _MOST_BARS else ordered[: _MOST_BARS - 1]
    rest = sum(given.values()) - sum(given[name] for name in most)
    others = {f"{len(given) - len(most)} others": rest} if rest else {}
    return {name: given[name] for name in most} | others


def _listed(question: Distribution) -> str:
    """The distribution on one line."""
    counts = _most_frequent(question.counts)
    ordered = sorted(counts, key=[*question.counts].index) if question.kind == "rating" else counts
    return ", ".join(f"{_shown(name)}: {counts[name]:,}" for name in ordered) or "no answers"


def _means(question: Distribution) -> Iterator[str]:
    parts = []
    if question.mean is not None and question.kind == "rating":  # log-odds cancel out
        parts.append(f"mean {question.mean:.2f}")
    if question.entropy is not None:
        parts.append(f"mean entropy {question.entropy:.2f} nats")
    if parts:
        yield ", ".join(parts)
    if question.by_class:
        means = sorted(question.by_class.items(), key=lambda it: -it[1])
        shown = [f"{_shown(name, 24)}: {mean:.2f}" for name, mean in means]
        if len(shown) > _MOST_NAMES:
            half = _MOST_NAMES // 2
            shown = [*shown[:half], "…", *shown[-half:]]
        yield f"mean per class, training rows: {', '.join(shown)}"
    if question.explained is not None:
        yield (
            f"classes explain {question.explained:.0%} of the differences within a group "
            f"({question.chance:.0%} by chance)"
        )


def _shown(text: str, width: int = 40) -> str:
    """Somebody's text on one line, cut, with nothing in it that a terminal would act on."""
    return cut(one_line(" ".join(text[: 4 * width].split())), width)
