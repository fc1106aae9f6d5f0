"""A small contest, commands on it, and what an undisturbed run of each leaves."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from benchmarks.campaign.commands import forked, python, stackllm

NOT_RESULTS = {
    "timings.jsonl", "libraries.log", ".lock", ".lock.json", "logbook.jsonl", ".logbook.lock",
}  # fmt: skip
SETTINGS = """
[run]
folds = 2
[encoder]
backbone = "none"
[stack]
n_trees = 6
n_seeds = 1
[pseudo]
rounds = 1
[[member]]
kind = "lexical"
[[member]]
kind = "features"
n_trees = 6
"""


DECODER = """
[[member]]
kind = "decoder"
backbone = "{folder}/tiny"
precision = "float32"
trainable_layers = 1
[member.prompt]
max_length_prompt = 4
max_length_answer = 12
[member.training]
epochs = 4
batch_size = 2
"""


def write_decoder(folder: Path) -> None:
    """Add a fine-tuned decoder to a contest: a random one of two layers, with a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=100, num_attention_heads=4, pad_token_id=0, **size)
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    words = ["<unk>", "question", "Question", "Answer", "so", "well", "thus", ".", "!", "?", ";"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.save_pretrained(folder / "tiny")
    with (folder / "stackllm.toml").open("a") as settings:
        settings.write(DECODER.format(folder=folder.resolve()))  # adapters hold the path


def write_contest(folder: Path, n_groups: int = 12, seed: int = 0) -> Path:
    """``train.csv``, ``test.csv``, ``sub.csv`` and ``stackllm.toml`` of three classes in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    train, test, sub = ["Question,Response,target"], ["id,Question,Response"], ["id,a,b,c"]
    for group in range(2 * n_groups):
        for label in draw.sample(range(3), 3):
            words = " ".join(draw.choices(["so", "well", "thus", "but", "and", "then"], k=8))
            answer = f"{words}{'.!?'[label] if draw.random() < 0.8 else ';'} {words}"
            if group < n_groups:
                train.append(f"question {group},{answer},{label}")
            else:
                parts = [draw.random() + 0.1 for _ in range(3)]
                sub.append(f"{len(test) - 1}," + ",".join(repr(p / sum(parts)) for p in parts))
                test.append(f"{len(test) - 1},question {group},{answer}")
    for name, lines in (("train", train), ("test", test), ("sub", sub)):
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (folder / "stackllm.toml").write_text(SETTINGS)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every published file; times, locks and quarantine are not results."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in NOT_RESULTS
        and "quarantine" not in path.relative_to(folder).parts
    }


def ran(folder: Path) -> list[str]:
    """Units that have run in ``folder``, in order, from their times."""
    path = folder / "artifacts" / "run" / "timings.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["unit"] for line in path.read_text().splitlines() if line[-1:] == "}"]


def finished_units(folder: Path) -> dict[str, str]:
    """Units that stand published, and the key of each."""
    root = folder / "artifacts" / "run"
    return {
        str(path.parent.relative_to(root)): json.loads(path.read_text())["key"]
        for path in root.rglob("manifest.json")
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    }


def started_units(folder: Path) -> int:
    """Units whose worker was inside them: their temporary folders."""
    try:
        return sum(path.is_dir() for path in (folder / "artifacts").rglob(".*.tmp"))
    except FileNotFoundError:  # one was published while we looked
        return 0


@dataclass
class Stage:
    """A command, the folder it starts from, and what it leaves when nobody disturbs it.

    Parameters
    ----------
    name
        Of the stage that is disturbed.
    arguments
        Of ``stackllm``.
    before
        Arguments of the command that has been run before.
    decoder
        Whether a decoder is fine-tuned as well.
    encoder
        Whether the same decoder reads all texts, frozen.
    """

    name: str
    arguments: tuple[str, ...]
    before: tuple[str, ...] = ()
    home: Path = field(default_factory=Path)
    decoder: bool = False
    encoder: bool = False

    @property
    def command(self) -> list[str]:
        """The whole command, as it is started."""
        return python("-m", "stackllm", *self.arguments)

    @property
    def alone(self) -> list[str]:
        """Its arguments with one worker, so that every write is the same one at each run."""
        return _alone(self.arguments)

    def finish(self, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run it in ``folder`` to its end, with one worker."""
        return forked(folder, stackllm, *self.alone)

    @cached_property
    def start(self) -> Path:
        """Folder that every case starts from a copy of."""
        folder = write_contest(self.home / f"{self.name}-start")
        if self.decoder:
            write_decoder(folder)
        if self.encoder:
            settings = folder / "stackllm.toml"
            settings.write_text(settings.read_text().replace('"none"', '"./tiny"'))
        if self.before:
            done = forked(folder, stackllm, *_alone(self.before))
            assert done.returncode == 0, done.stderr
        return folder

    @cached_property
    def undisturbed(self) -> Path:
        """Folder in which nobody has disturbed the command; not to be changed."""
        folder = self.copy("undisturbed")
        done = self.finish(folder)
        assert done.returncode == 0, done.stderr
        return folder

    @cached_property
    def expected(self) -> dict[str, str]:
        """What the command leaves."""
        found = digests(self.undisturbed)
        assert found.keys() > digests(self.start).keys()
        return found

    def copy(self, name: str) -> Path:
        """A fresh folder to work in."""
        target = self.home / f"{self.name}-{name}"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.start, target)
        return target


def _alone(arguments: tuple[str, ...]) -> list[str]:
    return ["1" if word == "2" else word for word in arguments]


def stages(home: Path) -> dict[str, Stage]:
    """The commands that are disturbed, each beginning where its own stage begins."""
    quiet = ("--quiet", "--jobs", "2")
    optim = ("optim", "sub.csv", "--groups", "test.csv", "--group", "Question")
    return {
        stage.name: stage
        for stage in (
            Stage("features", ("features", *quiet), home=home),
            Stage("decoder", ("features", *quiet), home=home, decoder=True),
            Stage("llm", ("features", *quiet), home=home, decoder=True, encoder=True),
            Stage("stack", ("stack", *quiet), ("features", *quiet), home),
            Stage("pseudo", ("pseudo", *quiet), ("stack", *quiet), home),
            Stage("optim", optim, home=home),
        )
    }
