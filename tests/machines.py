"""Machines that are not here: GPUs that are only pretended, and copies of models that are counted."""

from __future__ import annotations

import weakref

import pytest

from stackllm.llm import machine
from stackllm.llm.machine import Gpu

GIB = 2**30
T4 = Gpu("Tesla T4", 15 * GIB, (7, 5), "t4")
P100 = Gpu("Tesla P100-PCIE-16GB", 16 * GIB, (6, 0), "p100")
V100 = Gpu("Tesla V100-SXM2-16GB", 16 * GIB, (7, 0), "v100")
A10 = Gpu("NVIDIA A10G", 22 * GIB, (8, 6), "a10")
H100 = Gpu("NVIDIA H100 80GB HBM3", 79 * GIB, (9, 0), "h100")


@pytest.fixture
def pretend_gpus(monkeypatch):
    """``pretend_gpus(T4, T4)``: what the machine has from now on, in this process; tensors stay on the CPU."""

    def pretend(*gpus: Gpu) -> None:
        monkeypatch.setattr(machine, "_visible", lambda: gpus)

    return pretend


@pytest.fixture
def copies(monkeypatch):
    """How many models of transformers were alive once each had been loaded in this process, itself included.

    A list that grows. Nothing is collected before counting: what still hangs in a cycle counts.
    """
    from transformers import PreTrainedModel

    load = PreTrainedModel.from_pretrained.__func__
    loaded: list[weakref.ref] = []
    counts: list[int] = []

    def counted(cls, *args, **options):
        counts.append(1 + sum(model() is not None for model in loaded))
        given = load(cls, *args, **options)
        loaded.append(weakref.ref(given[0] if isinstance(given, tuple) else given))
        return given

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    return counts
