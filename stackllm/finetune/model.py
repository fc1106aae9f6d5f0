"""A language model as a classifier: LoRA on its layers and a head that is trained whole.

Layers below the first one that is trained give the same output for every fold, seed and epoch. So
a decoder can start from their cached output (:mod:`stackllm.llm.trunk`): the lower layers are
taken out while it trains and put back before it is saved, which makes it an ordinary PEFT adapter.
Other models (:mod:`stackllm.finetune.structure`) read their texts whole and pool as they always do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le, Len

from stackllm.errors import UsageError, did_you_mean, first_line
from stackllm.finetune.structure import (
    Structure,
    head_names,
    last_linear,
    reads_last_token,
    structure_of,
    trained_copy,
)
from stackllm.llm.backbone import CLASSIFIER, Attention, Devices, load_model, quiet_libraries
from stackllm.llm.layers import check_layers, plain
from stackllm.parameters import Name, PartOf, check
from stackllm.store.records import read_json, write_json

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        Names of the modules that get one; ``["all-linear"]`` takes every linear one in the layers, and
        so never the head.
    """

    r: Annotated[int, Ge(1), Le(10_000)] = 4
    alpha: Annotated[int, Ge(1), Le(1_000_000)] = 16
    dropout: PartOf = 0.05
    target_modules: Annotated[tuple[Name, ...], Len(1, 1000)] = ("all-linear",)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Batch:
    """Sequences of unlike length side by side.

    Parameters
    ----------
    ids
        Token ids ``(n, longest)``. None if ``states`` are given.
    states
        Output of the lower layers ``(n, longest, hidden)``. None if ``ids`` are given.
    mask
        1 for real tokens, int64 ``(n, longest)``; they stand first, unless a model pools the last place.
    """

    ids: Tensor | None
    states: Tensor | None
    mask: Tensor

    def to(self, device: Any) -> Batch:
        """The same batch on a device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Batch(move(self.ids), move(self.states), self.mask.to(device))


def new_classifier(
    backbone: str,
    precision: str,
    n_classes: int,
    lora: LoraParams,
    n_trained: int | None,
    seed: int,
    attention: Attention = "auto",
    devices: Devices = "one",
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A backbone with fresh adapters on its top ``n_trained`` layers (None: on all), and a fresh head.

    ``attention`` and ``devices`` are as for :func:`stackllm.llm.backbone.load_model`.

    Returns
    -------
    model, tokenizer
        The model with its adapters, and its tokenizer.

    Raises
    ------
    MissingInputError, UsageError
        If the backbone cannot be loaded so, or has no module that ``lora`` names.
    """
    quiet_libraries()
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import set_seed

    made_of = structure_of(backbone)
    trained_layers = top_layers(backbone, made_of, n_trained)
    set_seed(seed)
    model, tokenizer = _load(backbone, precision, n_classes, made_of, attention, devices)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(backbone, model, lora, trained_layers),
        modules_to_save=[*head_names(model), *_new_in_body(backbone, model)],
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(
            f'backbone "{backbone}": [member.lora] target_modules {list(lora.target_modules)} cannot have '
            f"adapters ({first_line(error)})."
        ) from error
    modules = dict(model.named_modules())
    for name in config.modules_to_save:  # in half precision the steps of its rate would round away
        if name in modules:
            trained_copy(modules[name]).float()
    _match_dtypes(adapted)
    return adapted, tokenizer


def top_layers(backbone: str, made_of: Structure, n_trained: int | None) -> tuple[str, ...]:
    """Names of the top ``n_trained`` layers; empty for all.

    Raises
    ------
    UsageError
        If a decoder, which starts from the output of the others, has no others.
    """
    if n_trained is None:
        return ()
    n_layers = len(made_of.layers)
    if made_of.reads_last_token:
        check_layers(backbone, n_layers, n_trained)
    return made_of.layers[-n_trained:] if n_trained < n_layers else ()


def load_classifier(
    folder: Path,
    backbone: str,
    precision: str,
    n_classes: int,
    attention: Attention = "auto",
    devices: Devices = "one",
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A classifier that :func:`save_classifier` wrote, ready to predict."""
    quiet_libraries()
    from peft import PeftModel

    made_of = structure_of(backbone)
    model, tokenizer = _load(backbone, precision, n_classes, made_of, attention, devices)
    adapted = PeftModel.from_pretrained(model, folder)
    adapted.eval()
    _match_dtypes(adapted)
    return adapted, tokenizer


def _load(
    backbone: str,
    precision: str,
    n_classes: int,
    made_of: Structure,
    attention: Attention,
    devices: Devices,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(
        CLASSIFIER, backbone, precision, lambda _: None, attention, devices, made_of.beside,
        num_labels=n_classes,
    )  # fmt: skip


def save_classifier(model: PeftModel, folder: Path) -> None:
    """Write adapters and head as safetensors, as ``peft`` does, and always the same bytes.

    The base model's configuration stands beside them: it knows the number of classes, which
    ``peft`` does not store.
    """
    model.save_pretrained(folder, safe_serialization=True)
    plain(model).config.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form
    path = folder / "adapter_config.json"
    config = read_json(path)
    for key in ("target_modules", "modules_to_save"):  # sets: their order is chance
        config[key] = sorted(set(config[key]))
    base = Path(config["base_model_name_or_path"]).expanduser()
    if base.is_dir():  # a relative one would be looked for wherever it is loaded
        config["base_model_name_or_path"] = str(base.resolve())
    write_json(path, config, indent=2, sort_keys=True)


def logits(model: PeftModel, batch: Batch) -> Tensor:
    """Scores of each class, float32 ``(n, n_classes)``."""
    inner = plain(model)
    if reads_last_token(inner):
        scores: Tensor = inner.score(_last_states(inner, batch))
    else:
        scores = inner(input_ids=batch.ids, attention_mask=batch.mask).logits
    return scores.float()


def head_inputs(model: PeftModel, batch: Batch) -> Tensor | None:
    """What the last linear layer of the head reads, ``(n, width)``; None if it reads more than a row.

    A model whose logits are not that layer's output on one pooled state a row has no such input.
    """
    layer, seen = last_linear(model), []
    if layer is None:
        return None
    hook = layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    try:
        scores = logits(model, batch)
    finally:
        hook.remove()
    pooled = len(seen) == 1 and seen[0][0].ndim == 2 and bool((seen[0][1].float() == scores).all())
    return seen[0][0] if pooled else None


def _last_states(inner: PreTrainedModel, batch: Batch) -> Tensor:
    """The last layer's output at the last real token, ``(n, hidden)``."""
    import torch

    width = batch.mask.shape[1]
    hidden = inner.base_model(
        input_ids=batch.ids,
        inputs_embeds=batch.states,
        attention_mask=batch.mask,
        position_ids=torch.arange(width, device=batch.mask.device)[None],
        use_cache=False,
    ).last_hidden_state
    rows = torch.arange(len(hidden), device=hidden.device)
    states: Tensor = hidden[rows, (batch.mask.sum(1) - 1).to(hidden.device)]
    return states


def _targets(
    backbone: str, model: PreTrainedModel, lora: LoraParams, layers: tuple[str, ...]
) -> list[str]:
    """Full names of the modules to adapt, all of them in ``layers`` (empty: anywhere in the body).

    What peft calls all-linear, it does not take for some layers only.
    """
    import torch
    from transformers.pytorch_utils import Conv1D  # what GPT-2 has for linear layers

    heads = tuple(f"{name}." for name in head_names(model))
    inside = tuple(f"{name}." for name in layers)
    body = {
        name: module
        for name, module in model.named_modules()
        if not f"{name}.".startswith(heads) and (not inside or name.startswith(inside))
    }
    if lora.target_modules == ("all-linear",):
        return [
            name
            for name, module in body.items()
            if isinstance(module, torch.nn.Linear | Conv1D) and _in_a_list(model, name)
        ]
    chosen = {
        wanted: [name for name in body if f".{name}".endswith(f".{wanted}")]
        for wanted in lora.target_modules
    }
    for wanted, names in chosen.items():
        if not names:
            raise UsageError(
                f'backbone "{backbone}": [member.lora] target_modules: "{wanted}" fits none of its trained '
                f"layers. {did_you_mean(wanted, {name.rsplit('.')[-1] for name in body})}"
            )
    return sorted({name for names in chosen.values() for name in names})


def _in_a_list(model: PreTrainedModel, name: str) -> bool:
    """Does a module stand in a list of layers? Poolers and projections do not, and are no layers."""
    import torch

    parts = name.split(".")
    above = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return any(isinstance(model.get_submodule(path), torch.nn.ModuleList) for path in above)


def _new_in_body(backbone: str, model: PreTrainedModel) -> list[str]:
    """Modules of the body whose weights were not stored, such as BERT's pooler: they start at random.

    So they have to be trained and saved, or each loading would draw others.
    """
    heads = tuple(f"{name}." for name in head_names(model))
    parameters = dict(model.named_parameters())
    new = sorted(it for it in model.new_weights if it in parameters and not it.startswith(heads))
    layers = [name for name in new if _in_a_list(model, name.rpartition(".")[0])]
    if layers:
        raise UsageError(
            f'backbone "{backbone}": {len(layers)} weights of its layers are not stored, such as {layers[0]}. '
            "Give a folder whose weights are those of its config.json."
        )
    owners = {name.rpartition(".")[0] for name in new}
    return sorted(it for it in owners if not any(True for _ in model.get_submodule(it).children()))


def _match_dtypes(model: PeftModel) -> None:
    """Let what is trained whole read in its own precision, which the frozen body may not compute in."""
    import torch

    def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = next(trained_copy(module).parameters()).dtype
        return tuple(
            it.to(dtype) if isinstance(it, torch.Tensor) and it.is_floating_point() else it
            for it in args
        )

    for module in plain(model).modules():
        if hasattr(module, "modules_to_save"):
            module.register_forward_pre_hook(cast)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def of_head(name: str) -> bool:
    """Does a trained parameter belong to what is trained whole, and not to an adapter?"""
    return ".modules_to_save." in name
