"""``python -m benchmarks.campaign.watch COMMAND ...``: stackllm, with a hook that notes what it does.

Pickle, sockets, shells and child processes are noted with the place they come from in
``events.json``; so is every file that begins like a pickle.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

NOTED = (
    "pickle.",
    "socket.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.",
    "marshal.load",
)


def main() -> None:
    """Put the hook in place and run the command."""
    events: list[tuple[str, str, str]] = []
    opened: set[str] = set()
    home = str(Path.cwd()) + os.sep

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(details[0], str | os.PathLike):
            opened.add(os.path.abspath(details[0]))
        elif event.startswith(NOTED):
            frame = sys._getframe(1)
            events.append((event, repr(details)[:200], frame.f_code.co_filename))

    def write() -> None:
        files = [path for path in Path(home).rglob("*") if path.is_file()]
        events.extend(("pickle", str(path), "") for path in files if is_pickle(path))
        Path(home, "events.json").write_text(json.dumps({"events": events, "opened": len(opened)}))

    atexit.register(write)
    sys.addaudithook(hook)
    sys.argv = ["stackllm", *sys.argv[1:]]
    from stackllm.cli import main as stackllm

    stackllm()


def is_pickle(path: Path) -> bool:
    """Does a file look like a pickle of protocol 2 or later, hold one as torch's do, or have its usual name?"""
    if path.suffix in {".pkl", ".pickle", ".joblib", ".pt", ".pth"}:
        return True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    content = path.read_bytes()
    if content[:6] == b"\x93NUMPY":
        return b"'descr': '|O'" in content[:128]
    return content[:1] == b"\x80" and content[1:2] <= b"\x05" and content[-1:] == b"."


if __name__ == "__main__":
    main()
