"""The state of a training on disk, without a pickle: tensors as safetensors, all else as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackllm.finetune.model import trained
from stackllm.llm.machine import device
from stackllm.store.records import read_json, write_json

_WEIGHTS, _OPTIMISER, _RANDOM = "weights.safetensors", "optimizer.safetensors", "random.safetensors"
_TRAINER = "trainer_state.json"
"""Where transformers looks for the number of steps that are done."""
_SETTINGS = "settings.json"


def save_state(trainer: Any, folder: Path) -> None:
    """Write all that the next step depends on: weights, optimiser, schedule, random numbers, count."""
    import torch
    from safetensors.torch import save_file

    save_file(_plain(trained(trainer.model)), folder / _WEIGHTS)
    optimiser = trainer.optimizer.state_dict()
    moments: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for key, value in _flat(optimiser["state"]).items():
        (moments if isinstance(value, torch.Tensor) else counts)[key] = value
    save_file(_plain(moments), folder / _OPTIMISER)
    random = {"cpu": torch.get_rng_state()}
    if device().type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state()
    save_file(random, folder / _RANDOM)
    trainer.state.save_to_json(str(folder / _TRAINER))
    settings = {
        "groups": optimiser["param_groups"],
        "counts": counts,
        "schedule": trainer.lr_scheduler.state_dict(),
        "scale": trainer.accelerator.scaler.state_dict() if trainer.accelerator.scaler else None,
    }
    write_json(folder / _SETTINGS, settings)


def load_batch_size(folder: Path) -> int:
    """Rows of a pass that memory had room for."""
    size: int = read_json(folder / _TRAINER)["train_batch_size"]
    return size


def load_weights(model: Any, folder: Path) -> None:
    """Give the trained weights of ``model`` their stored values."""
    from safetensors.torch import load_file

    stored = load_file(folder / _WEIGHTS)
    for name, value in trained(model).items():
        value.data.copy_(stored[name])


def load_optimiser(trainer: Any, folder: Path) -> None:
    """Give the optimiser its moments and rates, and the schedule and the loss's scale their place."""
    from safetensors.torch import load_file

    settings = read_json(folder / _SETTINGS)
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**settings.get("counts", {}), **load_file(folder / _OPTIMISER)}.items():
        number, *inner, name = key.split(".")
        place = state.setdefault(int(number), {})
        for step in inner:
            place = place.setdefault(step, {})
        place[name] = value
    for group in settings["groups"]:
        group["betas"] = tuple(group["betas"])
    trainer.optimizer.load_state_dict({"state": state, "param_groups": settings["groups"]})
    _page(trainer.optimizer.optimizer)
    trainer.lr_scheduler.load_state_dict(settings["schedule"])
    if trainer.accelerator.scaler:
        trainer.accelerator.scaler.load_state_dict(settings["scale"])


def load_randomness(folder: Path) -> None:
    """Go on with the random numbers that came next, as dropout draws them."""
    import torch
    from safetensors.torch import load_file

    stored = load_file(folder / _RANDOM)
    torch.set_rng_state(stored["cpu"])
    if "cuda" in stored and device().type == "cuda":
        torch.cuda.set_rng_state(stored["cuda"])


def _plain(tensors: dict[str, Any]) -> dict[str, Any]:
    # clones: bitsandbytes shares its tables of 8-bit numbers among all states
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _flat(state: dict[Any, Any], before: str = "") -> dict[str, Any]:
    """Values of nested dictionaries by their path; bitsandbytes' states are nested."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        key = f"{before}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return flat


def _page(optimiser: Any) -> None:
    """Give a paged optimiser pages again: what it loads are plain tensors."""
    if not getattr(optimiser, "is_paged", False):
        return
    for parameter, values in optimiser.state.items():
        for name in ("state1", "state2"):
            page = optimiser.get_state_buffer(parameter, dtype=values[name].dtype)
            values[name] = page.copy_(values[name])
