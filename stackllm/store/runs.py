"""The same work in other runs: units of a key, wherever they stand below a folder of runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stackllm.store.units import MANIFEST, Unit, is_whole, keys_in


@dataclass(frozen=True)
class Stored:
    """Where a unit stands.

    Parameters
    ----------
    run
        Folder of the run.
    path
        The unit's path below it.
    """

    run: Path
    path: str

    @property
    def folder(self) -> Path:
        """The unit's folder."""
        return self.run / self.path


class Runs:
    """What the runs of a folder hold: looked through once, and not before something is missing.

    Parameters
    ----------
    folder
        The folder of runs, ``artifacts``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, unit: Unit) -> Stored | None:
        """A verified unit of the same stage and key, whatever it is called; None without any.

        What is damaged, half-written or removed meanwhile counts as absent.
        """
        candidates = self._stored.get((unit.stage, unit.key), [])
        return next((it for it in candidates if is_whole(it.folder, unit.key)), None)

    @cached_property
    def _stored(self) -> dict[tuple[str, str], list[Stored]]:
        """Units by stage and key, not verified; nothing that is hidden or behind a link."""
        stored: dict[tuple[str, str], list[Stored]] = {}
        for here, folders, files in os.walk(self.folder):  # passes over folders that are gone
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            run, *parts = Path(here).relative_to(self.folder).parts or ("",)
            if MANIFEST in files and parts:
                folders.clear()
                for key in keys_in(Path(here)):
                    place = Stored(self.folder / run, "/".join(parts))
                    stored.setdefault((parts[0], key), []).append(place)
        return stored
