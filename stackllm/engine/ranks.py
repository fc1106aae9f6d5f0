"""Several processes that train one model together, as ``accelerate launch`` and ``torchrun`` start them.

The first of them, rank 0, runs the command. The others wait for units that are computed together,
compute their share of each, and leave no file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from stackllm.errors import StackllmError, first_line
from stackllm.llm.machine import device

_PATIENCE = timedelta(days=30)
"""How long others wait for rank 0, which may be busy with units of its own."""

_talk: list[Any] = []
"""The process group over which work is handed out, once it stands."""


def size() -> int:
    """How many processes there are; 1 for a command that was typed as it is."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def join() -> None:
    """Meet the others; on a GPU machine, take the GPU that is meant for this process."""
    import torch
    from torch import distributed

    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank())))
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if on_gpu else "gloo")
    _talk[:] = [distributed.new_group(backend="gloo", timeout=_PATIENCE)]


def follow() -> int:
    """Compute along with rank 0 until it is done. What goes wrong with a unit, rank 0 says.

    Returns
    -------
    int
        Exit status: 1 if rank 0 went away or this process's share could not be computed.
    """
    from stackllm.store.checkpoints import checkpoints_of  # not for every "stackllm --help"

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us ends us with rank 0
    try:
        join()
        while (work := from_first(None)) is not None:
            root, task = work
            with (
                tempfile.TemporaryDirectory() as folder,
                checkpoints_of(root, task.unit),
                contextlib.suppress(StackllmError),
            ):
                task.function(Path(folder), *task.args)
    except RuntimeError as error:  # of torch: a closed connection, a GPU without memory
        print(f"rank {rank()}: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Be rank 0: at the end others are let go. After a failure whoever started them ends them."""
    if size() == 1:
        yield
        return
    join()
    try:
        yield
    except StackllmError as error:
        if not error.exit_code:  # a dry run, which is no failure
            from_first(None)
        raise
    from_first(None)


def call(root: Path, task: Any) -> None:
    """Let the others compute ``task`` too, from now on; nothing to do without others."""
    if size() > 1:
        from_first((root, task))


def from_first(value: Any) -> Any:
    """What rank 0 gave; this process's own value if it is alone."""
    if size() == 1:
        return value
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0, group=_talk[0])
    return box[0]
