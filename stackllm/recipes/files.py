"""A Python file of the user's own: a recipe, or a member."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from stackllm.errors import DataError, StackllmError, UsageError
from stackllm.store.digest import file_digest


def load_file(path: Path, kind: str) -> ModuleType:
    """Run a Python file as a module; the same content is run once a process.

    Parameters
    ----------
    path
        The file.
    kind
        Part of the module's name, as ``"recipe"``. The rest is a digest of the content, so that what is
        stored of the module's classes finds them wherever a copy of the file stands.

    Raises
    ------
    UsageError
        If it is no Python file, or raises.
    StorageError
        If it cannot be read.
    """
    name = f"stackllm_{kind}_{file_digest(path)[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f'{path}: not a Python file. Let its name end in ".py".')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for the module that they stand in
    try:
        # standard output is for what a command tells, JSON perhaps
        with (
            calling(f"{path}: loading it", path, UsageError),
            contextlib.redirect_stdout(sys.stderr),
        ):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def calling(what: str, path: Path, kind: type[StackllmError] = DataError) -> Iterator[None]:
    """Turn what a user's code raises into one sentence with the line of the file that it comes from.

    Parameters
    ----------
    what
        What fails then, such as ``"mine.py: build()"``.
    path
        The user's file.
    kind
        The error to raise instead. Our own pass as they are.

    Examples
    --------
    >>> with calling("mine.py: build()", Path("mine.py")):
    ...     1 / 0
    Traceback (most recent call last):
    stackllm.errors.DataError: mine.py: build() failed (ZeroDivisionError: division by zero). Mend the file.
    """
    try:
        yield
    except StackllmError:
        raise
    except (
        Exception,
        SystemExit,
    ) as error:  # a user's code may raise anything, and end the process
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).resolve() == path.resolve()
        ]
        where = f", line {lines[-1]}" if lines else ""
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise kind(f"{what} failed ({said}{where}). Mend the file.") from error
