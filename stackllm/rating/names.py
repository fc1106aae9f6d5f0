"""Names of models: whether the one that answered can be the one that was asked for.

Servers answer under the name of the file that they loaded, with a date, or without what a router
was told. Whatever tells sizes, versions or families apart has to be the same.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_ENDING = re.compile(r"\.(gguf|ggml|bin|safetensors)$")
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_QUANTISED = re.compile(
    r"[-._:](?:(?:ud|i1|imat)[-._])?(?:i?q\d\w*|tq\d\w*|bf16|fp?(?:8|16|32)|mxfp4\w*|nvfp4|int[48])$"
)
_DATE = re.compile(r"[-:@](\d{4,}(?:-\d\d){0,2}|latest)$")
_PINNED = re.compile(r"@(.*)$")
_VARIANT = re.compile(
    r":(latest|free|paid|extended|beta|nitro|floor|online|thinking|exacto|fastest|cheapest|preferred|auto)$"
)
"""What a router was told about where and how to run a model."""

_HUB = re.compile(r".*/models--[^/]+--([^/]+)/snapshots/[^/]+$")


class _Name(NamedTuple):
    """The parts of a name; empty where it does not tell."""

    model: str
    quantised: str
    date: str
    pinned: str
    variant: str
    file: bool


def same_model(told: str, asked: str) -> bool:
    """Whether a server's name for a model can be the one asked for.

    Case, folders, the ending and the parts of a file do not count. A date of four figures or more
    (so that claude-3-5 is not taken for claude-3), what follows an @, a router's variant, and the
    quantisation of a file have to be the same only where both tell them.

    Examples
    --------
    >>> same_model("gpt-4o-2024-08-06", "gpt-4o"), same_model("gpt-4o-mini", "gpt-4o")
    (True, False)
    >>> same_model("/models/qwen2.5-7b-instruct-q4_k_m.gguf", "Qwen/Qwen2.5-7B-Instruct")
    True
    """
    one, other = _read(told), _read(asked)
    if one.quantised != other.quantised:
        unquantised, quantised = sorted((one, other), key=lambda name: bool(name.quantised))
        if unquantised.quantised or not quantised.file:
            return False
    pairs = ((one.date, other.date), (one.pinned, other.pinned), (one.variant, other.variant))
    return one.model == other.model and all(a == b or not (a and b) for a, b in pairs)


def _read(name: str) -> _Name:
    path = name.strip().casefold().replace("\\", "/").rstrip("/")
    path = _HUB.sub(r"\1", path)
    rest = path.rsplit("/", 1)[-1] or path
    rest, variant = _split(rest, _VARIANT)
    rest, date = _split(rest, _DATE)
    rest, pinned = _split(rest, _PINNED)
    rest, ending = _split(rest, _ENDING)
    rest, _ = _split(rest, _PART)
    short, quantised = _split(rest, _QUANTISED)
    model = short.removesuffix("-gguf")
    is_file = bool(ending) or model != short
    if not date:
        model, date = _split(model, _DATE)
    date, variant = date.replace("-", "").replace("latest", ""), variant.replace("latest", "")
    return _Name(model, quantised.lstrip("-._:"), date, pinned, variant, is_file)


def _split(name: str, ending: re.Pattern[str]) -> tuple[str, str]:
    """A name without an ending, and that ending; the name whole if nothing else would be left."""
    cut = ending.search(name)
    return (
        (name[: cut.start()], cut[1] if cut.groups() else cut[0])
        if cut and cut.start()
        else (name, "")
    )
