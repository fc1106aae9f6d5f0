"""Models of the hub: the same key before and after they are fetched, and only what is needed is fetched."""

import shutil
from pathlib import Path

import pytest

from stackllm.llm.locate import pinned, prepare, revision_of

NAME = "org/model"


def silent(text):
    """Told what is fetched."""


@pytest.fixture(scope="module")
def whole(make_backbone):
    return Path(make_backbone("llama"))


@pytest.fixture
def pushed(hub, whole, tmp_path):
    """A model in the hub, with what others push beside it."""
    folder = shutil.copytree(whole, tmp_path / "pushed")
    for name in (
        "pytorch_model.bin",
        "modeling_own.py",
        "consolidated.safetensors",
        "README.md",
        "tf_model.h5",
        "vocab.py",
    ):
        (folder / name).write_text("nothing that we want")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_text("another model")
    hub.commit(NAME, folder)
    return folder


def test_the_key_is_the_same_before_and_after_it_is_fetched(hub, pushed):
    commit = hub.branches[NAME]["main"]
    before = revision_of(NAME)
    assert not hub.fetched()
    folder = prepare(NAME, silent)
    assert before == revision_of(NAME) == revision_of(f"{NAME}@{commit}") == commit
    assert pinned(NAME) == f"{NAME}@{commit}"
    assert Path(folder).is_dir()


def test_only_what_is_needed_is_fetched_and_nothing_twice(hub, pushed, whole):
    folder = Path(prepare(NAME, silent))
    assert hub.fetched() == {path.name for path in whole.iterdir()}
    assert {path.name for path in folder.iterdir()} == hub.fetched()
    hub.asked.clear()
    assert prepare(pinned(NAME), silent) == str(folder)
    assert not hub.fetched()
