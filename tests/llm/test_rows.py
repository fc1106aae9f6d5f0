"""The row cache: planned from all rows, found again by text, taken in the order asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import T4

from stackllm.engine.local import Engine, PendingError
from stackllm.engine.progress import Reporter
from stackllm.llm import rows as module
from stackllm.llm.rows import RowCache, Rows, Text, Weights, plan_shards

texts = st.lists(
    st.builds(Text, st.sampled_from("abcdefg"), st.text("xyz", max_size=5)), max_size=60
)


@given(texts, st.integers(1, 70))
def test_shards_hold_every_text_once_and_whole_questions_short_ones_first(items, most):
    rows = list({item.key: item for item in items}.items())
    shards = plan_shards(rows, most)
    assert sorted(row for shard in shards for row in shard) == sorted(rows)
    of_question = {}
    for number, shard in enumerate(shards):
        for _, item in shard:
            assert of_question.setdefault(item.question, number) == number
    longest = {q: max(t.size for _, t in rows if t.question == q) for q in of_question}
    sizes = [longest[item.question] for shard in shards for _, item in shard]
    assert sizes == sorted(sizes)


def test_a_shard_is_closed_by_the_first_question_after_it_is_full():
    rows = [(f"{q}{i}", Text(q, "x" * n)) for n, q in enumerate("abcd") for i in range(3)]
    assert [len(shard) for shard in plan_shards(rows, 4)] == [6, 6]


@pytest.mark.parametrize(
    ("seen", "devices", "n_rows", "most"),
    [
        ([], "one", 9_000, 112),
        ([T4], "one", 9_000, 1_024),
        ([T4], "one", 50, 112),
        ([T4, T4], "one", 9_000, 1_024),
        ([T4, T4], "one", 2_000, 500),
        ([T4, T4], "all", 2_000, 1_024),
        ([T4, T4], "one", 100, 112),
    ],
)
def test_a_shard_gives_a_gpu_several_passes_and_each_gpu_some_shards(
    pretend_gpus, seen, devices, n_rows, most
):
    pretend_gpus(*seen)
    assert module._most(n_rows, 128, Weights("x", "float32", devices=devices)) == most


@pytest.fixture
def small(make_backbone, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_ROWS", 3)
    return Weights(make_backbone("llama"), "float32")


def measure(model, tokenizer, items, log):
    log.extend(items)
    return {"n": np.array([[item.size, len(item.question)] for item in items])}


def test_rows_come_in_the_order_asked_for_and_each_is_read_once(small, tmp_path):
    engine = Engine(tmp_path, 1, Reporter(quiet=True))
    cache, read = RowCache("kind", 1, "0" * 64), []
    items = [Text("q" * (i % 4), "r" * i) for i in (5, 2, 9, 2, 7, 5, 0)]
    made = cache.ensure(items, engine, "label", "texts", small, measure, read)
    assert made.take("n").tolist() == [[len(it.response), len(it.question)] for it in items]
    assert sorted(read) == sorted(set(items))
    more = [Text("new", "text"), *items[::-1]]
    again = cache.ensure(more, engine, "label", "texts", small, measure, read)
    assert again.take("n")[1:].tolist() == made.take("n")[::-1].tolist()
    assert read.count(Text("new", "text")) == 1
    assert len(read) == len(set(more))
    assert set(cache.known(tmp_path)) == {item.key for item in more}
    assert RowCache("kind", 1, "1" * 64).known(tmp_path) == {}


def test_what_a_check_refuses_is_not_read(small, tmp_path):
    def check(missing):
        raise ValueError(f"{len(missing)} are too many")

    cache, engine = RowCache("kind", 1, "0" * 64), Engine(tmp_path, 1, Reporter(quiet=True))
    with pytest.raises(ValueError, match="2 are too many"):
        cache.ensure(
            [Text("q", "r"), Text("q", "s")],
            engine,
            "label",
            "texts",
            small,
            measure,
            [],
            check=check,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_reads_nothing(small, tmp_path):
    dry = Engine(tmp_path, 1, Reporter(quiet=True), dry_run=True)
    with pytest.raises(PendingError, match="1 of 1 units of label would run"):
        RowCache("kind", 1, "0" * 64).ensure(
            [Text("q", "r")], dry, "label", "texts", small, measure, []
        )
    assert list(tmp_path.iterdir()) == []


@given(data=st.data())
def test_shards_in_different_precision_make_one_matrix_in_memory_or_in_a_file(
    data, tmp_path_factory
):
    root = tmp_path_factory.mktemp("shards")
    kinds = data.draw(st.lists(st.sampled_from(["float16", "float32"]), min_size=1, max_size=4))
    for number, kind in enumerate(kinds):
        (root / f"{number}").mkdir()
        values = np.arange(6).reshape(3, 2) / 7 + number
        np.save(root / f"{number}" / "x.npy", values.astype(kind))
    places = [(root / f"{n}", row) for n in range(len(kinds)) for row in range(3)]
    chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=12))
    taken = Rows(chosen).take("x")
    expected = [np.load(shard / "x.npy")[row] for shard, row in chosen]
    assert np.array_equal(taken, np.array(expected))
    assert taken.dtype == np.result_type(*{row.dtype for row in expected})
    Rows(chosen).take("x", root / "all.npy")
    stored = np.load(root / "all.npy")
    assert stored.dtype == taken.dtype
    assert np.array_equal(stored, taken)
