"""Units for the pools' tests; a module of its own, since workers import it."""

import logging
import os
import signal
import sys
import time
import warnings

import numpy as np

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
