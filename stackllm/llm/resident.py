"""The one model that a process holds.

Where one copy of a backbone fits and two do not, whatever still refers to the former must be gone
*before* the next is loaded. So all who load a model of some size do it here.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")

_held: dict[Hashable, Any] = {}
"""At most one entry: what was loaded last, by its key."""
_turn = threading.RLock()
"""Two threads of a worker that load at once would hold two."""


def resident(key: Hashable, load: Callable[[], T]) -> T:
    """What ``load`` gives: this process's only model, kept until another is asked for.

    Parameters
    ----------
    key
        All that decides what is loaded, which weights a name means now and who they are for, if they change
        them, included.
    load
        Loads it. The former is freed before it is called; if it fails, nothing is kept.

    Examples
    --------
    >>> resident("a", lambda: [1]) is resident("a", lambda: [2])
    True
    >>> resident("b", lambda: [3]), resident("a", lambda: [4])
    ([3], [4])
    >>> release()
    """
    with _turn:
        if key not in _held:
            release()
            _held[key] = load()
        held: T = _held[key]
        return held


def release() -> None:
    """Free the model, and hand its memory back: other processes and other allocators want it too."""
    with _turn:
        _held.clear()
        gc.collect()  # models hold themselves in cycles: hooks, adapters, a traceback of what failed
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
