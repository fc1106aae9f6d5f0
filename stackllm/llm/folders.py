"""What a folder of a model must hold to be loaded, looked at before anything is loaded.

What transformers says of a file that is damaged or not there names neither the file nor what to do.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

from stackllm.errors import MissingInputError, StorageError, UsageError

_LFS = b"version https://git-lfs"
"""How a file begins that git has put in place of a large one that it did not fetch."""

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
"""How the name of a part of a GGUF file ends."""

_GGUF_TEXT = 8
_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Kinds of single values in a GGUF file: of text, and bytes of the others."""

_JSON = ("config.json", "generation_config.json", "tokenizer*.json", "vocab.json", "*.index.json")
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")
TOKENIZER_FILES = (
    *_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "bpe.codes", "chat_template.*",
)  # fmt: skip
"""Patterns of the files that a tokenizer may be made of."""
_PACKED = ("quantization_config", "compression_config")
_PACKED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only weights of a folder. None if it means none.

    Raises
    ------
    UsageError
        If the folder holds several.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    files = _matching(path, "*.gguf", "*.GGUF")
    # beside it may stand how images are read
    files = [file for file in files if "mmproj" not in file.name.lower()]
    if not files or _matching(path, "*.safetensors"):
        return None
    wholes = {_PART.sub("", file.name) for file in files}
    if len(wholes) > 1:
        raise UsageError(
            f"{path} holds {len(files)} GGUF files. Name the one to read, such as {files[0]}."
        )
    return files[0]


def check_gguf(path: Path) -> None:
    """Refuse what is called a GGUF file and is none, or but a part of one.

    Raises
    ------
    MissingInputError, StorageError
        If it is a git-lfs pointer, or something else.
    UsageError
        If it is one of several parts.
    """
    _refuse_pointers([path])
    if not _beginning(path).startswith(b"GGUF"):
        raise StorageError(f"{path} is no GGUF file, or a damaged one. Fetch it again.")
    part = _PART.search(path.name)
    if part and int(part[2]) > 1:
        first = path.with_name(f"{path.name[: part.start()]}-00001-of-{part[2]}.gguf")
        raise UsageError(
            f"{path} is one of {int(part[2])} parts of a GGUF file, and only whole ones can be read. Join them, with: "
            f"llama-gguf-split --merge {first} WHOLE.gguf, and give that."
        )


def check_architecture(path: Path) -> None:
    """Refuse a GGUF file of a family that transformers cannot convert.

    Raises
    ------
    UsageError
        With the family.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    family = _architecture(path)
    known = {_plain(name) for name in GGUF_SUPPORTED_ARCHITECTURES}
    if family and _plain(family) not in known:
        raise UsageError(
            f'{path} is a GGUF file of the family "{family}", which transformers cannot read. Give the same model as a '
            "folder that transformers saved, or another model."
        )


def _plain(family: str) -> str:
    """A family's name as GGUF and transformers both write it."""
    return family.replace("-", "").replace("_", "")


def _architecture(path: Path) -> str:
    """The family that a GGUF file names, where it does so before its lists, as every tool writes it; else empty.

    Reading all that is in front of the weights, the vocabulary among it, takes seconds.
    """
    # one that ends within them is damaged: loading says so
    with path.open("rb") as file, contextlib.suppress(struct.error):
        version, _, n_entries = struct.unpack("<4xIQQ", file.read(24))
        if not 2 <= version <= 3:  # the first had other counts; of another byte order
            return ""
        for _ in range(min(n_entries, 64)):
            key = _text(file)
            (kind,) = struct.unpack("<I", file.read(4))
            if kind == _GGUF_TEXT:
                value = _text(file)
                if key == "general.architecture":
                    return value
            elif kind in _GGUF_SIZES:
                file.read(_GGUF_SIZES[kind])
            else:
                break
    return ""


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(min(length, 65_536)).decode("utf-8", "replace")


def check_folder(folder: Path) -> None:
    """Refuse a folder from which transformers cannot load a model and its tokenizer.

    Raises
    ------
    MissingInputError
        If it lacks configuration, weights or tokenizer, or holds pointers to them.
    StorageError
        If one of them is damaged.
    UsageError
        If it holds an adapter and no model.
    """
    _refuse_pointers(_matching(folder, "*"))
    if not (folder / "config.json").is_file():
        _refuse_adapter(folder)
        raise MissingInputError(
            f"{folder} has no config.json. Give the folder of a model as transformers saves it, with "
            "config.json, weights and tokenizer."
        )
    contents = {path.name: _read_json(path) for path in _matching(folder, *_JSON)}
    check_settings(folder)
    _check_weights(folder, contents)
    if not _matching(folder, *_VOCABULARIES):
        raise MissingInputError(
            f"{folder} has weights but no tokenizer. Copy tokenizer.json and tokenizer_config.json "
            "there from where the weights came from."
        )


def check_settings(folder: Path) -> None:
    """Refuse weights that were packed elsewhere, by what ``config.json`` and older tools' files say of them.

    What each kind of them computes with differs from machine to machine, where it can be loaded at all, and
    none of them is verified here; stackllm packs weights itself.

    Raises
    ------
    StorageError
        If the configuration is damaged.
    UsageError
        With the kind, and what to give instead.
    """
    config = _read_json(folder / "config.json")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    packed = [part[key] for part in parts for key in _PACKED if part.get(key)]
    files = _matching(folder, *_PACKED_FILES)
    if packed or files:
        named = packed[0].get("quant_method") if packed and isinstance(packed[0], dict) else None
        kind = named or (files[0].name if files else "of a kind that it does not name")
        raise UsageError(
            f"{folder} holds weights that are quantised already ({kind}), which stackllm does not read. Give the model "
            'that they were made from: precision = "nf4" or "int8" quantises it here.'
        )


def shards_of(folder: Path) -> list[str]:
    """Names of the files that hold a folder's weights, whether they are there or not."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    return sorted(set(_read_json(index).get("weight_map", {}).values()))


def _check_weights(folder: Path, contents: dict[str, dict[str, Any]]) -> None:
    from safetensors import SafetensorError, safe_open

    for name, index in contents.items():
        if name.endswith(".safetensors.index.json"):
            shards = sorted(set(index.get("weight_map", {}).values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise MissingInputError(
                    f"{folder} lacks {len(missing)} of the {len(shards)} files of its weights, such as "
                    f"{missing[0]}. Fetch them as well."
                )
    files = _matching(folder, "*.safetensors")
    if not files and _matching(folder, *UNSAFE):
        raise MissingInputError(
            f"{folder} has no weights as safetensors, and other formats can run code when they are read. "
            "Fetch model.safetensors, or load the model with transformers and save it anew."
        )
    if not files:
        raise MissingInputError(
            f"{folder} has no weights. Put model.safetensors there, or name another folder."
        )
    for path in files:
        try:
            with safe_open(path, "numpy"):  # reads the list of what is in it, and compares sizes
                pass
        except SafetensorError as error:
            raise StorageError(f"{path} is damaged ({error}). Fetch it again.") from error


def _refuse_pointers(paths: list[Path]) -> None:
    for path in paths:
        if _beginning(path).startswith(_LFS):
            raise MissingInputError(
                f"{path} is not the file itself but git-lfs's pointer to it. Run git lfs pull in "
                f"{path.parent}, or fetch the model again."
            )


def _refuse_adapter(folder: Path) -> None:
    path = folder / "adapter_config.json"
    if path.is_file():
        base = _read_json(path).get("base_model_name_or_path")
        raise UsageError(
            f"{folder} holds an adapter, not a model. Give the model that it was trained on"
            f"{f' ({base})' if base else ''}, or merge the two and save the result."
        )


def _read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that transformers will read as an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # a UnicodeDecodeError is one too
        raise StorageError(f"{path} is damaged: no JSON ({error}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise StorageError(
            f"{path} is damaged: it holds a {type(content).__name__}, not an object. Fetch it again."
        )
    return content


def _matching(folder: Path, *patterns: str) -> list[Path]:
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(paths)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)
