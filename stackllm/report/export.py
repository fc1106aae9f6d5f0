"""Taking a run's fine-tuned models elsewhere: folders that peft loads, a model card, the model hub."""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from stackllm.errors import (
    DataError,
    MissingInputError,
    ServerError,
    UsageError,
    first_line,
)
from stackllm.llm.prompts import PromptParams, special_ends
from stackllm.report.card import Base, MemberCard, Reading, card
from stackllm.store.atomic import replace_folder
from stackllm.store.digest import file_digest
from stackllm.store.records import RECORD, read_json, write_json
from stackllm.store.units import MANIFEST, Unit, open_unit, stored_key

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ADAPTER, _SETTINGS, _CARD = "adapter_config.json", "decoder.json", "README.md"
_LEFT = (MANIFEST, "predictions.npy", "metrics.jsonl", _SETTINGS)
"""Files of a unit that are about the data or this machine and nothing to peft."""

_UNIT = re.compile(r"round(\d+)_(?:fold(\d+)(?:_part(\d+))?|full)_seed(\d+)")
"""How the model of a fold, with pseudo-labels of a part or without, or of all rows is called."""


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Parameters
    ----------
    adapters
        Folders of the adapters, below the export's.
    folder
        Where they stand; None if they were only uploaded.
    url
        Their page in the model hub; None if they were not uploaded.
    """

    adapters: tuple[str, ...]
    folder: Path | None = None
    url: str | None = None

    def summary(self) -> dict[str, Any]:
        """The same for programs."""
        folder = None if self.folder is None else str(self.folder)
        return {"adapters": list(self.adapters), "folder": folder, "url": self.url}

    def __str__(self) -> str:
        places = " and ".join(str(it) for it in (self.folder, self.url) if it is not None)
        return f"{len(self.adapters)} adapters and their card: {places}"


def export(
    root: Path,
    target: Path | None = None,
    repo: str | None = None,
    base: str | None = None,
    public: bool = False,
) -> Exported:
    """Write a finished run's adapters and their model card into a folder, or upload them, or both.

    Parameters
    ----------
    root
        The run's folder.
    target
        Where to write; it must not hold anything else.
    repo
        Where in the model hub, as ``"org/name"``.
    base
        Name in the hub of the model that the adapters stand on, where that was a folder. None: as it is.
    public
        May everybody see a repository that is made for it?

    Raises
    ------
    MissingInputError
        If there is no such run, it has no fine-tuned member, or nobody is logged in to the hub.
    UsageError
        If something else stands where it is to go, or others could not fetch the base.
    DataError
        If ``run.json`` is not what this version writes.
    StorageError
        If a model is damaged, or the folder cannot be written.
    ServerError
        If the hub is out of reach or refuses.
    """
    if target is None and repo is None:
        raise UsageError(
            "it is not said where to. Give the setting to a folder, the setting hub a name, or both."
        )
    record = _record(root)
    models = _models(root, record)
    members = [_member(root, record, name, units, base) for name, units in models.items()]
    api = None if repo is None else _open_hub(repo, [member.base for member in members])
    url = None
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "export"
        for member in members:
            for folder in member.adapters:
                _copy(root / "members" / folder, whole / folder, member.base, record["classes"])
        text = card(record, root.resolve().name, _count_groups(root), members)
        (whole / _CARD).write_text(text, encoding="utf-8", newline="\n")
        if target is not None:
            _publish(whole, target)
        if api is not None and repo is not None:
            url = _upload(api, whole, repo, public)
    adapters = tuple(folder for member in members for folder in member.adapters)
    return Exported(adapters, target, url)


def _publish(whole: Path, target: Path) -> None:
    """Put a copy of a folder at its place, unless the same stands there."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} is no folder. Give the setting to another name.")
    if target.is_dir() and any(target.iterdir()):
        if not _same(whole, target):
            raise UsageError(
                f"{target} holds something else. Remove it, or give the setting to another name."
            )
        return

    def fill(folder: Path) -> None:
        shutil.copytree(whole, folder, dirs_exist_ok=True)

    replace_folder(target, fill, lambda: target.is_dir() and any(target.iterdir()))


def _same(one: Path, other: Path) -> bool:
    """Do two folders hold the same files?"""
    names = [sorted(_files(folder)) for folder in (one, other)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(one, other, names[0], False)[1:])


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]


def _record(root: Path) -> dict[str, Any]:
    """What a run says of itself."""
    path = root / RECORD
    try:
        record: dict[str, Any] = read_json(path)
        if not {"settings", "classes", "until"} <= record.keys():
            raise ValueError("it lacks settings, classes or until")
    except FileNotFoundError as error:
        raise MissingInputError(
            f'{root}: there is no finished run here. "stackllm runs" lists those that there are.'
        ) from error
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: not what a run of this stackllm writes ({first_line(error)}). Run the command that made it again."
        ) from error
    return record


def _models(root: Path, record: dict[str, Any]) -> dict[str, list[str]]:
    """Units below ``members/`` of each fine-tuned member: those of the round that is submitted, and on all rows."""
    members = [it for it in record["settings"]["members"] if it["kind"] == "decoder"]
    if not members:
        raise MissingInputError(
            f'{root}: this run has no fine-tuned member, so there is nothing to export. Add a member of kind "decoder" to its '
            "settings and run it again, or name another run."
        )
    if record["until"] != "features":
        content = read_json(
            open_unit(root, Unit("model", stored_key(root / "model"))) / "model.json"
        )
        return {
            name: [
                path.removeprefix("members/")
                for _, path in [*content["places"][name], *content["full"].get(name, [])]
            ]
            for name in (it["name"] for it in members)
        }
    return {it["name"]: _first_round(root, record, it) for it in members}


def _first_round(root: Path, record: dict[str, Any], member: dict[str, Any]) -> list[str]:
    """Units of a run that ended with stage one: folds and seeds that the settings name, whatever else is left there."""
    seeds, folds = member["params"]["seeds"], record["settings"]["run"]["folds"]
    full = member["params"]["refit"] == "full"
    units = []
    for path in sorted((root / "members" / member["name"]).glob("round0_*")):
        told = _UNIT.fullmatch(path.name)
        wanted = told and int(told[4]) in seeds and (int(told[2]) < folds if told[2] else full)
        units += [f"{member['name']}/{path.name}"] if wanted else []
    return units


def _member(
    root: Path, record: dict[str, Any], name: str, units: Sequence[str], base: str | None
) -> MemberCard:
    """What the card says of a member; its units are verified."""
    folders = [
        open_unit(root, Unit(f"members/{unit}", stored_key(root / "members" / unit)))
        for unit in units
    ]
    member = next(it for it in record["settings"]["members"] if it["name"] == name)
    settings = read_json(folders[0] / _SETTINGS)["params"]
    config = read_json(folders[0] / _ADAPTER)
    stands_on, _, revision = (base or config["base_model_name_or_path"]).partition("@")
    known = Base(
        stands_on,
        (revision or None) if base else config.get("revision"),
        _in_hub(stands_on),
        settings["precision"],
    )
    return MemberCard(
        name,
        member["params"],
        {unit: _trained_on(unit) for unit in units},
        _scores(root, name, units[0]),
        known,
        _reading(folders[0], settings, config),
    )


def _in_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _trained_on(unit: str) -> str:
    told = _UNIT.fullmatch(unit.rpartition("/")[2])
    assert told is not None  # it is a unit's own name
    _, fold, part, seed = told.groups()
    rows = "all training rows" if fold is None else f"all folds but number {fold}"
    more = "" if part is None else f", and pseudo-labels of part {part} of the test"
    return f"{rows}{more}; seed {seed}"


def _scores(root: Path, name: str, unit: str) -> dict[str, Any]:
    """A member's row of the leaderboard, of the round that a unit is of."""
    path = root / "leaderboard.csv"
    if not path.is_file():
        return {}
    number = int(unit.rpartition("/")[2].partition("_")[0].removeprefix("round"))
    board = pl.read_csv(path)
    rows = board.filter((board["model"] == name) & (board["round"] == number)).to_dicts()
    return rows[0] if rows else {}


def _reading(folder: Path, settings: dict[str, Any], config: dict[str, Any]) -> Reading:
    from safetensors import safe_open
    from transformers import AutoTokenizer
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    from stackllm.llm.backbone import quiet_libraries

    quiet_libraries()
    here = (folder / "tokenizer_config.json").is_file()
    source = str(folder) if here else config["base_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    # the head of every decoder is called so; others read texts that their tokenizer closes
    with safe_open(folder / "adapter_model.safetensors", "numpy") as weights:
        closed = "base_model.model.score.weight" not in weights.keys()  # noqa: SIM118
    start, end = special_ends(tokenizer)
    if not closed:
        start, end = [it for it in tokenizer("").input_ids if it == tokenizer.bos_token_id], []
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    own_head = read_json(folder / "config.json")["model_type"] not in known
    return Reading(PromptParams(**settings["prompt"]), start, end, closed, here, own_head)


def _count_groups(root: Path) -> int:
    return pl.read_parquet(root / "folds" / "folds.parquet")["group_id"].n_unique()


def _copy(unit: Path, folder: Path, base: Base, classes: Sequence[str]) -> None:
    """Copy what peft reads, and say there what it stands on and what this run calls the classes.

    A model whose classes were only renamed is not trained anew, and still has the names of its first run.
    """
    shutil.copytree(unit, folder, ignore=lambda *_: _LEFT)
    config = read_json(folder / _ADAPTER)
    config |= {"base_model_name_or_path": base.name, "revision": base.revision}
    write_json(folder / _ADAPTER, config, indent=2, sort_keys=True)
    model = read_json(folder / "config.json")
    model["id2label"] = {str(number): name for number, name in enumerate(classes)}
    model["label2id"] = {name: number for number, name in enumerate(classes)}
    write_json(folder / "config.json", model, indent=2, sort_keys=True)


def _open_hub(repo: str, bases: Sequence[Base]) -> HfApi:
    """The hub, once it is sure that it can be written to and that others can use what is written."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f'the setting hub: "{repo}" is no "org/name" ({first_line(error)}).'
        ) from error
    for it in bases:
        if not it.in_hub:
            raise UsageError(
                f"the adapters stand on {it.name}, which nobody who downloads them has. Say with the setting base what "
                'that model is called in the hub, as "org/name".'
            )
    if get_token() is None:
        raise MissingInputError(
            'nobody is logged in to the model hub here. Run "hf auth login", or set HF_TOKEN to a token that may write.'
        )
    api = HfApi()
    with _hub_errors(repo):
        api.whoami()
    return api


def _upload(api: HfApi, whole: Path, repo: str, public: bool) -> str:
    """Put the files into a repository that is new, empty, or holds just them; gives its page."""
    with _hub_errors(repo):
        if not api.repo_exists(repo):
            api.create_repo(repo, private=not public)
        stored = {
            it.path: it for it in api.list_repo_tree(repo, recursive=True) if hasattr(it, "blob_id")
        }
        stored.pop(".gitattributes", None)
        files = _files(whole)
        if stored and not (
            stored.keys() == set(files) and all(_is(whole / it, stored[it]) for it in files)
        ):
            raise UsageError(
                f'the setting hub: "{repo}" holds something else already. Give another name, or remove what is there.'
            )
        if not stored:
            api.upload_folder(
                repo_id=repo, folder_path=whole, commit_message="Adapters of a stackllm run"
            )
    return f"{api.endpoint}/{repo}"


def _is(path: Path, stored: Any) -> bool:
    """Is a file of the hub this one? It tells git's name of a small file and the SHA-256 of a large one."""
    if stored.lfs is not None:
        return bool(stored.lfs.sha256 == file_digest(path))
    content = path.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return bool(stored.blob_id == git.hexdigest())


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """What huggingface_hub raises, as a sentence."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    later = (
        'Give the setting to a folder, and upload that with "hf upload" where there is a network.'
    )
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ServerError(
            f"the model hub is not to be asked: HF_HUB_OFFLINE is set. {later}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise MissingInputError(
                f'the model hub does not let this user write "{repo}" (status {status}). Log in with a token that may '
                '("hf auth login"), or give another name.'
            ) from error
        raise ServerError(
            f"the model hub refuses with status {status} ({first_line(error)}). Try again later."
        ) from error
    except (OSError, httpx2.HTTPError) as error:
        raise ServerError(
            f"the model hub is out of reach ({first_line(error)}). {later}"
        ) from error
