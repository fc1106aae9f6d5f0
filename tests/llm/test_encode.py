"""The encoder's cache, with a small decoder in a local folder."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from machines import H100

from stackllm.engine.local import Engine
from stackllm.engine.progress import Reporter
from stackllm.errors import MissingInputError, StorageError, UsageError
from stackllm.llm import encode as module
from stackllm.llm import locate as converting
from stackllm.llm import rows as rows_module
from stackllm.llm.backbone import load_backbone
from stackllm.llm.encode import EncoderParams
from stackllm.llm.locate import find_backbone
from stackllm.llm.machine import choose_dtype
from stackllm.llm.resident import release


@pytest.fixture(scope="module")
def backbone(make_backbone):
    return make_backbone("llama")


def make_rows(n_groups, seed=0):
    draw = np.random.default_rng(seed)
    text = lambda n: " ".join(f"w{i}" for i in draw.integers(0, 200, n))  # noqa: E731
    rows = [
        (f"g{g}", question, text(draw.integers(1, 30)))
        for g in range(n_groups)
        for question in [text(6)]
        for _ in range(3)
    ]
    return pl.DataFrame(rows, schema=["group_id", "question", "response"], orient="row")


@pytest.fixture
def engine(tmp_path):
    return Engine(tmp_path, 1, Reporter(quiet=True))


def encode(rows, params, engine):
    """Pooled layers, likelihood and identity."""
    read, likelihood, identity = module.encode(rows, params, engine)
    return read.take("pooled"), likelihood, identity


def shards(root):
    return sorted(path.parent for path in Path(root).glob("encoder/*/*/manifest.json"))


def params(backbone, **changes):
    return EncoderParams(backbone=backbone, dtype="float32", **changes)


def test_shapes_and_names(backbone, engine):
    embedding, likelihood, _ = encode(make_rows(4), params(backbone), engine)
    assert embedding.shape == (12, 3 * 32)
    assert embedding.dtype == np.float16
    assert likelihood.shape == (12, 7)
    assert (likelihood["rank1_share"] <= likelihood["rank10_share"]).all()
    assert (likelihood["logprob_min"] <= likelihood["logprob_mean"]).all()


def test_a_changed_row_costs_one_row(backbone, engine, monkeypatch):
    rows = make_rows(6)
    first, _, _ = encode(rows, params(backbone), engine)
    before = shards(engine.root)
    changed = rows.with_columns(
        pl.when(pl.int_range(pl.len()) == 4)
        .then(pl.lit("w1 w2"))
        .otherwise("response")
        .alias("response")
    )
    second, _, _ = encode(changed, params(backbone), engine)
    new = set(shards(engine.root)) - set(before)
    assert len(new) == 1
    assert len(np.load(new.pop() / "keys.npy")) == 1
    others = np.arange(18) != 4
    assert np.array_equal(first[others], second[others])
    assert not np.allclose(first[4], second[4])


def test_settings_that_change_numbers_change_the_cache(backbone, engine):
    rows = make_rows(2)
    _, _, plain = encode(rows, params(backbone), engine)
    _, _, shorter = encode(rows, params(backbone, max_response_tokens=5), engine)
    assert plain != shorter
    assert len(shards(engine.root)) == 2


def test_the_cache_goes_by_the_layers_that_are_read_not_by_how_they_were_named(
    make_backbone, engine
):
    """Of 6 layers both give the third, fourth and fifth; of the last the second gives the sixth."""
    rows, backbone = make_rows(2), make_backbone("llama", layers=6)
    exact = encode(rows, params(backbone, depths=(1 / 2, 2 / 3, 5 / 6)), engine)
    rounded = encode(rows, params(backbone, depths=(0.5, 0.667, 0.833)), engine)
    assert rounded[2] == exact[2]
    assert np.array_equal(rounded[0], exact[0])
    assert len(shards(engine.root)) == 1
    other = encode(rows, params(backbone, depths=(0.5, 0.667, 0.95)), engine)
    assert other[2] != exact[2]
    assert len(shards(engine.root)) == 2


def test_a_stopped_run_goes_on_to_the_same_bytes(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "_SHARD_ROWS", 6)
    rows = make_rows(8)
    whole = Engine(tmp_path / "whole", 1, Reporter(quiet=True))
    expected, _, _ = encode(rows, params(backbone), whole)
    stopped = Engine(tmp_path / "stopped", 1, Reporter(quiet=True))
    original, done = module.read_texts, []

    def dies_at_the_third(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return original(*arguments)

    monkeypatch.setattr(module, "read_texts", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        encode(rows, params(backbone), stopped)
    assert len(shards(stopped.root)) == 2
    monkeypatch.setattr(module, "read_texts", original)
    resumed, _, _ = encode(rows, params(backbone), stopped)
    assert np.array_equal(resumed, expected)
    names = lambda root: [path.name for path in shards(root)]  # noqa: E731
    assert names(stopped.root) == names(whole.root)


def test_what_a_gpu_has_read_a_cpu_finds_again(
    backbone, engine, tmp_path, pretend_gpus, monkeypatch
):
    """In other shards, for a GPU has room for more; and the same within rounding if it is read there."""
    monkeypatch.setattr(rows_module, "_SHARD_ROWS", 6)
    rows = make_rows(8)
    pretend_gpus(H100)
    first, likelihood, identity = encode(rows, params(backbone), engine)
    assert len(shards(engine.root)) == 1
    pretend_gpus()
    assert np.array_equal(encode(rows, params(backbone), engine)[0], first)
    assert len(shards(engine.root)) == 1
    other = Engine(tmp_path / "cpu", 1, Reporter(quiet=True))
    second, also, known = encode(rows, params(backbone), other)
    assert len(shards(other.root)) == 4
    assert known == identity
    np.testing.assert_allclose(first, second, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(likelihood.to_numpy(), also.to_numpy(), rtol=1e-3, atol=1e-4)


def test_a_damaged_shard_is_read_again(backbone, engine):
    rows = make_rows(3)
    first, _, _ = encode(rows, params(backbone), engine)
    victim = shards(engine.root)[0] / "pooled.npy"
    content = bytearray(victim.read_bytes())
    content[-3] ^= 4
    victim.write_bytes(content)
    second, _, _ = encode(rows, params(backbone), engine)
    assert np.array_equal(first, second)


def test_where_a_row_stands_does_not_matter(backbone, engine, tmp_path):
    rows = make_rows(5)
    order = np.random.default_rng(1).permutation(15)
    first, _, _ = encode(rows, params(backbone), engine)
    other = Engine(tmp_path / "other", 1, Reporter(quiet=True))
    second, _, _ = encode(rows[order], params(backbone), other)
    np.testing.assert_allclose(first[order], second, rtol=2e-3, atol=1e-5)


def test_long_questions_are_cut_in_the_middle(backbone, engine):
    rows = make_rows(1).with_columns(question=pl.lit(" ".join(f"w{i % 200}" for i in range(300))))
    embedding, _, _ = encode(rows, params(backbone), engine)
    assert np.isfinite(embedding).all()


def test_backbones_that_are_not_there():
    with pytest.raises(MissingInputError, match="there is no such folder"):
        find_backbone("/no/such/folder")
    with pytest.raises(UsageError, match="depths, entry 1, must be a number above 0 and at most 1"):
        EncoderParams(depths=(0.0,))


@pytest.mark.parametrize(
    "setting", [{"attention": "eager"}, {"attention": "sdpa"}, {"devices": "all"}]
)
def test_attention_and_devices_change_no_number_beyond_rounding(backbone, tmp_path, setting):
    rows = make_rows(4)
    found = []
    for name, changes in (("plain", {}), ("other", setting)):
        engine = Engine(tmp_path / name, 1, Reporter(quiet=True))
        found.append(encode(rows, params(backbone, **changes), engine)[0])
        release()
    np.testing.assert_allclose(found[0], found[1], rtol=2e-3, atol=1e-4)


def test_attention_that_is_not_installed_is_one_sentence(backbone, engine):
    release()
    with pytest.raises(MissingInputError, match=r"[Ff]lash.*Install it, or take another attention"):
        encode(make_rows(2), params(backbone, attention="flash_attention_2"), engine)


@pytest.mark.parametrize("room", [1, 40])
def test_where_memory_runs_out_batches_get_smaller(backbone, tmp_path, monkeypatch, room):
    import torch

    release()  # a model remembers what fitted it
    rows = make_rows(8)
    expected, likelihood, _ = encode(rows, params(backbone), Engine(tmp_path / "a", 1))
    whole, tried = module.read_groups, []

    def small(model, prompts, layers, budget):
        tried.append(budget)
        if budget > room:
            raise torch.OutOfMemoryError("this device is small")
        return whole(model, prompts, layers, budget)

    monkeypatch.setattr(module, "read_groups", small)
    found, other, _ = encode(rows, params(backbone), Engine(tmp_path / "b", 1))
    assert tried[0] > room >= tried[-1]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)  # float16
    np.testing.assert_allclose(other.to_numpy(), likelihood.to_numpy(), rtol=1e-3, atol=1e-4)


def test_a_text_that_memory_cannot_hold_is_one_sentence(backbone, engine, monkeypatch):
    import torch

    def none(model, prompts, layers, budget):
        raise torch.OutOfMemoryError("this device is small")

    monkeypatch.setattr(module, "read_groups", none)
    with pytest.raises(StorageError, match="out of memory with one text at a time"):
        encode(make_rows(4), params(backbone), engine)


def test_a_damaged_converted_backbone_is_set_aside_told_and_made_again(tmp_path, monkeypatch):
    source = tmp_path / "weights.gguf"
    source.write_bytes(b"GGUF weights")
    monkeypatch.setenv("STACKLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(converting, "find_backbone", lambda name: source)
    monkeypatch.setattr(
        converting, "_convert", lambda source, folder, _: (folder / "config.json").write_text("{}")
    )
    said = []
    victim = Path(converting.prepare("smollm2", said.append)) / "config.json"
    converting.prepare("smollm2", said.append)
    assert len(said) == 1
    victim.write_text("[]")
    assert converting.prepare("smollm2", said.append) == str(victim.parent)
    assert "was damaged; moved to" in said[1]
    assert "converting" in said[2]
    assert victim.read_text() == "{}"
    assert [path.name for path in (tmp_path / "cache/quarantine").rglob("config.json")]


def test_precision_comes_with_its_reason():
    assert choose_dtype("float16") == ("float16", "asked for")
    dtype, reason = choose_dtype("auto")
    assert dtype in {"float32", "bfloat16", "float16"}
    assert len(reason) > 10


@pytest.mark.slow
def test_the_embedded_llm_reads_english():
    """Shuffled words are less likely than the sentence they came from."""
    from stackllm.llm.encoder import read_groups
    from stackllm.llm.prompts import Prompt

    loaded = load_backbone(dtype="float32", echo=lambda _: None)
    ids = lambda text: loaded.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    prompt = Prompt(
        ids("Question: What is the capital of France?\nAnswer:"),
        [ids(" The capital of France is Paris."), ids(" Paris of is The France capital.")],
    )
    _, likelihood = read_groups(loaded.model, [prompt], (15,))
    assert likelihood[0, 0] > likelihood[1, 0] + 1
    assert loaded.dtype == "float32"
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
