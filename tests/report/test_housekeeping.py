import pytest

from stackllm.errors import LockedError, MissingInputError
from stackllm.report.housekeeping import clean, sizes
from stackllm.store.lock import locked


@pytest.fixture
def artifacts(tmp_path):
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
    with pytest.raises(MissingInputError, match=r'no "trunk"\. There are: cache/trunk'):
        clean(artifacts, "trunk")
    for outside in ("..", "../x", "/etc"):
        with pytest.raises(MissingInputError, match="There are"):
            clean(artifacts, outside)
