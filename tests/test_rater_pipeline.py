"""Ratings on their way into the stack, from a server that knows who wrote what."""

import hashlib
import itertools
import json

import numpy as np
import polars as pl
import pytest
from chat_server import chat_server, completion
from conftest import write_table
from helpers import stackllm

pytestmark = pytest.mark.slow

PLAIN = ("--backbone", "none", "--folds", "3", "--jobs", "1", "--quiet")


def settings(url, ask='["gpt_rating", "category"]', more=""):
    return (
        f'[rater]\nask = {ask}\nurl = "{url}"\nmodel = "tiny"\n'
        f"[server]\nrequests_per_minute = 0\nattempts = 2\nbackoff_seconds = 0.01\n{more}"
        '[stack]\nn_trees = 60\n[[member]]\nkind = "features"\nn_trees = 60\n'
    )


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    """Texts that say nothing about their label, and who wrote each."""
    folder = write_table(tmp_path_factory.mktemp("rated"), 240, 60, signal=False, seed=5)
    train = pl.read_csv(folder / "train.csv")
    test = pl.read_csv(folder / "test.csv").join(pl.read_csv(folder / "solution.csv"), on="id")
    writer = {}
    for frame in (train, test.select(train.columns)):
        writer |= {(q, r): label for q, r, label in frame.iter_rows()}
    return folder, writer


def plain(handler, body, rating):
    """The rating and nothing else."""
    handler.send(completion(str(rating)))


def reasoning(handler, body, rating):
    """Thought in front, which the server may file apart, and log-probabilities over all tokens."""
    thought = f"The task wants a number. Is it a {11 - rating}? I think again and again. " * 3
    words = ["<think>", *thought.split(), "</think>", "\n\n"]
    if body["max_tokens"] < len(words):
        cut = " ".join(words[: body["max_tokens"]])
        answer = completion(cut)
        answer["choices"][0]["finish_reason"] = "length"
        handler.send(answer)
        return
    tokens = [(word, {word: 0.6, "1": 0.4}) for word in words[:-1]]
    tokens += [("\n\n", {"\n\n": 1.0}), spread(rating, 10), ("<|im_end|>", {"<|im_end|>": 1.0})]
    if rating % 2:
        handler.send(completion(str(rating), tokens, reasoning_content=thought))
    else:
        handler.send(completion(f"<think>{thought}</think>\n\n{rating}", tokens))


def five_alternatives(handler, body, rating):
    """No more than the five likeliest tokens, and a refusal where more are asked for."""
    if body.get("top_logprobs", 0) > 5:
        handler.send({"error": {"message": "top_logprobs may be 5 at most", "code": 400}}, 400)
    else:
        handler.send(completion(str(rating), [spread(rating, body["top_logprobs"])]))


def spread(rating, n):
    """The token of a rating, four times likelier than all the others that are told together."""
    others = [str(i) for i in range(1, 11) if i != rating][: n - 1]
    return str(rating), {str(rating): 0.8, **dict.fromkeys(others, 0.2 / (n - 1))}


def knows(writer, rated, says=plain):
    """A server whose rating depends on the writer: 2, 5 or 8, one time in five something else.

    What it rates how is written into ``rated``, by question and response; it depends on the prompt
    alone, so that all servers rate alike.
    """

    def behave(handler, body, number):
        prompt = body["messages"][0]["content"]
        if "You sort questions" in prompt:
            handler.send(completion("history" if "poem" in prompt else "other"))
            return
        text = next((q, r) for q, r in writer if f"\n{r}\n" in prompt and f"\n{q}\n" in prompt)
        draw = np.random.default_rng([*hashlib.sha256(prompt.encode()).digest()])
        of_this_writer = 2 + 3 * writer[text]
        rated[text] = of_this_writer if draw.random() < 0.8 else int(draw.integers(1, 11))
        says(handler, body, rated[text])

    return behave


def least_losses(writer, rated, rows):
    """Log loss of who knows how the rater rates: row by row, and with a row of each writer a group.

    Bayes' rule over the three writers, and over the six ways to seat them in a group. Over all tables
    that is 0.343 and 0.148 nats.
    """
    ratings = np.arange(1, 11)
    likelihood = np.array([0.8 * (ratings == 2 + 3 * label) + 0.02 for label in range(3)])
    alone, together = [], []
    for _, group in rows.group_by("Question", maintain_order=True):
        texts = list(group.select("Question", "Response").iter_rows())
        labels = [writer[text] for text in texts]
        seen = likelihood[:, [rated[text] - 1 for text in texts]]  # (3 writers, 3 rows)
        alone += [-np.log(seen[label, i] / seen[:, i].sum()) for i, label in enumerate(labels)]
        weights = {
            seats: np.prod([seen[label, i] for i, label in enumerate(seats)])
            for seats in itertools.permutations(range(3))
        }
        for i, label in enumerate(labels):
            right = sum(weight for seats, weight in weights.items() if seats[i] == label)
            together.append(-np.log(right / sum(weights.values())))
    return np.mean(alone), np.mean(together)


def losses(done):
    assert done.returncode == 0, done.stderr
    board = pl.DataFrame(json.loads(done.stdout)["leaderboard"])
    stack = board.filter(pl.col("model") == "stack").row(0, named=True)
    return stack["raw"], stack["raw_se"], stack["test_posterior"]


def check_gain(contest, ratings, rated):
    """The stack gains what such ratings can give, and no more."""
    folder, writer = contest
    train, test = (pl.read_csv(folder / name) for name in ("train.csv", "test.csv"))
    least_alone, least_together = least_losses(writer, ratings, train)
    assert least_alone == pytest.approx(0.343, abs=0.1)
    _, least_test = least_losses(writer, ratings, test)
    # The stack knows the others of a group too: it may do better than row by row, and no better
    # than all together.
    assert least_together - 0.05 < rated[0] < least_alone + 0.05
    gain, possible = np.log(3) - rated[2], np.log(3) - least_test
    assert 0.8 * possible < gain < possible + 0.05  # on the test, whose labels nothing has seen


def test_a_rating_that_depends_on_the_writer_raises_the_stack(contest):
    folder, writer = contest
    ratings = {}
    with chat_server(knows(writer, ratings)) as server:
        (folder / "stackllm.toml").write_text(settings(server.url, ask="[]"))
        truth = ("--truth", "solution.csv", "--json")
        without = losses(stackllm("stack", *PLAIN, *truth, "--name", "without", cwd=folder))
        assert server.bodies == []  # nothing is asked unless it is turned on
        (folder / "stackllm.toml").write_text(settings(server.url))
        rated = losses(stackllm("stack", *PLAIN, *truth, "--name", "rated", cwd=folder))
        n_requests = len(server.bodies)
        assert n_requests == len(server.counts)
        again = losses(stackllm("stack", *PLAIN, *truth, "--name", "rated", cwd=folder))
        assert again == rated
        assert len(server.bodies) == n_requests
        new = folder / "new.csv"
        pl.read_csv(folder / "test.csv").head(9).write_csv(new)
        done = stackllm("predict", "new.csv", "--name", "rated", cwd=folder)
        assert done.returncode == 0, done.stderr
    assert without[0] > np.log(3) - 2 * without[1]
    check_gain(contest, ratings, rated)
    names = pl.read_parquet(folder / "artifacts/rated/inputs/table/blocks.parquet").columns
    assert {"gpt_rating_expected", "gpt_rating_ok", "category_code", "category_p_history"} <= {
        *names
    }
    assert {"within_asked_gpt_rating_mean", "standing_asked_gpt_rating_rank"} <= {*names}


@pytest.mark.parametrize(
    ("says", "more"), [(reasoning, "max_tokens = 2000\n"), (five_alternatives, "")]
)
def test_a_server_of_another_kind_raises_the_stack_as_much(contest, says, more):
    folder, writer = contest
    ratings = {}
    with chat_server(knows(writer, ratings, says)) as server:
        (folder / "stackllm.toml").write_text(settings(server.url, '["gpt_rating"]', more))
        name = says.__name__
        truth = ("--truth", "solution.csv", "--json")
        rated = losses(stackllm("stack", *PLAIN, *truth, "--name", name, cwd=folder))
        assert len(server.counts) == len(writer)
        assert len(server.bodies) <= len(writer) + 8  # what it takes to learn what it refuses
    check_gain(contest, ratings, rated)
    blocks = pl.read_parquet(folder / f"artifacts/{name}/inputs/table/blocks.parquet")
    train = pl.read_csv(folder / "train.csv")
    given = [ratings[text] for text in train.select("Question", "Response").iter_rows()]
    assert blocks["gpt_rating_likeliest"].head(train.height).to_list() == given
    assert blocks["gpt_rating_entropy"].min() > 0.1  # they are probabilities


def test_dry_run_and_max_requests_on_the_command_line(contest, tmp_path):
    folder = write_table(tmp_path, 12, 6, signal=False, seed=5)
    with chat_server(lambda handler, *_: handler.send(completion("7"))) as server:
        (folder / "stackllm.toml").write_text(settings(server.url, ask='["gpt_rating"]'))
        dry = stackllm("features", *PLAIN, "--dry-run", cwd=folder)
        assert dry.returncode == 0, dry.stderr
        assert "54 rows; " in dry.stdout
        assert "54 requests" in dry.stdout
        assert server.bodies == []
        assert not (folder / "artifacts").exists()
        stopped = stackllm("features", *PLAIN, "--max-requests", "5", cwd=folder)
        assert stopped.returncode == 75
        assert "stopped after 5 requests; every answer is kept" in stopped.stderr
        assert len(server.bodies) == 5
        assert stackllm("features", *PLAIN, "--ask", "gpt_rating", cwd=folder).returncode == 0
        assert len(server.bodies) == len(server.counts) == 54
    down = stackllm("features", *PLAIN, "--ask", "preferred", cwd=folder)
    assert down.returncode == 69
    assert "gives no answers" in down.stderr
    assert "Traceback" not in down.stderr
    unknown = stackllm("features", *PLAIN, "--ask", "gpt_ratings", cwd=folder)
    assert unknown.returncode == 2
    assert 'Did you mean "gpt_rating"' in unknown.stderr
