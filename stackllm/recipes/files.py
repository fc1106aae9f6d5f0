"""A Python file of the user's own: a recipe, or a member."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from stackllm.errors import UsageError, first_line
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
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file does wrong
        del sys.modules[name]
        raise UsageError(
            f"{path}: loading it failed ({type(error).__name__}: {first_line(error)}). Mend the file."
        ) from error
    return module
