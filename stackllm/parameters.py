"""What the fields of parameter classes may hold: said once, on the field, whoever builds the class.

A field declares its limits in its type, ``n_trees: Annotated[int, Ge(1), Le(100_000)]``, and the
class calls :func:`check` in ``__post_init__``. So a settings file, an option and a line of Python
are held to the same limits. pydantic compares; it is imported when the first class is built, so
that commands which build none start without it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Len, Lt, Predicate, doc

from stackllm.errors import StackllmError, UsageError, did_you_mean

MAX_SEED = 2**31
"""Seeds are below it, so that a run's and a member's together are below what every library takes."""

FILE = doc("the name of a file")
"""Marks fields that name a file: in a settings file it is relative to that file."""

BACKBONE = doc("the name of an LLM: a folder, a name in the hub, or one of stackllm's own")
"""Marks fields that name an LLM, which may be a folder."""

Seed = Annotated[int, Ge(0), Lt(MAX_SEED)]
Share = Annotated[float, Gt(0), Le(1)]
PartOf = Annotated[float, Ge(0), Lt(1)]
TokenCount = Annotated[int, Ge(1), Lt(2**31)]
FileName = Annotated[str, Len(1, 4096), Predicate(str.isprintable), FILE]
BackboneName = Annotated[str, Len(1, 4096), Predicate(str.isprintable), BACKBONE]
Name = Annotated[str, Len(1, 10_000)]

_WINDOWS_PATH = (
    "A name holds no control characters. In double quotes \\t and \\n are such: write a path with "
    "backslashes in single quotes, 'C:\\data', or with forward slashes."
)

_OUTSIDE = {
    "greater_than", "greater_than_equal", "less_than", "less_than_equal", "literal_error",
    "predicate_failed", "string_too_short", "string_too_long", "too_short", "too_long",
}  # fmt: skip
"""pydantic's names for a value of the right type that is not allowed all the same."""


def check(params: Any) -> None:
    """Hold a frozen dataclass to the limits on its fields; for its ``__post_init__``.

    Whole numbers become floats and lists become tuples where a field is declared so: 1 and 1.0 are
    one setting and must give one digest.

    Parameters
    ----------
    params
        The instance that is being made.

    Raises
    ------
    UsageError
        With the field, what is allowed and the value.

    Examples
    --------
    >>> @dataclasses.dataclass(frozen=True)
    ... class Params:
    ...     rate: Annotated[float, Gt(0), Le(1)] = 1
    ...     def __post_init__(self):
    ...         check(self)
    >>> Params().rate
    1.0
    >>> Params(rate=2)
    Traceback (most recent call last):
    stackllm.errors.UsageError: rate must be a number above 0 and at most 1, not 2.
    """
    values = {entry.name: getattr(params, entry.name) for entry in dataclasses.fields(params)}
    for name, value in validated(type(params), values).items():
        object.__setattr__(params, name, value)  # the way dataclasses set fields of frozen classes


def validated(
    params: type,
    values: Mapping[str, Any],
    label: Callable[[str], str] = str,
    wrong_type: type[StackllmError] = UsageError,
) -> dict[str, Any]:
    """Values of some fields of a parameter class, held to their limits.

    Parameters
    ----------
    params
        The dataclass.
    values
        By field; fields that are left out are not looked at.
    label
        What a field is called in a sentence.
    wrong_type
        The error for a value of another type.

    Returns
    -------
    dict
        The values in the types that the fields declare.

    Raises
    ------
    UsageError
        For a value that is not allowed.
    """
    hints = hints_of(params)
    return {
        name: _checked(hints[name], value, label(name), wrong_type)
        for name, value in values.items()
    }


def hints_of(params: type) -> dict[str, Any]:
    """Type of each field of a dataclass, limits included."""
    return _hints(params)


@functools.cache  # apart, for a class is nothing that mypy takes for hashable
def _hints(params: type) -> dict[str, Any]:
    return get_type_hints(params, include_extras=True)


def marks(hint: Any) -> list[Any]:
    """What is annotated anywhere in a type, such as :data:`FILE`."""
    inner = [mark for part in get_args(hint) for mark in marks(part)]
    return [*getattr(hint, "__metadata__", ()), *inner]


def allowed(hint: Any) -> str:
    """What a field of this type may hold, in words.

    Examples
    --------
    >>> allowed(Seed)
    'a whole number from 0 to 2147483647'
    >>> allowed(tuple[Share, ...])
    'a list, each a number above 0 and at most 1'
    >>> allowed(Literal["soft", "hard"] | None)
    '"soft" or "hard"'
    """
    plain, limits = hint, []
    if get_origin(hint) is Annotated:
        plain, *limits = get_args(hint)
    words = [mark.documentation for mark in limits if hasattr(mark, "documentation")]
    if words:
        return str(words[0])
    if get_origin(plain) is Literal:
        return _either([f'"{word}"' for word in get_args(plain)])
    if get_origin(plain) in (Union, types.UnionType):
        return _either([allowed(part) for part in get_args(plain) if part is not type(None)])
    filled = any(isinstance(limit, Len) and limit.min_length for limit in limits)
    if get_origin(plain) is tuple:
        return f"a list{' of one or more' if filled else ''}, each {allowed(get_args(plain)[0])}"
    if plain in (int, float):
        noun = "a whole number" if plain is int else "a number"
        return f"{noun} {_range(limits, plain is int)}".strip()
    if plain is str:
        return "text that is not empty" if filled else "text"
    return "true or false" if plain is bool else "a table of keys and values"


def shown(value: Any) -> str:
    """A value as a settings file has it, cut to a sentence's measure.

    Examples
    --------
    >>> shown(True), shown(["a", 1.5]), shown(float("nan"))
    ('true', '["a", 1.5]', 'nan')
    """
    if isinstance(value, float):
        text = repr(value)
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _checked(hint: Any, value: Any, label: str, wrong_type: type[StackllmError]) -> Any:
    from pydantic import ValidationError

    if getattr(value, "ndim", None) == 0:  # a number of numpy's
        value = value.item()
    elif isinstance(value, list):
        value = tuple(value)
    try:
        return _validator(hint).validate_python(value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        sorts = {entry["type"] for entry in errors}
        kind = UsageError if _OUTSIDE & sorts else wrong_type
        place = next((step for step in errors[0]["loc"] if isinstance(step, int)), None)
        if place is not None:
            value, label = value[place], f"{label}, entry {place + 1},"
            hint = _entry(hint)
        step = did_you_mean(value, _words(hint)) if isinstance(value, str) else ""
        if not step.startswith("Did"):  # all words are listed already
            step = _WINDOWS_PATH if "predicate_failed" in sorts else ""
        sentence = f"{label} must be {allowed(hint)}, not {shown(value)}. {step}"
        raise kind(sentence.rstrip()) from error


@functools.cache
def _validator(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    if dataclasses.is_dataclass(hint):  # a class of its own limits: an instance has passed them
        return TypeAdapter(hint)
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def _entry(hint: Any) -> Any:
    """Type of the entries of a ``tuple[…, ...]``."""
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_args(plain)[0]


def _words(hint: Any) -> list[str]:
    """The words that a type allows."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [word for part in get_args(hint) for word in _words(part)]


def _range(limits: list[Any], whole: bool) -> str:
    low = next((it for it in limits if isinstance(it, Ge | Gt)), None)
    high = next((it for it in limits if isinstance(it, Le | Lt)), None)
    if isinstance(high, Lt) and whole:
        high = Le(high.lt - 1)  # type: ignore[operator]
    above = f"above {low.gt:.10g}" if isinstance(low, Gt) else f"from {low.ge:.10g}" if low else ""
    if isinstance(high, Lt):
        below = f"below {high.lt:.10g}"
    else:
        below = f"at most {high.le:.10g}" if high else ""
    if isinstance(low, Ge):
        return f"{above} to {below.removeprefix('at most ')}" if below else above
    return " and ".join(part for part in (above, below) if part)


def _either(parts: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
