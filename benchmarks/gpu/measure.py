"""Seconds, peaks of memory, and which weights are loaded while which are still alive."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu.models import free


def wait() -> None:
    """Until the GPU has done what it was told to."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a run, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextlib.contextmanager
def peak(result: dict[str, Any], name: str) -> Iterator[None]:
    """Put the most GiB that were allocated at once inside into ``result``; None without a GPU."""
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        free()
        torch.cuda.reset_peak_memory_stats()
    yield
    result[name] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None


def compared(estimated: int, peak_gib: float | None) -> dict[str, float | None]:
    """The product's estimate of memory, in bytes, and how far it is from the peak, as a share of that."""
    gib = estimated / 2**30
    error = None if peak_gib is None else abs(gib / peak_gib - 1)
    return {"estimate_gib": gib, "estimate_error": error}


class Watch:
    """Counts and times what the product has transformers and peft do, whatever it calls in between.

    Attributes
    ----------
    seconds
        Of ``loading`` weights, ``training`` and ``saving``, each including what it calls.
    copies
        How much of a model's weights was alive when each load ended, as a number of models: 1 is none
        but the one that was loaded. Nothing is collected for it, as nothing is before a GPU is full.

    Parameters
    ----------
    room
        Loading raises torch's OutOfMemoryError where more models than that would be alive: a card
        that holds no more, make-believe. None: any number.
    """

    def __init__(self, room: int | None = None) -> None:
        self.seconds: Counter[str] = Counter()
        self.copies: list[float] = []
        self._room = room
        self._loaded: list[list[tuple[weakref.ref[Any], int]]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        """While this lasts."""
        import peft
        import transformers

        load = transformers.PreTrainedModel.from_pretrained.__func__
        with (
            replaced(transformers.PreTrainedModel, "from_pretrained", self._load(load)),
            replaced(transformers.Trainer, "train", self._timed("training")),
            replaced(peft.PeftModel, "save_pretrained", self._timed("saving")),
        ):
            yield self

    def _timed(self, name: str) -> Callable[[Any], Any]:
        def around(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def run(*args: Any, **options: Any) -> Any:
                wait()
                start = time.perf_counter()
                try:
                    return function(*args, **options)
                finally:
                    wait()
                    self.seconds[name] += time.perf_counter() - start

            return run

        return around

    def _load(self, load: Callable[..., Any]) -> Callable[[Any], Any]:
        def run(cls: type, *args: Any, **options: Any) -> Any:
            others = self._alive()
            if self._room is not None and others > self._room - 0.99:
                import torch

                raise torch.OutOfMemoryError("CUDA out of memory: this make-believe card is full.")
            loaded = load(cls, *args, **options)
            self.copies.append(round(1 + others, 2))
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            self._loaded.append([(weakref.ref(it), it.nbytes) for it in model.parameters()])
            return loaded

        return lambda _: classmethod(self._timed("loading")(run))

    def _alive(self) -> float:
        """Models that are alive, in parts if only some of their weights are."""
        return sum(
            sum(size for it, size in weights if it() is not None) / sum(size for _, size in weights)
            for weights in self._loaded
        )


@contextlib.contextmanager
def replaced(owner: Any, name: str, around: Callable[[Any], Any]) -> Iterator[None]:
    """``owner.name`` is ``around`` of what it was, for a while."""
    inherited = name not in vars(owner)
    before = vars(owner).get(name, getattr(owner, name))
    setattr(owner, name, around(before))
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
