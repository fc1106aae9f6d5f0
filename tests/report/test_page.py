"""The report of a run: what it says, that texts are inert in it, and whom it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from browser import Browser, installed
from click.testing import CliRunner
from conftest import write_table
from hypothesis import given
from hypothesis import strategies as st

import stackllm
from stackllm import pipeline
from stackllm.cli import cli
from stackllm.crossfit.pseudo import PseudoParams
from stackllm.errors import DataError, MissingInputError, StorageError, UsageError
from stackllm.group.posterior import posterior
from stackllm.members.boosting import BoostingParams
from stackllm.members.lexical import LexicalParams
from stackllm.members.registry import Member
from stackllm.metrics import log_loss, mean_with_error, row_losses
from stackllm.report.changes import as_stored
from stackllm.report.logbook import LOGBOOK, describe, record_run
from stackllm.report.page import browser, checks, panels, render, svg, telltales
from stackllm.report.page.finished import read_finished
from stackllm.report.page.gather import gather
from stackllm.report.page.render import as_json, as_markdown, page
from stackllm.report.page.report import report
from stackllm.report.public import Given, enter
from stackllm.settings import RunParams, Settings
from stackllm.store.digest import file_digest
from stackllm.tables.contest import TableParams
from stackllm.workspace import open_workspace

HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "</script><script>document.title = 'taken'</script>",
    "<!-- <script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "<svg onload=alert(1)>",
    "javascript:alert(1)",
    "{{ 7 * 7 }} {% raw %} {# no #}",
    "${7*7} `x`",
    "\u202eright to left\u202c \u2066isolated",
    "عربي ونص طويل",
    "NUL \0 and bell \x07 and \x9b31m",
    "\u2028 and \u2029 end lines",
    "emoji 👩🏽\u200d🚀 and combining e\u0301\u0301\u0301",
    "'\"><b>bold</b>",
    "| a | table |\n# head\n[link](javascript:alert(1))",
    "&lt;already&gt; &amp; escaped",
    "=cmd|' /C calc'!A0",
    "x" * 5_000,
    " \t\r\n ",
    "]]><![CDATA[",
    "<body onload=alert(1)>",
    "<iframe src=javascript:alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<object data=data:text/html,x>",
    "<embed src=//example.org/x>",
    "<link rel=stylesheet href=//example.org/x.css>",
    "<style>body{display:none}</style>",
    "</style><script>alert(1)</script>",
    "<meta http-equiv=refresh content='0;url=//example.org'>",
    "<base href=//example.org>",
    "<form action=//example.org><input name=x autofocus onfocus=alert(1)>",
    "<math><mi xlink:href=javascript:alert(1)>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<svg><script>alert(1)</script></svg>",
    "</svg></table></main></body></html>",
    "<details open ontoggle=alert(1)>",
    "<video><source onerror=alert(1)>",
    "<a href=javascript:alert(1)>here</a>",
    "<textarea></script><title>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<template><script>alert(1)</script></template>",
    "<ScRiPt>alert(1)</sCrIpT >",
    "<script\n>alert(1)</script\n>",
    "<<script>script>alert(1)<</script>/script>",
    "%3Cscript%3Ealert(1)%3C/script%3E",
    "\\u003cscript\\u003e and \\x3cscript\\x3e",
    "\\",
    "\\\"",
    "\"}]}; alert(1); //",
    "');alert(1)//",
    "-->",
    "--!><script>alert(1)</script>",
    "\ufeff byte order marks \ufffe \uffff",
    "\U0010ffff and \ue000",
    "zero\u200bwidth\u200cjoin\u2060ers\ufeff",
    "Z\u0351\u0358a\u0321l\u0335\u0317g\u0316o\u031b " * 20,
    "ﷺ" * 50,
    "\u3000ideographic 　 spaces\u00a0",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07",
    "a\r\nb\rc\x0bd\x0ce",
]  # fmt: skip


def planted(
    root, n_groups, classes, *, quota=1, strength=1.5, texts=None, until="stack", seed=0, test=True
):
    """A finished run as it stands on disk, of rows whose scores are drawn by us."""
    draw = np.random.default_rng(seed)
    n_classes = len(classes)
    labels = np.tile(np.repeat(np.arange(n_classes), quota), n_groups)
    groups = np.repeat(np.arange(n_groups), n_classes * quota)
    n = len(labels)
    ids = [str(i) for i in range(n)]
    texts = texts or [f"answer {i}, of {classes[j]}" for i, j in enumerate(labels)]
    work = root.parent.parent
    work.mkdir(parents=True, exist_ok=True)
    table = pl.DataFrame(
        {
            "id": ids,
            "Question": [f"What of case {i}? {texts[i]}" for i in groups],
            "Response": [texts[i % len(texts)] for i in range(n)],
            "target": [classes[j] for j in labels],
        }
    )
    table.write_parquet(work / "train.parquet")
    inputs = [work / "train.parquet"]
    if test:
        table.head(2 * n_classes * quota).drop("target").write_parquet(work / "test.parquet")
        inputs.append(work / "test.parquet")
    data = TableParams(
        train=str(inputs[0]), test=str(inputs[1]) if test else None, quota=quota, id="id"
    )
    model_names = ["lexical", "skeleton", *(["stack", "blend"] if until != "features" else [])]
    predictions = root / "predictions"
    (predictions / "round0" / "posteriors").mkdir(parents=True)

    def frame(matrix, which):
        return pl.DataFrame({"row_id": which, **dict(zip(classes, matrix.T, strict=True))})

    board = []
    for extra, name in enumerate(model_names):
        scores = draw.normal(size=(n, n_classes))
        scores[np.arange(n), labels] += strength + 0.2 * extra
        raw = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        final = posterior(raw, groups, quota=quota)
        frame(raw, ids).write_parquet(predictions / "round0" / f"{name}_oof.parquet")
        frame(final, ids).write_parquet(
            predictions / "round0" / "posteriors" / f"{name}_oof.parquet"
        )
        loss, error = mean_with_error(row_losses(final, labels), groups)
        raw_loss, raw_error = mean_with_error(row_losses(raw, labels), groups)
        board.append(
            {"round": 0, "model": name, "raw": raw_loss, "raw_se": raw_error, "posterior": loss, "posterior_se": error,
             "accuracy": float((final.argmax(axis=1) == labels).mean()), "auc": float("nan")}
        )  # fmt: skip
    if until != "features":
        frame(final, ids).write_parquet(root / "oof.parquet")
        board = [row | {"behind": row["posterior"] - loss, "behind_se": 0.01} for row in board]
    pl.DataFrame(board).write_csv(root / "leaderboard.csv")
    names = pl.Series(classes, dtype=pl.String).gather(labels)
    pl.DataFrame(
        {"row_id": ids, "group_id": [f"g{i}" for i in groups], "label": names, "fold": groups % 5}
    ).write_parquet(predictions / "rows_oof.parquet")
    pl.DataFrame(
        schema={"row_id": pl.String, "group_id": pl.String, "part": pl.Int32}
    ).write_parquet(predictions / "rows_test.parquet")
    settings = Settings(data=data, encoder=None, members=(Member("lexical", "lexical", LexicalParams()),))  # fmt: skip
    best = 0 if until != "features" else None
    record = {
        "settings": as_stored(settings), "classes": list(classes), "best_round": best, "until": until,
        "oof_log_loss": {"round 0" if best == 0 else name: loss}, "n_train": n, "n_test": 0,
        "inputs": {str(path): file_digest(path) for path in inputs}, "backbones": {}, "stackllm": "0.1.0",
        "python": "3.11", "versions": {}, "machine": "x86_64", "notes": [],
    }  # fmt: skip
    (root / "run.json").write_text(json.dumps(record))
    (root / "state.json").write_text('{"state": "finished"}')
    return root


def told_of(root):
    return gather(read_finished(root.name, root.parent))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run as it is made, of one lexical member, with a round of pseudo-labels."""
    folder = write_table(tmp_path_factory.mktemp("page"), 24, 8)
    play(folder, "demo", "pseudo")
    return folder / "artifacts" / "demo"


def play(folder, name, until, test="test.csv"):
    settings = Settings(
        data=TableParams(train=str(folder / "train.csv"), test=test and str(folder / test)),
        run=RunParams(folds=2),
        encoder=None,
        members=(Member("lexical", "lexical", LexicalParams(views=("words",))),),
        stack=BoostingParams(n_trees=5, n_seeds=1, min_leaf_rows=3),
        pseudo=PseudoParams(rounds=1),
    )
    with open_workspace(name, folder / "artifacts", n_jobs=1, quiet=True) as workspace:
        pipeline.run(settings, workspace, until=until)
    return folder / "artifacts" / name


class Elements(HTMLParser):
    """Every element of a page, with its attributes and text."""

    def __init__(self):
        super().__init__()
        self.found, self.inside = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))
        self.inside.append(self.found[-1])

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop()[0] != tag:  # some are never closed
            pass

    def handle_data(self, data):
        if self.inside:
            self.inside[-1][2].append(data)


def elements(text):
    parser = Elements()
    parser.feed(text)
    return [(tag, attrs, "".join(said)) for tag, attrs, said in parser.found]


KNOWN_TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "nav", "ul", "li", "a", "main", "section", "h1", "h2",
    "h3", "p", "div", "span", "b", "small", "table", "thead", "tbody", "tr", "th", "td", "button", "label", "input",
    "select", "option", "svg", "path", "circle", "rect", "polyline", "text", "noscript", "pre", "code", "footer", "script",
    "polygon", "clippath",
}  # fmt: skip


def assert_inert(text):
    """Only our own elements, no attribute that runs or loads, and the two scripts that we wrote."""
    every = elements(text)
    assert {tag for tag, _, _ in every} <= KNOWN_TAGS
    for _, attrs, _ in every:
        assert not any(
            name.startswith("on") or name in ("style", "src", "srcdoc") for name in attrs
        )
        assert re.fullmatch(r"#[a-z]+", attrs.get("href") or "#x")
    scripts = [(attrs, said) for tag, attrs, said in every if tag == "script"]
    (data, held), (plain, ours) = scripts
    assert data["type"] == "application/json"
    assert not plain
    assert "<" not in held
    (style,) = [said for tag, _, said in every if tag == "style"]
    (policy,) = [attrs["content"] for tag, attrs, _ in every if attrs.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for rule, content in (("script-src", ours), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    return json.loads(held)


def test_the_page_says_what_the_arrays_say(tmp_path):
    root = planted(tmp_path / "w" / "artifacts" / "demo", 30, ["a", "b", "c"])
    told = told_of(root)
    run = read_finished("demo", root.parent)
    labels = run.design.labels
    assert told["standing"]["posterior"]["value"] == pytest.approx(
        log_loss(run.posterior, labels), abs=1e-6
    )
    assert told["standing"]["brought"]["value"] == pytest.approx(
        log_loss(run.raw, labels) - log_loss(run.posterior, labels), abs=2e-6
    )
    matrix = np.array(told["confusion"]["posterior"])
    expected = [
        [int(((labels == i) & (run.posterior.argmax(axis=1) == j)).sum()) for j in range(3)]
        for i in range(3)
    ]
    assert matrix.tolist() == expected
    assert sum(it["rows"] for it in told["reliability"]["raw"]) == len(labels)
    hits = sum(it["rows"] * it["right"] for it in told["reliability"]["raw"])
    assert hits == pytest.approx((run.raw.argmax(axis=1) == labels).sum(), abs=1e-3)
    losses = [it["posterior"] for it in told["browser"]["groups"]]
    assert losses == sorted(losses, reverse=True)
    assert np.mean(losses) == pytest.approx(told["standing"]["posterior"]["value"], abs=1e-6)
    for by in ("class", "fold", "length"):
        parts = [it for it in told["slices"] if it["by"] == by]
        assert sum(it["rows"] for it in parts) == len(labels)
        mean = sum(it["rows"] * it["loss"]["value"] for it in parts) / len(labels)
        assert mean == pytest.approx(told["standing"]["posterior"]["value"], abs=1e-5)
    held = assert_inert(page(told))
    first = held["groups"][0]["members"][0]
    row = run.ids.to_list().index(first["id"])
    assert first["before"] == np.rint(1000 * run.raw[row]).astype(int).tolist()
    assert first["text"] == run.table.train["response"][row]


def test_a_run_as_it_is_made_has_every_panel_and_the_same_bytes_twice(real, tmp_path):
    written = report("demo", real.parent)
    path, told = written.path, written.told
    assert path == real / "report.html"
    assert told["rounds"][1]["verdict"]
    assert told["pseudo"][0]["rows"] > 0
    assert told["pseudo"][0]["turned"] is None
    assert sum(told["pseudo"][0]["histogram"]) == told["pseudo"][0]["labels"]
    assert len(told["weights"]["weights"][0]) == 2
    assert "Here" in {it["word"] for it in told["voices"][1]["words"]}  # as the list-maker begins
    text = path.read_text(encoding="utf-8")
    held = assert_inert(text)
    assert any(member["marks"] for group in held["groups"] for member in group["members"])
    for name in ("verdict", "checks", "leaderboard", "rounds", "group", "browser", "voices", "confusion", "reliability", "members",
                 "slices", "pseudo", "made"):  # fmt: skip
        assert f'<section id="{name}"' in text
    again = stackllm.open(real).report(tmp_path / "copy.html").path
    for end in (".html", ".md", ".json"):
        assert again.with_suffix(end).read_bytes() == path.with_suffix(end).read_bytes()
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == told
    ((tag, attrs, _),) = elements(written._repr_html_())
    assert (tag, attrs["sandbox"], attrs["srcdoc"]) == ("iframe", "allow-scripts", text)


def test_hostile_texts_are_inert(tmp_path):
    assert len({*HOSTILE}) >= 60
    classes = [f"{it[:40]} {i}" for i, it in enumerate(HOSTILE[:6])]
    texts = [HOSTILE[i % len(HOSTILE)] + f" {i}" for i in range(2 * len(HOSTILE))]
    texts[7] = "long " * 2_000_000
    root = planted(tmp_path / "w" / "artifacts" / "demo", 20, classes, texts=texts)
    told = told_of(root)
    text = page(told)
    assert_inert(text)
    assert len(text.encode()) < 400_000
    assert "\0" not in text + as_markdown(told)
    assert "\u202e" not in text
    assert "<script" not in as_markdown(told).replace("<!--", "")
    assert json.loads(as_json(told)) == told


@given(st.text())
def test_any_text_keeps_its_letters_in_place(text):
    shown = browser.visible(text, 50)
    assert len(shown) == min(len(text), 50)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)


WORDS = st.lists(st.sampled_from(["ab", "a", "\n\n", "  ", "été", "👩", ".", "-"]), max_size=30)


@given(WORDS.map("".join), st.integers(0, 2**20))
def test_marks_are_the_words_of_most_worth(text, seed):
    """Spreading each n-gram letter by letter is the oracle."""
    draw = np.random.default_rng(seed)
    ngrams = [*dict.fromkeys(text[i : i + 2] for i in range(len(text) - 1))] or ["ab"]
    values = draw.normal(size=(len(ngrams), 3))
    scores = pl.DataFrame({"view": ["characters"] * len(ngrams), "ngram": ngrams}).with_columns(
        pl.Series(str(j), values[:, j]) for j in range(3)
    )
    made = telltales.marks(text, scores)
    ends = [0, *(it for start, end, _, _ in made for it in (start, end))]
    assert ends == sorted(ends)
    assert ends[-1] <= len(text)
    if re.search(r"\s\s", text):  # which count as one space
        return
    letters = np.zeros((len(text), 3))
    for ngram, worth in zip(ngrams, values, strict=True):
        at = [i for i in range(len(text) - 1) if text[i : i + 2] == ngram]
        for i in at:
            letters[i : i + 2] += worth / (2 * len(at))
    best = max(
        (
            letters[it.start() : it.end()].sum(axis=0).max()
            for it in re.finditer(r"\w+|[^\w\s]", text)
        ),
        default=0.0,
    )
    assert bool(made) == (best > 1e-9)
    for start, end, j, strength in made:
        worth = letters[start:end].sum(axis=0)
        assert worth[j] == pytest.approx(worth.max())
        assert strength < 3 or worth[j] > 0.6 * best


def test_the_word_that_speaks_is_marked_for_its_class():
    table = pl.DataFrame(
        {
            "view": ["words", "words"],
            "ngram": ["sun shines", "never"],
            "0": [0.0, 0.1],
            "1": [0.9, 0.0],
        }
    )
    assert telltales.marks("The sun shines, never fails.", table) == [
        (4, 7, 1, 2), (8, 14, 1, 3), (16, 21, 0, 1),
    ]  # fmt: skip


def test_public_scores_of_the_logbook_are_drawn(tmp_path):
    root = planted(tmp_path / "w" / "artifacts" / "demo", 8, ["a", "b", "c"])
    assert told_of(root)["public"] is None
    team = [("<b>one", 1.028, 0.925), ("two", 1.006, 0.855), ("three", 0.945, 0.736)]
    enter(root.parent, [Given(name, lb, cv) for name, cv, lb in team])
    told = told_of(root)
    assert told["public"]["kind"] == "regression"
    assert not {"date", "note"} & {*told["public"]["pairs"][0]}
    text = page(told)
    assert_inert(text)
    assert 'id="public"' in text


def test_helped_and_hurt_are_counted_once():
    losses = [(1.0, 0.5), (1.0, 1.5), (0.7, 0.7), (0.1, 0.4)]
    told = render._helped([{"raw": raw, "posterior": after} for raw, after in losses])
    assert (told["gain"], told["cost"]) == (2, 2)
    assert [[it["place"] for it in rows] for _, rows in told["most"]] == [[1, 3], [0, 2]]


@pytest.mark.parametrize(("until", "test"), [("features", "test.csv"), ("stack", None)])
def test_runs_that_end_early_or_have_no_test_rows(real, until, test):
    root = play(real.parent.parent, f"{until}_only", until, test)
    told = told_of(root)
    assert told["pseudo"] == []
    assert told["standing"]["n_test"] == (24 if test else 0)
    assert told["standing"]["posterior"]["value"] == pytest.approx(
        min(row["posterior"] for row in told["leaderboard"] if row["submitted"]), abs=1e-6
    )
    assert_inert(page(told))
    assert "\n| lexical | 0 |" in as_markdown(told)


@pytest.mark.parametrize("n_classes", [2, 20])
def test_few_and_many_classes(tmp_path, n_classes):
    classes = [f"model {i}" for i in range(n_classes)]
    root = planted(tmp_path / "w" / "artifacts" / "demo", 6, classes)
    told = told_of(root)
    assert_inert(page(told))
    assert len(told["confusion"]["raw"]) == n_classes


def test_one_group_has_scores_without_errors(tmp_path):
    root = planted(tmp_path / "w" / "artifacts" / "demo", 1, ["a", "b", "c"])
    told = told_of(root)
    assert told["standing"]["posterior"]["error"] is None
    assert told["checks"][0]["code"] == "SLM01"
    assert told["checks"][0]["severity"] == "issue"
    assert_inert(page(told))
    as_markdown(told)


def test_stage_one_alone_is_told_of_its_best_member(tmp_path):
    root = planted(
        tmp_path / "w" / "artifacts" / "demo", 12, ["a", "b"], until="features", test=False
    )
    told = told_of(root)
    assert told["model"] == "skeleton"
    assert (told["rounds"], told["pseudo"], told["weights"]) == ([], [], None)
    assert "ends with stage one" in told["lacks"][0]
    text = page(told)
    assert_inert(text)
    assert "The best model, skeleton, has" in text


def test_six_thousand_rows_fit_the_budget(tmp_path):
    classes = [f"model-{i}" for i in range(7)]
    texts = [f"{i}: " + "words of some length, é; " * 60 for i in range(857 * 7)]
    root = planted(tmp_path / "w" / "artifacts" / "demo", 857, classes, texts=texts)
    told = told_of(root)
    assert told["browser"]["total"] == 857
    size = len(page(told).encode())
    assert size < 3 * 2**20
    script = len((Path(browser.__file__).parent / "page.js").read_bytes())
    assert script < 25_000


def test_a_model_whose_units_are_gone_leaves_words_unmarked(real, tmp_path):
    copy = tmp_path / "demo"
    shutil.copytree(real, copy)
    shutil.rmtree(copy / "members")
    told = told_of(copy)
    assert told["lacks"][0].startswith("No words are marked: ")
    assert told["weights"] == told_of(real)["weights"]
    assert not any(row["marks"] for group in told["browser"]["groups"] for row in group["members"])
    assert_inert(page(told))


def test_texts_that_changed_are_left_out_and_said(tmp_path):
    root = planted(tmp_path / "w" / "artifacts" / "demo", 4, ["a", "b"])
    (tmp_path / "w" / "train.parquet").unlink()
    told = told_of(root)
    assert "train.parquet is not there" in told["lacks"][0]
    assert "text" not in told["browser"]["groups"][0]["members"][0]
    assert_inert(page(told))


def found(root):
    return {it["code"]: it["sentence"] for it in told_of(root)["checks"]}


def rewrite(root, name, change):
    """Change the predictions of the blend, before or after the group."""
    path = root / "predictions" / "round0" / name
    frame = pl.read_parquet(path)
    matrix = change(frame.drop("row_id").to_numpy())
    columns = dict(zip(frame.columns[1:], matrix.T, strict=True))
    pl.DataFrame({"row_id": frame["row_id"], **columns}).write_parquet(path)


def sharpened(matrix):
    sharp = matrix**8
    return sharp / sharp.sum(axis=1, keepdims=True)


def test_a_sound_run_has_nothing_to_point_at(tmp_path):
    root = planted(tmp_path / "w" / "artifacts" / "demo", 120, ["a", "b", "c"])
    rewrite(
        root,
        "blend_oof.parquet",
        lambda matrix: matrix**0.8 / (matrix**0.8).sum(axis=1, keepdims=True),
    )
    codes = found(root)
    assert "SLM01" not in codes
    assert "SLM03" not in codes
    assert "SLM05" not in codes
    assert "SLM08" not in codes


def test_checks_find_what_was_planted(tmp_path):
    root = planted(tmp_path / "w" / "artifacts" / "demo", 60, ["a", "b", "c"])
    rewrite(root, "blend_oof.parquet", sharpened)
    codes = found(root)
    assert "60 training groups" in codes["SLM01"]
    assert "Row probabilities are over-confident" in codes["SLM02"]

    def blind(matrix):
        halves = matrix[:, :2].mean(axis=1)
        return np.column_stack([halves, halves, matrix[:, 2]])

    rewrite(root, "blend_oof.parquet", blind)
    assert "a and b (50%" in found(root)["SLM05"]
    record = json.loads((root / "run.json").read_text())
    record["settings"]["data"]["quota"] = 2
    (root / "run.json").write_text(json.dumps(record))
    assert "The quota is 2" in found(root)["SLM08"]
    rows = root / "predictions" / "rows_oof.parquet"
    pl.read_parquet(rows).with_columns(group_id=pl.lit("one")).write_parquet(rows)
    assert "In 1 of 1 training groups" in found(root)["SLM03"]


def test_a_member_that_has_time_but_no_weight_and_labels_that_turn():
    told = {
        "weights": {"models": ["big", "small"], "mean": [0.0, 0.9]},
        "leaderboard": [{"model": "big", "seconds": 90.0}, {"model": "small", "seconds": 10.0}],
        "pseudo": [{"round": 1, "turned": None}, {"round": 2, "turned": 0.25}],
    }
    assert next(checks._idle_members(told))[1].endswith("all the same): big (90 s).")
    assert next(checks._turned(told))[1].startswith("25% of the pseudo-labels of round 2")


def test_scores_on_test_rows_are_held_against_those_out_of_fold(tmp_path):
    root = planted(tmp_path / "w" / "artifacts" / "demo", 120, ["a", "b", "c"])
    record = json.loads((root / "run.json").read_text())
    board = pl.read_csv(root / "leaderboard.csv")
    for gap, said in ((0.05, False), (0.9, True)):
        scored = [
            {**row, "seconds": 1.0, "test_one_fold": row["posterior"] + gap, "test_se": 0.1}
            for row in board.to_dicts()
        ]
        (root.parent / LOGBOOK).unlink(missing_ok=True)
        record_run(root.parent, describe("demo", record, scored))
        assert ("SLM06" in found(root)) == said
    assert "worse by 0.900" in found(root)["SLM06"]


def test_every_check_and_panel_has_its_place_in_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    heads = [
        line.lstrip("# ").lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("###")
    ]
    assert heads == [checks.anchor(code) for code in checks.TITLES]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low, width):
    made = svg.ticks(low, low + width)
    assert len(made) <= 6
    assert all(
        low - 1e-6 * width <= it <= low + width * 1.000001 for it in made
    ) or width < 1e-9 * abs(low)


def test_numbers_are_those_that_json_can_hold():
    told = panels.rounded({"a": [math.nan, 1 / 3, -0.0], "b": (np.float64(2.0), True, "x")})
    assert json.dumps(told) == '{"a": [null, 0.333333, 0.0], "b": [2.0, true, "x"]}'


def typed(*arguments):
    result = CliRunner().invoke(cli, ["report", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_the_command_says_verdict_and_checks(real, tmp_path):
    output = tmp_path / "new" / "page.html"
    told = typed("demo", "--artifacts", real.parent, "-o", output)
    assert told.splitlines()[-1] == f"report: {output}"
    assert "SLM01 few groups" in told
    summary = json.loads(typed("demo", "--artifacts", real.parent, "--json"))
    assert summary["verdict"] == told.splitlines()[:3]


def test_wrong_commands_end_in_one_sentence(real, tmp_path):
    artifacts = ("--artifacts", real.parent)
    with pytest.raises(MissingInputError, match=r'no run "dema" in .*Did you mean "demo"'):
        typed("dema", *artifacts)
    with pytest.raises(MissingInputError, match="Make one with stackllm run"):
        typed("demo", "--artifacts", tmp_path)
    with pytest.raises(
        StorageError, match=r"this is a folder. Name a file inside it with --output"
    ):
        typed("demo", *artifacts, "-o", tmp_path)
    with pytest.raises(UsageError, match=r"ends in \.html"):
        typed("demo", *artifacts, "-o", tmp_path / "page.json")
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.md: this file is no report"):
        typed("demo", *artifacts, "-o", tmp_path / "notes.html")
    assert notes.read_text() == "mine"
    with pytest.raises(UsageError, match=r"run\.json: this file is no report"):
        typed("demo", *artifacts, "-o", real / "run.html")
    half = tmp_path / "half"
    half.mkdir()
    (half / "state.json").write_text('{"state": "running"}')
    with pytest.raises(MissingInputError, match=r"was interrupted. Run the command"):
        typed("half", "--artifacts", tmp_path)
    (half / "state.json").write_text('{"state": "finished"}')
    (half / "run.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be read. Run the command"):
        typed("half", "--artifacts", tmp_path)
    (half / "state.json").write_text("{")
    with pytest.raises(MissingInputError, match=r"left no result. Run the command"):
        typed("half", "--artifacts", tmp_path)
    root = planted(tmp_path / "w" / "artifacts" / "demo", 4, ["a", "b"])
    (root / "predictions" / "round0" / "stack_oof.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=r"stack_oof\.parquet: it cannot be read. Run the command"):
        typed("demo", "--artifacts", root.parent)


@pytest.mark.skipif(not installed(), reason="no Chromium is installed; CHROMIUM names one")
def test_a_browser_draws_sorts_filters_and_opens(tmp_path):
    texts = [HOSTILE[i % len(HOSTILE)] + f" {i}" for i in range(90)]
    root = planted(tmp_path / "w" / "artifacts" / "demo", 30, ["a", "b", "<b>c"], texts=texts)
    path = report("demo", root.parent).path
    with Browser(tmp_path / "profile") as browser:
        browser.open(path)
        assert browser.complaints() == []
        assert browser.requests() == [path.resolve().as_uri()]
        assert browser.ask("document.title") == "demo: stackllm report"
        assert browser.ask("document.querySelectorAll('#groups .open').length") == 25
        assert browser.ask("document.querySelectorAll('#groups .resp').length") == 3
        assert (
            browser.ask(
                "document.querySelectorAll('#groups b, #groups img, #groups script').length"
            )
            == 0
        )
        names = "[...document.querySelectorAll('#board tbody tr')].filter(r => !r.hidden).map(r => r.cells[0].firstChild.textContent)"  # fmt: skip
        browser.ask("document.querySelector('#board th button').click()")
        assert browser.ask(names) == ["blend", "lexical", "skeleton", "stack"]
        browser.ask("document.querySelector('#board th button').click()")
        assert browser.ask(names) == ["stack", "skeleton", "lexical", "blend"]
        browser.ask(
            "{const i = document.querySelector('[data-for]'); i.value = 'lex'; i.dispatchEvent(new Event('input'))}"
        )
        assert browser.ask(names) == ["lexical"]
        browser.ask("document.getElementById('more').click()")
        assert browser.ask("document.querySelectorAll('#groups .open').length") == 30
        browser.ask(
            "document.querySelectorAll('#groups [aria-expanded=false]').forEach(b => b.click())"
        )
        assert browser.ask("document.querySelectorAll('#groups .resp').length") == 90
        tags = browser.ask(
            "[...new Set([...document.querySelectorAll('#groups *')].map(e => e.tagName))].join(' ')"
        )
        assert {*tags.split()} <= {
            "TR",
            "TD",
            "TH",
            "TABLE",
            "CAPTION",
            "DIV",
            "BUTTON",
            "SPAN",
            "H3",
            "P",
            "MARK",
        }
        assert browser.ask("document.title") == "demo: stackllm report"
        browser.ask(
            "document.querySelectorAll('#groups [aria-expanded=true]').forEach(b => b.click())"
        )
        browser.ask(
            "document.querySelector('circle[data-g=\"29\"]').dispatchEvent(new Event('click'))"
        )
        assert browser.ask("document.activeElement.dataset.group") == "29"
        assert browser.ask("document.activeElement.getAttribute('aria-expanded')") == "true"
        browser.ask(
            "{const i = document.getElementById('word'); i.value = 'case 3?'; i.dispatchEvent(new Event('input'))}"
        )
        assert browser.ask("document.querySelectorAll('#groups .open').length") == 1
        wide = "Emulation.setDeviceMetricsOverride"
        browser.call(wide, width=390, height=800, deviceScaleFactor=1, mobile=True)
        assert browser.ask("document.documentElement.scrollWidth") == 390
        assert browser.complaints() == []
