"""Loading a language model: which weights, in which precision, on which device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stackllm.engine import ranks
from stackllm.errors import MissingInputError, StackllmError, StorageError, UsageError, first_line
from stackllm.llm.families import check_reads
from stackllm.llm.heads import add_classifier
from stackllm.llm.layers import without_upper
from stackllm.llm.locate import EMBEDDED, prepare, revision_of, settings_of
from stackllm.llm.machine import (
    QUANTISED,
    Precision,
    choose_dtype,
    compute_dtype,
    device,
    gpus,
    packing,
)
from stackllm.llm.memory import does_not_fit, is_out_of_memory, let_go
from stackllm.llm.resident import resident

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Attention = Literal["auto", "eager", "sdpa", "flash_attention_2"]
Devices = Literal["one", "all"]

CAUSAL, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
"""The transformers classes that make an LLM and a classifier of a backbone."""


@dataclass(frozen=True)
class Backbone:
    """A loaded frozen LLM.

    Parameters
    ----------
    name
        What the user asked for.
    revision
        What the weights are: a digest of the local files, or the hub's commit.
    dtype
        Precision of the weights, as torch names it.
    model
        A transformers causal LM in evaluation mode, without gradients.
    tokenizer
        Its tokenizer.
    """

    name: str
    revision: str
    dtype: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_backbone(
    name: str = EMBEDDED, dtype: Precision = "auto", echo: Callable[[str], None] = print
) -> Backbone:
    """Load a decoder LLM for reading.

    Parameters
    ----------
    name
        ``"smollm2"`` for the embedded LLM, a folder with a transformers model, or a hub name.
    dtype
        Precision of the weights; see :func:`~stackllm.llm.machine.choose_dtype`.
    echo
        Told each automatic choice with its reason.

    Raises
    ------
    MissingInputError
        If the weights are nowhere to be found.
    UsageError
        If the model is no decoder with a language-model head, or wants to run code of its own.
    """
    chosen, reason = choose_dtype(dtype)
    echo(f"backbone {name}: {chosen} ({reason})")
    model, tokenizer = load_model(CAUSAL, name, chosen, echo)
    return Backbone(name, revision_of(name), chosen, _frozen(model), tokenizer)


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    return model.eval()


def frozen_model(
    name: str,
    precision: str,
    attention: Attention = "auto",
    devices: Devices = "one",
    without_top: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen decoder LLM and its tokenizer, the process's only model; see :func:`load_model`.

    So many layers at the top are not loaded, nor what stands above them.
    """
    trim = functools.partial(without_upper, n_layers=without_top) if without_top else None

    def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_model(
            CAUSAL, name, precision, lambda _: None, attention, devices, trim=trim
        )
        return _frozen(model), tokenizer

    key = name, revision_of(name), precision, attention, devices, without_top
    return resident(("frozen", *key), load)


def load_model(
    kind: str,
    name: str,
    precision: str,
    echo: Callable[[str], None] = print,
    attention: Attention = "auto",
    devices: Devices = "one",
    unquantised: Sequence[str] = (),
    trim: Callable[[PreTrainedModel], None] | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Weights and tokenizer of a language model, on the GPU where there is one.

    Parameters
    ----------
    kind
        The transformers class that loads it, such as ``"AutoModelForSequenceClassification"``.
    name
        As for :func:`load_backbone`.
    precision
        A :data:`~stackllm.llm.machine.Precision`, but not ``"auto"``: see
        :func:`~stackllm.llm.machine.choose_dtype`. ``"int8"`` and ``"nf4"`` quantise with bitsandbytes.
    attention
        How attention is computed; ``"auto"`` is what transformers takes for the model. Whatever is
        not ``"auto"`` or ``"eager"`` may want a package or a GPU of its own.
    devices
        On ``"one"`` GPU, this process's, or its layers shared out over ``"all"``, which is for models
        that are too large for one. With a single GPU, or none, both mean the same.
    unquantised
        Names of linear layers that ``"int8"`` and ``"nf4"`` leave as they are; none means those that
        transformers leaves.
    trim
        Takes out parts of the model before weights are read: those of the parts never are.
    options
        Further settings of the model's configuration.

    Returns
    -------
    model, tokenizer
        The tokenizer always has a pad token that the model has an embedding of, and the model's
        configuration names it. ``model.new_weights`` are names of weights that were not stored.

    Raises
    ------
    MissingInputError
        If the weights are nowhere to be found.
    UsageError
        If transformers cannot load them as such a model.
    """
    location = prepare(name, echo)
    quiet_libraries()
    import transformers

    shared: dict[str, Any] = {"trust_remote_code": False}
    shared |= {"local_files_only": True} if Path(location).exists() else {}
    loading = weights_options(precision, unquantised)
    if attention != "auto":
        loading["attn_implementation"] = attention
    if devices == "all" and ranks.size() > 1:
        raise UsageError(
            f'backbone "{name}": devices = "all" is for one process. Start the command without accelerate '
            'launch, or set devices = "one".'
        )
    if devices == "all" and len(gpus()) > 1:  # one is one, with no copies between layers
        loading["device_map"] = "auto"
    elif device().type != "cpu":
        loading["device_map"] = {"": device()}
    with _load_errors(name, kind):
        config = transformers.AutoConfig.from_pretrained(location, **shared, **options)
    _check_family(name, config, kind)
    tokenizer = _load_tokenizer(name, location, shared)
    text = config.get_text_config()
    text.pad_token_id = _pad_token(text, tokenizer)  # before an embedding is made that looks at it
    tokenizer.pad_token_id = text.pad_token_id
    with _load_errors(name, kind, precision):
        loader = getattr(transformers, kind)
        if trim is not None:
            loader, config = _trimmed(loader, config, trim)
        model, account = loader.from_pretrained(
            location, config=config, use_safetensors=True, output_loading_info=True,
            **shared, **loading,
        )  # fmt: skip
    if trim is not None:
        model.__class__ = loader.__base__
    if devices == "all" and device().type == "cuda":
        _refuse_offloading(model, name, kind, precision)
    model.new_weights = frozenset(account["missing_keys"])
    keep_unpacked(model)
    return model, tokenizer


def _trimmed(
    auto: Any, config: PretrainedConfig, trim: Callable[[PreTrainedModel], None]
) -> tuple[Any, PretrainedConfig]:
    """The class of a configuration's models, which come without what ``trim`` takes out, and its configuration.

    transformers reads no weight that a model has no place for, be it to convert, quantise or move it.
    """
    import torch

    with torch.device("meta"):
        skeleton = auto.from_config(config, trust_remote_code=False)
    whole: Any = type(skeleton)

    def begin(self: Any, *args: Any, **options: Any) -> None:
        whole.__init__(self, *args, **options)
        trim(self)

    body = {"__init__": begin, "__module__": whole.__module__}
    return type(whole.__name__, (whole,), body), skeleton.config


def _pad_token(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill up with, which is masked: the first candidate that the model has an embedding of.

    The configuration's own goes first, as RoBERTa counts positions from the number of that token. One that
    ends texts comes before whatever has the number 0: transformers reads a text up to its last token that
    is no padding, and 0 may be a word, or what stands for unknown ones.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    tokens = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, *ends)
    return next((it for it in tokens if it is not None and 0 <= it < config.vocab_size), 0)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone alone, to count tokens before a model is loaded.

    Raises
    ------
    MissingInputError
        As for :func:`load_model`.
    """
    location = prepare(name)
    quiet_libraries()
    return _load_tokenizer(
        name, location, {"trust_remote_code": False, "local_files_only": Path(location).exists()}
    )


def _load_tokenizer(name: str, location: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location, **options)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise MissingInputError(
            f'backbone "{name}": its tokenizer could not be loaded ({first_line(error)}). Fetch '
            "tokenizer.json and tokenizer_config.json again from where the weights came from; if that "
            "names a package, install it."
        ) from error


def load_skeleton(name: str, kind: str = CLASSIFIER) -> PreTrainedModel:
    """A backbone as a model of a kind, by default a classifier, without its weights: to see how it is built.

    Raises
    ------
    MissingInputError, UsageError
        As for :func:`load_model`.
    """
    config = _whole_config(name, lambda _: None, kind)
    config.get_text_config().pad_token_id = 0  # what is stored may lie outside the embedding
    import torch
    import transformers

    with _load_errors(name, kind), torch.device("meta"):
        return getattr(transformers, kind).from_config(config, trust_remote_code=False)


def load_config(name: str, echo: Callable[[str], None] = print) -> PretrainedConfig:
    """The configuration of a backbone's text model, without its weights.

    Raises
    ------
    MissingInputError, UsageError
        As for :func:`load_model`.
    """
    return _whole_config(name, echo, CAUSAL).get_text_config()


def _whole_config(name: str, echo: Callable[[str], None], kind: str) -> PretrainedConfig:
    location = settings_of(name, echo)
    quiet_libraries()
    from transformers import AutoConfig

    local = {"local_files_only": True} if Path(location).exists() else {}
    with _load_errors(name, kind):
        config = AutoConfig.from_pretrained(location, trust_remote_code=False, **local)
    _check_family(name, config, kind)
    return config


def _check_family(name: str, config: PretrainedConfig, kind: str) -> None:
    """Refuse a type that is not read right; give one a classifier that transformers has none of."""
    if kind == CLASSIFIER:
        add_classifier(config)
    else:
        check_reads(name, config)


def check_length(name: str, room: int | None, longest: int) -> None:
    """Refuse sequences that a model has no positions for; None is room for any.

    Raises
    ------
    UsageError
        With both lengths.
    """
    if room is not None and longest > room:
        raise UsageError(
            f'backbone "{name}" reads at most {room} tokens, and the longest text has {longest}. '
            "Lower max_length_answer, max_length_prompt or max_length."
        )


def _refuse_offloading(model: PreTrainedModel, name: str, kind: str, precision: str) -> None:
    """A layer that stands beside the GPUs is fetched anew for every pass, a hundred times slower."""
    if {"cpu", "disk"} & {str(place) for place in getattr(model, "hf_device_map", {}).values()}:
        raise does_not_fit(name, kind, precision)


@contextlib.contextmanager
def _load_errors(name: str, kind: str, precision: str = "") -> Iterator[None]:
    """What transformers raises when it can't load a model of a kind, as a sentence."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            let_go(error)
            raise does_not_fit(name, kind, precision) from error
        sentence = _load_sentence(error, name, kind)
        if sentence is None:
            raise
        raise sentence from error


def _load_sentence(error: Exception, name: str, kind: str) -> StackllmError | None:
    from safetensors import SafetensorError

    said = first_line(error)
    if isinstance(error, OSError):
        return MissingInputError(
            f'backbone "{name}": its weights could not be loaded ({said}). '
            "Offline, give the path of a folder that holds config.json, the weights and the tokenizer."
        )
    if isinstance(error, SafetensorError):
        return StorageError(
            f'backbone "{name}": its weights are damaged ({said}). Fetch them again.'
        )
    if isinstance(error, ImportError):
        return MissingInputError(
            f'backbone "{name}" wants a package that is not here ({said}). Install it, or take '
            'another attention or precision ("auto" needs none).'
        )
    if not isinstance(error, ValueError | RuntimeError | KeyError):
        return None
    if "size mismatch" in str(error) or "mismatched" in str(error):
        return UsageError(
            f'backbone "{name}" has a classification head of another number of classes. '
            "Give the language model that it was made from."
        )
    what, wanted = (
        ("classifier", "any model") if kind == CLASSIFIER else
        ("decoder", "a language model that generates text")
    )  # fmt: skip
    return UsageError(
        f'backbone "{name}" is no {what} that transformers can load ({said}). Choose {wanted} '
        f"of a family that transformers has a {what} of."
    )


def quiet_libraries() -> None:
    """Keep transformers and bitsandbytes from reporting what is no news: a new head, optional kernels."""
    import logging
    import warnings

    from transformers.utils import logging as reports

    reports.disable_progress_bar()
    reports.set_verbosity_error()
    for library in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # and peft sets it right


def keep_unpacked(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on some CPUs.

    After that training would quietly leave most adapters as they are, and layers whose width is no
    multiple of 64 would fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def weights_options(precision: str, unquantised: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that give weights of that precision; see :func:`load_model`."""
    import torch

    compute = getattr(torch, compute_dtype(precision))
    if packing(precision) not in QUANTISED:
        return {"dtype": compute}
    from transformers import BitsAndBytesConfig

    bits = {
        "int8": {"load_in_8bit": True},
        "nf4": {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute,
        },
    }  # fmt: skip
    config = BitsAndBytesConfig(
        llm_int8_skip_modules=list(unquantised) or None, **bits[packing(precision)]
    )
    return {"dtype": compute, "quantization_config": config}
