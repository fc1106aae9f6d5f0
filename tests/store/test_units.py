import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import LockedError, StorageError
from stackllm.store.atomic import _prefix, write_bytes, write_file
from stackllm.store.digest import digest
from stackllm.store.folder import open_folder
from stackllm.store.lock import locked
from stackllm.store.units import Unit, make_unit, open_unit, publish, quarantine, state

UNIT = make_unit("stage/one", 1, {"a": 1})


def fill(folder):
    np.save(folder / "array.npy", np.arange(5))
    (folder / "text.txt").write_text("hello")


def test_a_unit_is_new_then_done_then_stale(tmp_path):
    assert state(tmp_path, UNIT) == "new"
    publish(tmp_path, UNIT, fill)
    assert state(tmp_path, UNIT) == "done"
    assert (open_unit(tmp_path, UNIT) / "text.txt").read_text() == "hello"
    other = make_unit("stage/one", 2, {"a": 1})
    assert state(tmp_path, other) == "code changed"
    publish(tmp_path, other, fill)
    assert state(tmp_path, UNIT) == "code changed"
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["one"]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (make_unit("stage/one", 2, "a", params=1), "code changed"),
        (make_unit("stage/one", 1, "a", params=2), "parameters changed"),
        (make_unit("stage/one", 1, "b", params=1), "input changed"),
        (make_unit("stage/one", 1, "b", params=2), "parameters changed"),
        (make_unit("stage/one", 1, "a", params=1), "done"),
        (make_unit("stage/two", 1, "a", params=1), "new"),
    ],
)
def test_the_reason_to_run_is_told_apart(tmp_path, other, reason):
    publish(tmp_path, make_unit("stage/one", 1, "a", params=1), fill)
    assert state(tmp_path, other) == reason


def test_a_file_or_link_that_the_run_did_not_write_is_damage(tmp_path):
    folder = publish(tmp_path, UNIT, fill)
    (folder / "model_9.txt").write_text("tree")
    assert state(tmp_path, UNIT) == "corrupt"
    (folder / "model_9.txt").unlink()
    assert state(tmp_path, UNIT) == "done"
    (folder / "text.txt").rename(tmp_path / "elsewhere.txt")
    (folder / "text.txt").symlink_to(tmp_path / "elsewhere.txt")
    assert state(tmp_path, UNIT) == "corrupt"


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stage").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="stage is a link"), locked(tmp_path / "run"):
        pass


def test_what_killed_writers_left_is_removed(tmp_path):
    publish(tmp_path, UNIT, fill)
    rubbish = [".one.abc.tmp", ".one.abc.12.old", "stage/.one.x.tmp"]
    for name in rubbish:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.npy").write_text("x")
    open_folder(tmp_path, shared=True)
    assert (tmp_path / rubbish[0]).exists()
    open_folder(tmp_path)
    assert not any((tmp_path / name).exists() for name in rubbish)
    assert state(tmp_path, UNIT) == "done"


def test_a_file_that_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    """Also where there is no run and no lock, as beside the output of ``optim``."""
    code = (
        "import os, signal, sys, pathlib; from stackllm.store.atomic import write_file\n"
        "write_file(pathlib.Path(sys.argv[1]), lambda path: os.kill(os.getpid(), signal.SIGKILL))"
    )
    target = tmp_path / "out [1].csv"
    killed = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    mine = tmp_path / _prefix(target)
    mine.with_name(f"{mine.name}x.tmp").write_text("at work")
    write_bytes(target, b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{mine.name}x.tmp", target.name]


def test_publishing_at_once_is_harmless(tmp_path):
    """Two runs may make the same shard of the shared cache."""
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: publish(tmp_path, UNIT, fill), range(200)))
    assert folders == {UNIT.inside(tmp_path)}
    assert state(tmp_path, UNIT) == "done"
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["one"]


def test_publishing_twice_gives_the_same_bytes(tmp_path):
    def content():
        return {path.name: path.read_bytes() for path in UNIT.inside(tmp_path).iterdir()}

    publish(tmp_path, UNIT, fill)
    first = content()
    publish(tmp_path, UNIT, fill)
    assert content() == first


def test_a_unit_that_fails_leaves_nothing(tmp_path):
    def broken(folder):
        fill(folder)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        publish(tmp_path, UNIT, broken)
    assert state(tmp_path, UNIT) == "new"
    assert list((tmp_path / "stage").iterdir()) == []


@given(st.data())
def test_every_flipped_bit_and_truncation_is_found(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("store")
    folder = publish(root, UNIT, fill)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:place]
    file.write_bytes(content)
    assert state(root, UNIT) == "corrupt"
    with pytest.raises(StorageError, match="Run the command that made the run"):
        open_unit(root, UNIT)


def test_damaged_units_go_to_quarantine(tmp_path):
    folder = publish(tmp_path, UNIT, fill)
    (folder / "text.txt").write_text("hellp")
    assert state(tmp_path, UNIT) == "corrupt"
    moved = quarantine(tmp_path, UNIT)
    assert (moved / "text.txt").read_text() == "hellp"
    assert state(tmp_path, UNIT) == "new"


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "", "a/.hidden", "a/b c", "a/../b"])
def test_unit_paths_stay_inside(path):
    with pytest.raises(ValueError, match="not made of plain names"):
        Unit(path, "key")


def test_a_file_is_seen_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out.csv"
    write_bytes(target, b"old")

    def broken(temporary):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"No space left on device. Free some space"):
        write_file(target, broken)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_writing_onto_a_folder_is_refused(tmp_path):
    with pytest.raises(StorageError, match="Name a file, not a folder"):
        write_bytes(tmp_path, b"x")


def test_digests_see_every_difference():
    frame = pl.DataFrame({"a": ["x", "yz"], "b": [1, 2]})
    variants = [
        frame,
        frame.reverse(),
        frame.rename({"a": "c"}),
        frame.with_columns(pl.col("b").cast(pl.Int32)),
        pl.DataFrame({"a": ["xy", "z"], "b": [1, 2]}),
        pl.DataFrame({"a": [None, "xyz"], "b": [1, 2]}),
        pl.DataFrame({"a": ["", "xyz"], "b": [1, 2]}),
        np.arange(4),
        np.arange(4.0),
        np.arange(4).reshape(2, 2),
        [1, 2],
        ["1", "2"],
        "12",
    ]
    assert len({digest(variant) for variant in variants}) == len(variants)


def test_digests_do_not_depend_on_chunks():
    frame = pl.DataFrame({"a": ["x", "y"]})
    assert digest(pl.concat([frame[:1], frame[1:]], rechunk=False)) == digest(frame)


def test_one_writer_a_run(tmp_path):
    again = locked(tmp_path)
    with locked(tmp_path), pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        again.__enter__()
    with locked(tmp_path):
        pass


def test_every_folder_that_is_made_is_durable_before_what_it_holds(tmp_path, monkeypatch):
    durable, whole = [], os.fsync

    def noted(file):
        durable.append(Path(f"/proc/self/fd/{file}").readlink())
        whole(file)

    monkeypatch.setattr(os, "fsync", noted)
    publish(tmp_path / "artifacts" / "run", make_unit("stage/own", 1), lambda folder: None)
    run = tmp_path / "artifacts" / "run"
    assert durable[:3] == [tmp_path, run.parent, run]
    assert durable[-1] == run / "stage"
    manifest = next(i for i, path in enumerate(durable) if path.name == "manifest.json")
    assert manifest > 2
