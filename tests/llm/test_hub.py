"""Models of the hub: the same key before and after they are fetched, and only what is needed is fetched."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import MissingInputError, ServerError, StorageError, UsageError
from stackllm.llm.backbone import load_config, load_model
from stackllm.llm.hub import hub_model
from stackllm.llm.locate import UNKNOWN, is_ready, pinned, prepare, revision_of, with_revision

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


def test_looking_at_a_model_fetches_no_weights(hub, pushed):
    assert is_ready(NAME)
    assert load_config(NAME, silent).num_hidden_layers == 4
    assert hub.fetched() == {"config.json"}


def test_a_model_is_loaded_from_what_was_fetched(hub, pushed):
    model, tokenizer = load_model("AutoModelForCausalLM", NAME, "float32", silent)
    assert model.config.num_hidden_layers == 4
    assert tokenizer("Question")["input_ids"]


def test_a_branch_that_moves_is_another_model_and_a_commit_stays(hub, pushed, whole):
    first = pinned(NAME)
    second = hub.commit(NAME, whole)
    assert revision_of(NAME) == second != revision_of(first)
    assert pinned(first) == first
    hub.commit(NAME, whole, branch="v1.0")
    assert pinned(f"{NAME}@v1.0") not in (first, pinned(NAME))
    assert Path(prepare(first, silent)) != Path(prepare(NAME, silent))


def test_without_a_hub_the_cache_tells_the_commit(hub, pushed, monkeypatch):
    from huggingface_hub import constants

    commit, folder = revision_of(NAME), prepare(NAME, silent)
    for name, value in (("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")):
        with monkeypatch.context() as without:
            without.setattr(constants, name, value)
            assert revision_of(NAME) == revision_of(f"{NAME}@{commit[:9]}") == commit
            assert prepare(NAME, silent) == folder
            assert is_ready(NAME)
    hub.fails = 503
    assert revision_of(NAME) == commit


def test_without_a_hub_and_a_cache_there_is_one_sentence(hub, pushed, monkeypatch):
    from huggingface_hub import constants

    commit = prepare(pinned(NAME), silent) and revision_of(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ServerError, match=r"is out of reach .* give the path of a folder"):
        prepare("org/other", silent)
    with pytest.raises(ServerError, match=f'there is commit {commit} here: revision = "{commit}"'):
        pinned(f"{NAME}@dev")
    assert revision_of("org/other") == UNKNOWN
    assert not is_ready("org/other")
    hub.fails = 503
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    with pytest.raises(
        ServerError, match=r"answers with an error \(503\). Run the same command again later"
    ):
        pinned("org/other")


def gate(hub, folder):
    hub.gated.add(NAME)


def wants_code(hub, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModel": "modeling_own.Own"}})
    )


def is_packed(hub, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "awq"}})
    )


def only(*names):
    def keep(hub, folder):
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()
        for name in names:
            (folder / name).write_text("{}")

    return keep


def no_weights(hub, folder):
    (folder / "model.safetensors").unlink()


FAULTS = {
    "gated": (NAME, gate, MissingInputError, "is gated: .* Ask for access on http.*/org/model, then log in"),
    "unknown": ("org/unknown", None, MissingInputError, "no such model in the hub that you may see. Check the name"),
    "no revision": (f"{NAME}@dev", None, MissingInputError, 'the hub has no revision "dev" of it. Take one of'),
    "no commit": (f"{NAME}@{'0' * 40}", None, MissingInputError, "the hub has no revision"),
    "code of its own": (NAME, wants_code, UsageError, "wants to run code of its own"),
    "packed": (NAME, is_packed, UsageError, r"quantised already \(awq\)"),
    "GGUF files": (NAME, only("a.gguf", "b.gguf"), UsageError, "but 2 GGUF files. Fetch one, with: hf download org/model a.gguf"),
    "adapter": (NAME, only("adapter_config.json"), UsageError, "it is an adapter, not a model"),
    "nothing": (NAME, only("README.md"), MissingInputError, "has no config.json in the hub"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "do", "kind", "sentence"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_is_one_sentence_before_weights_are_fetched(
    hub, pushed, name, do, kind, sentence
):
    if do:
        do(hub, pushed)
    with pytest.raises(kind, match=sentence) as raised:
        prepare(name, silent)
    assert "\n" not in str(raised.value)
    assert hub.fetched() <= {"config.json"}


def test_pickles_are_never_fetched(hub, pushed):
    no_weights(hub, pushed)
    with pytest.raises(MissingInputError, match="has no weights"):
        prepare(NAME, silent)
    assert not [name for name in hub.fetched() if name.endswith((".bin", ".py", ".h5"))]


def test_a_download_that_is_broken_off_goes_on_where_it_stopped(hub, pushed):
    hub.cut.add("model.safetensors")
    with pytest.raises(ServerError, match=r"Run the same command again|run the same command again"):
        prepare(NAME, silent)
    hub.cut.clear()
    before = hub.fetched()
    hub.asked.clear()
    prepare(NAME, silent)
    assert hub.fetched() == {"model.safetensors"} <= before


def test_a_disk_that_is_full_is_told_before_anything_is_fetched(hub, pushed, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(StorageError, match=r"0.0 GiB are free at .* set HF_HUB_CACHE"):
        prepare(NAME, silent)
    assert "model.safetensors" not in hub.fetched()


def test_shards_are_fetched_by_their_index(hub, pushed):
    names = ["a-1.safetensors", "b [2].safetensors"]
    for name in names:
        shutil.copy(pushed / "model.safetensors", pushed / name)
    (pushed / "model.safetensors").unlink()
    weight_map = {"x": names[0], "y": names[1]}
    (pushed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    folder = Path(prepare(NAME, silent))
    assert {path.name for path in folder.glob("*.safetensors")} == set(names)


def test_two_processes_at_once_end_with_the_same_whole_folder(hub, pushed, whole):
    code = f"from stackllm.llm.locate import prepare; print(prepare({NAME!r}, lambda text: None))"
    pair = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {process.communicate()[0].strip() for process in pair}
    assert [process.returncode for process in pair] == [0, 0]
    (folder,) = map(Path, folders)
    for path in whole.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert not list(folder.parents[1].glob("**/*.incomplete"))


@pytest.mark.parametrize(
    "name",
    ["org/name@", "org/name@../../up", "org/name@a b", "a@b/c@d", "org/x/y", "@main", "-x@y"],
)
def test_what_can_be_no_model_of_the_hub(name):
    assert hub_model(name) is None


@given(
    st.from_regex(r"[A-Za-z0-9]{1,8}(/[A-Za-z0-9]{1,8})?", fullmatch=True),
    st.from_regex(r"[a-z0-9]{1,9}(/[a-z0-9.]{1,9})?", fullmatch=True),
)
def test_a_name_with_its_revision_is_read_as_it_is_written(repo, revision):
    model = hub_model(f"{repo}@{revision}")
    if ".." not in revision and not revision.partition("/")[2].startswith("."):
        assert (model.repo, model.revision) == (repo, revision)
        assert str(model) == with_revision(repo, revision)
