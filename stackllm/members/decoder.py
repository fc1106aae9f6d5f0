"""Member ``decoder``: a language model fine-tuned as a classifier, with LoRA or QLoRA.

With ``trainable_layers`` a number, only that many layers at the top are trained, a decoder's on the
cached output of the others; with ``"all"`` every layer gets its adapter. All but decoders, and
decoders of which all layers are trained, read their texts anew each time.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
from annotated_types import Ge, Le, Len

from stackllm.crossfit.folds import inner_folds
from stackllm.crossfit.targets import Targets
from stackllm.engine import ranks
from stackllm.errors import TrainingError, UsageError
from stackllm.finetune.dataset import Collate, Examples, TrainingParams
from stackllm.finetune.memory import Plan, gpu_room, plan_training, training_needs
from stackllm.finetune.model import (
    Batch,
    LoraParams,
    bare_classifier,
    last_states,
    load_classifier,
    new_classifier,
    save_classifier,
    top_layers,
)
from stackllm.finetune.structure import (
    last_linear,
    may_read_last_token,
    may_start_from_trunk,
    structure_of,
)
from stackllm.finetune.train import is_finite, read, train
from stackllm.finetune.train import predict as predict_rows
from stackllm.llm.backbone import (
    Attention,
    Devices,
    check_length,
    load_skeleton,
    load_tokenizer,
)
from stackllm.llm.estimate import sizes_of_skeleton
from stackllm.llm.layers import positions
from stackllm.llm.locate import EMBEDDED, revision_of
from stackllm.llm.machine import Precision, choose_dtype, compute_dtype, gpus, use_one_thread
from stackllm.llm.prompts import PromptParams, make_prompts
from stackllm.llm.trunk import Trunk, TrunkParams
from stackllm.members.inputs import Inputs, read_texts, read_trunk
from stackllm.members.protocol import Traits
from stackllm.members.warm_head import save_states, start_head
from stackllm.metrics import log_loss
from stackllm.parameters import BackboneName, Seed, check
from stackllm.store.checkpoints import LAST_GOOD, keep
from stackllm.store.digest import digest
from stackllm.store.records import read_json, write_json

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

VERSION = 4

Side = Literal["left", "right"]

_SETTINGS = "decoder.json"


@dataclass(frozen=True)
class DecoderParams:
    """Settings of a fine-tuned language model: any that transformers has a classifier of.

    Parameters
    ----------
    backbone
        ``"smollm2"`` (embedded), a folder, or a hub name.
        ``revision`` beside it names a commit, branch or tag of the hub, as ``"org/name@revision"`` does; a
        run stays with the commit that it began with.
    precision
        Of the frozen weights; ``"int8"`` and ``"nf4"`` quantise them (QLoRA), and compute in what follows the
        dash, or as ``"auto"``: in what suits the machine that begins the run.
    trainable_layers
        How many layers at the top are trained, or ``"all"``. Decoders start from the cached output of
        the others.
    seeds
        A model for each; their probabilities are averaged.
    every_round
        Train anew in every round of pseudo-labels; else later rounds go on with the first's models.
    refit
        ``"full"``: also a model per seed on all training rows. It takes the place of the folds' models
        in what is submitted, and in nothing that is scored or learnt from.
    warm_head
        Start from the head that suits the backbone as it is, instead of a random one, if the head ends
        in one linear layer on a pooled state.
    attention, devices
        How attention is computed, and on which GPUs the model stands; as for the encoder.
    prompt, lora, training
        What is read, what is adapted, how it is trained.
    """

    backbone: BackboneName = EMBEDDED
    precision: Precision = "auto"
    trainable_layers: Annotated[int, Ge(1), Le(10_000)] | Literal["all"] = 4
    seeds: Annotated[tuple[Seed, ...], Len(1, 1000)] = (0,)
    every_round: bool = False
    refit: Literal["folds", "full"] = "folds"
    warm_head: bool = True
    attention: Attention = "auto"
    devices: Devices = "one"
    prompt: PromptParams = field(default_factory=PromptParams)
    lora: LoraParams = field(default_factory=LoraParams)
    training: TrainingParams = field(default_factory=TrainingParams)

    def __post_init__(self) -> None:
        check(self)
        if len(set(self.seeds)) != len(self.seeds):
            raise UsageError(f"seeds must be different whole numbers, not {list(self.seeds)}.")
        if self.refit == "full" and self.every_round:
            raise UsageError(
                'refit = "full" trains on true labels only, so it does not go with every_round = true. '
                "Leave one of them out."
            )

    @property
    def chosen_precision(self) -> str:
        """The precision that ``"auto"`` stands for on this machine."""
        return choose_dtype(self.precision)[0]

    @property
    def n_trained(self) -> int | None:
        """Layers that are trained; None for all."""
        return None if self.trainable_layers == "all" else self.trainable_layers

    @property
    def trunk(self) -> TrunkParams | None:
        """What is to be cached for it; None if all layers are trained, or it is no decoder."""
        if self.n_trained is None or not may_start_from_trunk(self.backbone):
            return None
        return TrunkParams(
            self.backbone,
            self.chosen_precision,
            self.n_trained,
            self.prompt,
            self.attention,
            self.devices,
        )

    @property
    def starts(self) -> DecoderParams | None:
        """What decides the states from which a head starts that all seeds share; None if none does.

        That is so where a single new layer reads the frozen backbone's states: of other heads the layers
        below the last start at random, and who stops early holds out groups of his own.
        """
        alone = self.warm_head and not self.training.patience
        if not alone or not may_read_last_token(self.backbone):
            return None
        return dataclasses.replace(
            _of_one_model(self), lora=LoraParams(), training=TrainingParams()
        )

    @property
    def remark(self) -> str:
        """What a user should know who counts on the cached trunk; empty if it is used or not wanted."""
        if self.n_trained is None or self.trunk is not None:
            return ""
        layers = top_layers(self.backbone, structure_of(self.backbone), self.n_trained)
        which = f"its top {len(layers)} layers are" if layers else "all of its layers are"
        return f"backbone {self.backbone}: {which} trained without a cached trunk, from which its layers cannot start"


def traits(params: DecoderParams) -> Traits:
    """What the settings mean for the stages; ``params`` there are as they came out on this machine."""
    return Traits(
        params=_of_one_model(params),
        weights=_identity(params),
        seeds=params.seeds,
        every_round=params.every_round,
        refitted=params.refit == "full",
        trunk=params.trunk,
        remark=params.remark,
        backbone=params.backbone,
        starts=params.starts,
        devices=params.devices,
    )


def _of_one_model(params: DecoderParams) -> DecoderParams:
    precision = cast(Precision, params.chosen_precision)
    return dataclasses.replace(
        params, precision=precision, seeds=(0,), every_round=False, refit="folds",
        training=params.training.numbers,
    )  # fmt: skip


def _identity(params: DecoderParams) -> str:
    """Digest of the weights that the settings only name."""
    precision = params.chosen_precision
    return digest(revision_of(params.backbone), precision, compute_dtype(precision))


def fit(inputs: Inputs, targets: Targets, params: DecoderParams, seed: int, folder: Path) -> None:
    """Fine-tune on ``targets`` and write adapter, head and settings into ``folder``."""
    use_one_thread()
    training, params = params.training, _of_one_model(params)
    model, tokenizer = new_classifier(
        params.backbone, params.precision, targets.n_classes, params.lora, params.n_trained, seed,
        params.attention, params.devices, from_trunk=params.trunk is not None,
    )  # fmt: skip
    lengths, collate = sequences(inputs, params, tokenizer)
    check_length(params.backbone, positions(model), int(lengths.max()))
    fitted, held = _hold_out(inputs, targets, params, seed)
    rows, where = np.unique(fitted.rows, return_inverse=True)
    labels = np.zeros((len(rows), targets.n_classes))
    np.add.at(labels, (where, fitted.labels), fitted.weights)
    weights = labels.sum(axis=1)
    examples = Examples(rows, labels / weights[:, None], weights, lengths[rows], collate)

    def validate() -> float:
        return log_loss(predict_rows(model, held.rows, lengths[held.rows], collate), held.labels)

    warm = False
    try:
        if params.warm_head:
            warm = start_head(model, inputs, fitted, lengths, collate, seed)
        history = folder / "metrics.jsonl"
        planned = plan(params, training, int(lengths.max()))
        train(
            model, examples, training, seed, history, validate if len(held.rows) else None, planned
        )
    except TrainingError as error:
        raise TrainingError(f"{error}{_keep_last_good(model)}") from error
    save_classifier(model, folder, params.backbone, tokenizer, targets.classes)
    content = {
        "n_classes": targets.n_classes, "warm_head": warm, "params": dataclasses.asdict(params),
    }  # fmt: skip
    write_json(folder / _SETTINGS, content, indent=1)


def predict(inputs: Inputs, rows: np.ndarray, folder: Path) -> np.ndarray:
    """Probabilities of ``rows``, float64 ``(len(rows), n_classes)``."""
    use_one_thread()
    content = read_json(folder / _SETTINGS)
    params = _params(content["params"])
    model, tokenizer = load_classifier(
        folder, params.backbone, params.precision, content["n_classes"],
        params.attention, params.devices, params.n_trained if params.trunk else None,
    )  # fmt: skip
    lengths, collate = sequences(inputs, params, tokenizer)
    return predict_rows(model, rows, lengths[rows], collate)


def plan(params: DecoderParams, training: TrainingParams, longest: int) -> Plan | None:
    """Rows per pass and checkpointing that suit this process's GPU; None without one.

    Raises
    ------
    StorageError
        If not even one row of ``longest`` tokens fits.
    """
    memory = gpu_room(params.devices)
    if memory is None:
        return None
    skeleton = load_skeleton(params.backbone)
    heads = getattr(skeleton.config.get_text_config(), "num_attention_heads", 0)
    needs = training_needs(
        sizes_of_skeleton(skeleton), params.precision, params.lora, training, longest,
        params.n_trained, params.trunk is not None, heads if params.attention == "eager" else 0,
    )  # fmt: skip
    return plan_training(
        params.backbone, params.precision, needs, training, longest, memory, ranks.size()
    )


def told_before(inputs: Inputs, params: DecoderParams) -> tuple[str, ...]:
    """What a training is going to take of a GPU, before a model is loaded; empty without a GPU.

    Raises
    ------
    StorageError
        As for :func:`plan`.
    """
    if not gpus():
        return ()
    training, params = params.training, _of_one_model(params)
    if params.trunk:
        longest = read_trunk(inputs, params.trunk).lengths.max()
    else:
        longest = sequences(inputs, params, load_tokenizer(params.backbone))[0].max()
    planned = plan(params, training, int(longest))
    return (planned.told,) if planned else ()


def _hold_out(
    inputs: Inputs, targets: Targets, params: DecoderParams, seed: int
) -> tuple[Targets, Targets]:
    """What to train on, and what tells when to stop: given labels of a fifth of the training groups."""
    if not params.training.patience:
        return targets, targets.only(np.zeros(len(targets.rows), dtype=bool))
    held = inner_folds(inputs.groups[targets.rows], 5, seed) == 0
    return targets.only(~held), targets.only(held & targets.given)


def _keep_last_good(model: PeftModel) -> str:
    """Save the weights of before a step that failed, and say where; nothing if they are no numbers."""
    if ranks.rank() or not is_finite(model):
        return ""
    weights = keep(lambda folder: save_classifier(model, folder), "adapter", LAST_GOOD)
    return f" The weights of before that step are kept in {weights}." if weights else ""


def read_start(inputs: Inputs, params: DecoderParams, n_classes: int, folder: Path) -> None:
    """Write what the head of the frozen backbone reads of every row, float32 ``(n_rows, hidden)``."""
    use_one_thread()
    params = _of_one_model(params)
    model, tokenizer = bare_classifier(
        params.backbone, params.precision, n_classes, params.attention, params.devices,
        params.n_trained if params.trunk else None,
    )  # fmt: skip
    lengths, collate = sequences(inputs, params, tokenizer)
    check_length(params.backbone, positions(model), int(lengths.max()))
    states = read(last_states, model, np.arange(len(lengths)), lengths, collate)
    head = last_linear(model)
    save_states(folder, states, head is not None and head.bias is not None)


def _params(stored: dict[str, Any]) -> DecoderParams:
    inner = {
        "prompt": PromptParams(**stored["prompt"]),
        "lora": LoraParams(**stored["lora"]),
        "training": TrainingParams(**{**stored["training"], "report_to": ()}),
    }
    return DecoderParams(**{**stored, **inner})


def sequences(
    inputs: Inputs, params: DecoderParams, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, Collate]:
    """Length of every row's sequence, int ``(n_rows,)``, and what makes batches of them."""
    if params.trunk is None:
        return _from_texts(inputs, params, tokenizer)
    return _from_trunk(read_trunk(inputs, params.trunk))


def _from_texts(
    inputs: Inputs, params: DecoderParams, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, Collate]:
    import torch

    made_of = structure_of(params.backbone)
    side: Side = "left" if made_of.pools_last_place else "right"
    prompts = make_prompts(
        tokenizer, read_texts(inputs).iter_rows(), params.prompt, not made_of.reads_last_token
    )
    sequences = [[*prompt.prefix, *ids] for prompt in prompts for ids in prompt.responses]

    def collate(rows: np.ndarray) -> Batch:
        chosen = [torch.tensor(sequences[row]) for row in rows]
        ids, mask = _padded(chosen, tokenizer.pad_token_id, side)
        return Batch(ids, None, mask)

    return np.array(list(map(len, sequences))), collate


def _from_trunk(trunk: Trunk) -> tuple[np.ndarray, Collate]:
    import torch

    def collate(rows: np.ndarray) -> Batch:
        chosen = [torch.from_numpy(trunk.states(int(row))) for row in rows]
        if chosen[0].dtype == torch.uint16:
            chosen = [states.view(torch.bfloat16) for states in chosen]
        states, mask = _padded(chosen, 0, "right")
        return Batch(None, states, mask)

    return trunk.lengths, collate


def _padded(sequences: list[Tensor], filler: int, side: Side) -> tuple[Tensor, Tensor]:
    """Sequences side by side, filled up on a side, and int64 1 where they are real."""
    import torch

    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    real = [torch.ones(len(sequence), dtype=torch.int64) for sequence in sequences]
    return pad(sequences, padding_value=float(filler)), pad(real)
