"""Everything that can go wrong in a way the user can mend.

::

    StackllmError                       1
    ├── UsageError (ValueError)         2   an option or parameter makes no sense
    ├── DataError (ValueError)         65   what was read, or an array that was given, is wrong
    ├── TrainingError                  65   a fine-tuning cannot go on
    ├── MissingInputError              66   a file or package that is needed is not there
    ├── ServerError                    69   a server is out of reach or does not answer as it must
    ├── StorageError                   74   reading or writing failed, memory ran out, an artifact is corrupt
    ├── LockedError                    75   another process is writing this run
    └── BudgetError                    75   --max-requests is used up; the same command goes on

The number is ``exit_code``, the exit status of a command that ends so (0 is a success; a dry run
ends one with an error of its own, :class:`stackllm.engine.local.PendingError`). A message is one
sentence that says what is wrong, where, and what to do next.

Whoever calls stackllm from Python can catch bad values as ``ValueError``, as with other libraries.
``MissingInputError`` is no ``OSError``: whatever the system refuses becomes a ``StorageError`` on its
way, and a missing package is no file.

Beside these the command line turns into a sentence and a status: click's usage errors (2), what
nobody foresaw of the disk, of memory and of polars (74), and signals (130, 143).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StackllmError(Exception):
    """Base of every error that stackllm raises on purpose."""

    exit_code = 1
    """Exit status of a command that ends with this error."""


class UsageError(StackllmError, ValueError):
    """An option or parameter that makes no sense, or two that contradict each other."""

    exit_code = 2


class DataError(StackllmError, ValueError):
    """A file was read, or an array was given, and what it holds is wrong."""

    exit_code = 65


class TrainingError(StackllmError):
    """A fine-tuning that cannot go on: its loss is no number any more."""

    exit_code = 65


class MissingInputError(StackllmError):
    """A file or package that is needed is not there."""

    exit_code = 66


class ServerError(StackllmError):
    """A server is out of reach, turns us away, or gives no answers."""

    exit_code = 69


class StorageError(StackllmError):
    """Reading or writing failed, memory ran out, or a stored artifact is corrupt."""

    exit_code = 74


class LockedError(StackllmError):
    """Another process is writing this run."""

    exit_code = 75


class BudgetError(StackllmError):
    """As many requests as allowed have been sent; every answer is kept."""

    exit_code = 75


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known name, or lists what is known.

    Parameters
    ----------
    name
        What was asked for.
    known
        What exists.

    Returns
    -------
    str
        ``'Did you mean "target"?'`` or ``'There are: "id", "text".'``

    Examples
    --------
    >>> did_you_mean("targt", ["id", "target"])
    'Did you mean "target"?'
    >>> did_you_mean("xyz", ["id", "text"])
    'There are: "id", "text".'
    >>> did_you_mean("xyz", [])
    'There are none.'
    """
    names = list(known)
    if not names:
        return "There are none."
    lowered = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(name.lower(), list(lowered), n=1)
    if near:
        return f'Did you mean "{lowered[near[0]]}"?'
    shown = ", ".join(f'"{candidate}"' for candidate in names[:20])
    return f"There are: {shown}{', …' if len(names) > 20 else ''}."


def first_line(error: BaseException) -> str:
    """What a library says first, for a sentence of ours; the kind of error where it says nothing.

    Examples
    --------
    >>> first_line(ValueError("no  such thing\\nfrom deep inside")), first_line(KeyError())
    ('no such thing', 'KeyError')
    """
    said = str(error).strip() or type(error).__name__
    return " ".join(said.splitlines()[0].split())[:200]
