"""The GPUs that units are dealt out to, each by a name that ``CUDA_VISIBLE_DEVICES`` takes.

Who only deals them out must not hold one: what is asked here goes to the driver's list of GPUs and
makes no CUDA context, which would take some 300 MiB of every GPU for as long as the process lives.
"""

from __future__ import annotations

import os
from typing import Literal

VARIABLE = "CUDA_VISIBLE_DEVICES"

Wanted = Literal["one", "all"]
"""A GPU for itself alone, or all of a machine."""


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
