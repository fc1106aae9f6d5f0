"""The logbook: what is recorded and when, public scores and their band, and how it is all shown."""

import csv
import io
import json
import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from stackllm.cli import cli
from stackllm.members.decoder import DecoderParams
from stackllm.members.registry import Member
from stackllm.report import listing, logbook, public
from stackllm.report.changes import as_stored, chosen
from stackllm.report.lb_plot import plot, svg
from stackllm.report.logbook import LOGBOOK, commit_of, describe, read_logbook, record_run
from stackllm.report.public import Given, band_of, enter
from stackllm.settings import RunParams, Settings

TEAM = [("mistral 1", 1.028, 0.925), ("mistral 2", 1.00639, 0.855), ("mistral 3", 0.945, 0.736)]


def record(seed=0, loss=0.5, settings=None, **more):
    settings = settings or Settings(run=RunParams(seed=seed))
    return {
        "settings": as_stored(settings), "classes": ["a", "b", "c"], "n_train": 300, "n_test": 100,
        "inputs": {"train.csv": "1" * 64, "test.csv": "2" * 64}, "stackllm": "0.1.0",
        "until": "stack", "best_round": 0, "oof_log_loss": {"round 0": loss}, **more,
    }  # fmt: skip


def board(loss=0.5, **more):
    scores = {
        "raw": 2 * loss,
        "raw_se": 0.02,
        "posterior": loss,
        "posterior_se": 0.01,
        "auc": float("nan"),
    }
    return [{"round": 0, "model": name, "seconds": 2.0, **scores, **more} for name in ("lexical", "stack", "blend")]  # fmt: skip


def run_in(folder, name="demo", seed=0, loss=0.5, **more):
    return record_run(folder, describe(name, record(seed, loss), board(loss, **more)))


def typed(*arguments, code=0):
    result = CliRunner().invoke(cli, ["runs", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        assert result.exception.exit_code == code, result.exception
        return str(result.exception)
    assert result.exit_code == code, result.output
    return result.output


def lines_of(folder):
    return [it for it in read_logbook(folder).runs if it["kind"] == "run"]


def test_the_same_again_adds_no_line_and_other_settings_add_one(tmp_path):
    assert run_in(tmp_path)
    assert not run_in(tmp_path)
    assert run_in(tmp_path, seed=1)
    assert not run_in(tmp_path)
    assert not run_in(tmp_path, loss=0.5 + 1e-9)  # another machine's last digit
    assert run_in(tmp_path, loss=0.51)
    assert run_in(tmp_path, name="other")
    assert [it["seed"] for it in lines_of(tmp_path)] == [0, 0, 1, 0]
    assert lines_of(tmp_path)[2]["changed"] == {"run.seed": 1}


def test_scores_on_the_test_set_are_news_once(tmp_path):
    assert run_in(tmp_path)
    assert run_in(tmp_path, test_posterior=0.6, test_se=0.1)
    assert not run_in(tmp_path, test_posterior=0.6, test_se=0.1)
    assert not run_in(tmp_path)
    assert lines_of(tmp_path)[0]["test_posterior"] == 0.6


def test_where_the_tables_stand_is_no_other_run(tmp_path):
    moved = record()
    moved["settings"]["data"]["train"] = "elsewhere/train.csv"
    moved["inputs"] = {"elsewhere/train.csv": "1" * 64, "test.csv": "2" * 64}
    assert run_in(tmp_path)
    assert not record_run(tmp_path, describe("demo", moved, board()))
    other = record() | {"inputs": {"train.csv": "3" * 64, "test.csv": "2" * 64}}
    assert record_run(tmp_path, describe("demo", other, board()))


def test_a_failure_is_news_unless_it_is_the_last_thing_known(tmp_path):
    failed = describe("demo", record(), [], "the disk is made of cheese.")
    assert record_run(tmp_path, failed)
    assert not record_run(tmp_path, failed)
    assert run_in(tmp_path)
    assert record_run(tmp_path, failed)
    states = [it["state"] for it in lines_of(tmp_path)]
    assert states == ["failed", "finished", "failed"]
    assert "cheese" in typed("--artifacts", tmp_path)


def test_order_is_that_of_the_file_whatever_the_clock_says(tmp_path, monkeypatch):
    for name, date in (("late", "2031-01-01T00:00:00+00:00"), ("back", "1999-01-01T00:00:00+00:00")):  # fmt: skip
        monkeypatch.setattr(logbook, "now", lambda date=date: date)
        monkeypatch.setattr(public, "now", lambda date=date: date)
        run_in(tmp_path, name)
        enter(tmp_path, [Given("late", 0.7 if name == "late" else 0.8)])
    assert [it["name"] for it in lines_of(tmp_path)] == ["back", "late"]
    assert [it["lb"] for it in read_logbook(tmp_path).scores] == [0.8]


def test_the_record_outlives_the_folder_and_a_folder_without_a_line_is_read(tmp_path):
    run_in(tmp_path)
    old = tmp_path / "old"
    old.mkdir()
    (old / "run.json").write_text(json.dumps(record(loss=0.4)))
    (old / "leaderboard.csv").write_text("round,model,raw,raw_se,posterior,posterior_se\n0,blend,0.8,0.1,0.4,0.1\n")  # fmt: skip
    newest, oldest = read_logbook(tmp_path).runs
    assert (newest["name"], oldest["name"], oldest["posterior"]) == ("demo", "old", 0.4)
    enter(tmp_path, [Given("old", 0.5)])
    assert band_of(read_logbook(tmp_path).scores).pairs[0]["cv"] == 0.4


def test_a_damaged_line_is_reported_and_passed_over(tmp_path):
    for seed in range(3):
        run_in(tmp_path, seed=seed)
    path = tmp_path / LOGBOOK
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace("0.5", "0.4", 1) + lines[2])
    assert [it["seed"] for it in lines_of(tmp_path)] == [2, 0]
    assert "line 2 is damaged" in typed("--artifacts", tmp_path)
    assert json.loads(typed("--artifacts", tmp_path, "--json"))["damaged"] == [2]


def test_members_are_described_with_their_seeds(tmp_path):
    params = DecoderParams(seeds=(0, 1), trainable_layers=2)
    settings = Settings(members=(Member("llm", "decoder", params),))
    seeds = {"llm": {"0": {"raw": 0.9, "posterior": 0.5}, "1": {"raw": 1.1, "posterior": 0.7}}}
    made = record(settings=settings, seeds=seeds, parameters={"smollm2": 134_515_008})
    rows = [{**board()[0], "model": "llm"}, *board()[1:]]
    record_run(tmp_path, describe("demo", made, rows))
    model = lines_of(tmp_path)[0]["models"][0]
    assert (model["backbone"], model["parameters"], model["epochs"]) == ("smollm2", 134_515_008, 2)
    assert model["posterior_spread"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert model["changed"] == {"trainable_layers": 2, "seeds": [0, 1]}
    assert lines_of(tmp_path)[0]["changed"]["members"] == ["llm"]
    told = typed("--artifacts", tmp_path, "--models")
    assert "135 M" in told
    assert "2 seeds: 0.5000 0.7000 (spread 0.1414)" in told


def test_the_commit_of_a_clone_and_of_its_further_work_trees(tmp_path):
    git = tmp_path / "clone" / ".git"
    (git / "worktrees" / "w").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(f"# pack-refs with: peeled\n{'a' * 40} refs/heads/main\n{'b' * 40} refs/heads/w\n")  # fmt: skip
    assert commit_of(git) == "a" * 40
    (git / "refs/heads").mkdir(parents=True)
    (git / "refs/heads/main").write_text("c" * 40 + "\n")
    assert commit_of(git) == "c" * 40
    (git / "worktrees/w/HEAD").write_text("ref: refs/heads/w\n")
    (git / "worktrees/w/commondir").write_text("../..\n")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / ".git").write_text(f"gitdir: {git}/worktrees/w\n")
    assert commit_of(tree / ".git") == "b" * 40
    (git / "HEAD").write_text("d" * 40)
    assert commit_of(git) == "d" * 40


def test_settings_at_their_defaults_are_no_choice():
    assert chosen(as_stored(Settings())) == {}


# public scores


def test_a_score_belongs_to_the_settings_it_was_made_with(tmp_path):
    run_in(tmp_path)
    typed("--artifacts", tmp_path, "--lb", "demo=0.9")
    run_in(tmp_path, seed=1)
    (new, old) = json.loads(typed("--artifacts", tmp_path, "--json"))["runs"]
    assert "lb" not in new
    assert old["lb"] == 0.9
    typed("--artifacts", tmp_path, "--lb", "demo=0.8", "--note", "of seed 1")
    (new, old) = json.loads(typed("--artifacts", tmp_path, "--json"))["runs"]
    assert (new["lb"], new["note"], old["lb"]) == (0.8, "of seed 1", 0.9)


def test_the_latest_score_counts_and_the_same_is_not_entered_twice(tmp_path):
    run_in(tmp_path)
    for lb in (0.9, 0.9, 0.7, 0.7):
        typed("--artifacts", tmp_path, "--lb", f"demo={lb}")
    assert (tmp_path / LOGBOOK).read_text().count('"kind": "score"') == 2
    (score,) = read_logbook(tmp_path).scores
    assert (score["lb"], score["cv"]) == (0.7, 0.5)


def test_models_and_what_was_trained_elsewhere(tmp_path):
    run_in(tmp_path)
    typed(
        "--artifacts", tmp_path, "--lb", "demo/lexical=0.9", "--lb", "a=b=0.855", "--cv", "a=b=1.00639",
        "--note", "row by row", "--note", "full",
    )  # fmt: skip
    elsewhere, model = read_logbook(tmp_path).scores
    assert (model["cv"], model["note"]) == (1.0, "row by row")
    assert (elsewhere["name"], elsewhere["cv"], elsewhere["note"]) == ("a=b", 1.00639, "full")
    typed("--artifacts", tmp_path, "--lb", "a=b=0.8")  # corrected; its CV stays
    assert read_logbook(tmp_path).scores[0]["cv"] == 1.00639
    told = typed("--artifacts", tmp_path, "--models")
    assert "0.9000" in told
    assert "elsewhere" in told


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--lb", "dmeo=0.7"], 66, r'no run or model "dmeo".*Did you mean "demo"\?'),
        (["--lb", "demo/lexcal=0.7"], 66, r'Did you mean "demo/lexical"\?'),
        (["--lb", "demo=0.7", "--lb", "nothing at all=1"], 66, "no run or model"),
        (["--lb", "demo"], 2, "write a name and a number"),
        (["--lb", "demo=x"], 2, "write a name and a number"),
        (["--lb", "demo=nan"], 2, "must be a number, not nan"),
        (["--lb", "=0.7"], 2, "write a name and a number"),
        (["--lb", "demo=0.7", "--lb", "demo=0.8"], 2, "given two scores"),
        (["--cv", "x=0.7"], 2, "comes without --lb"),
        (["--lb", "demo=0.7", "--cv", "dmo=0.7"], 2, 'Did you mean "demo"'),
        (["--lb", "demo=0.7", "--note", "a", "--note", "b"], 2, "one for each, in their order"),
        (["--note", "a"], 2, "--lb 0 times"),
        (["--lb", "two\nlines=0.7", "--cv", "two\nlines=1"], 2, "that can be printed"),
        (["--lb", "\u202eturned=0.7", "--cv", "\u202eturned=1"], 2, "that can be printed"),
        (["--lb", f"{'x' * 10_000}=0.7", "--cv", f"{'x' * 10_000}=1"], 2, "1 to 200 characters"),
        (["--lb", "demo=0.7", "--note", "x" * 10_001], 2, "10,001 characters"),
        (["dmo"], 66, r'nothing is called "dmo".*Did you mean "demo"'),
        (["--json", "--csv"], 2, "--json and --csv do not go together"),
        (["--sizes", "--lb", "demo=0.7"], 2, "--sizes and --lb do not go together"),
        (["--sizes", "--csv"], 2, "--sizes and --csv do not go together"),
        (["--sizes", "--lb-plot", "a.svg"], 2, "--sizes and --lb-plot do not go together"),
        (["--lb-plot", "a.svg", "--markdown"], 2, "--lb-plot and --markdown do not go together"),
        (["--lb-plot", "a.pdf"], 2, r'ends with "\.svg" or "\.png"'),
        (["--lb-plot", "a.svg"], 66, "no public score"),
    ],
)
def test_what_makes_no_sense_is_a_sentence_and_enters_nothing(tmp_path, options, code, sentence):

    run_in(tmp_path)
    before = (tmp_path / LOGBOOK).read_bytes()
    said = typed("--artifacts", tmp_path, *options, code=code)
    assert re.search(sentence, said, re.S), said
    assert len(said) < 600
    assert (tmp_path / LOGBOOK).read_bytes() == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "artifacts").write_text("a file in its place")
    said = typed("--artifacts", tmp_path / "artifacts", "--lb", "a=0.7", "--cv", "a=1", code=74)
    assert "failed" in said


# the band


def scores(cvs, lbs, errors=None):
    return [
        {"name": f"s{i}", "run": None, "data": None, "train": None, "test": None, "cv": float(cv), "lb": float(lb),
         "cv_se": errors, "note": ""}
        for i, (cv, lb) in enumerate(zip(cvs, lbs, strict=True))
    ]  # fmt: skip


def test_the_prediction_interval_is_that_of_the_textbook():
    """Beside the covariance matrix of ordinary least squares."""
    from scipy.stats import t

    draw = np.random.default_rng(0)
    cv = draw.uniform(0.8, 1.2, 9)
    lb = 0.1 + 0.8 * cv + draw.normal(0, 0.02, 9)
    band = band_of(scores(cv, lb))
    X = np.stack([np.ones(9), cv], axis=1)
    beta, *_ = np.linalg.lstsq(X, lb, rcond=None)
    variance = ((lb - X @ beta) ** 2).sum() / 7
    for x in (0.7, 1.0, 1.4):
        row = np.array([1, x])
        half = t.ppf(0.975, 7) * np.sqrt(variance * (1 + row @ np.linalg.inv(X.T @ X) @ row))
        assert band.at(x) == pytest.approx((row @ beta - half, row @ beta, row @ beta + half))


def test_one_in_twenty_is_outside_by_chance_and_one_that_is_far_off_always():
    draw = np.random.default_rng(1)
    n_outside = n_far = 0
    for _ in range(150):
        cv = draw.uniform(0.8, 1.2, 8)
        lb = cv - 0.2 + draw.normal(0, 0.02, 8)
        n_outside += len(band_of(scores(cv, lb)).outside)
        lb[3] += 0.4
        n_far += "s3" in band_of(scores(cv, lb)).outside
    assert 0.03 < n_outside / (150 * 8) < 0.07
    assert n_far == 150


def test_few_pairs_are_judged_by_the_error_of_cv():
    pairs = scores([1.0, 0.9], [1.05, 0.6], errors=0.03)
    pairs[0] |= {"train": 100, "test": 50}
    pairs[1] |= {"train": 100, "test": 50}
    band = band_of(pairs)
    assert band.kind == "error"
    assert band.outside == ("s1",)  # 0.3 off, where 1.96 * 0.03 * sqrt(3) = 0.10 is to be expected
    assert public.expected_half(pairs[0]) == pytest.approx(1.959964 * 0.03 * np.sqrt(3))


@pytest.mark.parametrize(
    ("cvs", "error", "kind"),
    [
        ([1.0, 1.1], None, "none"),
        ([1.0, 1.1, 1.2], None, "regression"),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], None, "none"),
        ([1.0, 1.1, 1.2, 1.3], 0.1, "error"),
        ([1.0, 1.1, 1.2, 1.3, 1.4], 0.1, "regression"),
    ],
)
def test_which_band_there_is(cvs, error, kind):
    band = band_of(scores(cvs, np.array(cvs) - 0.1 + 0.01 * np.sin(range(len(cvs))), error))
    assert band.kind == kind
    assert band.told


def test_scores_on_one_line_are_all_inside_and_other_data_is_left_out(tmp_path):
    cvs = np.array([1.0, 0.9, 1.1, 0.8, 1.05])
    pairs = scores(cvs, 2 * cvs - 1)
    assert band_of(pairs).outside == ()
    pairs[0]["data"] = "new"
    pairs.append({**pairs[1], "name": "of another contest", "data": "old"})
    assert band_of(pairs).left_out == ("of another contest",)


# how it is shown

HOSTILE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(name=HOSTILE, note=HOSTILE, cv=st.floats(0.01, 1e6), lb=st.floats(-1e6, 1e6))
def test_pictures_and_tables_hold_any_name(tmp_path_factory, name, note, cv, lb):
    folder = tmp_path_factory.mktemp("hostile")
    book = logbook.Logbook(
        [describe(name, record(), board(), note)], [{**scores([cv], [lb])[0], "name": name, "note": note, "kind": "score", "date": "2026"}], (), folder,
    )  # fmt: skip
    ET.fromstring(svg(band_of(book.scores)))
    text = listing.as_text(book, models=True)
    assert all(line.isprintable() for line in text.replace(str(folder), "").split("\n"))
    assert max(map(len, text.replace(str(folder), "").split("\n"))) <= listing.WIDTH
    (_, *table) = csv.reader(io.StringIO(listing.as_csv(book), newline=""))
    assert len(table) == 2
    pages = listing.as_markdown(book, models=True).rstrip("\n").split("\n")
    assert len(pages) == 2 + 2 + 3
    json.loads(listing.as_json(book))


def test_the_table_fits_a_terminal_and_wide_letters_count_twice(tmp_path):
    from rich.cells import cell_len

    name = "语言模型" * 8
    entry = describe(name, record(seed=3), board(test_posterior=0.6), "")
    record_run(tmp_path, entry | {"changed": {f"setting{i}": "é" * 50 for i in range(9)}})
    for line in typed("--artifacts", tmp_path, "--models").splitlines():
        assert cell_len(line) <= 100


def test_filters_by_name(tmp_path):
    for name in ("demo", "big", "bigger"):
        run_in(tmp_path, name)
    runs = json.loads(typed("--artifacts", tmp_path, "--json", "big*"))["runs"]
    assert [it["name"] for it in runs] == ["bigger", "big"]
    assert "demo" not in typed("--artifacts", tmp_path, "big")


def test_the_same_picture_twice(tmp_path):
    enter(tmp_path, [Given(name, lb, cv) for name, cv, lb in TEAM])
    band = band_of(read_logbook(tmp_path).scores)
    plot(band, tmp_path / "one.svg")
    plot(band, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    shown = ET.fromstring((tmp_path / "one.svg").read_text())
    assert len(shown.findall(".//{*}circle")) == 3
    assert len(shown.findall(".//{*}polygon")) == 1


def test_png_needs_matplotlib(tmp_path):
    enter(tmp_path, [Given(name, lb, cv) for name, cv, lb in TEAM])
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        said = typed("--artifacts", tmp_path, "--lb-plot", tmp_path / "a.png", code=66)
        assert "pip install matplotlib" in said
    else:
        typed("--artifacts", tmp_path, "--lb-plot", tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


PAGE = Path(__file__).parents[2] / "docs/logbook.md"


def test_the_example_of_the_page(tmp_path, monkeypatch):
    """What is typed there prints what stands there, and draws the page's picture."""
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8").split("### Example")[1]
    commands = re.findall(r"^stackllm runs (.*)$", text, re.M)
    assert len(commands) == 8
    for command in commands:
        told = typed(*shlex.split(command))
    assert told == re.search(r"```text\n(.*?)```", text, re.S)[1]
    drawn = (tmp_path / "logbook.svg").read_text(encoding="utf-8")
    assert drawn == PAGE.with_suffix(".svg").read_text(encoding="utf-8")
