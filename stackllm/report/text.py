"""Tables as aligned text."""

from __future__ import annotations


def aligned(lines: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """Rows of cells in columns, the first row being the header.

    Parameters
    ----------
    lines
        Rows of equally many cells.
    left
        Columns set flush left; the others are set flush right.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
