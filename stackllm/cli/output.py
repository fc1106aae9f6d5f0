"""Where a command's table goes, settled before any work."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def chosen_output(
    output: str | None, default: Path, as_json: bool, reads: Iterable[Path | None]
) -> Path | None:
    """The file to write; None is the standard output.

    Parameters
    ----------
    output
        What ``-o`` says, ``-`` for the standard output.
    default
        Where to write if it says nothing.
    as_json
        Does an account go to the standard output?
    reads
        Files that the command reads; None for those that were not given.

    Raises
    ------
    UsageError
        If two things want the standard output, or the table would replace a file that it is made from.
    StorageError
        If there is a folder of that name.
    """
    from stackllm.errors import StorageError, UsageError

    if output == "-":
        if as_json:
            raise UsageError("-o - and --json both want the standard output. Name a file with -o.")
        return None
    target = default if output is None else Path(output)
    if target.is_dir():
        raise StorageError(f"{target}: this is a folder. Name a file inside it with -o.")
    for read in reads:
        # a terminal or a pipe may be both ends
        if read is not None and target.is_file() and read.is_file() and target.samefile(read):
            raise UsageError(
                f"-o {target}: this command reads that file, and would replace it. Name another file."
            )
    return target
