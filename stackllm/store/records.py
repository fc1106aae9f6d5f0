"""JSON in plain files, written the same way on every system: objects, and lists that grow by lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORD = "run.json"
"""The file in a run's folder that tells how it was made."""


def read_json(path: Path) -> Any:
    """What a JSON file in UTF-8 holds; what the system and the parser raise is for the caller to judge."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any, **options: Any) -> None:
    """Write JSON, with further ``options`` of :func:`json.dumps`; for files of a unit, which is published whole."""
    # no "\r\n" on Windows: the same work must give the same bytes
    path.write_text(json.dumps(content, **options), encoding="utf-8", newline="\n")


def append_json(path: Path, entry: Any) -> None:
    """Add a line of JSON to a file that may not be there yet."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(entry) + "\n")
