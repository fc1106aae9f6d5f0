"""Units for the pools' tests; a module of its own, since workers import it."""

import logging
import os
import signal
import sys
import time
import warnings

import numpy as np

from stackllm.engine import devices
from stackllm.errors import DataError


def write(folder, name):
    (folder / "name.txt").write_text(name)
    (folder.parents[1] / f"pid-{name}").write_text(str(os.getpid()))


def die(folder, name):
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(folder, name):
    mark = folder.parents[1] / "died"
    if not mark.exists():
        mark.write_text("")
        (folder / "half.txt").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, name)


def fail(folder, name):
    raise DataError("the table is bad")


def doze(folder, name):
    time.sleep(2)
    write(folder, name)


def nap(folder, name, other):
    """Ends only if the other runs at the same time."""
    (folder.parents[1] / f"here-{name}").write_text("")
    deadline = time.monotonic() + 30
    while not (folder.parents[1] / f"here-{other}").exists():
        assert time.monotonic() < deadline, "nobody else runs"
        time.sleep(0.02)
    write(folder, name)


def dask_setup(worker):
    """Dask calls this in every worker that starts: it sees two GPUs, as of dask-cuda its own first."""
    names = ("0", "1") if os.getpid() % 2 else ("1", "0")
    devices.identified = lambda: {f"uuid {name}": name for name in names}


def use_gpu(folder, name, other=None):
    """Fails if another unit is at work on a GPU that it sees, or on all of them; may have to meet another."""
    root = folder.parents[1]
    seen = os.environ.get(devices.VARIABLE, "")
    (root / f"gpus-{name}").write_text(seen)
    marks = [root / f"at-work-on-{gpu}" for gpu in seen.split(",")]
    for mark in marks:
        mark.touch(exist_ok=False)
    assert not (root / "at-work-on-all").exists()
    nap(folder, name, other) if other else write(folder, name)
    for mark in marks:
        mark.unlink()


def use_all(folder, name):
    """Fails if anybody else is at work on any GPU."""
    root = folder.parents[1]
    (root / f"gpus-{name}").write_text(os.environ.get(devices.VARIABLE, ""))
    (root / "at-work-on-all").touch(exist_ok=False)
    time.sleep(0.2)
    assert not list(root.glob("at-work-on-[0-9G]*"))
    write(folder, name)
    (root / "at-work-on-all").unlink()


_HELD = []


def grow(folder, name, n_bytes):
    """Holds more from now on, and takes as long as loky waits between two looks at the memory."""
    _HELD.append(np.ones(n_bytes // 8))
    time.sleep(1.1)
    write(folder, name)


def babble(folder, name):
    """All the ways in which a library speaks."""
    warnings.warn("old ways", FutureWarning, stacklevel=1)
    logging.getLogger("somelibrary").warning("look here")
    print("downloading", file=sys.stderr)
    os.write(2, b"compiled code\n")
    write(folder, name)
