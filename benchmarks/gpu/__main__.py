"""``python -m benchmarks.gpu``: one call, under eight minutes on an H100."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # libraries read it when they are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections import figures, incomplete, play_sections
from benchmarks.harness import Result, show


def main() -> None:
    """Parse the options, run the sections, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tiny", action="store_true", help="does it run? under a minute on a CPU")
    parser.add_argument("--out", type=Path, help="file that gets a line of JSON per section")
    parser.add_argument("--only", default="", help="sections in whose names this stands")
    parser.add_argument(
        "--limit", type=float, default=420, help="seconds after which no further section begins"
    )
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="stackllm-gpu-") as folder,
        contextlib.redirect_stdout(sys.stderr),  # Trainer prints what it thinks of
    ):
        bench = Bench(Path(folder), options.tiny)
        results = play_sections(bench, options.limit, options.only, options.out)
    details = {"tiny": options.tiny, "incomplete": incomplete(results), **results}
    show("gpu", Result(figures(results), details), options.json)


if __name__ == "__main__":
    main()
