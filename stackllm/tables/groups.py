"""Groups: which rows belong together, by one rule for ids and one for the text of questions."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from stackllm.errors import DataError
from stackllm.tables.columns import find_column, look_alikes
from stackllm.tables.files import check_text, read_frame, refuse_blank, shown
from stackllm.tables.ids import Read, Rows, find_rows

GROUP_NAMES = ("group", "group_id", "Question", "question", "prompt", "query")

SameQuestion = Literal["normalised", "exact"]
"""When two texts are one question: if nothing that a reader minds is different, or if nothing is."""


@dataclass(frozen=True)
class Groups:
    """The group of each row.

    Parameters
    ----------
    codes
        ``(n_rows,)``, which of ``names`` each row belongs to.
    names
        The groups' texts, as they were first spelt.
    source
        Where they come from, in words.
    exact
        Were texts compared to the letter?
    merged
        A sentence on texts that are spelt in several ways and are one group, if there are any.
    """

    codes: NDArray[np.intp]
    names: tuple[str, ...]
    source: str
    exact: bool
    merged: str | None


def normalise(text: str) -> str:
    """A question's text without what can make no difference, and a little more.

    Unicode NFKC, case-folded, white space collapsed, closing punctuation dropped. Texts that this
    makes alike may still ask different things (``10²`` and ``102``): see :func:`question_keys`.

    Examples
    --------
    >>> normalise("What  is\\nRust ?") == normalise("what is rust")
    True
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return re.sub(r"[\s.?!…:;,]+$", "", folded) or folded


def reading(text: str) -> str:
    """A question's text with only that taken out which no reader minds.

    Taken out: how a character is composed (NFC), widths and ligatures, the amount of white space, the
    capital at the beginning of a word, capitals throughout, and the punctuation after the last word.
    Kept: superscripts, subscripts, fractions, circled and mathematical characters; all signs (``C++``,
    ``.NET``, ``-5``); the case of abbreviations, symbols and single letters (``MB`` and ``Mb``, ``pH``,
    ``C`` and ``c``) and of short words after a number (``5 Mg`` and ``5 mg``); what closes a text after
    a number, a letter or a bracket, but for a full stop or question mark (``5!``). A text without
    white space is an id, of which every character counts.

    Examples
    --------
    >>> reading("What Is  Rust ?") == reading("WHAT IS RUST") == reading("what is rust")
    True
    >>> reading("What is 10² in MB?"), reading("what is 102 in Mb"), reading("Q7")
    ('what is 10² in MB', 'what is 102 in mb', 'Q7')
    """
    if len(text.split()) < 2:
        return text.strip()
    text = " ".join("".join(map(_typeset, unicodedata.normalize("NFC", text))).split())
    text = _CLOSING.sub("", text) or text
    if text.upper() == text and len(text.split()) > 2:
        return text.lower()
    return _WORD.sub(_uncapitalised, text)


def question_keys(texts: pl.Series, exact: bool) -> pl.Series:
    """Keys of texts, equal where they are one group.

    Most texts are told apart by :func:`normalise` already, and its result is their key. Where it
    makes several alike they are looked at again: by :func:`reading`, or to the letter.

    Parameters
    ----------
    texts
        Texts, each once, ``(n_texts,)``.
    exact
        Is every difference one?

    Returns
    -------
    polars.Series
        ``(n_texts,)``.

    Examples
    --------
    >>> question_keys(pl.Series(["What is 10²?", "what is 10²", "What is 102?"]), False).to_list()
    ['what is 102\\nwhat is 10²', 'what is 102\\nwhat is 10²', 'what is 102\\nwhat is 102']
    """
    keys = _normalised(texts)
    readings = {
        i: texts[i] if exact else reading(texts[i]) for i in keys.is_duplicated().arg_true()
    }
    of_key: dict[str, set[str]] = {}
    for i, told in readings.items():
        of_key.setdefault(keys[i], set()).add(told)
    parted = {i: f"{keys[i]}\n{told}" for i, told in readings.items() if len(of_key[keys[i]]) > 1}
    return keys.scatter(list(parted), list(parted.values())) if parted else keys


def group_ids(texts: pl.Series, *, exact: bool = False) -> pl.Series:
    """Stable id of each group: 16 hexadecimal digits of the SHA-256 of its key.

    Parameters
    ----------
    texts
        Group column of all tables that are used together, ``(n_rows,)``.
    exact
        Is every difference one? Else see :func:`question_keys`.

    Returns
    -------
    polars.Series
        ``(n_rows,)``, text.
    """
    distinct = texts.unique(maintain_order=True)
    ids = [hashlib.sha256(key.encode()).hexdigest()[:16] for key in question_keys(distinct, exact)]
    return texts.replace_strict(distinct, ids, return_dtype=pl.String).alias("group_id")


def said_of_merged(source: str, texts: pl.Series, groups: pl.Series) -> str | None:
    """A sentence on texts that are spelt differently and count as one group, with an example.

    Parameters
    ----------
    source
        Where they come from.
    texts, groups
        Texts and what group they are, ``(n_rows,)``.
    """
    pairs = pl.DataFrame({"text": texts, "group": groups}).unique(maintain_order=True)
    several = pairs.filter(pl.col("group").is_duplicated())
    if not several.height:
        return None
    one, other = several.filter(pl.col("group") == several["group"][0])["text"][:2]
    return (
        f"{source}: {several['group'].n_unique()} groups are spelt in several ways and count as one each "
        f'(such as {shown(one)} and {shown(other)}). To keep those apart, set same_question = "exact".'
    )


def group_column(path: Path, header: Sequence[str], wanted: str | None) -> str | None:
    """The group column of a table: the one wanted, else one of the usual names, else None.

    Raises
    ------
    DataError
        If no column has a usual name, but one would but for case, spaces and the like.
    """
    if wanted is not None:
        return wanted if wanted in header else None
    exact = next((name for name in GROUP_NAMES if name in header), None)
    if exact is None:
        for name in GROUP_NAMES:
            for like in look_alikes(header, name)[:1]:
                raise DataError(
                    f'{path}: column "{like}" looks like the groups. Rename it "{name}", or say that it '
                    "is the group column."
                )
    return exact


def groups_within(
    path: Path, frame: pl.DataFrame, column: str, same: SameQuestion = "normalised"
) -> Groups:
    """Groups from a column of the table itself.

    Raises
    ------
    DataError
        If a row has no group.
    """
    source = f'column "{column}" of {path}'
    check_filled(path, frame, column)
    return _groups(frame[column], source, same)


def groups_joined(
    rows: Rows,
    path: Path,
    column: str | None,
    id_name: str | None,
    same: SameQuestion = "normalised",
    read: Read = read_frame,
    *,
    surplus: bool = False,
) -> Groups:
    """Groups from another table, matched by the id.

    Parameters
    ----------
    rows
        The rows.
    path
        The other table.
    column
        Its group column. None: one of the usual names.
    id_name
        Its id column, as in :func:`~stackllm.tables.ids.id_column`.
    same
        When two texts are one question.
    read
        Reads the table.
    surplus
        May it hold other rows too?

    Raises
    ------
    MissingInputError, StorageError
        If the file is not there or cannot be read.
    DataError
        If a column is not there, ids are missing on either side, or a row has no group.
    """
    frame = read(path)
    name = group_column(path, frame.columns, column)
    if name is None:
        name = find_column(path, frame.columns, column or "group", "groups")
    source = f'column "{name}" of {path}'
    check_filled(path, frame, name)
    positions, by_number = find_rows(rows, path, frame, id_name, beside=[name], surplus=surplus)
    if by_number:
        source += ", matched by row number"
    return _groups(frame[name][positions], source, same)


def check_filled(path: Path, frame: pl.DataFrame, name: str) -> None:
    """Refuse rows without a group.

    Raises
    ------
    DataError
        With the first of them.
    """
    check_text(path, frame, [name])
    blank = (frame[name].is_null() | (frame[name].str.strip_chars() == "")).fill_null(True)
    refuse_blank(path, blank, f'group in column "{name}"')


def group_codes(groups: Groups, names: pl.Series) -> list[int | None]:
    """Which of ``groups`` each of some other texts is, ``(n_names,)``; None if it is none of them."""
    texts = pl.concat([pl.Series(groups.names, dtype=pl.String), names.fill_null("")])
    keys = group_ids(texts, exact=groups.exact).to_list()
    codes = {key: code for code, key in enumerate(keys[: len(groups.names)])}
    return [codes.get(key) for key in keys[len(groups.names) :]]


def _groups(column: pl.Series, source: str, same: SameQuestion) -> Groups:
    # neighbours mostly share a group, so comparing them first leaves far fewer texts to look up
    runs = column.rle_id()
    firsts = pl.DataFrame({"name": column.filter(runs.diff().fill_null(1) != 0)})
    names = firsts["name"].unique(maintain_order=True)
    exact = same == "exact" or not names.str.contains(r"\s").any()  # ids: see reading
    table = pl.DataFrame({"name": names, "code": np.arange(len(names))})
    merged = None
    if not exact:
        keys = question_keys(names, exact)
        merged = said_of_merged(source, names, keys)
    if merged:
        first = keys.is_first_distinct()
        names = names.filter(first)
        table = table.with_columns(
            code=keys.replace_strict(keys.filter(first), np.arange(len(names)))
        )
    codes = firsts.join(table, on="name", how="left", maintain_order="left")["code"].to_numpy()
    codes = codes[runs.to_numpy()].astype(np.intp, copy=False)
    return Groups(codes, tuple(names.to_list()), source, exact, merged)


def _normalised(texts: pl.Series) -> pl.Series:
    """:func:`normalise` of each text; of the plain ones, as most are, at once."""
    closed = texts.str.to_lowercase().str.strip_chars_end(" .?!:;,")
    plain = (
        (texts.str.len_bytes() == texts.str.len_chars())
        & ~texts.str.contains(r"^\s|\s\s|[\x00-\x1f]")
        & (closed != "")
    )
    odd = (~plain).arg_true()
    return (
        closed.scatter(odd, [normalise(text) for text in texts.gather(odd)]) if len(odd) else closed
    )


_CLOSING = re.compile(r"(?<=[^\W\d_][^\W\d_])[\s.?!…:;,]+$|[\s.?…]+$")
_WORD = re.compile(r"[^\W\d_]+")
_AFTER_NUMBER = re.compile(r"\d\s?$")
_WIDTHS = {"<wide>", "<narrow>", "<noBreak>", "<initial>", "<medial>", "<final>", "<isolated>"}


def _typeset(character: str) -> str:
    """The usual form of a character that is only another width or a ligature; others as they are."""
    kind, _, codes = unicodedata.decomposition(character).partition(" ")
    usual = unicodedata.normalize("NFKC", character)
    if kind in _WIDTHS or (
        kind == "<compat>" and (usual.isalpha() or usual.isspace() or codes == "002E 002E 002E")
    ):
        return usual
    return character


def _uncapitalised(match: re.Match[str]) -> str:
    word = match[0]
    if len(word) <= 3 and _AFTER_NUMBER.search(
        match.string, max(0, match.start() - 2), match.start()
    ):
        return word
    # the articles and pronouns of one letter are words, other letters symbols
    capitalised = word in ("A", "I") or (len(word) > 1 and word[1:] == word[1:].lower())
    return word.lower() if capitalised else word
