import json

import pytest
from click.testing import CliRunner

from stackllm.cli import cli
from stackllm.errors import LockedError, MissingInputError, UsageError
from stackllm.llm.locate import EMBEDDED
from stackllm.members.decoder import DecoderParams
from stackllm.members.registry import Member
from stackllm.report.changes import as_stored
from stackllm.report.housekeeping import clean, sizes
from stackllm.settings import Settings
from stackllm.store.lock import locked


@pytest.fixture
def artifacts(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("STACKLLM_CACHE", str(tmp_path.parent / f"{tmp_path.name}-llms"))
    monkeypatch.setattr(
        constants, "HF_HUB_CACHE", str(tmp_path.parent / f"{tmp_path.name}-llms/hub")
    )
    for name, size in {
        "one/members/a.npy": 300,
        "one/quarantine/b.npy": 20,
        "two/run.json": 10,
        "cache/trunk/x/states.npy": 5000,
        "cache/encoder/y/pooled.npy": 400,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    return tmp_path


def test_sizes_are_those_of_the_files_largest_first(artifacts):
    found = [(part.name, part.files, part.size) for part in sizes(artifacts)]
    assert found == [
        ("cache/trunk", 1, 5000),
        ("cache/encoder", 1, 400),
        ("one", 2, 320),
        ("two", 1, 10),
    ]


@pytest.mark.parametrize(
    ("what", "size", "left"),
    [
        ("cache/trunk", 5000, ["cache/encoder", "one", "two"]),
        ("two", 10, ["cache/trunk", "cache/encoder", "one"]),
        ("quarantine", 20, ["cache/trunk", "cache/encoder", "one", "two"]),
    ],
)
def test_what_is_removed_is_gone_and_nothing_else(artifacts, what, size, left):
    assert clean(artifacts, what).size == size
    assert [part.name for part in sizes(artifacts)] == left
    assert (artifacts / "one/quarantine").exists() != (what == "quarantine")
    assert not list(artifacts.glob(".removed*"))


def test_a_run_that_is_being_written_stays_and_so_does_the_cache(artifacts):
    with locked(artifacts / "one"):
        for what in ("one", "cache/trunk", "quarantine"):
            with pytest.raises(LockedError, match="is writing this run"):
                clean(artifacts, what)
        clean(artifacts, "two")
    assert (artifacts / "one/members/a.npy").is_file()
    assert (artifacts / "cache/trunk/x/states.npy").is_file()


def test_what_a_killed_removal_left_goes_with_the_next(artifacts):
    (artifacts / ".removed-old-1").mkdir()
    (artifacts / ".removed-old-1/states.npy").write_bytes(b"x")
    clean(artifacts, "two")
    assert not list(artifacts.glob(".removed*"))


def test_an_unknown_name_is_answered_with_the_known_ones(artifacts):
    with pytest.raises(MissingInputError, match=r'no "trunk"\. Did you mean "cache/trunk"'):
        clean(artifacts, "trunk")
    for outside in ("..", "../x", "/etc"):
        with pytest.raises(MissingInputError, match="there is no"):
            clean(artifacts, outside)


@pytest.fixture
def llms(artifacts):
    """Two LLMs, and runs that read with one of them or with none."""
    folder = artifacts.parent / f"{artifacts.name}-llms"
    revision, commit = "a" * 64, "b" * 40
    (folder / f"backbones/smollm2-{revision[:16]}").mkdir(parents=True)
    (folder / f"backbones/smollm2-{revision[:16]}/model.safetensors").write_bytes(b"x" * 70)
    snapshot = folder / f"hub/models--org--some-name/snapshots/{commit}"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "weights").write_bytes(b"x" * 90)
    (snapshot / "weights").symlink_to(blobs / "weights")
    members = (Member("llm", "decoder", DecoderParams(backbone="org/some-name")),)
    for name, settings, backbones in (
        ("one", Settings(members=members), {"org/some-name": commit, EMBEDDED: revision}),
        ("two", Settings(encoder=None), {}),
    ):
        content = {"settings": as_stored(settings), "backbones": backbones}
        (artifacts / name / "run.json").write_text(json.dumps(content))
    (artifacts / "cache/answers.sqlite").write_bytes(b"paid for")
    return artifacts


def test_what_reads_from_what(llms):
    users = {part.name: part.used_by for part in sizes(llms)}
    assert users["hub/org/some-name"] == ("one",)
    assert users[f"backbones/smollm2-{'a' * 16}"] == ("one",)
    assert users["cache/trunk"] == users["cache/encoder"] == ("one",)
    assert users["one"] == ()
    assert {part.name: part.size for part in sizes(llms)}["hub/org/some-name"] == 90


@pytest.mark.parametrize("name", ["hub/org/some-name", f"backbones/smollm2-{'a' * 16}"])
def test_an_llm_goes_alone_and_not_under_a_run_at_work(llms, name):
    before = {part.name for part in sizes(llms)}
    with locked(llms / "one"), pytest.raises(LockedError, match="is writing this run"):
        clean(llms, name)
    clean(llms, name)
    assert {part.name for part in sizes(llms)} == before - {name}
    folder = llms.parent / f"{llms.name}-llms"
    assert not list(folder.rglob(".removed*"))


def test_paid_answers_are_listed_and_never_removed(llms):
    (answers,) = [part for part in sizes(llms) if part.name == "cache/answers.sqlite"]
    assert answers.again == "paid for: stays"
    with pytest.raises(UsageError, match="paid for"):
        clean(llms, "cache/answers.sqlite")
    for part in sizes(llms):
        if part is not answers and part.name != "cache/answers.sqlite":
            clean(llms, part.name)
    assert [part.name for part in sizes(llms)] == ["cache/answers.sqlite"]


def cleaned(artifacts, *options, **more):
    return CliRunner().invoke(cli, ["clean", "--artifacts", str(artifacts), *options], **more)


def test_nothing_goes_unasked(llms, monkeypatch):
    before = sizes(llms)
    alone = cleaned(llms, "cache/trunk")
    assert alone.exception.exit_code == 2
    assert "Add --yes" in str(alone.exception)
    dry = cleaned(llms, "cache/trunk", "two", "--dry-run")
    assert dry.exit_code == 0
    assert "one" in dry.output.splitlines()[1]  # which reads from it
    told = json.loads(cleaned(llms, "cache/trunk", "--dry-run", "--json").output)
    assert told["would_remove"][0]["used_by"] == ["one"]
    assert cleaned(llms, "cache/trunk", "nothing", "--yes").exception.exit_code == 66
    monkeypatch.setattr("stackllm.cli.clean._ask", lambda: None)
    assert sizes(llms) == before
    assert cleaned(llms, "cache/trunk").exit_code == 0
    assert cleaned(llms, "two", "--yes").exit_code == 0
    assert {"cache/trunk", "two"}.isdisjoint(part.name for part in sizes(llms))


@pytest.mark.parametrize(("said", "goes"), [("n\n", False), ("\n", False), ("y\n", True)])
def test_who_is_asked_decides(llms, monkeypatch, said, goes):
    from stackllm.cli import clean as module

    class Terminal:
        @staticmethod
        def isatty():
            return True

    monkeypatch.setattr(module.sys, "stdin", Terminal(), raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: said.strip())
    code = module.clean.callback(("two",), False, False, llms, False) if goes else None
    if not goes:
        import click

        with pytest.raises(click.Abort):
            module.clean.callback(("two",), False, False, llms, False)
    assert code is None
    assert (llms / "two").exists() != goes
