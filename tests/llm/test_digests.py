"""Digests of weights: worked out once per machine and change, by all processes together."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stackllm.errors import StorageError
from stackllm.llm import digests, locate
from stackllm.llm.digests import SMALL, known_digest
from stackllm.llm.locate import prepare, revision_of
from stackllm.store import units

HOUR = 3600 * 10**9


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """Bytes of large files that were hashed, by an empty cache; a list that grows. The clock is an hour ahead."""
    monkeypatch.setenv("STACKLLM_CACHE", str(tmp_path / "cache"))
    real, clock, read = digests.file_digest, digests._now, []

    def counted(path):
        read.extend([path.stat().st_size] if path.stat().st_size >= SMALL else [])
        return real(path)

    for module in (digests, units):
        monkeypatch.setattr(module, "file_digest", counted)
    monkeypatch.setattr(digests, "_now", lambda: clock() + HOUR)
    return read


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(SMALL))
    return path


def true_digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_file_is_hashed_once(hashed, weights, tmp_path, monkeypatch):
    assert known_digest(weights) == known_digest(weights) == true_digest(weights)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(weights)
    assert known_digest(Path("link")) == known_digest(Path("model.safetensors"))
    assert hashed == [SMALL]


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_file_of_the_same_size_is_hashed_again_whatever_its_time_says(
    hashed, weights, keeps_time
):
    before = known_digest(weights), weights.stat()
    weights.write_bytes(b"\1" * SMALL)
    if keeps_time:  # as cp -p and rsync do
        os.utime(weights, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
    assert known_digest(weights) == true_digest(weights) != before[0]
    other = weights.with_name("other")
    other.write_bytes(b"\2" * SMALL)
    other.replace(weights)
    assert known_digest(weights) == true_digest(weights)


def test_a_file_that_was_just_written_is_not_trusted(hashed, weights, monkeypatch):
    written = weights.stat().st_mtime_ns
    monkeypatch.setattr(digests, "_now", lambda: written + digests.RACY_NS - 1)
    known_digest(weights)
    weights.write_bytes(b"\1" * SMALL)
    os.utime(weights, ns=(written, written))
    assert known_digest(weights) == true_digest(weights)
    assert len(hashed) == 2
    assert not list(weights.parent.glob("cache/**/*.json"))


@pytest.mark.parametrize("damage", [
    lambda text: "",
    lambda text: text[:-9],
    lambda text: "[]",
    lambda text: text.replace('"sha256": "', '"sha256": "0', 1),
    lambda text: json.dumps({**json.loads(text), "sha256": "0" * 64}),
])  # fmt: skip
def test_a_damaged_record_is_made_again(hashed, weights, damage):
    known_digest(weights)
    (record,) = weights.parent.glob("cache/digests/*.json")
    whole = record.read_text()
    record.write_text(damage(whole))
    assert known_digest(weights) == true_digest(weights)
    assert record.read_text() == whole
    assert len(hashed) == 2


def test_several_at_once_agree(hashed, weights):
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(known_digest, [weights] * 32)) == {true_digest(weights)}


def test_a_cache_that_cannot_be_written_costs_but_time(hashed, weights, monkeypatch):
    monkeypatch.setenv("STACKLLM_CACHE", str(weights))  # a file
    assert known_digest(weights) == true_digest(weights)


def test_what_cannot_be_read_is_a_sentence(hashed, tmp_path):
    with pytest.raises(StorageError, match="gone: reading failed"):
        known_digest(tmp_path / "gone")


def test_a_folder_is_hashed_once_and_one_that_is_edited_anew(hashed, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(SMALL))
    (folder / "config.json").write_text("{}")
    before = revision_of(str(folder))
    assert revision_of(str(folder)) == before
    (folder / "config.json").write_text('{"a": 1}')
    edited = revision_of(str(folder))
    assert edited != before
    assert hashed == [SMALL]
    (folder / "model.safetensors").write_bytes(b"\1" * SMALL)
    assert revision_of(str(folder)) not in (before, edited)


def test_a_gguf_file_and_what_it_was_converted_into_are_hashed_once_for_all_commands(
    hashed, tmp_path, monkeypatch
):
    source = tmp_path / "mine.gguf"
    source.write_bytes(b"GGUF".ljust(SMALL))
    convert = lambda source, folder, _: (folder / "model.safetensors").write_bytes(bytes(SMALL))  # noqa: E731
    monkeypatch.setattr(locate, "_convert", convert)
    prepare(str(source), lambda _: None)
    prepare(str(source), lambda _: None)  # notes the folder, which was new then
    assert len(hashed) < 8
    hashed.clear()
    folder = prepare(str(source), lambda _: None)
    revision_of(str(source))
    assert hashed == []
    (Path(folder) / "model.safetensors").write_bytes(b"\1" * SMALL)
    said = []
    prepare(str(source), said.append)
    assert "was damaged; moved to" in said[0]
