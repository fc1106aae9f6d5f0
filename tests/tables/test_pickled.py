"""Pickles: plain numbers come out as they went in, and nothing that a file names ever runs."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackllm.errors import DataError
from stackllm.tables.pickled import read_pickle

PATH = Path("logits.pkl")
MATRIX = np.random.default_rng(0).normal(size=(5, 3))
PLAIN = {
    "float32": MATRIX.astype(np.float32),
    "half": MATRIX.astype(np.float16),
    "turned": MATRIX.astype(">f8"),
    "by column": np.asfortranarray(MATRIX),
    "strided": MATRIX[::2],
    "whole": np.arange(6).reshape(2, 3),
    "bool": MATRIX > 0,
    "empty": np.zeros((0, 3)),
    "texts": np.array(["a", "bcd", "é", ""]),
    "objects": np.array(["q\n", None, 2.5], dtype=object),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", list(PLAIN))
def test_arrays_come_out_as_they_went_in(name, protocol) -> None:
    held = read_pickle(PATH, pickle.dumps({name: PLAIN[name], "again": [PLAIN[name]]}, protocol))
    for array in (held[name], held["again"][0]):
        assert array.shape == PLAIN[name].shape
        assert array.tolist() == PLAIN[name].tolist()


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(plain, st.integers(3, pickle.HIGHEST_PROTOCOL))
def test_plain_values_come_out_as_they_went_in(value, protocol) -> None:
    assert read_pickle(PATH, pickle.dumps(value, protocol)) == value


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(there: Path) -> list[object]:
    touch = f"touch {there}"
    return [
        Calls(os.system, touch),
        Calls(eval, f"open({str(there)!r}, 'w')"),
        Calls(exec, f"open({str(there)!r}, 'w')"),
        Calls(__import__, "os"),
        [MATRIX, {"deep": [Calls(os.system, touch)]}],
        {"logits": Calls(np.load, "x.npy", None, True)},
        Calls(np.frombuffer, b"12345678"),
        np.array([Calls(os.system, touch)], dtype=object),
        Calls(OrderedDict, [("a", Calls(os.system, touch))]),
        there,
        {1, 2},
        print,
        np.zeros(2, dtype=[("a", "f8")]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
    ]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_nothing_that_a_pickle_names_runs(tmp_path, protocol) -> None:
    there = tmp_path / "there"
    for value in hostile(there):
        content = pickle.dumps(value, protocol)
        with pytest.raises(DataError, match=r"logits\.pkl: .*is not opened|not a readable pickle"):
            read_pickle(PATH, content)
    assert not there.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'id'\ntR.",
        b"(S'id'\nios\nsystem\n.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n.",
        b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b"x.",
        b"\x80\x02\x8e" + (2**62).to_bytes(8, "little") + b"x.",
        b"\x80\x02]r\xff\xff\xff\xff0.",
        b"(lp0\ng0\na0.",
        b"I" + b"9" * 100_000 + b"\n.",
        b"\x82\x01.",
        b"Pid\n.",
        b"garbage",
        b"\x80\x04",
        b"\x80\x04" + b"(" * 100_000 + b"t" * 50_000,
    ],
)
def test_damaged_and_huge_pickles_are_refused(content) -> None:
    with pytest.raises(DataError, match=r"logits\.pkl: "):
        read_pickle(PATH, content)


@settings(max_examples=300)
@given(st.data())
def test_a_pickle_with_any_byte_changed_is_plain_or_refused(data) -> None:
    content = bytearray(pickle.dumps({"logits": MATRIX, "text": ["a", "b"]}, 4))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    with suppress(DataError):  # and no other error
        read_pickle(PATH, bytes(content))


def test_a_list_that_stands_in_many_others_is_not_written_out() -> None:
    row = [0.25, 0.75]
    assert read_pickle(PATH, pickle.dumps({"oof": [row, row], "preds": [row, row]}, 4))["oof"] == [
        row,
        row,
    ]
    for _ in range(40):
        row = [row, row]
    with pytest.raises(DataError, match="more numbers than stand in it"):
        read_pickle(PATH, pickle.dumps(row, 4))


def test_lists_within_themselves_are_refused() -> None:
    loop: list[object] = []
    loop.append({"again": loop})
    with pytest.raises(DataError, match="lists within lists"):
        read_pickle(PATH, pickle.dumps(loop, 4))
