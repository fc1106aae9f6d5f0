from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import stackllm

from stackllm import posterior

N_CLASSES = 3


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return stackllm("optim", *arguments, cwd=folder)


def refused(folder: Path, code: int, *arguments: object) -> str:
    """Run, expect an error of this exit code in one sentence and no output, return the sentence."""
    there = {path.name for path in folder.iterdir()}
    told = run(folder, *arguments)
    assert told.returncode == code, told.stderr
    assert told.stdout == ""
    assert "Traceback" not in told.stderr
    assert {path.name for path in folder.iterdir()} == there
    return told.stderr.strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """sub.csv, test.csv, solution.csv, oof.csv, train.csv of groups that hold each class once."""
    for seed, (sub, table, solution, n_groups) in enumerate(
        [("sub.csv", "test.csv", "solution.csv", 40), ("oof.csv", "train.csv", "", 80)]
    ):
        rng = np.random.default_rng(seed)
        labels = np.concatenate([rng.permutation(N_CLASSES) for _ in range(n_groups)])
        scores = rng.normal(size=(len(labels), N_CLASSES))
        scores[np.arange(len(labels)), labels] += 1.5
        p = np.exp(2.5 * scores)
        p /= p.sum(axis=1, keepdims=True)
        ids = pl.Series("id", [f"{i:04d}" for i in range(len(labels))])
        frame = pl.DataFrame({"id": ids, **{f"target_{j}": p[:, j] for j in range(N_CLASSES)}})
        frame.write_csv(tmp_path / sub)
        question = [f'why "{i // N_CLASSES}",\nand how?' for i in range(len(labels))]
        rows = pl.DataFrame({"id": ids, "Question": question})
        truth = pl.DataFrame({"id": ids, "target": labels})
        if solution:
            rows.write_csv(tmp_path / table)
            truth.write_csv(tmp_path / solution)
        else:
            rows.with_columns(truth["target"]).write_csv(tmp_path / table)
    return tmp_path


def table(path: Path) -> pl.DataFrame:
    return pl.read_csv(path, schema_overrides={"id": pl.String})


def matrix(frame: pl.DataFrame) -> np.ndarray:
    return frame.select(pl.col("^target_.*$")).to_numpy()


def test_the_posterior_is_written_beside_the_submission(folder: Path) -> None:
    told = run(folder, "sub.csv")
    assert told.returncode == 0, told.stderr
    before, after = table(folder / "sub.csv"), table(folder / "sub.optim.csv")
    groups = np.arange(before.height) // N_CLASSES
    assert np.array_equal(matrix(after), posterior(matrix(before), groups))
    assert after.columns == before.columns
    assert after["id"].to_list() == before["id"].to_list()
    assert after["id"][0] == "0000"
    assert "40 groups" in told.stdout


def test_column_order_odd_names_and_row_order_are_kept(folder: Path) -> None:
    rng = np.random.default_rng(0)
    frame = table(folder / "sub.csv").sample(fraction=1.0, shuffle=True, seed=1)
    frame = frame.select("target_2", "id", "target_0", "target_1")
    frame = frame.rename({"target_2": 'a "b", c', "target_0": "ü", "target_1": "x y"})
    frame = frame.with_columns(pl.Series("group", rng.integers(0, 60, frame.height)))
    frame.write_csv(folder / "odd.csv")
    frame = table(folder / "odd.csv")
    assert run(folder, "odd.csv", "-o", "deep/new.csv").returncode == 0
    after = table(folder / "deep/new.csv")
    assert after.columns == frame.columns
    assert after.select("id", "group").equals(frame.select("id", "group"))
    sums = after.drop("id", "group").sum_horizontal()
    assert sums.to_numpy() == pytest.approx(1, abs=1e-9)


def test_json_accounts_for_every_group_and_lists_those_that_were_kept(folder: Path) -> None:
    lines = ["id,group,a,b"]
    lines += [
        f"{g}{i},{g},0.7,0.3"
        for g, size in (("one", 1), ("two", 2), ("three", 3))
        for i in range(size)
    ]
    (folder / "mixed.csv").write_text("\n".join(lines) + "\n")
    told = run(folder, "mixed.csv", "--json")
    account = json.loads(told.stdout)
    assert account["groups"] == {"count": 3, "source": 'column "group" of mixed.csv'}
    assert {entry["how"]: entry["groups"] for entry in account["how"]} == {"exact": 2, "kept": 1}
    assert account["kept"] == [{"group": "three", "rows": 3, "reason": "3 rows for 2 places"}]
    after = pl.read_csv(folder / "mixed.optim.csv")
    assert after.filter(pl.col("group") == "three")["a"].to_list() == pytest.approx([0.7] * 3)


def test_large_groups_name_the_approximation_and_why(folder: Path) -> None:
    classes = [f"c{j}" for j in range(20)]
    p = np.random.default_rng(0).dirichlet(np.ones(20), 20)
    frame = pl.DataFrame(p, schema=classes)
    frame.insert_column(0, pl.Series("id", range(20)))
    frame.insert_column(1, pl.Series("group", ["q"] * 20)).write_csv(folder / "large.csv")
    account = json.loads(run(folder, "large.csv", "--json").stdout)
    assert account["how"] == [
        {
            "how": "belief propagation",
            "groups": 1,
            "rows": 20,
            "reason": "1,048,576 states, more than 262,144",
        }
    ]


def test_truth_scores_before_and_after_with_errors(folder: Path) -> None:
    account = json.loads(run(folder, "sub.csv", "--truth", "solution.csv", "--json").stdout)
    score = account["score"]
    assert score["after"]["log_loss"] < score["before"]["log_loss"]
    assert score["gain"] == pytest.approx(score["before"]["log_loss"] - score["after"]["log_loss"])
    for row in (score["before"], score["after"]):
        assert {"log_loss_error", "accuracy_error", "group_exact_accuracy_error"} < set(row)


def test_fit_reports_a_gain_on_groups_it_was_not_fitted_on(folder: Path) -> None:
    told = run(folder, "sub.csv", "--fit", "oof.csv", "--fit-truth", "train.csv", "--json")
    account = json.loads(told.stdout)
    fit = account["fit"]
    assert fit["helps"]
    assert fit["gain"] == pytest.approx(fit["before"] - fit["after"])
    assert fit["candidate"] == account["method"] == min(fit["scores"], key=fit["scores"].get)
    assert account["temperature"] != 1.0


def test_where_nothing_helps_it_says_so_and_changes_nothing(folder: Path) -> None:
    shuffled = table(folder / "train.csv").with_columns(pl.col("target").shuffle(seed=3))
    shuffled.write_csv(folder / "noise.csv")
    flat = table(folder / "oof.csv").with_columns(
        pl.lit(1 / 3).alias(f"target_{j}") for j in range(3)
    )
    flat.write_csv(folder / "flat.csv")
    told = run(folder, "sub.csv", "--fit", "flat.csv", "--fit-truth", "noise.csv")
    assert "no method helps" in told.stdout
    assert table(folder / "sub.optim.csv").equals(table(folder / "sub.csv"))


@pytest.mark.parametrize("method", ["posterior", "assignment", "blend", "sinkhorn", "none"])
def test_every_method_writes_rows_that_sum_to_one(folder: Path, method: str) -> None:
    assert run(folder, "sub.csv", "--method", method).returncode == 0
    sums = matrix(table(folder / "sub.optim.csv")).sum(axis=1)
    assert sums == pytest.approx(1, abs=1e-9)


def test_output_streams_to_the_standard_output(folder: Path) -> None:
    told = run(folder, "sub.csv", "-o", "-")
    assert run(folder, "sub.csv").returncode == 0
    assert told.stdout == (folder / "sub.optim.csv").read_text()
    assert "40 groups" in told.stderr


def test_a_parquet_file_comes_and_goes_as_parquet(folder: Path) -> None:
    table(folder / "sub.csv").write_parquet(folder / "sub.parquet")
    assert run(folder, "sub.parquet").returncode == 0
    assert run(folder, "sub.csv").returncode == 0
    assert pl.read_parquet(folder / "sub.optim.parquet").equals(table(folder / "sub.optim.csv"))


@pytest.mark.parametrize(
    ("quota", "expected"), [("2", 2), ("2,1,1", [2, 1, 1]), ("quota.csv", [1, 2, 1])]
)
def test_quotas_as_a_number_a_list_or_a_file(folder: Path, quota: str, expected) -> None:
    (folder / "quota.csv").write_text("target_1,target_0,target_2\n2,1,1\n")
    assert run(folder, "sub.csv", "--quota", quota).returncode == 0
    before, after = matrix(table(folder / "sub.csv")), matrix(table(folder / "sub.optim.csv"))
    groups = np.arange(len(before)) // N_CLASSES
    assert after == pytest.approx(posterior(before, groups, expected), abs=1e-12)


def test_quotas_by_group(folder: Path) -> None:
    (folder / "in.csv").write_text(
        "id,group,a,b\n1,x,0.6,0.4\n2,x,0.6,0.4\n3,y,0.6,0.4\n4,y,0.6,0.4\n"
    )
    (folder / "quota.csv").write_text("group,a,b\ny,2,0\nx,1,1\n")
    assert run(folder, "in.csv", "--quota", "quota.csv").returncode == 0
    assert pl.read_csv(folder / "in.optim.csv")["a"].to_list() == pytest.approx([0.5, 0.5, 1, 1])


def test_groups_come_from_the_column_the_option_the_project_or_test_csv(folder: Path) -> None:
    (folder / "test.csv").rename(folder / "elsewhere.csv")
    said = refused(folder, 66, "sub.csv")
    assert all(way in said for way in ("--group,", "--groups,", "stackllm.toml", "test.csv"))
    (folder / "stackllm.toml").write_text('[data]\ntest = "elsewhere.csv"\n')
    by_project = run(folder, "sub.csv", "-o", "-")
    (folder / "stackllm.toml").unlink()
    by_option = run(folder, "sub.csv", "--groups", "elsewhere.csv", "-o", "-")
    assert by_project.stdout == by_option.stdout != ""


def test_labels_by_name_suffix_or_position_and_ambiguity_shows_both(folder: Path) -> None:
    frame = table(folder / "sub.csv").rename({f"target_{j}": f"target_{j + 1}" for j in range(3)})
    frame.write_csv(folder / "from1.csv")
    truth = table(folder / "solution.csv")
    truth.with_columns("target_" + (pl.col("target") + 1).cast(pl.String)).write_csv(
        folder / "names.csv"
    )
    truth.with_columns(pl.col("target") + 1).write_csv(folder / "suffixes.csv")
    truth.with_columns(pl.col("target").clip(1, 2)).write_csv(folder / "either.csv")
    scores = {
        name: json.loads(run(folder, "from1.csv", "--truth", name, "--json").stdout)["score"]
        for name in ("names.csv", "suffixes.csv", "solution.csv")
    }
    assert scores["names.csv"] == scores["suffixes.csv"] == scores["solution.csv"]
    (folder / "from1.optim.csv").unlink()
    said = refused(folder, 65, "from1.csv", "--truth", "either.csv")
    assert '" by its suffix or class "target_' in said
    assert "Say which, suffix or position, with --labels." in said
    assert run(folder, "from1.csv", "--truth", "either.csv", "--labels", "suffix").returncode == 0


def test_questions_that_are_joined_are_shown_and_can_be_kept_apart(folder: Path) -> None:
    rows = "1,What is Rust?,0.9,0.1\n2,what is rust,0.9,0.1\n3,10² of it,0.9,0.1\n4,102 of it,0.9,0.1\n"
    (folder / "in.csv").write_text("id,Question,a,b\n" + rows)
    joined = run(folder, "in.csv")
    assert "2 classes, 3 groups" in joined.stdout
    assert '(such as "What is Rust?" and "what is rust")' in joined.stdout
    assert pl.read_csv(folder / "in.optim.csv")["a"].to_list() == pytest.approx(
        [0.5, 0.5, 0.9, 0.9]
    )
    apart = json.loads(run(folder, "in.csv", "--same-question", "exact", "--json").stdout)
    assert (apart["groups"]["count"], apart["warnings"]) == (4, [])


def test_what_the_settings_say_of_the_tables_counts_here_too(folder: Path) -> None:
    (folder / "in.csv").write_text("id,a,b\n1,0.9,0.1\n2,0.9,0.1\n")
    (folder / "new.csv").write_text("id,topic,text\n1,Item A,=x\n2,item a,y\n")
    (folder / "labels.csv").write_text("id,label,author\n1,b,a\n2,b,b\n")
    data = '[data]\ntest = "new.csv"\ngroup = "topic"\ntarget = "author"\n'
    (folder / "stackllm.toml").write_text(data)
    account = json.loads(run(folder, "in.csv", "--truth", "labels.csv", "--json").stdout)
    assert (account["groups"]["count"], account["quota"]) == (1, "1")
    assert account["score"]["before"]["accuracy"] == 0.5
    (folder / "stackllm.toml").write_text(data + 'question = "text"\nquota = 2\n')
    account = json.loads(run(folder, "in.csv", "--json").stdout)
    assert (account["groups"]["count"], account["quota"]) == (2, "2")
    assert run(folder, "in.csv", "--quota", "1,1", "--json").stdout.count('"quota": "1,1"') == 1


HEADER = "id,group,a,b\n"
BAD = {
    "not a number": (
        HEADER + "1,q,0.5,0.5\n2,q,x,0.5\n",
        'column "a" are no numbers (first: row 2, "x")',
    ),
    "nan": (HEADER + "1,q,nan,0.5\n", "first: row 1"),
    "infinite": (HEADER + "1,q,inf,0.5\n", "first: row 1"),
    "negative": (HEADER + "1,q,-0.5,1.5\n", "first: row 1"),
    "empty cell": (HEADER + "1,q,,1\n", "an empty cell"),
    "all zero": (HEADER + "1,q,0,0\n", "all zero"),
    "sum off": (HEADER + "1,q,0.5,0.4\n", "--renormalise"),
    "huge numbers": (HEADER + "1,q,1e308,1e308\n", "no probabilities"),
    "id twice": (HEADER + "7,q,0.5,0.5\n8,q,0.5,0.5\n7,q,0.5,0.5\n", "rows 1 and 3"),
    "no id": (HEADER + ",q,0.5,0.5\n", "no id"),
    "no group": (HEADER + "1,,0.5,0.5\n", "no group"),
    "empty": ("", "empty"),
    "header only": (HEADER, "no row below"),
    "column twice": ("id,group,a,a\n1,q,0.5,0.5\n", "more than once"),
    "nameless column": ("id,group,a,\n1,q,0.5,0.5\n", "no name"),
    "one class": ("id,group,a\n1,q,1\n", "two or more"),
    "semicolons": ("id;a;b\n1;0.5;0.5\n", 'columns are separated by ";"'),
    "too many fields": (HEADER + "1,q,0.5,0.5,0.5\n", "row 1 has 5 fields and the header 4"),
    "NUL": (HEADER + "1,q\0,0.5,0.5\n", "NUL"),
    "carriage returns": (HEADER.replace("\n", "\r") + "1,q,0.5,0.5\r", "carriage return"),
}


@pytest.mark.parametrize(("content", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(folder: Path, content: str, said: str) -> None:
    (folder / "bad.csv").write_bytes(content.encode())
    told = refused(folder, 65, "bad.csv")
    assert said in told
    assert told.startswith("error: bad.csv: ")
    assert "\n" not in told


def test_other_encodings_are_named(folder: Path) -> None:
    text = "id,group,a,b\n1,Frage über,0.5,0.5\n"
    (folder / "bad.csv").write_bytes(text.encode("utf-16"))
    assert "UTF-16" in refused(folder, 65, "bad.csv")
    (folder / "bad.csv").write_bytes(text.encode("latin-1"))
    assert "line 2 is not UTF-8 (byte 0xfc)" in refused(folder, 65, "bad.csv")
    (folder / "bad.csv").write_bytes(text.encode("utf-8-sig"))
    assert run(folder, "bad.csv").returncode == 0


def test_a_cell_of_ten_megabytes_is_read_and_never_shown(folder: Path) -> None:
    huge = "q" * 10_000_000
    (folder / "huge.csv").write_text(f'id,group,a,b\n1,"{huge}",0.5,0.5\n2,"{huge}",0.2,0.8\n')
    assert run(folder, "huge.csv").returncode == 0
    (folder / "bad.csv").write_text(f"id,group,a,b\n1,q,{huge},0.5\n")
    assert len(refused(folder, 65, "bad.csv")) < 400


def test_a_folder_a_missing_file_and_a_missing_column(folder: Path) -> None:
    assert "no such file" in refused(folder, 66, "nowhere.csv")
    (folder / "sub").mkdir()
    assert "this is a folder" in refused(folder, 66, "sub")
    assert 'no column "idd"' in refused(folder, 65, "sub.csv", "--id", "idd")
    assert 'no column "q"' in refused(folder, 65, "sub.csv", "--group", "q")


def test_ids_missing_on_either_side(folder: Path) -> None:
    whole = table(folder / "test.csv")
    whole.head(-2).write_csv(folder / "fewer.csv")
    said = refused(folder, 65, "sub.csv", "--groups", "fewer.csv")
    assert '2 ids of sub.csv are not in fewer.csv (first: "0118", "0119")' in said
    table(folder / "solution.csv").head(-1).with_columns(pl.col("id") + "x").write_csv(
        folder / "bad.csv"
    )
    said = refused(folder, 65, "sub.csv", "--truth", "bad.csv")
    assert "120 ids of sub.csv are not in bad.csv" in said
    assert "119 ids of bad.csv are not in sub.csv" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--quota", "1,2"], "2 numbers for 3 classes"),
        (["--quota", "many"], "nor a file that exists"),
        (["--temperature", "0"], "from 1e-6 to 1e6"),
        (["--temperature", "auto"], "needs --fit"),
        (["--fit", "oof.csv"], "belong together"),
        (["--json", "-o", "-"], "both want the standard output"),
        (["--method", "magic"], "'magic' is not one of"),
    ],
)
def test_options_that_make_no_sense(folder: Path, options: list[str], said: str) -> None:
    assert said in refused(folder, 2, "sub.csv", *options)


def test_rows_off_are_scaled_on_request(folder: Path) -> None:
    (folder / "in.csv").write_text("id,group,a,b\n1,q,3,1\n2,r,1,1\n")
    assert run(folder, "in.csv", "--renormalise").returncode == 0
    assert pl.read_csv(folder / "in.optim.csv")["a"].to_list() == [0.75, 0.5]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_sentence(folder: Path) -> None:
    assert "No space left" in refused(folder, 74, "sub.csv", "-o", "/dev/full")
    assert not Path("/dev/full").is_file()


def test_an_output_that_cannot_be_written_leaves_what_was_there(folder: Path) -> None:
    (folder / "locked").mkdir()
    refused(folder, 74, "sub.csv", "-o", "locked")
    (folder / "file").write_text("kept")
    refused(folder, 74, "sub.csv", "-o", "file/out.csv")
    assert (folder / "file").read_text() == "kept"
    if os.geteuid() != 0:
        (folder / "locked").chmod(0o500)
        refused(folder, 74, "sub.csv", "-o", "locked/out.csv")


def test_it_loads_neither_torch_nor_scikit_learn_nor_lightgbm(folder: Path) -> None:
    code = (
        "import sys; from stackllm.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'sklearn', 'lightgbm') if m in sys.modules], file=sys.stderr)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, "optim", "sub.csv"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stderr.strip() == "[]"


def test_an_id_column_of_another_case_is_found_and_one_of_another_name_refused(
    folder: Path,
) -> None:
    frame = table(folder / "test.csv").sample(fraction=1.0, shuffle=True, seed=2)
    frame.rename({"id": "ID"}).write_csv(folder / "case.csv")
    by_case = run(folder, "sub.csv", "--groups", "case.csv", "-o", "-")
    assert by_case.stdout == run(folder, "sub.csv", "-o", "-").stdout != ""
    frame.rename({"id": "test_id"}).write_csv(folder / "other.csv")
    said = refused(folder, 65, "sub.csv", "--groups", "other.csv")
    assert 'column "test_id" looks like ids' in said
    frame.rename({"id": "sample"}).write_csv(folder / "values.csv")
    said = refused(folder, 65, "sub.csv", "--groups", "values.csv")
    assert 'column "sample" looks like ids' in said


def test_matching_by_row_number_is_always_said(folder: Path) -> None:
    frame = pl.read_csv(folder / "sub.csv").with_columns(pl.col("id").cast(pl.Int64))
    frame.write_csv(folder / "plain.csv")
    table(folder / "test.csv").drop("id").write_csv(folder / "rows.csv")
    table(folder / "solution.csv").drop("id").write_csv(folder / "truth.csv")
    told = run(folder, "plain.csv", "--groups", "rows.csv", "--truth", "truth.csv").stdout
    assert 'column "Question" of rows.csv, matched by row number' in told
    assert "truth.csv: no id column, so its rows are matched by row number" in told


def test_suffixes_with_leading_zeros_are_numbers(folder: Path) -> None:
    names = {f"target_{j}": f"target_{j + 1:02d}" for j in range(3)}
    table(folder / "sub.csv").rename(names).write_csv(folder / "padded.csv")
    truth = table(folder / "solution.csv")
    truth.with_columns(pl.col("target") + 1).write_csv(folder / "truth.csv")
    scores = [
        json.loads(run(folder, sub, "--truth", labels, "--json").stdout)["score"]
        for sub, labels in (("padded.csv", "truth.csv"), ("sub.csv", "solution.csv"))
    ]
    assert scores[0] == scores[1]
    truth.with_columns(pl.col("target").clip(1, 2)).write_csv(folder / "either.csv")
    (folder / "padded.optim.csv").unlink()
    assert "suffix or position, with --labels" in refused(
        folder, 65, "padded.csv", "--truth", "either.csv"
    )


def test_one_group_has_a_score_but_no_error(folder: Path) -> None:
    (folder / "one.csv").write_text("id,group,a,b\n1,q,0.6,0.4\n2,q,0.5,0.5\n")
    (folder / "truth.csv").write_text("id,target\n1,a\n2,b\n")
    told = run(folder, "one.csv", "--truth", "truth.csv", "--json")
    assert json.loads(told.stdout)["score"]["gain_error"] is None
    assert "nan" not in run(folder, "one.csv", "--truth", "truth.csv").stdout


@pytest.mark.parametrize("column", ["id", "group", "a"])
def test_lists_in_a_parquet_file_are_refused(folder: Path, column: str) -> None:
    frame = pl.DataFrame({"id": ["1"], "group": ["q"], "a": [0.5], "b": [0.5]})
    frame.with_columns(pl.concat_list(column)).write_parquet(folder / "in.parquet")
    assert f'column "{column}" holds List' in refused(folder, 65, "in.parquet")


def test_names_that_are_not_utf8_links_in_a_ring_and_narrow_terminals(folder: Path) -> None:
    name = os.fsdecode(b"x\xff.csv")
    (folder / name).write_bytes((folder / "sub.csv").read_bytes())
    assert run(folder, name).returncode == 0
    assert (folder / os.fsdecode(b"x\xff.optim.csv")).is_file()
    (folder / "ring").symlink_to("ring")
    assert "symbolic links" in refused(folder, 74, "sub.csv", "-o", "ring")
    text = "id,group,a,b\n1,q€,0.6,0.4\n2,q€,0.5,0.5\n"
    (folder / "euro.csv").write_text(text)
    told = stackllm("optim", "euro.csv", "--quota", "0", cwd=folder, PYTHONIOENCODING="latin-1")
    assert (told.returncode, told.stderr) == (0, "")
    assert "q\\u20ac" in told.stdout


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_streams(folder: Path, closed: str) -> None:
    table(folder / "sub.csv").write_parquet(folder / "sub.parquet")
    code = "from stackllm.cli import main; main()"
    output = "-" if closed == ">&-" else "out.csv"
    told = subprocess.run(
        [
            "sh",
            "-c",
            f'exec "$0" -c "{code}" optim sub.parquet -o {output} {closed}',
            sys.executable,
        ],
        cwd=folder,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert told.returncode == (74 if closed == ">&-" else 0)
    assert b"Traceback" not in told.stderr


def test_labels_to_fit_on_may_come_through_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with subprocess.Popen(["sh", "-c", "cat train.csv > pipe"], cwd=folder) as writer:
        told = run(folder, "sub.csv", "--fit", "oof.csv", "--fit-truth", "pipe")
        writer.kill()
    assert told.returncode == 0, told.stderr


def test_messages_name_the_column_the_row_and_the_file_that_are_wrong(folder: Path) -> None:
    (folder / "extra.csv").write_text("id,group,a,b,fold\n1,q,0.6,0.4,0\n2,q,0.5,0.5,1\n")
    assert 'column "fold" looks like no class' in refused(folder, 65, "extra.csv")
    (folder / "two.csv").write_text("id,a,b\n1,0.5,0.5\n2,0.5,0.5\n")
    (folder / "blank.csv").write_text("id,Question\n2,q\n1,\n")
    assert "first: row 2)" in refused(folder, 65, "two.csv", "--groups", "blank.csv")
    assert "nofile.csv" in refused(folder, 66, "sub.csv", "--quota", "nofile.csv")


@pytest.mark.parametrize("method", ["posterior", "assignment", "blend", "sinkhorn", "none"])
def test_groups_that_are_kept_are_tempered_and_nothing_else(folder: Path, method: str) -> None:
    (folder / "in.csv").write_text("id,group,a,b\n" + "".join(f"{i},q,0.8,0.2\n" for i in range(3)))
    told = run(folder, "in.csv", "--method", method).stdout
    assert method == "none" or "kept as they came" in told
    assert pl.read_csv(folder / "in.optim.csv")["a"].to_list() == [0.8] * 3
    told = run(folder, "in.csv", "--method", method, "--temperature", "2").stdout
    assert method == "none" or "kept, but for the temperature" in told
    assert pl.read_csv(folder / "in.optim.csv")["a"].to_list() == pytest.approx([2 / 3] * 3)
