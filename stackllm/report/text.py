"""Tables as aligned text, and words of unknown making on one line of it."""

from __future__ import annotations

import textwrap

WIDTH = 100
"""Cells of a line that people read."""


def aligned(lines: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """Rows of cells in columns, the first row being the header.

    Parameters
    ----------
    lines
        Rows of equally many cells.
    left
        Columns set flush left; the others are set flush right.
    """
    from rich.cells import cell_len  # of a letter of China or Japan two

    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]

    def padded(i: int, cell: str) -> str:
        room = " " * (widths[i] - cell_len(cell))
        return cell + room if i in left else room + cell

    return "\n".join(
        "  ".join(padded(i, cell) for i, cell in enumerate(line)).rstrip() for line in lines
    )


def one_line(text: str) -> str:
    r"""A text without what moves a terminal's cursor or turns the direction of writing.

    Examples
    --------
    >>> one_line("two\nlines, and \u202e turned")
    'two\\nlines, and \\u202e turned'
    """
    return "".join(it if it.isprintable() else it.encode("unicode_escape").decode() for it in text)


def cut(text: str, width: int) -> str:
    """A line cut to so many cells of a terminal.

    Examples
    --------
    >>> cut("seven voices", 8), cut("seven", 8)
    ('seven v…', 'seven')
    """
    from rich.cells import cell_len, set_cell_size

    if len(text) <= width and cell_len(text) <= width:
        return text
    return set_cell_size(text[: width + 1], width - 1).rstrip() + "…"


def folded(line: str) -> str:
    """A long line over several, the others set in further than the first.

    Examples
    --------
    >>> print(folded("  cost: " + "48 requests now, " * 6 + "and no more"))
      cost: 48 requests now, 48 requests now, 48 requests now, 48 requests now, 48 requests now, 48
        requests now, and no more
    """
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    wrapped = textwrap.wrap(
        line, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return "\n".join(wrapped)
