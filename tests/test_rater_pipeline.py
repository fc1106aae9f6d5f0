"""Ratings on their way into the stack, from a server that knows who wrote what."""

import json

import numpy as np
import polars as pl
import pytest
from chat_server import chat_server, completion
from conftest import write_table
from helpers import stackllm

pytestmark = pytest.mark.slow

PLAIN = ("--backbone", "none", "--folds", "3", "--jobs", "1", "--quiet")


def settings(url, ask='["gpt_rating", "category"]'):
    return (
        f'[rater]\nask = {ask}\nurl = "{url}"\nmodel = "tiny"\n'
        "[server]\nrequests_per_minute = 0\nattempts = 2\nbackoff_seconds = 0.01\n"
        '[stack]\nn_trees = 20\n[[member]]\nkind = "features"\nn_trees = 20\n'
    )


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    """Texts that say nothing about their label, and who wrote each."""
    folder = write_table(tmp_path_factory.mktemp("rated"), 40, 16, signal=False, seed=5)
    train = pl.read_csv(folder / "train.csv")
    test = pl.read_csv(folder / "test.csv").join(pl.read_csv(folder / "solution.csv"), on="id")
    writer = {}
    for frame in (train, test.select(train.columns)):
        writer |= {(q, r): label for q, r, label in frame.iter_rows()}
    return folder, writer


def knows(writer):
    """A server whose rating depends on the writer: 2, 5 or 8, one time in five something else."""

    def behave(handler, body, number):
        prompt = body["messages"][0]["content"]
        if "You sort questions" in prompt:
            handler.send(completion("history" if "poem" in prompt else "other"))
            return
        label = next(
            label
            for (q, r), label in writer.items()
            if f"\n{r}\n" in prompt and f"\n{q}\n" in prompt
        )
        draw = np.random.default_rng(len(prompt) + label)
        rating = 2 + 3 * label if draw.random() < 0.8 else int(draw.integers(1, 11))
        handler.send(completion(str(rating)))

    return behave


def losses(done):
    assert done.returncode == 0, done.stderr
    board = pl.DataFrame(json.loads(done.stdout)["leaderboard"])
    stack = board.filter(pl.col("model") == "stack").row(0, named=True)
    return stack["raw"], stack["raw_se"], stack["test_posterior"]


def test_a_rating_that_depends_on_the_writer_raises_the_stack(contest):
    folder, writer = contest
    with chat_server(knows(writer)) as server:
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
        done = stackllm("predict", "new.csv", *PLAIN, "--name", "rated", cwd=folder)
        assert done.returncode == 0, done.stderr
    assert without[0] > np.log(3) - 2 * without[1]
    assert rated[0] < without[0] - 0.2
    assert rated[2] < np.log(3) - 0.2  # and on the test, whose labels nothing has seen
    names = pl.read_parquet(folder / "artifacts/rated/inputs/table/blocks.parquet").columns
    assert {"gpt_rating_expected", "gpt_rating_ok", "category_code", "category_p_history"} <= {
        *names
    }
    assert {"within_asked_gpt_rating_mean", "standing_asked_gpt_rating_rank"} <= {*names}


def test_dry_run_and_max_requests_on_the_command_line(contest, tmp_path):
    folder = write_table(tmp_path, 12, 6, signal=False, seed=5)
    with chat_server(lambda handler, *_: handler.send(completion("7"))) as server:
        (folder / "stackllm.toml").write_text(settings(server.url, ask='["gpt_rating"]'))
        dry = stackllm("features", *PLAIN, "--dry-run", cwd=folder)
        assert dry.returncode == 0, dry.stderr
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
