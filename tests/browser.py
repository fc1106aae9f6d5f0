"""A headless Chromium without a network, driven over a pipe: no driver, no port, no package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

NAMES = (
    "chromium",
    "chromium-headless-shell",
    "chromium-browser",
    "google-chrome",
    "chrome-headless-shell",
)
"""What a browser may be called; ``CHROMIUM`` in the environment names another one."""


def installed() -> str | None:
    """A browser of this machine."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of one browser; what it complains of is kept."""

    def __init__(self, folder: Path) -> None:
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-pipe", f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND",
        ]  # fmt: skip
        # the browser reads commands from 3 and answers on 4
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, installed(), *flags],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.ours_in, self.ours_out = ours_in, ours_out
        self.left, self.number, self.session, self.events = b"", 0, None, []
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.ours_in)
        os.close(self.ours_out)
        self.process.kill()
        self.process.wait()

    def _read(self):
        while b"\0" not in self.left:
            more = os.read(self.ours_in, 1 << 20)
            assert more, "the browser has gone"
            self.left += more
        message, self.left = self.left.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        """Ask the browser something of its own protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.ours_out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path):
        """Open a file, and wait for it."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(it.get("method") == "Page.loadEventFired" for it in self.events):
            self.events.append(self._read())

    def ask(self, script: str):
        """What a script in the page gives."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def complaints(self):
        """Errors, warnings and whatever was logged."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [it for it in self.events if it.get("method") in kinds]

    def requests(self):
        """Addresses that the page asked for."""
        asked = [it for it in self.events if it.get("method") == "Network.requestWillBeSent"]
        return [it["params"]["request"]["url"] for it in asked]
