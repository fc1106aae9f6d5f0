"""Probabilities of allowed answers, read from a causal LLM's scores: nothing is sampled or parsed.

What all prompts have in common is read once, what those of a question have in common once a
question, and each ending on top of those keys and values. An answer of one token needs nothing
more; one of several is scored by the sum of its tokens' log-probabilities, all such answers of a
batch of rows in one further pass.

Biases of the LLM towards an answer whatever is shown are divided out, after Zhao et al.,
"Calibrate Before Use" (2021).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stackllm.llm.families import level_of, window_of
from stackllm.llm.prompts import Prompt
from stackllm.llm.reading import pad, read_ends
from stackllm.llm.vocabulary import score_among

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def score_answers(
    model: PreTrainedModel, prompts: list[Prompt], answers: list[list[int]], budget: int = 1_024
) -> np.ndarray:
    """Log-probability of each answer after each prompt.

    Parameters
    ----------
    model
        A transformers causal LM in evaluation mode.
    prompts
        Prompts that begin alike: what they have in common, which may be nothing, and how each goes on,
        with at least one token.
    answers
        Token ids of each allowed answer, at least one each.
    budget
        Tokens of a batch of endings; the batches are endings of like length.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_rows, n_answers)``: the sum over the answer's tokens. Rows are the ends
        of prompts, one group after the other.
    """
    import torch

    paths = continuations(answers)
    with torch.inference_mode():
        last, later = _read(model, prompts, paths, budget)
        columns = [_token_scores(model, last, sorted({answer[0] for answer in answers}))]
        columns += [
            _token_scores(model, later[:, i, j], _next_tokens(answers, path[: j + 1]))
            for i, path in enumerate(paths)
            for j in range(len(path))
        ]
    begun: list[tuple[int, ...]] = [()]
    begun += [tuple(path[: j + 1]) for path in paths for j in range(len(path))]
    scores_after = dict(zip(begun, columns, strict=True))
    return np.stack(
        [
            sum(scores_after[tuple(answer[:j])][token] for j, token in enumerate(answer))
            for answer in answers
        ],
        axis=1,
    )


def continuations(answers: list[list[int]]) -> list[list[int]]:
    """The beginnings after which an answer's next token has to be looked up, the longest only.

    Examples
    --------
    >>> continuations([[1], [2], [1, 0], [7, 8, 9]])
    [[1], [7, 8]]
    """
    begun = {tuple(answer[:-1]) for answer in answers if len(answer) > 1}
    return [
        list(path)
        for path in sorted(begun)
        if not any(other != path and other[: len(path)] == path for other in begun)
    ]


def answer_probabilities(scores: np.ndarray, answers: list[list[int]]) -> np.ndarray:
    """Probability of each answer among the allowed ones.

    A score says how likely the reply *begins* with the answer's tokens. Where one answer begins
    another, as 1 begins 10, the longer one's probability is taken off the shorter one's.

    Parameters
    ----------
    scores
        From :func:`score_answers`, ``(n_rows, n_answers)``.
    answers
        Token ids of each answer.

    Returns
    -------
    numpy.ndarray
        ``(n_rows, n_answers)``, rows sum to 1; NaN where every score is -inf or NaN.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        raw = np.exp(scores - scores.max(axis=1, keepdims=True))
        alone = raw.copy()
        for i, answer in enumerate(answers):
            longer = [j for j, other in enumerate(answers) if j != i and _begins(answer, other)]
            outermost = [
                j
                for j in longer
                if not any(_begins(answers[k], answers[j]) for k in longer if k != j)
            ]
            alone[:, i] -= raw[:, outermost].sum(axis=1)
        alone = np.maximum(alone, 0.0)  # rounding
        result: np.ndarray = alone / alone.sum(axis=1, keepdims=True)
    return result


def calibrate(probabilities: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """Divide by what the LLM answers when nothing is shown, and renormalise.

    Parameters
    ----------
    probabilities
        ``(n_rows, n_answers)``.
    empty
        Probabilities of the same prompt with empty texts, ``(n_answers,)``.

    Returns
    -------
    numpy.ndarray
        ``(n_rows, n_answers)``, rows sum to 1.

    Examples
    --------
    >>> calibrate(np.array([[0.8, 0.2]]), np.array([0.8, 0.2])).tolist()
    [[0.5, 0.5]]
    """
    ratio = probabilities / np.maximum(empty, 1e-6)
    result: np.ndarray = ratio / ratio.sum(axis=1, keepdims=True)
    return result


def _next_tokens(answers: list[list[int]], begun: list[int]) -> list[int]:
    """The tokens with which answers go on after ``begun``."""
    return sorted({answer[len(begun)] for answer in answers if _begins(begun, answer)})


def _read(
    model: PreTrainedModel, prompts: list[Prompt], paths: list[list[int]], budget: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of each row's end ``(n_rows, hidden)``, and along each path after it.

    The latter are ``(n_rows, n_paths, longest path, hidden)``.
    """
    import torch

    level = level_of(model)
    root = _common([prompt.prefix for prompt in prompts])
    rest = [Prompt(prompt.prefix[len(root) :], prompt.responses) for prompt in prompts]
    widest = len(root) + sum(
        max(map(len, parts), default=0)
        for parts in (
            [prompt.prefix for prompt in rest],
            [tail for prompt in rest for tail in prompt.responses],
            paths,
        )
    )
    if level == "shared" and widest > window_of(model):
        level = "front"  # a window counts what pads a row inside
    apart = level == "shared" and len(paths) > 1  # read in a pass of their own, after the ends
    tails = paths if paths and not apart else [[]]
    rest = [
        Prompt(prompt.prefix, [[*end, *tail] for end in prompt.responses for tail in tails])
        for prompt in rest
    ]
    lengths = [len(end) for prompt in rest for end in prompt.responses]
    n_states = 1 + max(map(len, tails))  # from the end's last token on
    rows: list[int] = []
    states, along = [], []
    for ends in read_ends(model, rest, max(1, budget // max(1, len(paths))), root, level):
        hidden = ends.of(ends.output.last_hidden_state)
        first = [lengths[row] - 1 - len(tails[row % len(tails)]) for row in ends.rows]
        places = torch.tensor(first)[:, None] + torch.arange(n_states)
        places = places.clamp(max=hidden.shape[1] - 1).to(hidden.device)
        states.append(hidden[torch.arange(len(places), device=hidden.device)[:, None], places])
        rows += ends.rows
        if apart:
            n = len(ends.rows)
            each = ends.reading.copy([place for place in range(n) for _ in paths])
            _, output = each.go_on(model, *pad(model, paths * n, left=False))
            along.append(output.last_hidden_state.unflatten(0, (n, -1)))
    back = torch.from_numpy(np.argsort(rows)).to(hidden.device)
    # (n_rows, n_tails, n_states, hidden)
    whole = torch.cat(states)[back].unflatten(0, (-1, len(tails)))
    return whole[:, 0, 0], torch.cat(along)[back] if apart else whole[:, :, 1:]


def _common(rows: list[list[int]]) -> list[int]:
    """What all rows begin with."""
    length = min(map(len, rows))
    differs = (i for i in range(length) if any(row[i] != rows[0][i] for row in rows))
    return rows[0][: next(differs, length)]


def _token_scores(
    model: PreTrainedModel, hidden: torch.Tensor, tokens: list[int]
) -> dict[int, np.ndarray]:
    """Log-probability of each of ``tokens`` after each state: float64 ``(n_rows,)``."""
    scores = score_among(model, hidden, tokens).double().cpu().numpy()
    return dict(zip(tokens, scores.T, strict=True))


def _begins(short: list[int], long: list[int]) -> bool:
    return len(short) < len(long) and long[: len(short)] == short
