"""The same work is found again in other runs and under other names, and nothing else is."""

import errno
import json
import os
import shutil
from collections import defaultdict

import pytest
from conftest import write_table
from helpers import digests, stackllm

from stackllm.engine.local import Engine, PendingError, Task, read_timings
from stackllm.engine.progress import Reporter
from stackllm.store.digest import digest
from stackllm.store.runs import Runs
from stackllm.store.units import MANIFEST, _signed, make_unit, publish, quarantine, state

ONE = make_unit("members/one/fold0", 1, "text", params=3)
TWO = make_unit("members/two/fold0", 1, "text", params=3)


def fill(folder):
    (folder / "model.txt").write_bytes(b"tree")
    (folder / "predictions.npy").write_bytes(bytes(range(99)))


def refuse(folder):
    raise AssertionError("it was run")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def plain(tmp_path):
    """Folder of a unit in the run ``plain``."""
    return publish(tmp_path / "plain", ONE, fill)


def engine(root, dry_run=False):
    return Engine(root, 1, Reporter(), dry_run, runs=Runs(root.parent))


@pytest.mark.parametrize(("run", "unit"), [("plain", TWO), ("other", ONE), ("other", TWO)])
def test_the_same_work_under_another_name_is_taken_over(tmp_path, plain, capsys, run, unit):
    line = {"unit": ONE.path, "key": ONE.key, "seconds": 7.5}
    (tmp_path / "plain" / "timings.jsonl").write_text(json.dumps(line) + "\n")
    (folder,) = engine(tmp_path / run).ensure("members", [Task(unit, refuse)])
    assert "1 of 1 units of members taken over from run plain" in capsys.readouterr().err
    assert state(tmp_path / run, unit) == "done"
    assert content(folder) == content(publish(tmp_path / "afresh", unit, fill))  # manifest and all
    assert read_timings(tmp_path / run)[unit.path] == 7.5
    assert (folder / "model.txt").samefile(plain / "model.txt")
    shutil.rmtree(plain)
    assert state(tmp_path / run, unit) == "done"


@pytest.mark.parametrize(
    "other",
    [
        make_unit("members/one/fold0", 2, "text", params=3),
        make_unit("members/one/fold0", 1, "texts", params=3),
        make_unit("members/one/fold0", 1, "text", params=4),
        make_unit("stack/one/fold0", 1, "text", params=3),
    ],
)
def test_other_work_is_not(tmp_path, plain, other):
    runs = Runs(tmp_path)
    assert runs.find(other) is None
    assert runs.find(ONE).folder == plain


def damage_file(folder):
    (folder / "model.txt").write_bytes(b"tref")


def cut_manifest(folder):
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:-9])


def forge_manifest(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"size": 4', '"size": 5'))


def lose_file(folder):
    (folder / "model.txt").unlink()


def add_file(folder):
    (folder / "model_2.txt").write_bytes(b"tree")


def link_file(folder):
    (folder / "model.txt").rename(folder.parents[3] / "model.txt")
    (folder / "model.txt").symlink_to(folder.parents[3] / "model.txt")


def link_folder(folder):
    folder.rename(folder.parents[3] / "hidden")
    folder.symlink_to(folder.parents[3] / "hidden")


def hide(folder):
    folder.rename(folder.with_name(".fold0.0badcafe-1-x.tmp"))


def put_away(folder):
    quarantine(folder.parents[2], ONE)


def strip(folder):
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    "harm",
    [damage_file, cut_manifest, forge_manifest, lose_file, add_file, link_file, link_folder, hide,
     put_away, strip],
)  # fmt: skip
def test_what_is_not_whole_is_never_taken_over(tmp_path, harm):
    harm(publish(tmp_path / "artifacts" / "plain", ONE, fill))
    engine(tmp_path / "artifacts" / "other").ensure("members", [Task(TWO, fill)])
    assert list(read_timings(tmp_path / "artifacts" / "other")) == [TWO.path]
    (tmp_path / "artifacts" / "other" / TWO.path / "model.txt").write_bytes(b"x")  # no link of it


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.ENOTSUP])
def test_a_disk_without_hard_links_gets_copies(tmp_path, plain, monkeypatch, number):
    def link(*arguments, **named):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    (folder,) = engine(tmp_path / "other").ensure("members", [Task(TWO, refuse)])
    assert state(tmp_path / "other", TWO) == "done"
    assert not (folder / "model.txt").samefile(plain / "model.txt")


def test_a_unit_that_goes_away_meanwhile_is_run(tmp_path, plain, monkeypatch):
    runs, find = Runs(tmp_path), Runs.find

    def removed(self, unit):
        stored = find(self, unit)
        shutil.rmtree(plain)
        return stored

    monkeypatch.setattr(Runs, "find", removed)
    Engine(tmp_path / "other", 1, runs=runs).ensure("members", [Task(TWO, fill)])
    assert state(tmp_path / "other", TWO) == "done"


def test_a_dry_run_counts_it_as_done_and_writes_nothing(tmp_path, plain, capsys):
    new = make_unit("members/two/fold1", 1, "text 1")
    looked = engine(tmp_path / "other", dry_run=True)
    with pytest.raises(PendingError, match=r"^1 of 2 units of members would run") as pending:
        looked.ensure("members", [Task(TWO, refuse), Task(new, refuse)])
    assert pending.value.units == {TWO.path: f"done, in {plain}", new.path: "new"}
    assert f"{TWO.path}: done, in {plain}" in capsys.readouterr().err
    assert not looked.lacks([Task(TWO, refuse)])
    assert looked.lacks([Task(TWO, refuse), Task(new, refuse)])
    assert not (tmp_path / "other").exists()


def test_runs_are_looked_through_once_and_only_if_something_is_missing(
    tmp_path, plain, monkeypatch
):
    walks, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: walks.append(1) or walk(*a, **k))
    own = engine(tmp_path / "plain")
    own.ensure("members", [Task(ONE, refuse)])
    assert not walks
    for number in range(3):
        own.ensure("members", [Task(make_unit(f"members/x/fold{number}", 1, number), fill)])
    assert len(walks) == 1


def as_before(root, unit, fill):
    """A unit as it was stored when a key covered the whole path."""
    folder = publish(root, unit, fill)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["self"]
    manifest["key"] = digest(unit.path, unit.parts)
    (folder / MANIFEST).write_text(_signed(manifest))
    return folder


def test_a_unit_stored_when_keys_held_the_path_goes_on(tmp_path):
    as_before(tmp_path / "plain", ONE, fill)
    assert state(tmp_path / "plain", ONE) == "done"
    assert state(tmp_path / "plain", make_unit(ONE.path, 1, "news", params=3)) == "input changed"
    engine(tmp_path / "other").ensure("members", [Task(TWO, refuse)])
    assert state(tmp_path / "other", TWO) == "done"


def test_shards_stored_when_keys_did_not_hold_their_rows_are_never_mistaken(tmp_path):
    as_before(tmp_path / "plain", make_unit("encoder/x/a", 1, "identity"), fill)
    shard = make_unit("encoder/x/b", 1, "identity", digest(["rows"]))
    assert Runs(tmp_path).find(shard) is None


SETTINGS = """
[stack]
n_trees = 6
n_seeds = 1
[[member]]
kind = "lexical"
name = "{}"
[[member]]
kind = "lexical"
name = "{}"
[[member]]
kind = "features"
n_trees = 6
"""


@pytest.mark.slow
def test_units_of_one_key_hold_the_same_and_a_run_goes_on_under_any_name(tmp_path):
    """Over all stages of a real run, two of whose members differ in their names only."""
    folder = write_table(tmp_path / "contest", 12, 6)
    words = ("--backbone", "none", "--folds", "2", "--rounds", "1")

    def play(run, *names):
        (folder / "stackllm.toml").write_text(SETTINGS.format(*names))
        done = stackllm("run", *words, "--name", run, cwd=folder)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stderr.splitlines() if "taken over from" in line]
        return sum(int(line[0]) for line in lines)

    assert play("plain", "first", "second") == 0
    contents = defaultdict(set)
    manifests = list((folder / "artifacts").rglob(MANIFEST))
    for path in manifests:
        manifest = json.loads(path.read_text())
        contents[manifest["key"]].add(json.dumps(manifest["files"], sort_keys=True))
    assert all(len(held) == 1 for held in contents.values())
    assert len(contents) < len(manifests)
    assert play("renamed", "third", "fourth") == len(manifests) - 1  # the model names its members
    assert play("again", "first", "second") == len(manifests)
    first, again = (digests(folder / "artifacts" / name) for name in ("plain", "again"))
    assert first == again


def test_a_dry_run_goes_on_where_all_work_stands_elsewhere(tmp_path, plain):
    looked = engine(tmp_path / "other", dry_run=True)
    assert looked.ensure("members", [Task(TWO, refuse)]) == [plain]
    assert looked.folder(TWO.path) == plain
    assert looked.met == {"members": (1, 0)}
    assert not (tmp_path / "other").exists()
