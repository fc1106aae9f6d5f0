"""Settings that have no sense are refused when they are read, each with one sentence."""

import shutil

import pytest

from stackllm.errors import DataError, MissingInputError, StackllmError, UsageError
from stackllm.llm.locate import anchored, find_backbone, revision_of
from stackllm.settings import read_settings

DECODER = '[[member]]\nkind = "decoder"\n'
TRAINING = f"{DECODER}[member.training]\n"


def read(folder, content):
    path = folder / "stackllm.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_settings(path, {})


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        (f"{DECODER}seeds = [-1]", 2, "seeds must be from 0 to 2147483647"),
        (f"{DECODER}seeds = [2147483648]", 2, "seeds must be from 0 to 2147483647"),
        (f"{DECODER}seeds = [0.5]", 65, "seeds, each of them, must be int, such as 0, not 0.5"),
        (f"{DECODER}seeds = [true]", 65, "seeds, each of them, must be int"),
        (f"{DECODER}seeds = ['a']", 65, "seeds, each of them, must be int"),
        ("[run]\nseed = -1", 2, "--seed must be from 0 to 2147483647, not -1"),
        ("[run]\nseed = 4294967296", 2, "--seed must be from 0"),
        (f"{DECODER}[member.lora]\ntarget_modules = [1]", 65, "target_modules, each of them, must be str"),
        ("[encoder]\ndepths = ['a']", 65, "depths, each of them, must be float"),
        ("[encoder]\ndepths = [true]", 65, "depths, each of them, must be float"),
        ("[encoder]\ndepths = [nan]", 65, "depths, each of them, must be a finite number"),
        ("[encoder]\nbatch_tokens = 0", 2, "batch_tokens must be 1 or more, not 0"),
        ("[rater]\nbatch_tokens = -5", 2, "batch_tokens must be 1 or more, not -5"),
        ("[[member]]\nkind = 'lexical'\nviews = [1]", 65, "views, each of them, must be str"),
        ("[[member]]\nkind = 'lexical'\nc = nan", 65, "c must be a finite number, not nan"),
        ("[[member]]\nkind = ['decoder']", 65, "there is no kind"),
        ("[[member]]\nkind = 'lexical'\nname = '-x'", 65, "no - in front"),
        (f"[[member]]\nkind = 'lexical'\nname = '{'x' * 300}'", 65, "up to 100 letters"),
        (f"{TRAINING}epochs = inf", 65, "epochs must be a finite number"),
        (f"{TRAINING}learning_rate = nan", 65, "learning_rate must be a finite number"),
        (f"{TRAINING}weight_decay = -5.0", 2, "weight_decay must be 0 or more"),
        (f"{TRAINING}max_grad_norm = -1.0", 2, "max_grad_norm must be 0 or more"),
        (f"{TRAINING}report_to = ['tensorbord']", 2, 'no tracker "tensorbord". Did you mean "tensorboard"?'),
        (f"{TRAINING}report_to = [1]", 65, "report_to, each of them, must be str"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(tmp_path, content, status, sentence):
    with pytest.raises(StackllmError) as caught:
        read(tmp_path, content)
    assert sentence in str(caught.value)
    assert caught.value.exit_code == status


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(
        integration_utils, "get_available_reporting_integrations", lambda: ["wandb"]
    )
    with pytest.raises(MissingInputError, match="pip install tensorboard"):
        read(tmp_path, f"{TRAINING}report_to = ['tensorboard']")
    settings = read(tmp_path, f"{TRAINING}report_to = ['wandb']")
    assert settings.members[0].params.training.report_to == ("wandb",)


def test_a_file_that_windows_has_marked(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbf[run]\nfolds = 3\n").run.folds == 3


def test_backbones_are_found_from_where_the_settings_stand(tmp_path, monkeypatch):
    (tmp_path / "sub" / "tiny").mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    content = '[encoder]\nbackbone = "./tiny"\n[rater]\nbackbone = "tiny"\n' + DECODER
    (tmp_path / "sub" / "stackllm.toml").write_text(f'{content}backbone = "../tiny"\n')
    settings = read_settings((tmp_path / "sub" / "stackllm.toml").relative_to(tmp_path), {})
    assert settings.encoder.backbone == "./sub/tiny"
    assert settings.rater.backbone == "./sub/tiny"
    assert settings.members[0].params.backbone == "./tiny"
    shutil.rmtree(tmp_path / "sub" / "tiny")
    with pytest.raises(MissingInputError, match="there is no such folder"):
        find_backbone(settings.encoder.backbone)


def test_weights_that_change_are_seen_at_once(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = revision_of(str(tmp_path))
    assert revision_of(str(tmp_path)) == before
    weights.write_bytes(b"two")
    assert revision_of(str(tmp_path)) != before


def test_names_in_the_hub_and_whole_paths_stay_as_they_are(tmp_path):
    for name in ("smollm2", "none", "HuggingFaceTB/SmolLM2-135M", str(tmp_path)):
        assert anchored(name, tmp_path / "elsewhere") == name


@pytest.mark.parametrize("name", ["bad name!", "nöne", "a/b/c", "./nope"])
def test_backbones_that_nothing_can_be_called(name):
    with pytest.raises(MissingInputError, match="there is no such folder"):
        find_backbone(name)


@pytest.mark.parametrize("name", ["", "none"])
def test_a_decoder_needs_a_backbone(name):
    with pytest.raises(UsageError, match="is none to read with"):
        find_backbone(name)


def test_numbers_may_be_written_without_a_point(tmp_path):
    settings = read(tmp_path, "[[member]]\nkind = 'frozen'\nc = [1, 0.5]\n")
    assert settings.members[0].params.c == (1.0, 0.5)
    with pytest.raises(DataError, match="c must be tuple"):
        read(tmp_path, "[[member]]\nkind = 'frozen'\nc = 1\n")
