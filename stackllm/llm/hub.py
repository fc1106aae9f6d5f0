"""Models of the model hub: which commit a name means, and that commit's files on this machine.

A branch moves, a commit does not: whatever is keyed by a model is keyed by its commit, which is asked for
before anything is read. What is fetched stands in huggingface_hub's own cache, where other tools find it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stackllm.errors import (
    MissingInputError,
    ServerError,
    StackllmError,
    StorageError,
    UsageError,
    first_line,
)
from stackllm.llm.folders import TOKENIZER_FILES, UNSAFE, shards_of
from stackllm.store.atomic import write_text

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

BRANCH = "main"
"""What a name without a revision means, in the hub."""

SECONDS = 10.0
"""How long the hub may take to say which commit a name means."""

_SETTINGS = ("config.json", "generation_config.json", "model.safetensors.index.json")
_COMMIT = re.compile("[0-9a-f]{40}")
_PART_OF_COMMIT = re.compile("[0-9a-f]{7,39}")


@dataclass(frozen=True)
class HubModel:
    """A model of the hub as somebody named it.

    Parameters
    ----------
    repo
        ``"org/name"``.
    revision
        A commit, branch or tag; None is the branch that the hub shows.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def is_pinned(self) -> bool:
        """Does it name a commit in full, which is the same for ever?"""
        return bool(_COMMIT.fullmatch(self.revision or ""))

    @property
    def folder(self) -> Path:
        """Where a pinned model's files stand, once they are here."""
        return _cached(self.repo) / "snapshots" / str(self.revision)


def hub_model(name: str) -> HubModel | None:
    """The model that ``name`` would be in the hub; None if it can be none.

    Examples
    --------
    >>> hub_model("org/name@v1.0"), hub_model("a folder"), hub_model("org/name@")
    (HubModel(repo='org/name', revision='v1.0'), None, None)
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repo, mark, revision = name.partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return None
    # as git has it, in short: nothing in it may lead out of the folder that it names
    sound = re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", revision) and ".." not in revision
    return HubModel(repo, revision or None) if sound or not mark else None


def pin(model: HubModel, seconds: float = SECONDS) -> HubModel:
    """The same model at the commit that its name means now.

    Asked of the hub; where that is out of reach, the local cache knows what the name meant last.

    Parameters
    ----------
    model
        Any.
    seconds
        How long the hub may take.

    Raises
    ------
    MissingInputError
        If the hub has no such model or revision for this user, or the cache none and the hub is not to be asked.
    ServerError
        If the hub is out of reach, and the cache does not know either.
    """
    if model.is_pinned:
        return model
    commit: str | None
    try:
        commit = named_commit(model, seconds)
    except (MissingInputError, ServerError) as error:
        commit = cached_commit(model) if isinstance(error, ServerError) else None
        if commit is None:
            raise type(error)(f"{error}{_cached_commits(model)}") from error
    else:
        if cached_commit(model) != commit:
            with contextlib.suppress(StorageError):  # a cache that is only read
                write_text(_ref(model), commit)
    return HubModel(model.repo, commit)


def named_commit(model: HubModel, seconds: float = SECONDS) -> str:
    """The commit that the hub says a name means; nothing is noted, so what is here is found as before.

    Raises
    ------
    MissingInputError, ServerError
        If the hub has no such model or revision for this user, or is out of reach.
    """
    return str(_described(model, seconds).sha)


def cached_commit(model: HubModel) -> str | None:
    """The commit that the local cache knows a model by, without a word to the hub; None if it does not."""
    if model.is_pinned:
        return model.revision
    folder = _cached(model.repo)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        commit = _ref(model).read_text(encoding="utf-8").strip()
        if _COMMIT.fullmatch(commit):
            return commit
    if _PART_OF_COMMIT.fullmatch(model.revision or ""):
        whole = [path.name for path in folder.glob(f"snapshots/{model.revision}*")]
        return whole[0] if len(whole) == 1 else None
    return None


def settings_folder(model: HubModel) -> Path:
    """A folder with a pinned model's ``config.json``, and whatever else of it is here; no weights are fetched.

    Raises
    ------
    MissingInputError, ServerError, StorageError, UsageError
        If it is not here and cannot be fetched, or the model has none.
    """
    if not (model.folder / "config.json").is_file():
        _require_settings(model, [file.rfilename for file in _described(model).siblings or []])
        _download(model, ["config.json"])
    return model.folder


def whole_folder(
    model: HubModel, check: Callable[[Path], None], echo: Callable[[str], None]
) -> Path:
    """A folder with a pinned model's settings, weights and tokenizer; only what is not here is fetched.

    Files that arrived whole stay when others do not, so the same call goes on. No code and no pickles
    are fetched. Several processes may do this at once: each file is moved into its place when it is whole.

    Parameters
    ----------
    model
        With its commit.
    check
        Raises what is wrong with a folder that is fetched.
    echo
        Told what is fetched.

    Raises
    ------
    MissingInputError, ServerError, StorageError, UsageError
        If something is not here and cannot be fetched, or is not what can be loaded.
    """
    settings = [*_SETTINGS, *TOKENIZER_FILES]
    with contextlib.suppress(MissingInputError, StorageError, ServerError):
        _download(model, settings, here_only=True)
        check(model.folder)
        return model.folder
    sizes = {
        file.rfilename: file.size or 0 for file in _described(model, sizes=True).siblings or []
    }
    _require_settings(model, list(sizes))
    _download(model, settings)
    shards = shards_of(model.folder)
    missing = [name for name in shards if not (model.folder / name).exists()]
    _require_room(model, sum(sizes.get(name, 0) for name in missing))
    if missing:
        gib = sum(sizes.get(name, 0) for name in missing) / 2**30
        echo(
            f"backbone {model.repo}: fetching {gib:.1f} GiB of commit {model.revision} from the hub"
        )
    _download(model, [glob.escape(name) for name in shards])
    check(model.folder)
    return model.folder


def _require_settings(model: HubModel, files: list[str]) -> None:
    """Refuse a model of the hub that transformers cannot load, by the names of its files."""
    if "config.json" in files:
        return
    where = f'backbone "{model}" has no config.json in the hub'
    ggufs = [name for name in files if name.lower().endswith(".gguf")]
    if ggufs:
        raise UsageError(
            f"{where} but {len(ggufs)} GGUF files. Fetch one, with: hf download {model.repo} {ggufs[0]} "
            "--local-dir FOLDER, and give its path."
        )
    if "adapter_config.json" in files:
        raise UsageError(
            f"{where}: it is an adapter, not a model. Give the model that it was trained on, or merge the two and "
            "save the result."
        )
    raise MissingInputError(f"{where}. Give a model that transformers can load.")


def _require_room(model: HubModel, n_bytes: int) -> None:
    free = shutil.disk_usage(model.folder).free
    if n_bytes > free:
        raise StorageError(
            f'backbone "{model}": its weights take {n_bytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free at '
            f"{model.folder}. Free some, or set HF_HUB_CACHE to a folder on a larger disk."
        )


def _described(model: HubModel, seconds: float = SECONDS, sizes: bool = False) -> ModelInfo:
    """What the hub says of a model, its commit and files among that."""
    from huggingface_hub import HfApi

    with _sentences(model):
        return HfApi().model_info(
            model.repo, revision=model.revision, timeout=seconds, files_metadata=sizes
        )


def _download(model: HubModel, patterns: list[str], here_only: bool = False) -> None:
    from huggingface_hub import snapshot_download

    with _sentences(model):
        snapshot_download(
            model.repo,
            revision=model.revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*", "*.py", *UNSAFE],
            local_files_only=here_only,
        )


@contextlib.contextmanager
def _sentences(model: HubModel) -> Iterator[None]:
    """What huggingface_hub raises, as a sentence with what to do."""
    import httpx2
    from huggingface_hub.errors import XetDownloadError

    try:
        yield
    except (
        OSError,
        ValueError,
        RuntimeError,
        httpx2.HTTPError,
        httpx2.InvalidURL,
        XetDownloadError,
    ) as error:
        raise _sentence(model, error) from error


def _sentence(model: HubModel, error: BaseException) -> StackllmError:
    from huggingface_hub import constants, errors

    said, hub = f'backbone "{model}"', constants.ENDPOINT
    log_in = "log in with: hf auth login (or set HF_TOKEN)"
    elsewhere = "give the path of a folder that holds the model"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        return _sentence(model, error.__cause__)
    if isinstance(error, errors.GatedRepoError):
        return MissingInputError(
            f"{said} is gated: its authors want to know who uses it. Ask for access on {hub}/{model.repo}, then {log_in}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return MissingInputError(
            f'{said}: the hub has no revision "{model.revision}" of it. Take one of {hub}/{model.repo}/commits.'
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return MissingInputError(
            f"{said}: there is no such folder, and no such model in the hub that you may see. Check the name; "
            f"where it is private, {log_in}."
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return MissingInputError(
                f"{said}: the hub refuses it to you ({status}). Check your token: {log_in}."
            )
        return ServerError(
            f"{said}: the hub at {hub} answers with an error ({status}). Run the same command again later, or "
            f"{elsewhere}."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ServerError(
            f"{said} is not on this machine, and HF_HUB_OFFLINE keeps the hub from being asked. Unset it, or "
            f"{elsewhere}."
        )
    if isinstance(error, OSError) and error.errno is not None:
        where = error.filename or constants.HF_HUB_CACHE
        step = "Free some space" if error.errno == errno.ENOSPC else "Mend this"
        return StorageError(
            f"{said} could not be written to {where} ({error.strerror}). {step}, or set HF_HUB_CACHE to a folder "
            "that can be written and has room, and run the same command again."
        )
    return ServerError(
        f"{said} is not all on this machine, and the hub at {hub} is out of reach ({first_line(error)}). Connect this "
        f"machine and run the same command again, or {elsewhere}."
    )


def _cached(repo: str) -> Path:
    """Where huggingface_hub keeps what it knows of a model."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _ref(model: HubModel) -> Path:
    """The file in which huggingface_hub notes the commit that a branch or tag was last."""
    return _cached(model.repo) / "refs" / (model.revision or BRANCH)


def _cached_commits(model: HubModel) -> str:
    """Advice to take a commit that is on this machine; empty if none is."""
    commits = sorted(path.name for path in _cached(model.repo).glob("snapshots/*"))
    return (
        f' Of it there is commit {commits[0]} here: revision = "{commits[0]}".' if commits else ""
    )
