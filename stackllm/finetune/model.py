"""A decoder LLM as a classifier: LoRA on its layers and a head on the last real token.

Layers below the first one that is trained give the same output for every fold, seed and epoch. So
a classifier can start from their cached output (:mod:`stackllm.llm.trunk`): the lower layers are
taken out while it trains and put back before it is saved, which makes it an ordinary PEFT adapter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le, Len

from stackllm.errors import UsageError
from stackllm.llm.backbone import Attention, Devices, load_model, quiet_libraries
from stackllm.llm.layers import check_layers, count_layers, layers_of
from stackllm.parameters import Name, PartOf, check

HEAD = "score"
"""What transformers calls the head of every decoder for sequence classification."""


@dataclass(frozen=True)
class LoraParams:
    """Low-rank adapters (Hu et al., "LoRA", 2021).

    Parameters
    ----------
    r, alpha
        Rank, and scale ``alpha / r``.
    dropout
        Share of the inputs that an adapter does not see in training.
    target_modules
        Names of the linear layers that get one; ``["all-linear"]`` takes all but the head.
    """

    r: Annotated[int, Ge(1), Le(10_000)] = 4
    alpha: Annotated[int, Ge(1), Le(1_000_000)] = 16
    dropout: PartOf = 0.05
    target_modules: Annotated[tuple[Name, ...], Len(1, 1000)] = ("all-linear",)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Batch:
    """Sequences of unlike length side by side, real tokens first.

    Parameters
    ----------
    ids
        Token ids ``(n, longest)``. None if ``states`` are given.
    states
        Output of the lower layers ``(n, longest, hidden)``. None if ``ids`` are given.
    mask
        1 for real tokens, ``(n, longest)``.
    """

    ids: Any
    states: Any
    mask: Any

    def to(self, device: Any) -> Batch:
        """The same batch on a device."""

        def move(tensor: Any) -> Any:
            return None if tensor is None else tensor.to(device)

        return Batch(move(self.ids), move(self.states), move(self.mask))


def new_classifier(
    backbone: str,
    precision: str,
    n_classes: int,
    lora: LoraParams,
    n_trained: int | None,
    seed: int,
    attention: Attention = "auto",
    devices: Devices = "one",
) -> tuple[Any, Any]:
    """A backbone with fresh adapters on its top ``n_trained`` layers (None: on all), and a fresh head.

    ``attention`` and ``devices`` are as for :func:`stackllm.llm.backbone.load_model`.

    Returns
    -------
    model
        A ``peft`` model.
    tokenizer
        Its tokenizer.

    Raises
    ------
    MissingInputError, UsageError
        If the backbone cannot be loaded so, or has no module that ``lora`` names.
    """
    quiet_libraries()
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    model, tokenizer = load_model(
        "AutoModelForSequenceClassification",
        backbone,
        precision,
        lambda _: None,
        attention,
        devices,
        num_labels=n_classes,
    )
    n_layers = count_layers(model)
    check_layers(backbone, n_layers, n_trained)
    targets = _targets(model, lora)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        layers_to_transform=list(range(n_layers - n_trained, n_layers)) if n_trained else None,
        modules_to_save=[HEAD],
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(
            f'backbone "{backbone}": [member.lora] target_modules {targets} fit none of its layers '
            f"({str(error).splitlines()[0][:160]})."
        ) from error
    head(adapted).float()  # in half precision the steps of its learning rate would round away
    return adapted, tokenizer


def load_classifier(
    folder: Path,
    backbone: str,
    precision: str,
    n_classes: int,
    attention: Attention = "auto",
    devices: Devices = "one",
) -> tuple[Any, Any]:
    """A classifier that :func:`save_classifier` wrote, ready to predict."""
    quiet_libraries()
    from peft import PeftModel

    model, tokenizer = load_model(
        "AutoModelForSequenceClassification",
        backbone,
        precision,
        lambda _: None,
        attention,
        devices,
        num_labels=n_classes,
    )
    model = PeftModel.from_pretrained(model, folder)
    model.eval()
    return model, tokenizer


def save_classifier(model: Any, folder: Path) -> None:
    """Write adapters and head as safetensors, as ``peft`` does, and always the same bytes."""
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order is chance
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8", newline="\n")


def logits(model: Any, batch: Batch) -> Any:
    """Scores of each class, float32 ``(n, n_classes)``, from the last real token."""
    states = last_states(model, batch)
    return model.get_base_model().score(states.to(head(model).weight.dtype)).float()


def last_states(model: Any, batch: Batch) -> Any:
    """What the head reads: the last layer's output at the last real token, ``(n, hidden)``."""
    import torch

    inner = model.get_base_model()
    body = getattr(inner, inner.base_model_prefix)
    width = batch.mask.shape[1]
    hidden = body(
        input_ids=batch.ids,
        inputs_embeds=batch.states,
        attention_mask=batch.mask,
        position_ids=torch.arange(width, device=batch.mask.device)[None],
        use_cache=False,
    ).last_hidden_state
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, (batch.mask.sum(1) - 1).to(hidden.device)]


def _targets(model: Any, lora: LoraParams) -> list[str]:
    """Names of the linear layers to adapt; what peft calls all-linear, it does not take for some layers."""
    import torch
    from transformers.pytorch_utils import Conv1D  # what GPT-2 has for linear layers

    if lora.target_modules != ("all-linear",):
        return list(lora.target_modules)
    linear = {
        name.rsplit(".")[-1]
        for name, module in layers_of(model)[2].named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }
    return sorted(linear)


def trained(model: Any) -> dict[str, Any]:
    """The parameters that training changes, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def head(model: Any) -> Any:
    """The classification head of a PEFT model: the copy that is trained and saved."""
    return model.get_base_model().score
