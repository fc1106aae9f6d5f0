"""The gradients that the optimiser is given, in each precision beside float32's."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.measure import replaced
from benchmarks.gpu.models import device
from benchmarks.gpu.tuning import Task, make_task, store_inputs

if TYPE_CHECKING:
    import torch

_SMALL = 2.0**-10
"""What a loss is multiplied by to be as small as that of a step that is fitted well."""


def gradients(bench: Bench, name: str) -> dict[str, Any]:
    """Relative errors of the first step's gradients, their median over the tensors that training changes.

    Of ``float16_small`` the loss is a thousandth: gradients that float16 cannot hold unless they are scaled.
    """
    task = make_task(bench, name, "all", n_groups=2)
    exact = _first_step(bench, task, "float32")
    result: dict[str, Any] = {"tensors": len(exact)}

    def compare(precision: str, scale: float = 1.0, label: str = "") -> None:
        errors = _errors(_first_step(bench, task, precision, scale), exact)
        result[label or precision] = float(np.median(errors))
        result[f"{label or precision}_worst"] = float(max(errors))

    compare("bfloat16")
    if device() == "cpu":
        result["float16"] = "skipped: accelerate scales no loss on a CPU"
    else:
        compare("float16")
        compare("float16", _SMALL, "float16_small")
    if importlib.util.find_spec("bitsandbytes") is None:
        result["nf4"] = "skipped: bitsandbytes is not installed"
    else:
        compare("nf4")
    return result


def _errors(tensors: list[torch.Tensor], reference: list[torch.Tensor]) -> list[float]:
    """Norm of the difference over the norm; an adapter's first half has no gradient at first."""
    return [
        float((it - other).norm() / other.norm())
        for it, other in zip(tensors, reference, strict=True)
        if other.norm() > 0
    ]


def _first_step(bench: Bench, task: Task, precision: str, scale: float = 1.0) -> list[torch.Tensor]:
    """Gradients at the first step that the optimiser takes, in the order of its parameters.

    All rows are in one batch and nothing is dropped, so a step that loss scaling skips is the same
    step again.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from stackllm.members.decoder import fit
    from stackllm.members.inputs import load_inputs

    training = replace(task.params.training, batch_size=64, epochs=20, warmup=0.0, max_grad_norm=0)
    lora = replace(task.params.lora, dropout=0.0)
    params = replace(
        task.params, precision=precision, warm_head=False, lora=lora, training=training
    )
    seen: list[list[torch.Tensor]] = []

    def look(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        given = [it for group in optimiser.param_groups for it in group["params"]]
        seen.append([it.grad.detach().double().cpu() / scale for it in given])
        raise _SeenError

    def scaled(loss: Any) -> Any:
        return lambda *args, **options: loss(*args, **options) * scale

    hook = register_optimizer_step_pre_hook(look)
    folder = Path(mkdtemp(dir=bench.folder))
    try:
        with replaced(torch.nn.functional, "cross_entropy", scaled):
            inputs = load_inputs(store_inputs(task, folder).folder)
            targets = task.design.first_fits()[0].targets
            fit(inputs, targets, params, 0, Path(mkdtemp(dir=folder)))
    except _SeenError:
        return seen[0]
    finally:
        hook.remove()
    raise RuntimeError("no step was taken")


class _SeenError(Exception):
    """The gradients were seen; nothing more is wanted of that training."""
