import json
import os

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllm.errors import LockedError, StorageError
from stackllm.store.atomic import write_bytes, write_file
from stackllm.store.digest import digest
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
    assert state(tmp_path, other) == "inputs changed"
    publish(tmp_path, other, fill)
    assert state(tmp_path, UNIT) == "inputs changed"
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["one"]


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
    if state(root, UNIT) == "done":  # white space or the like inside the manifest
        assert file.name == "manifest.json"
        assert json.loads(file.read_text())["key"] == UNIT.key
    else:
        with pytest.raises(StorageError, match="Run the same command again"):
            open_unit(root, UNIT)


def test_damaged_units_go_to_quarantine(tmp_path):
    folder = publish(tmp_path, UNIT, fill)
    (folder / "text.txt").write_text("hellp")
    assert state(tmp_path, UNIT) == "damaged"
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
