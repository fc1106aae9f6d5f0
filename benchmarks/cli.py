"""What it costs to ask for help: the whole process against one that only imports click."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.harness import Figure, Result, interleaved_children, main


def measure(quick: bool, data: Path | None) -> Result:
    """``stackllm --help`` against ``import click``, in turns."""
    stackllm = [sys.executable, "-c", "from stackllm.cli import main; main()", "--help"]
    click = [sys.executable, "-c", "import click"]
    helped, imported = interleaved_children(7 if quick else 25, stackllm, click, cwd=Path.cwd())
    return Result(
        {"help_vs_click_import": Figure(helped.seconds / imported.seconds, 2.0)},
        {"help_seconds": helped.seconds, "click_seconds": imported.seconds},
    )


if __name__ == "__main__":
    main("cli", measure)
