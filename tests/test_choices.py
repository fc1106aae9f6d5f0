"""What "auto" and a branch became belongs to the run: another machine, another day, the same keys."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from machines import H100, T4

from stackllm import pipeline
from stackllm.errors import DataError, ServerError, UsageError
from stackllm.llm import machine
from stackllm.llm.choices import FILE
from stackllm.llm.encode import EncoderParams
from stackllm.llm.locate import revision_of
from stackllm.llm.machine import compute_dtype
from stackllm.members.decoder import DecoderParams
from stackllm.members.registry import Member
from stackllm.settings import Settings, read_settings
from stackllm.study import settle
from stackllm.workspace import open_workspace

SETTINGS = """
[run]
folds = 2

[encoder]
backbone = "{backbone}"
{more}

[[member]]
kind = "frozen"

[[member]]
kind = "decoder"
backbone = "{backbone}"
trainable_layers = 1
warm_head = false

[member.training]
epochs = 1
"""


@pytest.fixture(scope="module")
def folder(make_backbone):
    return Path(make_backbone("llama", 2))


@pytest.fixture
def no_bfloat16(monkeypatch):
    """A CPU that chooses float32, whatever this one would."""
    monkeypatch.setattr(machine, "_cpu_has_bfloat16", lambda: False)


def command(until, backbone, more="", dry_run=False, name="run"):
    """A command of the user's: settings are read anew, a workspace is opened."""
    Path("stackllm.toml").write_text(SETTINGS.format(backbone=backbone, more=more))
    settings = read_settings(None, {})
    with open_workspace(name, Path("artifacts"), n_jobs=1, dry_run=dry_run) as workspace:
        step = pipeline.plan if dry_run else pipeline.run
        return step(settings, workspace, until=until)


def choose(settings, name="run", dry_run=False):
    """What the settings become in a run."""
    with open_workspace(name, Path("artifacts"), n_jobs=1, dry_run=dry_run) as workspace:
        made, choices = settle(settings, workspace)
        if not dry_run:
            choices.write(workspace.root)
        return made


def test_a_run_begun_on_a_gpu_is_gone_on_with_on_a_cpu(
    kaggle, hub, folder, pretend_gpus, no_bfloat16, copies, capsys
):
    commit = hub.commit("org/model", folder)
    pretend_gpus(H100)
    command("features", "org/model")
    assert copies  # somebody read and trained
    said = capsys.readouterr().err
    assert f"backbone org/model: org/model@{commit}\n" in said
    assert 'precision "auto": bfloat16 (NVIDIA H100 80GB HBM3 computes in bfloat16)' in said
    stored = json.loads(Path("artifacts/run/run.json").read_text())
    assert stored["settings"]["encoder"]["dtype"] == "bfloat16"
    assert stored["backbones"] == {f"org/model@{commit}": commit}

    pretend_gpus()
    hub.commit("org/model", folder)  # the branch moves
    copies.clear()
    plan = command("stack", "org/model", dry_run=True)
    assert {
        stage.to_run
        for stage in plan.stages
        if stage.name in ("encoder", "trunk", "decoders, round 0")
    } <= {0, None}
    command("stack", "org/model")
    assert copies == []  # no model was even loaded
    said = capsys.readouterr().err
    assert "bfloat16 (as this run began; this machine alone would take float32" in said
    assert (
        f'as this run began. The hub is at another commit by now; to read with that, set revision = "{hub.branches["org/model"]["main"]}"'
        in said
    )
    hub.fails = 503  # the news is no more than that: without the hub, the name means what is here
    assert revision_of("org/model") == commit
    hub.fails = 0

    command("features", "org/model", f'revision = "{hub.branches["org/model"]["main"]}"')
    assert copies  # the advice works


def test_what_is_said_explicitly_holds_and_auto_comes_back_as_the_run_has_it(
    kaggle, pretend_gpus, no_bfloat16
):
    pretend_gpus(T4)
    assert choose(Settings()).encoder.dtype == "float16"
    pretend_gpus()
    assert choose(Settings(encoder=EncoderParams(dtype="float32"))).encoder.dtype == "float32"
    assert choose(Settings()).encoder.dtype == "float16"
    assert choose(Settings(), name="another").encoder.dtype == "float32"


@pytest.mark.parametrize("packed", ["int8", "nf4"])
def test_packed_weights_are_computed_in_what_the_run_began_with(
    kaggle, pretend_gpus, no_bfloat16, packed
):
    settings = Settings(members=(Member("decoder", "decoder", DecoderParams(precision=packed)),))
    pretend_gpus(H100)
    first = choose(settings).members[0].traits
    pretend_gpus()
    again = choose(settings).members[0].traits
    assert (again.weights, again.params, again.trunk) == (first.weights, first.params, first.trunk)
    assert again.trunk.identity == first.trunk.identity
    assert compute_dtype(again.params.precision) == "bfloat16"
    assert compute_dtype(packed) == "float32"  # what this machine would have taken


def test_a_record_that_cannot_be_read_is_made_again_and_said(kaggle, capsys):
    choose(Settings())
    path = Path("artifacts/run") / FILE
    path.write_text("{")
    choose(Settings())
    assert f"warning: {path} cannot be read" in capsys.readouterr().err
    assert "precision" in json.loads(path.read_text())


def test_an_llm_that_nobody_asks_is_not_looked_for(kaggle, hub):
    rater = replace(Settings().rater, backbone="nobody/has-this")
    made = choose(Settings(rater=rater))
    assert made.rater.backbone == "nobody/has-this"
    assert not hub.asked
    assert made.backbones == ("smollm2",)


def test_a_dry_run_without_a_hub_counts_all_as_unread_and_says_so(kaggle, hub, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    plan = command("features", "org/model", dry_run=True)
    assert "All that it is to read counts as unread" in capsys.readouterr().err
    assert plan.units
    with pytest.raises(ServerError, match="HF_HUB_OFFLINE keeps the hub from being asked"):
        command("features", "org/model")
    assert not list(Path("artifacts/run").glob("**/manifest.json"))  # before any work


def test_a_revision_is_a_part_of_the_name(kaggle):
    Path("stackllm.toml").write_text(
        SETTINGS.format(backbone="org/model", more='revision = "v1.0"')
    )
    assert read_settings(None, {}).encoder.backbone == "org/model@v1.0"
    overridden = read_settings(None, {"encoder": {"backbone": "org/other"}})
    assert overridden.encoder.backbone == "org/other"  # which has commits of its own


@pytest.mark.parametrize(("backbone", "revision", "kind", "sentence"), [
    ("smollm2", '"main"', UsageError, r"\[encoder\]: revision = \"main\" is for models of the hub, and backbone \"smollm2\" is none"),
    ("./here", '"main"', UsageError, "is for models of the hub"),
    ("mine.gguf", '"main"', UsageError, "is for models of the hub"),
    ("org/a@v1", '"v2"', UsageError, "name two revisions. Leave one of them out"),
    ("org/a", '"../up"', UsageError, "is no commit, branch or tag"),
    ("org/a", '""', UsageError, "revision must be text that is not empty"),
    ("org/a", "7", DataError, "revision must be text that is not empty, not 7"),
])  # fmt: skip
def test_a_revision_that_makes_no_sense_is_one_sentence(kaggle, backbone, revision, kind, sentence):
    Path("stackllm.toml").write_text(
        SETTINGS.format(backbone=backbone, more=f"revision = {revision}")
    )
    with pytest.raises(kind, match=sentence):
        read_settings(None, {})
