"""Asked recipes: features that an LLM answers, ``features/<block>.toml``.

A file says what to ask (``instruction``), what the LLM sees (``sees``) and which answers are
allowed: a ``scale`` of whole numbers, ``labels``, or ``compare``, which sets the response beside
others of its group. Or it is a ``rubric``: several questions with answers of their own, all asked
in one prompt. What comes back is the probability of each allowed answer to each question, and this
module turns it into columns.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from stackllm.errors import DataError, did_you_mean
from stackllm.store.digest import digest
from stackllm.toml import read_toml

Kind = Literal["rating", "category", "comparison"]

_KINDS = ("scale", "labels", "compare", "rubric")
_KEYS = ("instruction", "sees", *_KINDS)
_KINDS_IN_RUBRIC = ("scale", "labels")
_KEYS_IN_RUBRIC = ("ask", *_KINDS_IN_RUBRIC)
_SEEN = ("question", "response")
_MOST_ANSWERS = 101
_MOST_QUESTIONS = 20
_MOST_PARTNERS = 10


@dataclass(frozen=True)
class Asked:
    """One question: a recipe of its own, or one of a rubric.

    Parameters
    ----------
    block
        Name of the block of columns that its answers become.
    kind
        ``"rating"``: answers are whole numbers. ``"category"``: answers are names.
        ``"comparison"``: which of two responses is better.
    instruction
        What the LLM is told to do.
    answers
        The allowed answers; for a comparison ``("A", "B")``.
    sees
        Of ``"question"`` and ``"response"``, what the LLM is shown.
    partners
        For a comparison, beside how many others of its group each response is seen first.
    """

    block: str
    kind: Kind
    instruction: str
    answers: tuple[str, ...]
    sees: tuple[str, ...] = _SEEN
    partners: int = 0

    @property
    def questions(self) -> tuple[Asked, ...]:
        """Itself: what a rubric has several of."""
        return (self,)


@dataclass(frozen=True)
class Rubric:
    """Several questions about the same texts, asked in one prompt.

    Parameters
    ----------
    block
        Name of the recipe.
    instruction
        What the LLM is told to do.
    questions
        Each makes a block of its own, ``<block>_<name>``; its instruction is its own words.
    sees
        As for :class:`Asked`.
    """

    block: str
    instruction: str
    questions: tuple[Asked, ...]
    sees: tuple[str, ...] = _SEEN

    @property
    def kind(self) -> Literal["rubric"]:
        """What :class:`Asked` tells of itself, too."""
        return "rubric"

    @property
    def names(self) -> tuple[str, ...]:
        """What the questions are called in prompt and reply."""
        return tuple(asked.block.removeprefix(f"{self.block}_") for asked in self.questions)


AskedRecipe = Asked | Rubric
"""What a file asks: one question, or a rubric."""


@dataclass(frozen=True)
class Case:
    """One thing to ask: everything the LLM is shown, and nothing of where it came from.

    Parameters
    ----------
    question
        Text of the question; empty if it is not shown.
    responses
        The responses shown: none, one, or the two of a comparison.
    """

    question: str
    responses: tuple[str, ...]

    @property
    def key(self) -> str:
        """Digest of the texts."""
        return digest(self.question, list(self.responses))

    @property
    def size(self) -> int:
        """Characters of the longest response, or of the question where none is shown."""
        return max(map(len, self.responses), default=len(self.question))


def read_asked(path: Path) -> AskedRecipe:
    """Read and check an asked recipe.

    Raises
    ------
    MissingInputError
        If there is no such file.
    DataError
        If it is no TOML, or a key is missing or unknown or makes no sense.
    """
    content = read_toml(path, "Check the name of the recipe.")
    for name in content:
        if name not in _KEYS:
            raise DataError(f'{path}: there is no key "{name}". {did_you_mean(name, _KEYS)}')
    given = _kind(str(path), content, _KINDS)
    sees = _sees(path, content.get("sees", list(_SEEN)))
    if given == "rubric":
        questions = _questions(path, content["rubric"], sees)
        return Rubric(path.stem, _words(str(path), content, "instruction"), questions, sees)
    instruction = _words(str(path), content, "instruction")
    kind, answers = _answers(str(path), content, given)
    partners = int(content.get("compare", 0))
    if partners and "response" not in sees:
        raise DataError(f'{path}: a comparison sees "response"; add it to "sees".')
    return Asked(path.stem, kind, instruction, answers, sees, partners)


def list_cases(
    recipe: AskedRecipe, rows: pl.DataFrame
) -> tuple[list[Case], list[tuple[int, int, int]]]:
    """What has to be asked, each thing once, and which row each answer belongs to.

    In a comparison partners rotate: a group's distinct rows stand in a circle, and each is seen
    first beside the ones after it. The order in the circle comes from the texts, so neither the
    table's order nor a label that might hide in it has any say.

    Parameters
    ----------
    recipe
        What is asked.
    rows
        ``group_id, question, response``; order counts.

    Returns
    -------
    cases
        Without repetition.
    places
        ``(row, case, sign)``: the answer to the case counts for the row; sign -1 where the row
        was seen second.
    """
    questions = rows["question"].to_list() if "question" in recipe.sees else [""] * rows.height
    responses = rows["response"].to_list()
    numbers: dict[Case, int] = {}
    places: list[tuple[int, int, int]] = []
    if isinstance(recipe, Rubric) or recipe.kind != "comparison":
        seen = "response" in recipe.sees
        for row, (question, response) in enumerate(zip(questions, responses, strict=True)):
            case = Case(question, (response,) if seen else ())
            places.append((row, numbers.setdefault(case, len(numbers)), 1))
        return list(numbers), places
    for circle in _circles(rows):
        for i, first in enumerate(circle):
            for step in range(1, min(recipe.partners, len(circle) - 1) + 1):
                second = circle[(i + step) % len(circle)]
                case = Case(questions[first], (responses[first], responses[second]))
                number = numbers.setdefault(case, len(numbers))
                places += [(first, number, 1), (second, number, -1)]
    return list(numbers), places


def make_columns(
    asked: Asked, places: list[tuple[int, int, int]], probabilities: np.ndarray, n_rows: int
) -> pl.DataFrame:
    """Feature columns out of answers.

    Parameters
    ----------
    asked
        The question.
    places
        From :func:`list_cases`.
    probabilities
        ``(n_cases, n_answers)``, rows sum to 1; a row of NaN where there is no answer.
    n_rows
        Number of rows.

    Returns
    -------
    polars.DataFrame
        Float64, a row per row, NaN where there is no answer, and ``ok``, 1 where there is one.
        Rating: ``expected, entropy, likeliest`` (entropy in nats). Category: ``p_<label>`` and
        ``code``, the number of the most likely label from 0. Comparison: ``logodds`` of being
        preferred, averaged over its partners.
    """
    if asked.kind == "comparison":
        return _preference(places, probabilities, n_rows)
    answered = probabilities[[case for _, case, _ in places]]  # places are in the order of the rows
    ok = np.isfinite(answered).all(axis=1)
    best = np.where(ok, np.where(ok[:, None], answered, 0.0).argmax(axis=1), np.nan)
    if asked.kind == "category":
        columns = {
            f"p_{slug(label)}": answered[:, i].astype(np.float64)
            for i, label in enumerate(asked.answers)
        }
        return pl.DataFrame({**columns, "code": best, "ok": ok.astype(np.float64)})
    values = np.array([float(answer) for answer in asked.answers])
    logs = np.log(np.maximum(answered, 1e-300))
    likeliest = np.where(ok, values[np.where(ok, best, 0).astype(int)], np.nan)
    return pl.DataFrame(
        {
            "expected": answered @ values,
            "entropy": -(answered * logs).sum(axis=1),
            "likeliest": likeliest,
            "ok": ok.astype(np.float64),
        }
    )


def column_names(asked: Asked) -> list[str]:
    """The columns that :func:`make_columns` makes, as they are called among all features.

    Examples
    --------
    >>> column_names(Asked("topic", "category", "Sort.", ("math", "art")))
    ['topic_p_math', 'topic_p_art', 'topic_code', 'topic_ok']
    """
    empty = make_columns(asked, [], np.zeros((0, len(asked.answers))), 0)
    return [f"{asked.block}_{name}" for name in empty.columns]


def split_answers(recipe: AskedRecipe, answers: np.ndarray) -> list[np.ndarray]:
    """What stands side by side for all answers, ``(n_cases, n_answers_of_all)``, question by question."""
    ends = np.cumsum([len(asked.answers) for asked in recipe.questions])
    return np.split(answers, ends[:-1], axis=1)


def main_column(asked: Asked) -> str | None:
    """The column that is aggregated within the group; None for categories."""
    return {"rating": "expected", "comparison": "logodds", "category": None}[asked.kind]


def slug(label: str) -> str:
    """A label as part of a column's name.

    Examples
    --------
    >>> slug("Science & Nature")
    'science_nature'
    """
    return re.sub(r"\W+", "_", label.casefold()).strip("_")


def _preference(
    places: list[tuple[int, int, int]], probabilities: np.ndarray, n_rows: int
) -> pl.DataFrame:
    logodds = np.log(np.maximum(probabilities, 1e-6))  # (n_cases, 2); NaN stays NaN
    sums, counts = np.zeros(n_rows), np.zeros(n_rows)
    for row, case, sign in places:
        value = logodds[case, 0] - logodds[case, 1]
        if np.isfinite(value):
            sums[row] += sign * value
            counts[row] += 1
    ok = counts > 0
    mean = np.where(ok, sums / np.maximum(counts, 1), np.nan)
    return pl.DataFrame({"logodds": mean, "ok": ok.astype(np.float64)})


def _circles(rows: pl.DataFrame) -> list[list[int]]:
    """Row numbers of each group, in an order that only the texts decide."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for row, (group, response) in enumerate(rows.select("group_id", "response").iter_rows()):
        key = hashlib.sha256(response.encode()).hexdigest()
        groups.setdefault(group, []).append((key, row))
    return [[row for _, row in sorted(members)] for members in groups.values()]


def _questions(path: Path, tables: Any, sees: tuple[str, ...]) -> tuple[Asked, ...]:
    """The questions of a rubric."""
    if not isinstance(tables, dict) or not all(isinstance(it, dict) for it in tables.values()):
        raise DataError(f'{path}: "rubric" must be a table per question, such as [rubric.clarity].')
    if not 2 <= len(tables) <= _MOST_QUESTIONS:
        raise DataError(
            f"{path}: a rubric has 2 to {_MOST_QUESTIONS} questions, not {len(tables)}. "
            'One alone is a recipe with "scale" or "labels"; more than that fill several files.'
        )
    questions: dict[str, Asked] = {}
    for name, table in tables.items():
        where = f'{path}, question "{name}"'
        if not re.fullmatch(r"[^\W\d_][\w -]{0,39}", name):
            raise DataError(
                f"{path}: a question's name is a letter and up to 39 letters, figures, spaces, _ and -; "
                f"not {name!r}."
            )
        if slug(name) in questions:
            raise DataError(f'{path}: two questions are "{name}", apart from case and marks.')
        questions[slug(name)] = _question(where, f"{path.stem}_{slug(name)}", table, sees)
    return tuple(questions.values())


def _question(where: str, block: str, table: dict[str, Any], sees: tuple[str, ...]) -> Asked:
    for key in table:
        if key in ("instruction", "sees"):  # in TOML, what follows a table's head belongs to it
            raise DataError(f'{where}: "{key}" is the whole recipe\'s. Put it above all [rubric…].')
        if key not in _KEYS_IN_RUBRIC:
            raise DataError(
                f'{where}: there is no key "{key}". {did_you_mean(key, _KEYS_IN_RUBRIC)}'
            )
    words = _words(where, table, "ask")
    kind, answers = _answers(where, table, _kind(where, table, _KINDS_IN_RUBRIC))
    return Asked(block, kind, words, answers, sees)


def _words(where: str, content: dict[str, Any], key: str) -> str:
    words = content.get(key)
    if not isinstance(words, str) or not words.strip():
        raise DataError(f'{where}: "{key}" must be a text that says what to answer.')
    return words.strip()


def _kind(where: str, content: dict[str, Any], kinds: tuple[str, ...]) -> str:
    """The one key that says which answers are allowed."""
    given = [name for name in kinds if name in content]
    if len(given) != 1:
        *others, last = (f'"{name}"' for name in kinds)
        raise DataError(f"{where}: give exactly one of {', '.join(others)} and {last}.")
    return given[0]


def _answers(where: str, content: dict[str, Any], given: str) -> tuple[Kind, tuple[str, ...]]:
    if given == "scale":
        return "rating", _scale(where, content["scale"])
    if given == "labels":
        return "category", _labels(where, content["labels"])
    partners = content["compare"]
    if not _whole(partners) or not 1 <= partners <= _MOST_PARTNERS:
        raise DataError(
            f'{where}: "compare" is the number of partners, 1 to {_MOST_PARTNERS}, not {partners!r}.'
        )
    return "comparison", ("A", "B")


def _scale(where: str, scale: Any) -> tuple[str, ...]:
    if not (isinstance(scale, list) and len(scale) == 2 and all(map(_whole, scale))):
        raise DataError(
            f'{where}: "scale" must be two whole numbers such as [1, 10], not {scale!r}.'
        )
    low, high = scale
    if not 0 <= low < high or high - low >= _MOST_ANSWERS:
        raise DataError(
            f'{where}: "scale" goes up from 0 or more, in at most {_MOST_ANSWERS} steps; not {scale!r}.'
        )
    return tuple(str(value) for value in range(low, high + 1))


def _labels(where: str, labels: Any) -> tuple[str, ...]:
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DataError(f'{where}: "labels" must be a list of texts.')
    cleaned = tuple(label.strip() for label in labels)
    if not 2 <= len(cleaned) <= _MOST_ANSWERS:
        raise DataError(f'{where}: "labels" must be 2 to {_MOST_ANSWERS}, not {len(cleaned)}.')
    slugs = [slug(label) for label in cleaned]
    for label, name in zip(cleaned, slugs, strict=True):
        if not name or len(label) > 60 or not label.isprintable():
            raise DataError(f"{where}: the label {label!r} must be 1 to 60 printable characters.")
        if slugs.count(name) > 1:
            raise DataError(f'{where}: two labels are "{label}", apart from case and marks.')
    return cleaned


def _sees(path: Path, sees: Any) -> tuple[str, ...]:
    if not isinstance(sees, list) or not sees:
        raise DataError(f'{path}: "sees" must list "question", "response" or both.')
    for name in sees:
        if name not in _SEEN:
            raise DataError(f'{path}: "sees" knows no {name!r}. {did_you_mean(str(name), _SEEN)}')
    return tuple(name for name in _SEEN if name in sees)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
