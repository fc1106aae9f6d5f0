"""Backbones that cannot be loaded: each is told in one sentence, with what to do, before any work."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from stackllm.engine.local import Engine, PendingError
from stackllm.engine.progress import Reporter
from stackllm.errors import MissingInputError, StackllmError, StorageError, UsageError
from stackllm.llm.backbone import load_config, load_model
from stackllm.llm.encode import EncoderParams, encode
from stackllm.llm.folders import check_folder
from stackllm.llm.locate import find_backbone, prepare, revision_of

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def only(*names):
    return lambda folder: [path.unlink() for path in folder.iterdir() if path.name not in names]


def cut(name, to):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:to])


def lacks_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def holds_an_adapter(folder):
    only()(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')


def two_files(folder):
    only()(folder)
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")


def gguf_of(family):
    """A file whose header names a family, behind other values."""
    text = lambda words: struct.pack("<Q", len(words)) + words  # noqa: E731
    entries = [
        text(b"general.alignment") + struct.pack("<II", 4, 32),
        text(b"general.architecture") + struct.pack("<I", 8) + text(family),
    ]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)


def parts_of_one(folder):
    only()(folder)
    for i in (1, 2, 3):
        (folder / f"big-0000{i}-of-00003.gguf").write_bytes(gguf_of(b"llama"))
    (folder / "mmproj-big.gguf").write_bytes(gguf_of(b"clip"))


def says(**more):
    def write(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **more}))

    return write


def of_another_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_family"}))


BROKEN = {
    "tokenizer is a pointer": (write("tokenizer.json", POINTER), MissingInputError, "tokenizer.json is not the file itself .* Run git lfs pull"),
    "tokenizer is cut off": (cut("tokenizer.json", 900), StorageError, r"tokenizer.json is damaged: no JSON .* Fetch it again"),
    "tokenizer is of another kind": (write("tokenizer.json", "{}"), MissingInputError, "its tokenizer could not be loaded .* Fetch tokenizer.json"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), MissingInputError, "has weights but no tokenizer. Copy tokenizer.json"),
    "tokenizer's file is gone": (remove("tokenizer.json"), MissingInputError, "has weights but no tokenizer. Copy tokenizer.json"),
    "tokenizer's settings are damaged": (write("tokenizer_config.json", "{,"), StorageError, "tokenizer_config.json is damaged"),
    "weights are a pointer": (write("model.safetensors", POINTER), MissingInputError, "model.safetensors is not the file itself .* Run git lfs pull"),
    "weights are cut off": (cut("model.safetensors", 5_000), StorageError, "model.safetensors is damaged .* Fetch it again"),
    "weights are empty": (write("model.safetensors", ""), StorageError, "model.safetensors is damaged .* Fetch it again"),
    "no weights": (remove("model.safetensors"), MissingInputError, "has no weights. Put model.safetensors there"),
    "weights as pickles": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), MissingInputError, "no weights as safetensors.* save it anew"),
    "a shard is missing": (lacks_a_shard, MissingInputError, "lacks 1 of the 2 files of its weights, such as model-00002"),
    "settings are no JSON": (write("config.json", "model_type: llama\n"), StorageError, "config.json is damaged: no JSON .* Fetch it again"),
    "settings are a pointer": (write("config.json", POINTER), MissingInputError, "config.json is not the file itself"),
    "settings are no text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00{"), StorageError, "config.json is damaged"),
    "settings are a list": (write("config.json", "[1]"), StorageError, "config.json is damaged: it holds a list"),
    "settings say nothing": (write("config.json", "{}"), UsageError, "no decoder that transformers can load .* Choose a language model"),
    "no settings": (remove("config.json"), MissingInputError, "has no config.json. Give the folder of a model"),
    "nothing at all": (only(), MissingInputError, "has no config.json. Give the folder of a model"),
    "a family that nobody knows": (of_another_kind, UsageError, "no decoder that transformers can load .* Choose a language model"),
    **{
        f"weights as {kind}": (says(quantization_config={"quant_method": kind}), UsageError, rf"quantised already \({kind}\), .* Give the model that they were made from")
        for kind in ("awq", "gptq", "fp8", "compressed-tensors", "mxfp4", "bitsandbytes")
    },
    "weights packed in a part": (says(text_config={"compression_config": {"format": "dense"}}), UsageError, "quantised already"),
    "weights packed by an older tool": (write("quantize_config.json", "{}"), UsageError, r"quantised already \(quantize_config.json\)"),
    "an adapter": (holds_an_adapter, UsageError, r"holds an adapter.* trained on \(some/model\)"),
    "several GGUF files": (two_files, UsageError, "holds 2 GGUF files. Name the one to read, such as .*a.gguf"),
    "a GGUF file of nothing": (lambda folder: [only()(folder), (folder / "a.gguf").write_bytes(b"GGUF" + bytes(99))], StorageError, "a.gguf could not be converted .* Fetch it again"),
    "a GGUF file in parts": (parts_of_one, UsageError, "one of 3 parts .* Join them, with: llama-gguf-split --merge .*big-00001-of-00003.gguf WHOLE.gguf"),
    "a GGUF file of an unknown family": (lambda folder: [only()(folder), (folder / "a.gguf").write_bytes(gguf_of(b"no-such"))], UsageError, 'of the family "no-such", which transformers cannot read'),
    "a GGUF file that is a pointer": (lambda folder: [only()(folder), (folder / "a.gguf").write_text(POINTER)], MissingInputError, "a.gguf is not the file itself"),
    "a GGUF file that is none": (lambda folder: [only()(folder), (folder / "a.gguf").write_text("weights")], StorageError, "a.gguf is no GGUF file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(make_backbone):
    return Path(make_backbone("llama"))


@pytest.mark.parametrize(("damage", "kind", "sentence"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_with_a_folder_is_one_sentence(
    whole, tmp_path, monkeypatch, damage, kind, sentence
):
    monkeypatch.setenv("STACKLLM_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(whole, tmp_path / "model")
    damage(folder)
    with pytest.raises(StackllmError, match=sentence) as raised:
        load_model("AutoModelForCausalLM", str(folder), "float32", lambda _: None)
    assert type(raised.value) is kind
    said = str(raised.value)
    assert "\n" not in said
    assert str(folder) in said
    assert said.endswith(".")


def test_a_whole_folder_is_fine(whole):
    check_folder(whole)
    assert load_config(str(whole)).num_hidden_layers == 4


def test_a_file_that_is_no_gguf_file_leads_to_its_folder(whole):
    with pytest.raises(MissingInputError, match=f"Give the folder that it stands in: {whole}"):
        find_backbone(str(whole / "config.json"))
    with pytest.raises(MissingInputError, match="there is no such folder or file"):
        find_backbone("no_such.gguf")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A tiny Llama as a GGUF file, with a tokenizer of single bytes."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    out = gguf.GGUFWriter(path, "llama")
    width, n_tokens = 32, 259
    out.add_block_count(2)
    out.add_context_length(128)
    out.add_embedding_length(width)
    out.add_feed_forward_length(64)
    out.add_head_count(4)
    out.add_head_count_kv(4)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(8)
    out.add_vocab_size(n_tokens)
    letters = sorted(ByteLevel.alphabet())
    out.add_tokenizer_model("gpt2")
    out.add_token_list(["<s>", "</s>", *letters, letters[0] + letters[1]])
    out.add_token_types([3, 3, *[1] * (len(letters) + 1)])
    out.add_token_merges([f"{letters[0]} {letters[1]}"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)

    def add(name, *shape):
        out.add_tensor(name, draw.normal(0, 0.1, shape).astype(np.float32))

    add("token_embd.weight", n_tokens, width)
    add("output.weight", n_tokens, width)
    add("output_norm.weight", width)
    for block in (f"blk.{i}" for i in range(2)):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}.{name}.weight", width, width)
        for name in ("ffn_gate", "ffn_up"):
            add(f"{block}.{name}.weight", 64, width)
        add(f"{block}.ffn_down.weight", width, 64)
        for name in ("attn_norm", "ffn_norm"):
            add(f"{block}.{name}.weight", width)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_a_gguf_file_is_a_backbone_by_itself_and_as_all_that_a_folder_holds(
    gguf, tmp_path, monkeypatch
):
    import polars as pl

    monkeypatch.setenv("STACKLLM_CACHE", str(tmp_path / "cache"))
    said = []
    made = prepare(str(gguf), said.append)
    assert prepare(str(gguf.parent), said.append) == made
    assert len(said) == 1
    assert "converting tiny.gguf once" in said[0]
    assert revision_of(str(gguf)) == revision_of(str(gguf.parent))
    assert load_config(str(gguf)).num_hidden_layers == 2
    rows = pl.DataFrame({"group_id": ["g"] * 2, "question": ["Why?"] * 2, "response": ["a", "bc"]})
    params = EncoderParams(backbone=str(gguf), dtype="float32")
    read, _, _ = encode(rows, params, Engine(tmp_path / "run", 1, Reporter(quiet=True)))
    embedding = read.take("pooled")
    assert np.isfinite(embedding).all()
    assert embedding.shape == (2, 3 * 32)


def test_a_dry_run_converts_nothing(gguf, tmp_path, monkeypatch, capsys):
    import polars as pl

    monkeypatch.setenv("STACKLLM_CACHE", str(tmp_path / "cache"))
    rows = pl.DataFrame({"group_id": ["g"], "question": ["Why?"], "response": ["Because."]})
    dry = Engine(tmp_path / "run", 1, Reporter(), dry_run=True)
    for backbone in (str(gguf), "nobody/has-fetched-this"):
        with pytest.raises(PendingError, match="1 of 1 units of encoder would run"):
            encode(rows, EncoderParams(backbone=backbone, dtype="float32"), dry)
        assert f"backbone {backbone} is not here yet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
