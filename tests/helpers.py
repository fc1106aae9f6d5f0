"""What several test files need: typing a command as a user would, and digests of what it left."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path


def stackllm(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "stackllm", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every published file below a folder; times and locks are not results."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {"timings.jsonl", ".lock", ".lock.json"}
    }
