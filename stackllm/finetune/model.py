"""A language model as a classifier: LoRA on its layers and a head that is trained whole.

A process loads a backbone once. Every training and every stored model gets it bare, with adapters and
head of its own, so that what they compute does not depend on what was computed before.

Layers below the first one that is trained give the same output for every fold, seed and epoch. So
a decoder can start from their cached output (:mod:`stackllm.llm.trunk`): the lower layers are not even
loaded, and the others keep their numbers, which makes what is saved an ordinary PEFT adapter.
Other models (:mod:`stackllm.finetune.structure`) read their texts whole and pool as they always do.
"""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable, Sequence
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
from stackllm.llm.hub import HubModel, cached_commit
from stackllm.llm.layers import check_layers, plain, without_lower
from stackllm.llm.locate import find_backbone, revision_of
from stackllm.llm.resident import resident
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
        """The same batch on a device; pinned memory is copied while the processor goes on."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in memory that a GPU copies from by itself; torch's loaders ask for it by this name."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        ids, states = (None if it is None else change(it) for it in (self.ids, self.states))
        return Batch(ids, states, change(self.mask))


def new_classifier(
    backbone: str,
    precision: str,
    n_classes: int,
    lora: LoraParams,
    n_trained: int | None,
    seed: int,
    attention: Attention = "auto",
    devices: Devices = "one",
    from_trunk: bool = False,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A backbone with fresh adapters on its top ``n_trained`` layers (None: on all), and a fresh head.

    It takes the backbone away from the classifier that this process had before.

    Parameters
    ----------
    backbone, precision, attention, devices
        As for :func:`stackllm.llm.backbone.load_model`.
    n_classes
        How many scores it gives per text.
    lora
        Settings of the adapters.
    n_trained
        How many layers at the top get some.
    seed
        Of the weights that start at random.
    from_trunk
        Leave the other layers out: their output will be given.

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

    trained_layers = top_layers(backbone, structure_of(backbone), n_trained)
    n_layers = n_trained if from_trunk else None
    model, tokenizer = bare_classifier(backbone, precision, n_classes, attention, devices, n_layers)
    set_seed(seed)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(backbone, model, lora, trained_layers),
        modules_to_save=_draw_new_weights(backbone, model),
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(
            f'backbone "{backbone}": [member.lora] target_modules {list(lora.target_modules)} cannot have '
            f"adapters ({first_line(error)})."
        ) from error
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
    n_layers: int | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A classifier that :func:`save_classifier` wrote, ready to predict.

    Parameters
    ----------
    folder
        Where it stands.
    backbone, precision, n_classes, attention, devices
        As for :func:`new_classifier`.
    n_layers
        Leave out all but so many layers at the top: the others' output will be given.
    """
    quiet_libraries()
    from peft import PeftModel

    model, tokenizer = bare_classifier(backbone, precision, n_classes, attention, devices, n_layers)
    adapted = PeftModel.from_pretrained(model, folder)
    adapted.eval()
    _match_dtypes(adapted)
    return adapted, tokenizer


def bare_classifier(
    backbone: str,
    precision: str,
    n_classes: int,
    attention: Attention = "auto",
    devices: Devices = "one",
    n_layers: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """This process's copy of a backbone as it was loaded, whatever was done with it since.

    Parameters are as for :func:`load_classifier`. The head is as it is stored, or at random.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from transformers import set_seed

    made_of = structure_of(backbone)
    trim = None if n_layers is None else functools.partial(without_lower, n_layers=n_layers)

    def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        set_seed(0)  # of what is drawn here, nothing depends on what came before
        model, tokenizer = load_model(
            CLASSIFIER, backbone, precision, lambda _: None, attention, devices, made_of.beside,
            trim, num_labels=n_classes,
        )  # fmt: skip
        model.requires_grad_(False)
        for name in _trained_whole(backbone, model):
            # in half precision the steps of its rate would round away
            model.get_submodule(name).float()
        return model, tokenizer

    key = backbone, revision_of(backbone), precision, n_classes, attention, devices, n_layers
    model, tokenizer = resident((CLASSIFIER, *key), load)
    for name, module in list(model.named_modules()):  # of a training that failed half-way as well
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(name, module.original_module)
    vars(model).pop("peft_config", None)
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    return model.eval(), tokenizer


def save_classifier(
    model: PeftModel,
    folder: Path,
    backbone: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Write adapters and head as safetensors, as ``peft`` does, and always the same bytes.

    Parameters
    ----------
    model, folder
        What, and where to.
    backbone
        What it was made from: a model of the hub is named with its commit, all else by its folder.
    tokenizer
        Its files stand beside the adapters.
    classes
        What the classes are called. The configuration beside the adapters says that and, which
        ``peft`` does not store either, how many there are.
    """
    model.save_pretrained(folder, safe_serialization=True)
    config = copy.deepcopy(plain(model).config)
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        for path in [it for it in folder.iterdir() if it.is_dir()]:
            shutil.rmtree(path)  # templates of chats by name, of no use to a classifier
    (folder / "README.md").unlink(missing_ok=True)  # an empty form
    path = folder / "adapter_config.json"
    adapter = read_json(path)
    for key in ("target_modules", "modules_to_save"):  # sets: their order is chance
        adapter[key] = sorted(set(adapter[key]))
    source = None if backbone is None else find_backbone(backbone)
    base = Path(adapter["base_model_name_or_path"]).expanduser()
    if isinstance(source, HubModel):
        adapter["base_model_name_or_path"] = source.repo
        adapter["revision"] = source.revision if source.is_pinned else cached_commit(source)
    elif base.is_dir():  # a relative one would be looked for wherever it is loaded
        adapter["base_model_name_or_path"] = str(base.resolve())
    write_json(path, adapter, indent=2, sort_keys=True)


def logits(model: PeftModel, batch: Batch) -> Tensor:
    """Scores of each class, float32 ``(n, n_classes)``, on the batch's device wherever the head may be."""
    inner = plain(model)
    if reads_last_token(inner):
        scores: Tensor = inner.score(last_states(inner, batch))
    else:
        scores = inner(input_ids=batch.ids, attention_mask=batch.mask).logits
    return scores.float().to(batch.mask.device)


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
    pooled = (
        len(seen) == 1
        and seen[0][0].ndim == 2
        and bool((seen[0][1].float().to(scores.device) == scores).all())
    )
    return seen[0][0] if pooled else None


def last_states(model: PreTrainedModel | PeftModel, batch: Batch) -> Tensor:
    """A decoder's last output at the last real token, which its head reads: ``(n, hidden)``."""
    import torch

    inner = plain(model)
    width = batch.mask.shape[1]
    ids = batch.ids
    if batch.states is not None:
        inner.start.states = batch.states
        ids = torch.zeros_like(batch.mask)
    hidden = inner.base_model(
        input_ids=ids,
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
            if isinstance(module, torch.nn.Linear | Conv1D)
            and _in_a_list(model, name)
            and _hears_adapters(model, name)
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


def _hears_adapters(model: PreTrainedModel, name: str) -> bool:
    """Is a linear layer called as one, so that what an adapter adds to its output is heard?

    Routers give more than their product, and grouped products take other inputs. Layers that scan states
    (Mamba) hand the weights of all but their first projection to a kernel, which peft refuses as well.
    """
    kind = type(model.get_submodule(name)).__name__
    owner, _, last = name.rpartition(".")
    weights = {own for own, _ in model.get_submodule(owner).named_parameters(recurse=False)}
    scans = {"A_log", "D"} <= weights and last != "in_proj"
    return not scans and not any(odd in kind for odd in ("Router", "Grouped"))


def _in_a_list(model: PreTrainedModel, name: str) -> bool:
    """Does a module stand in a list of layers? Poolers and projections do not, and are no layers."""
    import torch

    parts = name.split(".")
    above = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return any(isinstance(model.get_submodule(path), torch.nn.ModuleList) for path in above)


def _trained_whole(backbone: str, model: PreTrainedModel) -> list[str]:
    """Modules that are trained and saved whole: the head, and what the body has but the weights lack.

    Such as BERT's pooler, which starts at random: another loading would draw others.
    """
    heads = head_names(model)
    in_head = tuple(f"{name}." for name in heads)
    new = sorted(it for it in _new_weights(model) if not it.startswith(in_head))
    layers = [name for name in new if _in_a_list(model, name.rpartition(".")[0])]
    if layers:
        raise UsageError(
            f'backbone "{backbone}": {len(layers)} weights of its layers are not stored, such as {layers[0]}. '
            "Give a folder whose weights are those of its config.json."
        )
    owners = {name.rpartition(".")[0] for name in new}
    leaves = (it for it in owners if not any(True for _ in model.get_submodule(it).children()))
    return [*heads, *sorted(leaves)]


def _new_weights(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that were not stored."""
    return {name for name, _ in model.named_parameters() if name in model.new_weights}


def _draw_new_weights(backbone: str, model: PreTrainedModel) -> list[str]:
    """Give every weight that was not stored a random start, and name the modules that are trained whole.

    They are drawn on the CPU in float32, so that they are the same on every machine and in every
    precision. Whatever the weights of the rest say, stays.
    """
    import torch

    names, new = _trained_whole(backbone, model), _new_weights(model)
    for name in names:
        module = model.get_submodule(name)
        fresh = copy.deepcopy(module).cpu().float()
        with torch.no_grad():
            for part in fresh.modules():
                model._init_weights(part)
            for key, value in module.named_parameters():
                if f"{name}.{key}" in new:
                    value.copy_(fresh.get_parameter(key))
    return names


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
