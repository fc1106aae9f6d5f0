"""Columns by their names: one rule for every role and every table.

A column that somebody names is where that name says, character for character; one that is called
nearly so is never taken in its place, but named in the message. Where nobody names one, the usual
names are looked for, and the only column called nearly so will do.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from stackllm.errors import DataError, did_you_mean

_INDEX = re.compile(r"Unnamed: \d+(_level_\d+)?|__index_level_\d+__")
_LIKE_IDS = re.compile(
    rf"(^|[^a-zA-Z])(id|Id|ID)s?$|[a-z](Id|ID)s?$|^(index|idx|key|level_\d+|{_INDEX.pattern})$"
)


def find_column(path: Path, header: Sequence[str], wanted: str, what: str) -> str:
    """The column called ``wanted``, or a sentence that names those called nearly so.

    Parameters
    ----------
    path
        The table's file, for the message.
    header
        Its column names.
    wanted
        The name, exactly.
    what
        What the column holds, as a reader would say it: ``"ids"``, ``"groups"``, ``"labels"``.

    Returns
    -------
    str
        ``wanted``.

    Raises
    ------
    DataError
        If there is no such column.
    """
    if wanted in header:
        return wanted
    alike = look_alikes(header, wanted)
    if not alike:
        raise DataError(
            f'{path}: there is no column "{wanted}". {did_you_mean(wanted, header)} '
            f"Name the column that holds the {what}."
        )
    names = " or ".join(f'"{name}"' for name in alike)
    raise DataError(
        f'{path}: there is no column "{wanted}". Did you mean {names}? Names count to the letter: '
        f'rename that column "{wanted}", or name it as it is for the {what}.'
    )


def usual_column(path: Path, header: Sequence[str], names: Sequence[str], what: str) -> str | None:
    """The first of the usual names that is there, else the only column called nearly so, else None.

    Parameters
    ----------
    path, header, what
        As in :func:`find_column`.
    names
        What such a column is usually called, the likeliest first.

    Raises
    ------
    DataError
        If several columns are called nearly so.
    """
    exact = next((name for name in names if name in header), None)
    if exact is not None:
        return exact
    alike = list(dict.fromkeys(like for name in names for like in look_alikes(header, name)))
    if len(alike) > 1:
        raise DataError(
            f'{path}: columns "{alike[0]}" and "{alike[1]}" could both hold the {what}. '
            f'Rename the right one "{names[0]}".'
        )
    return next(iter(alike), None)


def look_alikes(header: Sequence[str], wanted: str) -> list[str]:
    """Columns whose name is ``wanted`` but for case, spaces, ``_`` and other signs.

    Examples
    --------
    >>> look_alikes(["Id", "id ", "promptId", "ids"], "id")
    ['Id', 'id ']
    >>> look_alikes(["Prompt ID", "promptId", "prompt_id"], "prompt_id")
    ['Prompt ID', 'promptId']
    """
    return [name for name in header if name != wanted and _plain(name) == _plain(wanted)]


def called_like_ids(name: str) -> bool:
    """Is a column called as columns of ids or row numbers are?

    Examples
    --------
    >>> [name for name in ["prompt_id", "promptId", "IDs", "index", "valid", "bid"] if called_like_ids(name)]
    ['prompt_id', 'promptId', 'IDs', 'index']
    """
    return _LIKE_IDS.search(name.strip()) is not None


def written_by_pandas(name: str) -> bool:
    """Is it what an index becomes when pandas writes a table and reads it again?"""
    return _INDEX.fullmatch(name.strip()) is not None


def _plain(name: str) -> str:
    letters = "".join(filter(str.isalnum, unicodedata.normalize("NFKC", name).casefold()))
    return letters or name
