"""What is exported loads with peft alone, says what it is, and replaces nothing."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import fake_hub
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from conftest import write_table
from helpers import digests
from small_encoders import write_encoder
from transformers import AutoConfig

from benchmarks.gpu.models import SHAPES, build, byte_tokenizer
from stackllm import pipeline
from stackllm.cli import cli
from stackllm.errors import DataError, MissingInputError, ServerError, StorageError, UsageError
from stackllm.report.card import changed_settings
from stackllm.report.export import export
from stackllm.settings import read_settings
from stackllm.store.records import read_json, write_json
from stackllm.workspace import open_workspace

CONFIG = """
[data]
train = "{folder}/train.csv"
test = "{folder}/test.csv"
[encoder]
backbone = "none"
[run]
folds = 2
[[member]]
kind = "lexical"
[[member]]
kind = "decoder"
name = "tuned"
backbone = "{backbone}"
precision = "float32"
trainable_layers = 1
seeds = [0, 1]
refit = "full"
[member.prompt]
max_length_prompt = 31
max_length_answer = 40
max_length = 90
[member.lora]
r = 2
[member.training]
epochs = 1
batch_size = 8
learning_rate = 1e-2
[[member]]
kind = "decoder"
name = "whole"
backbone = "{encoder}"
precision = "float32"
trainable_layers = "all"
[member.prompt]
instruction = "Answer : w7"
before_question = " "
max_length_prompt = 4
max_length_answer = 40
max_length = 14
[member.training]
epochs = 1
learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of three members: n-grams, a fine-tuned decoder that reads bytes, a fine-tuned encoder."""
    folder = write_table(tmp_path_factory.mktemp("contest"), 8, 4)
    backbone = folder / "decoder"
    byte_tokenizer().save_pretrained(backbone)
    build(SHAPES["tiny"]).float().save_pretrained(backbone)
    encoder = write_encoder(folder / "encoder", "distilbert")
    config = folder / "stackllm.toml"
    config.write_text(CONFIG.format(folder=folder, backbone=backbone, encoder=encoder))
    with open_workspace("ten", folder / "artifacts", n_jobs=1, quiet=True) as workspace:
        pipeline.run(read_settings(config, {}), workspace, until="stack")
    return folder / "artifacts" / "ten"


@pytest.fixture
def copied(run, tmp_path):
    """The run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "ten"))


NAMES = (
    "tuned/round0_fold0_seed0",
    "tuned/round0_fold0_seed1",
    "tuned/round0_fold1_seed0",
    "tuned/round0_fold1_seed1",
    "tuned/round0_full_seed0",
    "tuned/round0_full_seed1",
    "whole/round0_fold0_seed0",
    "whole/round0_fold1_seed0",
)


def snippet(card, number):
    """The code of the card that loads an adapter of a member."""
    return card.split("```python\n")[1 + number].split("```")[0]


def test_the_card_s_code_gives_what_the_run_predicted(run, tmp_path, monkeypatch, capsys):
    exported = export(run, tmp_path / "out")
    assert exported.adapters == NAMES
    card = (tmp_path / "out" / "README.md").read_text()
    # an encoder's special tokens are spelt out in what it reads, a decoder's are not
    assert ["split_special_tokens" in snippet(card, number) for number in (0, 1)] == [False, True]
    monkeypatch.chdir(tmp_path / "out")
    for number, name, row in ((0, NAMES[0], 0), (0, NAMES[3], 5), (1, NAMES[7], 3)):
        predicted = np.load(run / "members" / name / "predictions.npy")
        folds = pl.read_parquet(run / "folds" / "folds.parquet")["fold"].to_numpy()
        place = np.flatnonzero(folds == int(name[17]))[row]
        rows = pl.read_parquet(next((run / "inputs").glob("*/texts.parquet")))
        question, response = rows.row(place)
        code = re.sub(r"folder = '.*'", f"folder = {name!r}", snippet(card, number))
        code = code.replace('"Why is the sky blue?"', repr(question))
        code = code.replace('"Because of Rayleigh scattering."', repr(response))
        exec(code, {})
        told = eval(capsys.readouterr().out)
        assert list(told) == read_json(run / "run.json")["classes"]
        np.testing.assert_allclose(list(told.values()), predicted[row], atol=1e-5)


def test_classes_are_called_as_the_run_calls_them_which_took_over_its_models(copied, tmp_path):
    record = read_json(copied / "run.json")
    renamed = [f"the {name}" for name in record["classes"]]
    write_json(copied / "run.json", record | {"classes": renamed})
    export(copied, tmp_path / "out")
    for name in NAMES:
        config = AutoConfig.from_pretrained(tmp_path / "out" / name)
        assert config.id2label == dict(enumerate(renamed))
        assert config.label2id == {name: number for number, name in enumerate(renamed)}


def test_the_card_tells_what_the_run_is_and_no_text_of_it(run, tmp_path):
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    board = (
        pl.read_csv(run / "leaderboard.csv").filter(pl.col("model") == "tuned").row(0, named=True)
    )
    assert f"{board['raw']:.4f} ± {board['raw_se']:.4f}" in card
    assert "24 rows in 8 groups, 2 folds" in card
    for line in ("training.epochs = 1.0", "lora.r = 2", "seeds = [0, 1]", 'refit = "full"'):
        assert f"{line}\n" in card
    assert "learning_rate = 0.01" in card
    assert "head_learning_rate" not in card  # a default
    assert 'prompt.instruction = "Answer : w7"' in card
    assert "| `tuned/round0_fold1_seed0` | all folds but number 1; seed 0 |" in card
    train = pl.read_csv(run.parents[1] / "train.csv")
    everything = b"".join(it.read_bytes() for it in (tmp_path / "out").rglob("*") if it.is_file())
    for text in (*train["Question"], *train["Response"]):
        assert text.encode() not in everything
    assert not list((tmp_path / "out").rglob("predictions.npy"))


def test_a_type_without_a_classifier_is_loaded_with_ours(run, tmp_path, monkeypatch):
    from transformers.models.auto import modeling_auto

    known = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    assert "llama" in known
    lacking = {name: it for name, it in known.items() if name != "llama"}
    monkeypatch.setattr(modeling_auto, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", lacking)
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ["add_classifier(config)" in snippet(card, number) for number in (0, 1)] == [True, False]
    compile(snippet(card, 0), "card", "exec")


def test_defaults_are_not_told():
    import dataclasses

    from stackllm.members.decoder import DecoderParams

    assert changed_settings(json.loads(json.dumps(dataclasses.asdict(DecoderParams())))) == {}


def test_the_same_again_changes_nothing_and_another_is_refused(run, copied, tmp_path):
    target = tmp_path / "out"
    export(run, target)
    before = digests(target), {it: it.stat().st_mtime_ns for it in target.rglob("*")}
    export(run, target)
    assert before == (digests(target), {it: it.stat().st_mtime_ns for it in target.rglob("*")})
    with pytest.raises(UsageError, match="holds something else"):
        export(run, target, base="org/model")
    assert before[0] == digests(target)
    (tmp_path / "file").write_text("a")
    with pytest.raises(UsageError, match="is no folder"):
        export(run, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    assert digests(tmp_path / "empty") == before[0]
    assert {it.name for it in tmp_path.iterdir()} == {"ten", "out", "file", "empty"}


def test_a_base_of_the_hub_is_named_in_every_adapter(run, tmp_path):
    export(run, tmp_path / "out", base="org/model@abc")
    for name in NAMES:
        config = read_json(tmp_path / "out" / name / "adapter_config.json")
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "abc")
    everything = b"".join(it.read_bytes() for it in (tmp_path / "out").rglob("*") if it.is_file())
    assert (
        str(run.parents[2]).encode() not in everything
    )  # where this user's models stand is no news
    assert '- "org/model"\n' in (tmp_path / "out" / "README.md").read_text()


def test_a_run_that_ended_with_stage_one_gives_its_own_seeds_only(copied, tmp_path):
    record = read_json(copied / "run.json")
    record["until"] = "features"
    del record["settings"]["members"][2]
    member = record["settings"]["members"][1]["params"]
    member |= {"seeds": [1], "refit": "folds"}  # what other settings left is no part of it
    write_json(copied / "run.json", record)
    assert export(copied, tmp_path / "out").adapters == (NAMES[1], NAMES[3])


def test_nothing_comes_of_what_is_damaged(copied, tmp_path):
    path = copied / "members" / NAMES[4] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StorageError, match="round0_full_seed0 is corrupt"):
        export(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_a_sentence(copied, tmp_path):
    with pytest.raises(MissingInputError, match="no finished run here"):
        export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UsageError, match="not said where to"):
        export(copied)
    record = read_json(copied / "run.json")
    record["settings"]["members"] = record["settings"]["members"][:1]
    write_json(copied / "run.json", record)
    with pytest.raises(MissingInputError, match="no fine-tuned member"):
        export(copied, tmp_path / "out")
    (copied / "run.json").write_text("[]")
    with pytest.raises(DataError, match="not what a run"):
        export(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("repo", "base", "error", "match"),
    [
        ("a b", "org/model", UsageError, 'is no "org/name"'),
        ("org/name", None, UsageError, "which nobody who downloads them has"),
        ("org/name", "org/model", MissingInputError, "nobody is logged in"),
    ],
)
def test_what_an_upload_needs_is_asked_for_first(
    run, tmp_path, monkeypatch, repo, base, error, match
):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    with pytest.raises(error, match=match):
        export(run, tmp_path / "out", repo, base)
    assert not (tmp_path / "out").exists()


class _Writable(fake_hub._Handler):
    """A hub that takes repositories and commits of small files, from whoever has the right token."""

    def do_GET(self):
        """Who is asking, and what is stored as git knows it."""
        parts = self.path.partition("?")[0].strip("/").split("/")
        repo = "/".join(parts[2:4])
        if not self._may():
            self._answer(401, b"{}")
        elif parts[1] == "whoami-v2":
            self._answer(200, b'{"name": "me"}')
        elif repo not in self.hub.stored:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[4:5] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": len(it), "oid": git_name(it)}
                for name, it in self.hub.stored[repo].items()
            ]
            self._answer(200, json.dumps(tree).encode())
        else:
            self._answer(200, json.dumps({"id": repo, "sha": "0" * 40}).encode())

    def do_POST(self):
        """A repository, which files are small, a commit of them."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if not self._may():
            return self._answer(401, b"{}")
        if parts[1] == "validate-yaml":
            return self._answer(200, b'{"errors": [], "warnings": []}')
        if parts[1] == "repos":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.hub.stored[repo] = {".gitattributes": b"*"}
            self.hub.visible[repo] = not (
                asked.get("private") or asked.get("visibility") == "private"
            )
            return self._answer(200, json.dumps({"url": f"{self.hub.address}/{repo}"}).encode())
        repo = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [
                {"path": it["path"], "uploadMode": "regular", "shouldIgnore": False}
                for it in json.loads(body)["files"]
            ]
            return self._answer(200, json.dumps({"files": files}).encode())
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.hub.stored[repo][line["value"]["path"]] = content
        told = {"commitUrl": f"{self.hub.address}/{repo}/commit/0", "commitOid": "0"}
        return self._answer(200, json.dumps(told).encode())

    def _may(self):
        return self.headers.get("Authorization") == "Bearer hf_right"

    def _answer(self, status, content, headers=None):
        asked, self.command = self.command, "GET"  # a POST is answered with content too
        super()._answer(status, content, headers)
        self.command = asked


def git_name(content):
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def writable(hub, monkeypatch):
    """A hub to upload to, for one who is logged in there."""
    hub.stored, hub.visible = {}, {}
    hub.server.RequestHandlerClass = type("Handler", (_Writable,), {"hub": hub})
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    return hub


def test_an_upload_is_the_folder(run, tmp_path, writable):
    exported = export(run, tmp_path / "out", "org/name", "org/model")
    assert exported.url == f"{writable.address}/org/name"
    stored = dict(writable.stored["org/name"])
    assert stored.pop(".gitattributes")
    assert not writable.visible["org/name"]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert stored == {it.relative_to(tmp_path / "out").as_posix(): it.read_bytes() for it in files}
    assert export(run, None, "org/name", "org/model").url == exported.url  # the same: nothing to do
    export(run, None, "org/public", "org/model", public=True)
    assert writable.visible["org/public"]


def test_an_upload_replaces_nothing(run, writable):
    export(run, None, "org/name", "org/model")
    before = dict(writable.stored["org/name"])
    with pytest.raises(UsageError, match='"org/name" holds something else already'):
        export(run, None, "org/name", "org/other")
    assert writable.stored["org/name"] == before


def test_a_token_that_may_not_write_is_a_sentence(run, writable, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(MissingInputError, match="does not let this user write"):
        export(run, None, "org/name", "org/model")


def test_a_hub_out_of_reach_is_a_sentence(run, hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ServerError, match="out of reach"):
        export(run, None, "org/name", "org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ServerError, match="HF_HUB_OFFLINE is set"):
        export(run, None, "org/name", "org/model")


def test_the_command_tells_what_it_wrote(run, tmp_path):
    words = [
        "export",
        "--artifacts",
        str(run.parent),
        "--name",
        "ten",
        "--to",
        str(tmp_path / "out"),
    ]
    told = CliRunner().invoke(cli, [*words, "--json"], catch_exceptions=False)
    assert json.loads(told.output) == {
        "adapters": list(NAMES), "folder": str(tmp_path / "out"), "url": None,
    }  # fmt: skip
    assert "8 adapters" in CliRunner().invoke(cli, words).output
