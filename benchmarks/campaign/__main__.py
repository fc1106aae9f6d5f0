"""``python -m benchmarks.campaign``: all figures, one JSON object a line."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path

GROUPS = {
    "kills": (40, 1),
    "writes": (10_000, 3),
    "damage": (200, 1),
    "inputs": (50, 1),
    "tables": (1, 1),
    "same": (100, 2),
    "engines": (20, 1),
}
"""Module of each group of figures, with the draws of the full and of the quick campaign."""


def main() -> int:
    """Play the groups asked for; 1 if a figure is not met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaign")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="a few cases of each figure")
    parser.add_argument("--draws", type=int, help="cases a figure")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    met = True
    with tempfile.TemporaryDirectory(prefix="stackllm-campaign-") as home:
        for name in options.groups or GROUPS:
            draws = options.draws or GROUPS[name][options.quick]
            module = importlib.import_module(f"benchmarks.campaign.{name}")
            for figure in module.figures(Path(home) / name, draws, options.seed):
                print(json.dumps({"group": name, **figure}), flush=True)
                met &= figure["met"]
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
