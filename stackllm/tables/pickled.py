"""Plain numbers out of a pickle, without unpickling: nothing that a file names is ever imported or called.

A pickle is a program for a small machine of Python's. Here that program is only *read*
(:func:`pickletools.genops` takes it apart), by a machine of our own that knows numbers, texts, lists,
dicts and the three ways in which numpy writes an array. Whatever else a file names is an error before
anything is made of it.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackllm.errors import DataError, first_line

_RECONSTRUCT = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
_FROM_BUFFER = {"numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"}
_SCALAR = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
_KNOWN = {
    *_RECONSTRUCT, *_FROM_BUFFER, *_SCALAR,
    "numpy.ndarray", "numpy.dtype", "_codecs.encode", "collections.OrderedDict", "builtins.bytearray",
    "builtins.bytes", "__builtin__.bytearray", "__builtin__.bytes",
}  # fmt: skip
_STEP = (
    "Only arrays, lists and dicts of plain numbers and texts are read from a pickle. Where you trust the file, "
    'load it there and write the numbers: np.save("{name}.npy", array), or df.to_parquet("{name}.parquet").'
)
_MARK = object()
_MOST_TIMES, _MOST_DEPTH = 8, 64
"""A list may stand in several others, which doubles what is to be made of it with each level."""


def read_pickle(path: Path, content: bytes) -> Any:
    """What a pickle of plain numbers holds.

    Parameters
    ----------
    path
        The file, for messages.
    content
        Its bytes.

    Returns
    -------
    object
        Numbers, texts, bytes, None, and lists, tuples, dicts and arrays of them.

    Raises
    ------
    DataError
        If it names anything but numpy's arrays, or is damaged.
    """
    step = _STEP.format(name=path.with_suffix("").as_posix())
    try:
        return _Machine().run(content)
    except _RefusedError as error:
        raise DataError(f"{path}: this pickle wants {error}, and is not opened. {step}") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise DataError(
            f"{path}: not a readable pickle of plain numbers ({first_line(error)}). {step}"
        ) from error


class _RefusedError(Exception):
    """What a pickle names and must not have."""


@dataclass
class _Name:
    """The name of something that the pickle would import."""

    text: str


@dataclass
class _Array:
    """An array or a type of one whose state comes later."""

    value: Any = None


class _Machine:
    """Stack, marks and memory of a pickle's program."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        """The value that the program leaves."""
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                value = self._stack.pop()
                if _size(value, {}) > _MOST_TIMES * len(content):
                    raise _RefusedError("to hold far more numbers than stand in it")
                return _plain(value)
            self._step(opcode.name, argument)
        raise ValueError("it ends too early")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PUSHED:
            stack.append(_PUSHED[name](argument))
        elif name in {"PROTO", "FRAME"}:
            pass
        elif name in {"PUT", "BINPUT", "LONG_BINPUT"}:
            self._memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in {"GET", "BINGET", "LONG_BINGET"}:
            stack.append(self._memo[int(argument)])
        elif name in {"GLOBAL", "STACK_GLOBAL"}:
            if name == "GLOBAL":
                module, _, attribute = argument.partition(" ")
            else:
                attribute, module = stack.pop(), stack.pop()
            stack.append(_known(f"{module}.{attribute}"))
        elif name in {"REDUCE", "NEWOBJ"}:
            arguments = stack.pop()
            stack.append(_made(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            _set_state(stack[-1], state)
        else:
            self._containers(name)

    def _containers(self, name: str) -> None:
        stack = self._stack
        if name == "MARK":
            stack.append(_MARK)
        elif name in {"TUPLE", "LIST", "DICT", "POP_MARK"}:
            items = self._since_mark()
            if name != "POP_MARK":
                stack.append(
                    {"TUPLE": tuple, "LIST": list, "DICT": _pairs}[name](items)  # type: ignore[operator]
                )
        elif name in {"TUPLE1", "TUPLE2", "TUPLE3"}:
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in {"APPEND", "APPENDS"}:
            items = [stack.pop()] if name == "APPEND" else self._since_mark()
            _of(stack[-1], list).extend(items)
        elif name in {"SETITEM", "SETITEMS"}:
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._since_mark()
            _of(stack[-1], dict).update(_pairs(items))
        elif name == "POP":
            stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            raise _RefusedError(f"the instruction {name}")

    def _since_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("a mark is missing")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items


_PUSHED: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_DICT": lambda _: {},
    **dict.fromkeys(
        (
            "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
            "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
            "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
        ),
        lambda argument: argument,
    ),
}  # fmt: skip
"""Instructions that put a value on the stack."""


def _known(name: str) -> _Name:
    if name not in _KNOWN:
        raise _RefusedError(f"to use {name[:80]!r}")
    return _Name(name)


def _made(called: Any, arguments: Any) -> Any:
    """What one of the known names makes; never by calling it."""
    name, given = _of(called, _Name).text, _of(arguments, tuple)
    if name in _RECONSTRUCT or name == "numpy.ndarray":
        return _Array()
    if name == "numpy.dtype":
        return _Array(_dtype(given[0], "="))
    if name in _FROM_BUFFER:
        raw, kind, shape, order = given
        return _Array(_filled(raw, kind, shape, order == "F"))
    if name in _SCALAR:
        return _filled(given[1], given[0], (1,), False)[0].item()
    if name == "_codecs.encode":
        return _of(given[0], str).encode("latin1")
    if name == "collections.OrderedDict":
        return {}
    return _of(given[0], bytes | bytearray) if given else b""  # bytes or a bytearray of them


def _set_state(made: Any, state: Any) -> None:
    array, given = _of(made, _Array), _of(state, tuple)
    if isinstance(array.value, np.dtype):
        array.value = _dtype(array.value.str[1:], _of(given[1], str))
        return
    _, shape, kind, by_column, raw = given
    array.value = _filled(raw, kind, shape, bool(by_column))


def _dtype(text: Any, order: str) -> np.dtype[Any]:
    """A plain type: numbers, texts, or ``O`` for a list of them."""
    text = _of(text, str).lstrip("<>=|")
    if order not in {"<", ">", "=", "|"} or not (
        text
        in {"f2", "f4", "f8", "b1", "O", "O8", *(f"{k}{n}" for k in "iu" for n in (1, 2, 4, 8))}
        or (text[:1] == "U" and text[1:].isdecimal() and len(text) < 9)
    ):
        raise _RefusedError(f"an array of {text[:40]!r}")
    return np.dtype("O" if text[0] == "O" else order.replace("|", "=") + text)


def _filled(raw: Any, kind: Any, shape: Any, by_column: bool) -> NDArray[Any]:
    dtype = _of(kind, _Array).value
    sizes = tuple(_of(size, int) for size in _of(shape, tuple))
    if not isinstance(dtype, np.dtype) or any(size < 0 for size in sizes):
        raise ValueError("an array without a type")
    count = math.prod(sizes)
    if dtype.kind == "O":
        items = _of(raw, list)
        if len(items) != count or not all(isinstance(it, str | int | float | None) for it in items):
            raise _RefusedError("an array of objects that are no texts or numbers")
        flat = np.empty(count, dtype=object)
        flat[:] = items
    else:
        if not isinstance(raw, bytes | bytearray) or len(raw) != count * dtype.itemsize:
            raise ValueError("an array whose bytes do not fill it")
        # a copy, in this machine's order of bytes
        flat = np.frombuffer(raw, dtype, count).astype(dtype.newbyteorder("="))
    return flat.reshape(sizes, order="F" if by_column else "C")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    keys = items[::2]
    if len(items) % 2 or not all(isinstance(key, str | int | float | None) for key in keys):
        raise _RefusedError("a dict whose keys are no texts or numbers")
    return dict(zip(keys, items[1::2], strict=True))


def _of(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{type(value).__name__.strip('_')} where it makes no sense")
    return value


def _size(value: Any, known: dict[int, int], depth: int = 0) -> int:
    """How many numbers and texts a value holds once every list in it is written out."""
    if not isinstance(value, dict | list | tuple):
        return 1
    if depth > _MOST_DEPTH:
        raise _RefusedError("lists within lists within lists")
    if id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = sum(_size(item, known, depth + 1) for item in items)
    return known[id(value)]


def _plain(value: Any, depth: int = 0) -> Any:
    """The value with arrays in place of what was to become one; no more than a few levels down."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict) and depth < 3:
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if (
        isinstance(value, list | tuple)
        and depth < 3
        and any(isinstance(it, _Array) for it in value)
    ):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, _Name):
        raise _RefusedError(f"to use {value.text!r}")
    return value
