"""The GPUs that units are dealt out to, each by a name that ``CUDA_VISIBLE_DEVICES`` takes.

Who only deals them out must not hold one: what is asked here goes to the driver's list of GPUs and
makes no CUDA context, which would take some 300 MiB of every GPU for as long as the process lives.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from typing import Literal

VARIABLE = "CUDA_VISIBLE_DEVICES"

Wanted = Literal["one", "all"]
"""A GPU for itself alone, or all of a machine."""

_ASK = (
    "import json, torch; print(json.dumps([str(torch.cuda.get_device_properties(i).uuid) "
    "for i in range(torch.cuda.device_count())]))"
)


def visible() -> tuple[str, ...]:
    """Names of the GPUs that this process may use; empty on a machine without.

    Whoever set the variable has said which, and by which names: numbers, UUIDs or instances of
    a divided GPU (MIG), of which CUDA shows a process the first only.
    """
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get(VARIABLE)
    if named is None:
        return tuple(map(str, range(count)))
    names = tuple(name.strip() for name in named.split(","))
    return names if count and names[0].startswith("MIG-") else names[:count]


def identified() -> dict[str, str]:
    """:func:`visible`, by what tells each GPU from all others wherever it is called otherwise.

    Number 0 of one process may be number 1 of another, or of another machine. Where CUDA has been
    started in this process already, its first GPU is the only one to which units can be kept.
    """
    names = visible()
    if not names:
        return {}
    uuids = list(names)
    if not names[0].startswith("MIG-"):
        # properties are CUDA's to tell, and after that it would not look at the variable any more
        asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True)
        uuids = json.loads(asked.stdout) if not asked.returncode else []
        if len(uuids) != len(names):
            uuids = [f"{socket.gethostname()} {name}" for name in names]
    pairs = list(zip(uuids, names, strict=True))
    return dict(pairs[:1] if _is_started() else pairs)


async def identified_beside() -> dict[str, str]:
    """:func:`identified`, while the process goes on answering others."""
    return await asyncio.to_thread(identified)


def bind(name: str) -> None:
    """Let this process see that GPU only; nothing where CUDA has been started and looks no more."""
    if not _is_started():
        os.environ[VARIABLE] = name


async def release_beside() -> None:
    """Let go of the language model that this process holds, if any, while it goes on answering others."""
    resident = sys.modules.get("stackllm.llm.resident")  # nothing is held by who has not loaded it
    if resident is not None:
        await asyncio.to_thread(resident.release)


def _is_started() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())
