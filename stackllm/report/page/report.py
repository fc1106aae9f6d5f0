"""Writing the report of a run: the page, and report.md and report.json beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from stackllm.errors import StorageError, UsageError
from stackllm.report.page.finished import read_finished
from stackllm.report.page.gather import gather
from stackllm.report.page.render import MARKER, as_json, as_markdown, page
from stackllm.store.atomic import storage_errors, write_text

PAGE = "report.html"
"""Name of the page in the run's folder."""

_NEAR_START = 4096


@dataclass(frozen=True)
class Report:
    """A report that was written. In a notebook it shows itself.

    Parameters
    ----------
    path
        The page.
    told
        What it says; see :func:`~stackllm.report.page.gather.gather`.
    """

    path: Path
    told: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """Verdict and checks, for programs."""
        said = ("code", "severity", "sentence")
        checks = [{it: check[it] for it in said} for check in self.told["checks"]]
        return {"report": str(self.path), "verdict": self.told["verdict"], "checks": checks}

    def __str__(self) -> str:
        checks = [f"{it['code']} {it['title']}: {it['sentence']}" for it in self.told["checks"]]
        return "\n".join([*self.told["verdict"], *checks, f"report: {self.path}"])

    def _repr_html_(self) -> str:
        """The page in a frame that reaches nothing of the notebook."""
        return (
            f'<iframe sandbox="allow-scripts" title="stackllm report" width="100%" height="800" '
            f'srcdoc="{escape(page(self.told))}"></iframe>'
        )


def report(name: str | Path, artifacts: Path, output: Path | None = None) -> Report:
    """Write the report of a finished run.

    Parameters
    ----------
    name
        Of the run: as below ``artifacts``, or the path of its folder.
    artifacts
        Folder of runs.
    output
        The page; ``.md`` and ``.json`` of the same name are written beside it. None: ``report.html`` in the
        run's folder.

    Returns
    -------
    Report

    Raises
    ------
    MissingInputError
        If there is no such run, or it has not finished.
    UsageError
        If a file that is no report would be replaced by what stands beside the page.
    DataError, StorageError
        If what the run left cannot be read, or the report cannot be written.
    """
    run = read_finished(name, artifacts)
    target = run.root / PAGE if output is None else output
    _check_target(target)
    told = gather(run)
    texts: Mapping[Path, str] = {
        target: page(told),
        target.with_suffix(".md"): as_markdown(told),
        target.with_suffix(".json"): as_json(told),
    }
    for path, text in texts.items():
        # names of files may hold halves of letters
        write_text(path, text.encode("utf-8", "replace").decode())
    return Report(target, told)


def _check_target(target: Path) -> None:
    """Refuse a folder, and names beside which somebody else's file would go."""
    if target.is_dir():
        raise StorageError(
            f"{target}: this is a folder. Name a file inside it with the setting output."
        )
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError(
            f"{target}: the report is an HTML page. Name a file that ends in .html with the setting output."
        )
    for path in (target, target.with_suffix(".md"), target.with_suffix(".json")):
        if not path.exists():
            continue
        with storage_errors(path, "reading"), path.open("rb") as file:
            if MARKER.encode() not in file.read(_NEAR_START):
                raise UsageError(
                    f"{path}: this file is no report, and would be replaced by one. Choose another name with the setting output."
                )
