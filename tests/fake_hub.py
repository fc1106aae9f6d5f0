"""A model hub on this machine: as much of its protocol as huggingface_hub speaks when it fetches models."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class FakeHub:
    """Models by name, each with commits (folders of files) and branches that may move.

    ``asked`` lists every request as ``"GET /path"``; ``fails`` is the status of every answer while it is set;
    ``gated`` and ``cut`` hold names of models whose files are refused, and of files that come short.
    """

    def __init__(self):
        self.folders: dict[str, dict[str, Path]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.asked: list[str] = []
        self.fails = 0
        self.gated: set[str] = set()
        self.cut: set[str] = set()
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def commit(self, repo: str, folder: str | Path, branch: str | None = "main") -> str:
        """Push a folder's files: the commit, to which the branch points then."""
        commits = self.folders.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo}{folder}{len(commits)}".encode()).hexdigest()
        commits[commit] = Path(folder)
        if branch:
            self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def fetched(self) -> set[str]:
        """Names of all files whose content was sent."""
        return {
            line.rpartition("/")[2]
            for line in self.asked
            if line.startswith("GET") and "/resolve/" in line
        }

    def close(self):
        """Hang up."""
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Nothing: ``asked`` is the log."""

    def do_HEAD(self):
        """As GET, without the content."""
        self.do_GET()

    def do_GET(self):
        """Answer what huggingface_hub asks."""
        url = urllib.parse.urlsplit(self.path)
        self.hub.asked.append(f"{self.command} {url.path}")
        if self.hub.fails:
            return self._answer(self.hub.fails, b"{}")
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        of_api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if of_api else parts[:2]), parts[4 if of_api else 2 :]
        if repo not in self.hub.folders:
            return self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.hub.branches[repo].get(revision, revision)
        if commit not in self.hub.folders[repo]:
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        folder = self.hub.folders[repo][commit]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path.relative_to(folder).as_posix(): path for path in files}
        if not of_api:
            return self._send(repo, commit, names.get("/".join(rest[2:])))
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": name}
                for name, path in names.items()
            ]
            return self._answer(200, json.dumps(tree).encode())
        siblings = [
            {"rfilename": name, "size": path.stat().st_size} for name, path in names.items()
        ]
        return self._answer(
            200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
        )

    def _send(self, repo, commit, path):
        if path is None:
            return self._answer(
                404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            )
        if repo in self.hub.gated:
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        content = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if path.name in self.hub.cut and self.command == "GET":
            return self._answer(200, content[: len(content) // 2], headers)
        return self._answer(200, content, headers)

    def _answer(self, status, content, headers=None):
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub that this process asks, with an empty cache; ``HF_*`` say the same to its children."""
    from huggingface_hub import constants

    made = FakeHub()
    cache = str(tmp_path / "hub-cache")
    monkeypatch.setattr(constants, "ENDPOINT", made.address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        made.address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, value in {
        "HF_ENDPOINT": made.address,
        "HF_HUB_CACHE": cache,
        "HF_HUB_OFFLINE": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    yield made
    made.close()
