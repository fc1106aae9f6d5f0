"""The four steps through the command line, on small contests."""

import json

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from conftest import write_table
from helpers import digests, stackllm

from stackllm.cli import cli

pytestmark = pytest.mark.slow

PLAIN = ("--backbone", "none", "--folds", "3", "--quiet")


def contest(folder):
    """A contest with a planted signal, and a stage two that is quick."""
    write_table(folder, 40, 12)
    (folder / "stackllm.toml").write_text("[stack]\nn_trees = 50\nn_seeds = 1\n")
    return folder


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A contest on which ``stackllm run`` has been typed, and what it printed."""
    folder = contest(tmp_path_factory.mktemp("played"))
    done = stackllm("run", *PLAIN, "--json", "--truth", "solution.csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_a_planted_signal_is_found_and_stage_three_helps(played):
    _, result = played
    board = pl.DataFrame(result["leaderboard"])
    assert board["round"].unique().sort().to_list() == [0, 1, 2]
    blend = board.filter((pl.col("model") == "blend") & (pl.col("round") == 0)).row(0, named=True)
    assert blend["posterior"] < blend["raw"] < np.log(3) - 2 * blend["raw_se"]
    assert blend["accuracy"] > 0.6
    assert blend["test_posterior"] < np.log(3)
    losses = board.filter(pl.col("model") == "blend").sort("round")["posterior"].to_list()
    assert result["best_round"] == int(np.argmin(losses))
    assert result["oof_log_loss"] == pytest.approx(min(losses))


def test_what_a_run_hands_out(played):
    folder, result = played
    run = folder / "artifacts" / "run"
    submission = pl.read_csv(run / "submission.csv")
    test = pl.read_csv(folder / "test.csv")
    assert submission.columns == ["id", "target_0", "target_1", "target_2"]
    assert submission["id"].to_list() == test["id"].to_list()
    assert np.allclose(submission.drop("id").to_numpy().sum(axis=1), 1, atol=1e-9)
    oof = pl.read_parquet(run / "oof.parquet")
    assert oof.height == 120
    truth = pl.read_csv(folder / "train.csv")["target"].to_numpy()
    given = oof.drop("row_id").to_numpy()[np.arange(120), truth]
    assert -np.log(given).mean() == pytest.approx(result["oof_log_loss"])
    record = json.loads((run / "run.json").read_text())
    assert record["n_train"] == 120
    assert set(record["inputs"]) == {"train.csv", "test.csv"}
    assert record["best_round"] == result["best_round"]


def test_two_seeds_are_noise_and_stage_three_is_not(played, monkeypatch):
    folder, result = played
    done = stackllm("stack", *PLAIN, "--seed", "1", "--name", "other", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(folder)

    def told(*arguments):
        shown = CliRunner().invoke(cli, ["compare", *map(str, arguments), "--json"])
        assert shown.exit_code == 0, shown.output
        return json.loads(shown.stdout)

    seeds = told("run", "other")
    assert seeds["verdict"] == "noise"
    assert "their folds differ" in seeds["notes"][0]
    assert seeds["scores"][0]["a"] == pytest.approx(result["oof_log_loss"])
    other = json.loads(done.stdout)
    assert seeds["scores"][0]["b"] == pytest.approx(other["oof_log_loss"])
    assert told("run/lexical:raw", "run/lexical")["verdict"] == "b is better"
    best = result["best_round"]
    for row in result["leaderboard"]:
        model = f"run/round{row['round']}/{row['model']}"
        if (row["round"], row["model"]) == (best, "blend"):
            assert (row["behind"], row["behind_se"]) == (0, 0)
        elif row["model"] in ("lexical", "stack"):
            score = told("run", model)["scores"][0]
            assert score["difference"] == pytest.approx(row["behind"], abs=1e-12)
            assert score["error"] == pytest.approx(row["behind_se"], rel=1e-9)
            assert score["b"] == pytest.approx(row["posterior"])
            unseen = told("run", model, "--truth", "solution.csv")["scores"][0]
            assert unseen["b"] == pytest.approx(row["test_posterior"], abs=0.02)
    stored = pl.read_csv(folder / "artifacts/run/leaderboard.csv")
    assert stored["behind"].to_list() == [row["behind"] for row in result["leaderboard"]]
    file = told("artifacts/run/submission.csv", "run", "--truth", "solution.csv")
    assert file["verdict"] == "same"
    refused = CliRunner().invoke(cli, ["compare", "artifacts/run/submission.csv", "run"])
    assert "holds the test rows of run. Give their labels" in str(refused.exception)


def test_the_audit_table_holds_every_pseudo_label(played):
    folder, _ = played
    labels = pl.read_parquet(folder / "artifacts" / "run" / "pseudo_labels.parquet")
    assert labels.columns == ["row_id", "round", "fold", "part", "label", "confidence"]
    used = labels.group_by("round", "fold", "row_id").agg(pl.col("confidence").sum())
    assert used.height == 2 * 3 * 36
    assert np.allclose(used["confidence"], 1)
    assert set(labels["round"]) == {1, 2}
    assert labels.group_by("row_id").agg(pl.col("part").n_unique())["part"].max() == 1
    assert labels["confidence"].is_between(0.02, 1).all()


def test_the_same_command_again_changes_nothing_and_runs_nothing(played):
    folder, _ = played
    before = digests(folder / "artifacts")
    timings = (folder / "artifacts" / "run" / "timings.jsonl").read_text()
    assert stackllm("run", *PLAIN, cwd=folder).returncode == 0
    assert digests(folder / "artifacts") == before
    assert (folder / "artifacts" / "run" / "timings.jsonl").read_text() == timings


def test_damage_is_found_and_mended_to_the_same_bytes(played):
    folder, _ = played
    run = folder / "artifacts" / "run"
    before = digests(run)
    victims = ["members/lexical/round0_fold1/weights.npy", "stack/models/round0_fold2/model_0.txt"]
    for name in victims:
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 1
        (run / name).write_bytes(content)
    again = stackllm("run", *PLAIN, cwd=folder)
    assert again.returncode == 0
    assert again.stderr.count("was damaged; moved to") == 2
    assert digests(run) == before


def test_same_seed_same_bytes_with_one_worker_or_two(played, tmp_path):
    folder, _ = played
    other = contest(tmp_path)
    others = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    done = stackllm("run", *PLAIN, "--jobs", "2", cwd=other, **others)
    assert done.returncode == 0, done.stderr
    assert digests(folder / "artifacts" / "run") == digests(other / "artifacts" / "run")


N_SEEDS, N_ERRORS = 12, 4
"""Tables of noise, and standard errors by which the mean over them may be off. Student's distribution of
11 degrees of freedom lies outside with 0.2 %: all bounds of the test together raise a false alarm in at
most 4 % of the changes that draw anew."""

NOISE = """
[run]
folds = 3
[encoder]
backbone = "none"
[stack]
n_trees = 20
n_seeds = 1
[pseudo]
rounds = 1
[[member]]
kind = "lexical"
[[member]]
kind = "features"
n_trees = 20
"""


def test_labels_shuffled_within_groups_score_chance(tmp_path):
    boards = []
    for seed in range(N_SEEDS):
        folder = write_table(tmp_path / str(seed), 24, 10, signal=False, seed=100 * seed)
        (folder / "stackllm.toml").write_text(NOISE)
        done = stackllm("run", "--quiet", "--json", "--truth", "solution.csv", cwd=folder)
        assert done.returncode == 0, done.stderr
        boards += json.loads(done.stdout)["leaderboard"]
    for (model, number), drawn in pl.DataFrame(boards).group_by("model", "round"):
        assert drawn.height == N_SEEDS

        def off(column, chance, drawn=drawn):
            """How far the mean is above chance, in standard errors."""
            return (drawn[column].mean() - chance) / (drawn[column].std() / np.sqrt(N_SEEDS))

        where = f"{model} of round {number}"
        # who learns from noise loses by it, so that losses are bounded from below only
        assert off("test_raw", np.log(3)) > -N_ERRORS, where
        assert off("test_posterior", np.log(3)) > -N_ERRORS, where
        if model in ("stack", "blend"):  # out of fold a little above chance: README, what leaks
            continue
        assert off("raw", np.log(3)) > -N_ERRORS, where
        assert off("posterior", np.log(3)) > -N_ERRORS, where
        assert abs(off("auc", 1 / 2)) < N_ERRORS, where
        assert abs(off("accuracy", 1 / 3)) < N_ERRORS, where


def test_zero_rounds_is_the_plain_stack(played, tmp_path):
    folder, _ = played
    other = contest(tmp_path)
    plain = stackllm("stack", *PLAIN, "--json", cwd=other)
    zero = stackllm("pseudo", "--rounds", "0", *PLAIN, "--json", cwd=other)
    assert json.loads(plain.stdout)["oof_log_loss"] == json.loads(zero.stdout)["oof_log_loss"]
    run = folder / "artifacts" / "run"
    assert (run / "submission_round0.csv").read_bytes() == (
        other / "artifacts" / "run" / "submission.csv"
    ).read_bytes()


def test_predict_on_the_test_rows_is_close_to_the_submission(played):
    """Each test row was left out by no fold's model in round 0, so both must agree exactly there."""
    folder, _ = played
    done = stackllm("stack", *PLAIN, "--name", "zero", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = stackllm("predict", "test.csv", "--name", "zero", "-o", "new.csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    new = pl.read_csv(folder / "new.csv")
    submission = pl.read_csv(folder / "artifacts" / "zero" / "submission.csv")
    assert new.columns == submission.columns
    assert np.allclose(new.drop("id").to_numpy(), submission.drop("id").to_numpy(), atol=1e-6)


def test_predict_needs_no_training_table(played, tmp_path):
    folder, _ = played
    pl.read_csv(folder / "test.csv").head(7).write_csv(tmp_path / "new.csv")
    artifacts = str(folder / "artifacts")
    done = stackllm("predict", "new.csv", "--artifacts", artifacts, "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    frame = pl.read_csv(tmp_path / "new.predictions.csv")
    assert frame.height == 7
    assert np.allclose(frame.drop("id").to_numpy().sum(axis=1), 1)


def test_dry_run_lists_reasons_and_writes_nothing(tmp_path):
    folder = write_table(tmp_path, 12, 6)
    done = stackllm("stack", "--backbone", "none", "--folds", "3", "--dry-run", cwd=folder)
    assert done.returncode == 0
    assert "folds: new" in done.stderr
    stages = {line[:22].strip(): line[22:].split() for line in done.stdout.splitlines()[1:]}
    assert list(stages) == [
        "folds", "inputs", "members, round 0", "stack inputs, round 0", "stack, round 0", "model",
    ]  # fmt: skip
    assert stages["members, round 0"][:2] == [
        "12",
        "12",
    ]  # four members without an LLM, three folds
    assert not (folder / "artifacts").exists()


def test_dry_run_tells_what_has_changed(played):
    folder, _ = played

    def told(*more):
        return stackllm("stack", *PLAIN[:-1], "--dry-run", *more, cwd=folder).stderr

    assert "folds: done" in told()
    assert "stack/models/round0_fold0: done" in told()
    before = digests(folder / "artifacts")
    assert "all units are done" in stackllm("run", *PLAIN, "--dry-run", cwd=folder).stdout
    assert digests(folder / "artifacts") == before
    listed = stackllm("stack", *PLAIN, "--dry-run", "--json", "--seed", "7", cwd=folder)
    told_units = json.loads(listed.stdout)["would_run"]
    assert told_units["folds"] == told_units["members/lexical/round0_fold0"] == "parameters changed"
    assert "folds: parameters changed" in told("--seed", "7")
    pl.read_csv(folder / "test.csv").head(30).write_csv(folder / "fewer.csv")
    assert "folds: input changed" in told("--test", "fewer.csv")


def test_other_members_and_columns_through_a_settings_file(tmp_path):
    folder = write_table(tmp_path, 18, 8)
    pl.read_csv(folder / "train.csv").rename({"target": "who"}).write_csv(folder / "training.csv")
    draw = np.random.default_rng(0)
    names = ["who_0", "who_1", "who_2"]
    for name, n in (("theirs_oof", 54), ("theirs_test", 24)):
        values = draw.dirichlet(np.ones(3), n)
        frame = pl.DataFrame(values, schema=names).with_row_index("id")
        frame.write_csv(folder / f"{name}.csv")
    (folder / "stackllm.toml").write_text(
        """
        [data]
        train = "training.csv"
        target = "who"
        [run]
        folds = 3
        [encoder]
        backbone = "none"
        [stack]
        n_trees = 10
        [[member]]
        kind = "lexical"
        views = ["characters"]
        c = 3
        [[member]]
        kind = "external"
        name = "theirs"
        oof = "theirs_oof.csv"
        test = "theirs_test.csv"
        """
    )
    done = stackllm("stack", "--json", "--quiet", cwd=folder)
    assert done.returncode == 0, done.stderr
    models = {row["model"]: row for row in json.loads(done.stdout)["leaderboard"]}
    assert list(models) == ["lexical", "theirs", "stack", "blend"]
    assert models["lexical"]["raw"] < np.log(3) < models["theirs"]["raw"]
