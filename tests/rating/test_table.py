"""The table of answers for people, and what a run tells of them: asked of a server that rates by rules we know."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from chat_server import chat_server, completion
from click.testing import CliRunner

from stackllm.cli import cli
from stackllm.errors import BudgetError
from stackllm.rating.answers import Answers, Cost
from stackllm.rating.cost import count_cost
from stackllm.rating.local import RaterParams, count_tokens, prompt_digests, prompt_text
from stackllm.rating.prompt import about_tokens
from stackllm.rating.question import Asked, Case, list_cases, make_columns
from stackllm.rating.replies import Reply, read_reply
from stackllm.rating.requests import ServerParams
from stackllm.rating.table import SCHEMA, Rated, ratings_table, write_ratings
from stackllm.report.ratings import account, render_accounts

BLOCKS = ("gpt_rating", "style_clarity", "style_tone", "topic", "versus")
SETTINGS = """
[data]
id = "code"
[encoder]
backbone = "none"
[rater]
url = "{url}"
model = "tiny"
[server]
requests_per_minute = 0
attempts = 1
{server}
[stack]
n_trees = 2
n_seeds = 1
[[member]]
kind = "features"
n_trees = 2
"""
STYLE = """
instruction = "Judge the style."
[rubric.clarity]
ask = "Is it clear?"
scale = [1, 5]
[rubric.tone]
ask = "Which tone has it?"
labels = ["stiff", "warm"]
"""
TOPIC = 'instruction = "Sort it."\nsees = ["question"]\nlabels = ["=even", "odd"]\n'
VERSUS = 'instruction = "Which is better?"\ncompare = 1\n'


def score(response):
    """What the server rates a response: it knows nothing else; None where it gives no valid answer."""
    number = int(response.split("#")[1].split()[0])
    return None if number % 11 == 3 else 1 + number % 10


def behave(handler, body, _):
    prompt = body["messages"][0]["content"]
    numbers = [int(part.split()[0]) for part in prompt.split("#")[1:]]
    if "Which is better" in prompt:
        text = "A" if numbers[-2] > numbers[-1] else "B"
    elif "Sort it" in prompt:
        text = "=even" if numbers[0] % 2 == 0 else "odd"
    elif "Judge the style" in prompt:
        text = f"clarity: {1 + numbers[-1] % 5}\ntone: {'warm' if numbers[-1] % 2 else 'stiff'}"
    else:
        text = str(score(f"#{numbers[-1]} ") or "no idea")
    tokens = None
    if text.isdigit():  # as sure as it is: seven times in ten
        tokens = [(text, {text: 0.7, "5" if text != "5" else "6": 0.3})]
    usage = {"prompt_tokens": 100, "total_tokens": 103}
    handler.send(completion(text, tokens) | {"usage": usage})


def make_contest(folder, n_groups=8, seed=3):
    """Rows with ids that are text, shuffled, some with the same texts as others of their group."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    rows = []
    for group in range(n_groups):
        for label in range(3):
            number = 3 * group + (label if group % 4 else min(label, 1))  # every fourth has a twin
            rows.append((f"Why is #{group} so?", f"Because #{number} is.\nTruly.", f"w{label}"))
    table = pl.DataFrame(rows, schema=["Question", "Response", "target"], orient="row")
    table = table.with_columns(code=pl.Series([f"r-{i:02d}" for i in draw.permutation(len(rows))]))
    train, test = table.head(18), table.tail(len(rows) - 18)
    train.sample(fraction=1, shuffle=True, seed=1).write_csv(folder / "train.csv")
    test.sample(fraction=1, shuffle=True, seed=2).drop("target").write_csv(folder / "test.csv")
    for name, text in (("style", STYLE), ("topic", TOPIC), ("versus", VERSUS)):
        (folder / f"{name}.toml").write_text(text)
    return folder


def settle(folder, url, server=""):
    (folder / "stackllm.toml").write_text(SETTINGS.format(url=url, server=server))


def run(command, *options, folder, code=0, ask=True):
    """A command in this process: what it printed on standard output."""
    recipes = (
        "--ask",
        "gpt_rating",
        "--recipe",
        "style.toml",
        "--recipe",
        "topic.toml",
        "--recipe",
        "versus.toml",
    )
    work = (
        ("--folds", "2", "--jobs", "1", *(recipes if ask else ()))
        if command != "predict"
        else ("--jobs", "1")
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(cli, [command, *work, *options])
    finally:
        os.chdir(before)
    assert getattr(done.exception, "exit_code", done.exit_code) == code, done.exception
    return done.stdout


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """A run that asked everything: its folder, what it printed, and the server, which is still up."""
    folder = make_contest(tmp_path_factory.mktemp("rated") / "contest")
    with chat_server(behave) as server:
        settle(folder, server.url, "price_in = 2.0\nprice_out = 10.0")
        yield folder, run("stack", folder=folder), server


def read(folder, name="run"):
    return pl.read_parquet(folder / "artifacts" / name / "ratings.parquet")


def tables(folder):
    parts = [
        pl.read_csv(folder / f"{name}.csv").with_columns(set=pl.lit(name))
        for name in ("train", "test")
    ]
    return pl.concat(parts, how="diagonal")


def test_every_row_has_the_answers_to_its_own_texts(rated):
    folder, _, _ = rated
    table, rows = read(folder), tables(folder)
    assert dict(table.schema) == SCHEMA
    assert table["block"].to_list() == [*BLOCKS] * rows.height
    for column, name in (("set", "set"), ("row_id", "code"), ("question", "Question")):
        assert table[column].to_list() == [value for value in rows[name] for _ in BLOCKS]
    for row, text in zip(
        table.filter(block="gpt_rating").iter_rows(named=True), rows["Response"], strict=True
    ):
        expected = score(text)
        if expected is None:
            assert row["status"] == "unknown answer"
            assert row["reply"] == "no idea"
            assert [
                row[name] for name in ("answer", "rating", "entropy", "probability", "measured")
            ] == [None] * 5
            continue
        other = 5 if expected != 5 else 6
        assert row["answer"] == row["reply"] == str(expected)
        assert row["rating"] == pytest.approx(0.7 * expected + 0.3 * other)
        assert row["entropy"] == pytest.approx(-0.7 * math.log(0.7) - 0.3 * math.log(0.3))
        assert row["probability"] == pytest.approx(0.7)
        assert (row["measured"], row["status"], row["model"]) == (True, "ok", "tiny")
    clarity, tone = (table.filter(block=f"style_{name}") for name in ("clarity", "tone"))
    numbers = [int(text.split("#")[1].split()[0]) for text in rows["Response"]]
    assert clarity["rating"].to_list() == [1 + number % 5 for number in numbers]
    assert tone["answer"].to_list() == ["warm" if number % 2 else "stiff" for number in numbers]
    assert clarity["measured"].to_list() == [False] * rows.height  # said, and no more is known
    topics = table.filter(block="topic")
    assert topics["answer"].to_list() == [
        "odd" if int(text.split("#")[1].split()[0]) % 2 else "=even" for text in rows["Question"]
    ]
    assert table.filter(status="ok")["reply"].null_count() == rows.height  # those of comparisons


def test_a_comparison_names_the_rows_that_stood_beside_each(rated):
    folder, _, _ = rated
    table = read(folder).filter(block="versus")
    texts = dict(tables(folder).select("code", "Response").iter_rows())
    for row in table.iter_rows(named=True):
        group = {
            it["row_id"] for it in table.iter_rows(named=True) if it["group_id"] == row["group_id"]
        }
        partners = row["partners"].split(", ")
        assert row["row_id"] not in partners
        assert set(partners) <= group
        assert len(row["prompt"].split(", ")) == len(partners) == 2  # once seen first, once second
        own = int(texts[row["row_id"]].split("#")[1].split()[0])
        others = [int(texts[it].split("#")[1].split()[0]) for it in partners]
        if own not in others:
            wins = np.sign(np.array([own - other for other in others])).mean()
            assert np.sign(row["logodds"]) == np.sign(wins)
    assert table["rating"].null_count() == table["answer"].null_count() == table.height


def test_the_same_prompt_has_the_same_digest_and_another_has_another(rated):
    folder, _, server = rated
    table, rows = read(folder), tables(folder)
    asked = table.filter(block="gpt_rating").with_columns(text=rows["Response"])
    assert asked["prompt"].n_unique() == asked.select("question", "text").n_unique()
    assert asked.group_by("prompt").agg(pl.col("text").n_unique())["text"].max() == 1
    same = (
        table.filter(pl.col("block").str.starts_with("style"))
        .group_by("row_id")
        .agg(pl.col("prompt").n_unique())
    )
    assert same["prompt"].to_list() == [1] * rows.height  # both questions stood in one prompt
    assert len(server.counts) == table["prompt"].str.split(", ").explode().n_unique()


def test_csv_and_parquet_are_the_same_but_for_formulas(rated):
    folder, _, _ = rated
    exact = read(folder)
    path = folder / "artifacts/run/ratings.csv"
    shown = pl.read_csv(path, schema=SCHEMA)
    assert shown.drop("answer", "reply").equals(exact.drop("answer", "reply"))
    topics = shown.filter(block="topic")["answer"].unique().sort().to_list()
    assert topics == ["'=even", "odd"]
    assert "=even" in exact["answer"].to_list()


def test_it_is_the_same_bytes_from_the_cache_after_a_stop_and_whatever_the_labels(rated, tmp_path):
    folder, _, server = rated
    files = [folder / "artifacts/run" / name for name in ("ratings.csv", "ratings.parquet")]
    first = [path.read_bytes() for path in files]
    files[0].unlink()
    n_requests = len(server.bodies)
    run("features", folder=folder)
    assert [path.read_bytes() for path in files] == first
    assert len(server.bodies) == n_requests
    other = make_contest(tmp_path / "other")
    train = pl.read_csv(other / "train.csv")
    train.with_columns(pl.col("target").reverse()).write_csv(other / "train.csv")
    settle(other, server.url)
    run("features", "--max-requests", "9", folder=other, code=BudgetError.exit_code)
    assert not (other / "artifacts/run/ratings.csv").exists()
    run("features", folder=other)
    assert [(other / "artifacts/run" / path.name).read_bytes() for path in files] == first


def test_a_run_that_asks_nothing_leaves_none_beside_its_results(rated, tmp_path):
    folder = make_contest(tmp_path / "other")
    settle(folder, rated[2].url)
    run("features", folder=folder)
    root = folder / "artifacts/run"
    assert (root / "ratings.csv").exists()
    assert "ratings" not in json.loads(run("features", "--json", folder=folder, ask=False))
    assert not list(root.glob("ratings*"))
    assert {path.name for path in root.glob("earlier/*/ratings*")} == {
        "ratings.csv",
        "ratings.parquet",
    }


def test_predict_writes_the_ratings_of_new_rows_beside_its_predictions(rated):
    folder, _, server = rated
    n_requests = len(server.bodies)
    said = run("predict", "test.csv", "-o", "answers.csv", folder=folder)
    assert "answers.ratings.csv" in said
    assert len(server.bodies) == n_requests
    new = pl.read_parquet(folder / "answers.ratings.parquet")
    assert new["set"].unique().to_list() == ["new"]
    assert new.drop("set").equals(read(folder).filter(set="test").drop("set"))
    told = json.loads(run("predict", "test.csv", "--json", folder=folder))
    assert told["ratings"] == "test.predictions.ratings.csv"
    (folder / "a.ratings.csv").write_bytes((folder / "test.csv").read_bytes())
    run(
        "predict", "a.ratings.csv", "-o", "a.csv", folder=folder, code=2
    )  # it would replace what it reads


def test_what_is_told_is_what_the_table_holds(rated):
    folder, printed, server = rated
    told = json.loads(run("features", "--json", folder=folder))["ratings"]
    table, rows = read(folder), tables(folder)
    assert [it["recipe"] for it in told] == ["gpt_rating", "style", "topic", "versus"]
    assert [q["block"] for it in told for q in it["questions"]] == [*BLOCKS]
    for question in (q for it in told for q in it["questions"]):
        answered = table.filter(block=question["block"], status="ok")
        assert question["rows"] == answered.height == sum(question["counts"].values())
        assert (
            question["rows"]
            + table.filter(pl.col("status") != "ok", block=question["block"]).height
            == rows.height
        )
        if question["kind"] != "comparison":
            counts = dict(answered["answer"].value_counts().iter_rows())
            assert {name: n for name, n in question["counts"].items() if n} == counts
        if question["kind"] == "rating":
            assert question["mean"] == pytest.approx(answered["rating"].mean())
            assert question["entropy"] == pytest.approx(answered["entropy"].mean())
            by = answered.filter(set="train").join(rows, left_on="row_id", right_on="code")
            means = dict(by.group_by("target").agg(pl.col("rating").mean()).iter_rows())
            assert question["by_class"] == pytest.approx(means)
            assert 0 <= question["explained"] <= 1
    missing = sum(score(text) is None for text in rows["Response"].unique())
    assert told[0]["questions"][0]["missing"] == {"unknown answer": missing}
    prompts = sum(it["cost"]["prompts"] for it in told)
    assert prompts == len(server.counts)
    for it in told:
        cost = it["cost"]
        assert (cost["sent"], cost["counted"]) == (0, cost["prompts"])
        assert (cost["prompt_tokens"], cost["reply_tokens"]) == (
            100 * cost["prompts"],
            3 * cost["prompts"],
        )
        assert cost["money"] == pytest.approx(
            (2.0 * cost["prompt_tokens"] + 10.0 * cost["reply_tokens"]) / 1e6
        )
        assert cost["money_now"] == 0
        head = next(line for line in printed.splitlines() if line.startswith(f"{it['recipe']}: "))
        assert head.startswith(
            f"{it['recipe']}: {cost['prompts']} prompts about {rows.height} rows"
        )
        paid = f"{cost['prompts']} requests now, 0 answers found in the journal; {cost['prompt_tokens']:,} tokens"
        assert paid in " ".join(printed.split())
    assert f"{missing} missing ({missing} unknown answer)" in " ".join(printed.split())
    bars = [line.split() for line in printed.splitlines() if line.endswith("#")]
    assert all(set(bar) == {"#"} and len(bar) <= 30 for *_, bar in bars)
    assert "ratings" not in run("features", "--quiet", folder=folder)
    assert "prompts about" not in run("features", "--quiet", folder=folder)


def test_a_dry_run_tells_prompts_tokens_and_money_of_each_recipe(rated, tmp_path):
    folder = make_contest(tmp_path / "other")
    settle(folder, rated[2].url, "price_in = 2.0\nprice_out = 10.0")
    n_requests = len(rated[2].bodies)
    lines = run("features", "--dry-run", folder=folder).splitlines()
    assert len(rated[2].bodies) == n_requests
    for recipe in ("gpt_rating", "style", "topic", "versus"):
        (line,) = (it for it in lines if it.startswith(f"  {recipe}: "))
        words = line.replace(",", "").split()
        count, prompt, reply, paid = words[1], words[6], words[12], words[17]
        assert words[2:4] == ["of", count]
        assert float(paid) == pytest.approx((2 * int(prompt) + 10 * int(reply)) / 1e6, rel=1e-3)
    settle(folder, rated[2].url)
    assert "price_in" not in run("features", "--dry-run", folder=folder)


def of_answers(probabilities, status=None, models=None, texts=None, **asked):
    """A question about one row per answer, and the rows."""
    question = Asked("grade", "rating", "Grade it.", ("1", "2", "3"))
    question = replace(question, **asked)
    n = len(probabilities)
    rows = pl.DataFrame(
        {
            "set": ["train"] * n, "row_id": [f"r{i}" for i in range(n)], "group_id": [f"g{i // 2}" for i in range(n)],
            "question": ["Why?"] * n, "response": [f"text {i}" for i in range(n)],
        }
    )  # fmt: skip
    _, places = list_cases(question, rows)
    answers = Answers(
        np.array(probabilities), status or ("ok",) * n, texts or ("",) * n, models or ("tiny",) * n,
        tuple(f"{i:064x}" for i in range(n)), (True,) * n,
    )  # fmt: skip
    columns = make_columns(question, places, answers.probabilities, n)
    return Rated(question, places, answers, columns, "grade", Cost(n, n)), rows


HOSTILE = (
    "=cmd|'/c calc'!A1",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202egnp.exe",
    'two\nlines,"quoted"',
    "+1 " * 4000,
    "\ud800half",
)


def test_hostile_texts_stay_inert_in_the_files_and_on_the_terminal(tmp_path):
    nothing = [[np.nan] * 3] * len(HOSTILE)
    status = tuple(text[:200] for text in HOSTILE)
    rated, rows = of_answers(nothing, status, models=HOSTILE, texts=HOSTILE)
    whole = [text for text in HOSTILE if "\ud800" not in text]
    rows = rows.with_columns(
        question=pl.Series([*whole, "plain"]), row_id=pl.Series([*whole, "@id"])
    )
    table = ratings_table([rated], rows)
    write_ratings(table, tmp_path / "ratings.csv")
    exact = pl.read_parquet(tmp_path / "ratings.parquet")
    assert exact["question"].to_list() == [*whole, "plain"]
    assert exact["model"].to_list() == [*whole, "?half"]
    shown = pl.read_csv(tmp_path / "ratings.csv", schema=SCHEMA)
    for column in ("row_id", "question", "reply", "model"):
        for cell, was in zip(shown[column], exact[column], strict=True):
            assert cell.removeprefix("'") == was
            assert cell[0] not in "=+-@|%"
    labels = rows.select("group_id").with_columns(label=pl.Series([0, 1] * 3))
    said = render_accounts(account([rated], table, labels, HOSTILE))
    assert all(it.isprintable() for it in said.replace("\n", ""))
    assert len(said) < 2000
    assert max(map(len, said.splitlines())) <= 100


def test_a_long_list_of_labels_is_cut_to_the_most_frequent():
    names = tuple(f"label {i}" for i in range(40))
    chosen = [0] * 9 + [1] * 5 + [*range(2, 40)]
    rated, rows = of_answers(np.eye(40)[chosen], kind="category", answers=names)
    labels = rows.select("group_id").with_columns(label=pl.lit(0))
    lines = render_accounts(
        account([rated], ratings_table([rated], rows), labels, ["x"])
    ).splitlines()
    bars = [line for line in lines if line.endswith("#")]
    assert len(bars) == 12
    assert bars[0].split()[:3] == ["label", "0", "9"]
    assert bars[-1].split()[:3] == ["29", "others", "29"]


def test_a_wide_scale_is_told_in_a_dozen_intervals():
    names = tuple(map(str, range(101)))
    rated, rows = of_answers(np.eye(101)[::2], answers=names)
    labels = rows.select("group_id").with_columns(label=pl.lit(0))
    (told,) = account([rated], ratings_table([rated], rows), labels, ["x"])
    counts = told.questions[0].counts
    assert len(counts) <= 12
    for name, count in counts.items():
        low, high = map(int, name.split("-"))
        assert count == len([i for i in range(0, 101, 2) if low <= i <= high])


def test_a_rating_that_knows_the_class_explains_everything_and_noise_what_chance_explains():
    draw = np.random.default_rng(0)
    n = 600
    labels = pl.Series([0, 1] * (n // 2))
    known, rows = of_answers(np.eye(3)[2 * labels.to_numpy()])
    noise, _ = of_answers(draw.dirichlet([1, 1, 1], n))
    train = rows.select("group_id").with_columns(label=labels)
    shares = []
    for rated in (known, noise):
        (told,) = account([rated], ratings_table([rated], rows), train, ["x", "y"])
        shares.append(told.questions[0].explained)
        assert told.questions[0].chance == pytest.approx(1 / (n - n // 2))
    assert shares[0] == pytest.approx(1.0)
    assert shares[1] < 0.03


def test_what_is_counted_without_making_prompts_is_what_prompts_have():
    question = Asked("grade", "rating", "Grade it.", ("1", "2", "3"))
    params = RaterParams(max_question_tokens=20, max_response_tokens=30)
    cases = [Case("Why? " * n, ("So it is. " * m,)) for n in (1, 9, 80) for m in (0, 2, 300)]
    for case in cases:
        prompt = prompt_text(question, case, params)
        about = count_tokens(question, [case], params)
        assert about == pytest.approx(
            about_tokens(prompt), abs=20
        )  # it cuts by characters, five a token
    assert count_tokens(question, cases, params) == sum(
        count_tokens(question, [it], params) for it in cases
    )
    assert count_tokens(question, [], params) == 0
    digests = prompt_digests(question, cases, params)
    assert len({*digests}) == len(cases)
    reworded = prompt_digests(replace(question, instruction="Grade!"), cases, params)
    assert not {*digests} & {*reworded}


def test_cost_is_the_servers_own_where_it_tells_and_else_estimated():
    body = {"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 16}
    question = Asked("grade", "rating", "Grade it.", ("1", "2"))
    jobs = dict.fromkeys("abcd", (question, body))
    reply = Reply("1", (), "stop", False, "tiny", 0)
    replies = {
        "a": replace(reply, n_prompt=90, n_tokens=95, cost=0.5),
        "b": reply,  # of a server, or an older journal, that tells nothing
        "c": replace(reply, n_prompt=80, n_tokens=81),
    }
    prices = ServerParams(price_in=1e6, price_out=2e6)
    cost = count_cost([*"abcda"], replies, {"a", "d"}, jobs, prices)
    assert (cost.prompts, cost.sent, cost.replies, cost.counted) == (4, 2, 3, 2)
    assert (cost.prompt_tokens, cost.reply_tokens) == (90 + 100 + 80, 5 + 1 + 1)
    assert cost.money == pytest.approx(0.5 + (100 + 2) + (80 + 2))
    assert cost.money_now == pytest.approx(0.5)
    assert count_cost([*"bc"], replies, set(), jobs, ServerParams()).money is None


@pytest.mark.parametrize("told", [None, "free", -1, True, float("nan"), float("inf"), 1e300, [0.1]])
def test_a_cost_that_makes_no_sense_counts_as_untold(told):
    usage = {"prompt_tokens": 3, "total_tokens": 4, "cost": told}
    reply = read_reply(json.dumps(completion("7") | {"usage": usage}).encode())
    assert (reply.text, reply.cost) == ("7", 0.0)
    paid = read_reply(json.dumps(completion("7") | {"usage": {**usage, "cost": 2}}).encode())
    assert Reply.load(paid.dump()) == paid
    assert paid.cost == 2.0
