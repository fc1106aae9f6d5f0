"""The model card of exported adapters: what they are, how good, how made, and how to load them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stackllm.llm.prompts import PromptParams
from stackllm.members.decoder import DecoderParams
from stackllm.metrics import shown_with_error
from stackllm.report.changes import as_stored, changes

_UNTOLD = {"backbone", "report_to", "attention", "devices"}
"""Settings that are told elsewhere in the card, or are about a machine."""


@dataclass(frozen=True)
class Base:
    """The model that adapters stand on.

    Parameters
    ----------
    name
        Its name in the model hub, or its folder.
    revision
        The hub's commit, where it is known.
    in_hub
        Can others fetch it by that name?
    precision
        In which the adapters were trained.
    """

    name: str
    revision: str | None
    in_hub: bool
    precision: str


@dataclass(frozen=True)
class Reading:
    """How a text becomes the tokens that the models were trained on.

    Parameters
    ----------
    prompt
        Template and lengths.
    start, end
        Tokens in front of every text and behind it.
    closed
        Does a text that spells out a special token count as its letters?
    own_tokenizer
        Does the tokenizer stand beside the adapter, and not only beside the base?
    own_head
        Has transformers no classifier of this type, so that stackllm's is needed to load it?
    """

    prompt: PromptParams
    start: Sequence[int]
    end: Sequence[int]
    closed: bool
    own_tokenizer: bool
    own_head: bool = False


@dataclass(frozen=True)
class MemberCard:
    """A fine-tuned member.

    Parameters
    ----------
    name
        What it is called in its run.
    params
        Its settings.
    adapters
        Folder of each of its models, and on what that was trained.
    scores
        Its row of the leaderboard.
    base, reading
        What it stands on, and what it reads.
    """

    name: str
    params: Mapping[str, Any]
    adapters: Mapping[str, str]
    scores: Mapping[str, Any]
    base: Base
    reading: Reading


def card(record: Mapping[str, Any], name: str, n_groups: int, members: Sequence[MemberCard]) -> str:
    """The card as Markdown with a head that the hub reads; it holds no text of the data.

    Parameters
    ----------
    record
        What ``run.json`` holds.
    name
        Of the run.
    n_groups
        Groups of the training table.
    members
        The fine-tuned members.
    """
    parts = [
        _head(members),
        f"# {name}: which LLM wrote it\n\n"
        f"Adapters (LoRA), each with its classification head, that tell which of {len(record['classes'])} classes a "
        f"response belongs to, given its question. Made by stackllm {record['stackllm']}; the numbers and names here "
        "are all that the card holds of the data.",
        _data(record, n_groups),
        *(_member(member) for member in members),
        "## Licence\n\nAn adapter is of no use without the model that it stands on, and that model's licence holds for "
        "what is made of it. Whoever publishes this adds a `license:` to the head of this file that suits both.",
        "## Made with\n\n"
        + ", ".join(f"{it} {number}" for it, number in record["versions"].items())
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def changed_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a fine-tuned member that differ from the defaults, inner ones as ``training.epochs``."""
    return {
        name: value
        for name, value in changes(params, as_stored(DecoderParams())).items()
        if name.rpartition(".")[2] not in _UNTOLD
    }


def _head(members: Sequence[MemberCard]) -> str:
    lines = ["---", "library_name: peft", "pipeline_tag: text-classification"]
    bases = sorted({member.base.name for member in members if member.base.in_hub})
    if bases:
        lines += ["base_model:", *(f"- {json.dumps(base)}" for base in bases)]
        lines += ["base_model_relation: adapter"]
    return "\n".join([*lines, "tags:", "- lora", "- stackllm", "---"])


def _data(record: Mapping[str, Any], n_groups: int) -> str:
    settings = record["settings"]
    names = ", ".join(f"`{_plain(it)}`" for it in record["classes"])
    return _table(
        "Data",
        {
            "classes": names,
            "a class stands in a group": f"{settings['data']['quota']} ×",
            "training": f"{record['n_train']:,} rows in {n_groups:,} groups, {settings['run']['folds']} folds",
            "test": f"{record['n_test']:,} rows",
        },
    )


def _member(member: MemberCard) -> str:
    base = member.base
    revision = f", revision `{base.revision}`" if base.revision else ""
    changed = changed_settings(member.params)
    settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in changed.items())
    parts = [
        f"## {_plain(member.name)}\n\nStands on `{base.name}`{revision}, read in {base.precision}.",
        "\n".join(
            ["| folder | trained on |", "|---|---|"]
            + [f"| `{folder}` | {told} |" for folder, told in member.adapters.items()]
        ),
        _scores(member.scores),
        f"Settings that differ from stackllm's defaults:\n\n```toml\n{settings or '# none'}\n```",
        _loading(member),
    ]
    return "\n\n".join(parts)


def _scores(scores: Mapping[str, Any]) -> str:
    """Scores with their errors."""
    if not scores:
        return "Its scores are not on record."
    raw = shown_with_error(scores["raw"], scores["raw_se"])
    posterior = shown_with_error(scores["posterior"], scores["posterior_se"])
    return (
        f"| out of fold | |\n|---|---|\n| log loss of a row alone | {raw} |\n"
        f"| log loss given its group | {posterior} |\n"
        f"| accuracy given its group | {scores['accuracy']:.4f} |\n\n"
        "Log loss is in nats, with standard errors over groups; rows are predicted by models that saw no row of their group, "
        "averaged over seeds and calibrated. *Given its group* uses that the number of rows of each class in a group is known "
        "(`stackllm optim` does that to any predictions)."
    )


def _loading(member: MemberCard) -> str:
    reading, prompt = member.reading, member.reading.prompt
    middle = prompt.before_answer.rstrip(" ")
    opening = prompt.before_answer[len(middle) :]
    pieces = [it for it in (prompt.instruction, prompt.before_question) if it]
    before = ", ".join(["*START", *(f"*ids({it!r})" for it in pieces)])
    letters = ", split_special_tokens=True" if reading.closed else ""
    tokenizer = "folder" if reading.own_tokenizer else repr(member.base.name)
    folder = next(iter(member.adapters))
    imported = "from stackllm.llm.heads import add_classifier\n" if reading.own_head else ""
    added = "add_classifier(config)  # transformers has none of this type\n" if imported else ""
    return f"""Load one of them, from the folder that this file is in (of the hub's, `huggingface_hub.snapshot_download` gives it):

```python
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, AutoTokenizer
{imported}
folder = {folder!r}
question, response = "Why is the sky blue?", "Because of Rayleigh scattering."

config = AutoConfig.from_pretrained(folder)
{added}model = AutoPeftModelForSequenceClassification.from_pretrained(
    folder, id2label=config.id2label, label2id=config.label2id, pad_token_id=config.pad_token_id
).eval()
tokenizer = AutoTokenizer.from_pretrained({tokenizer})
START, END = {list(reading.start)!r}, {list(reading.end)!r}


def ids(text):
    return tokenizer(text, add_special_tokens=False{letters}).input_ids if text else []


def cut(tokens, most, keep):
    last = {{"head": 0, "tail": most, "both": most // 2}}[keep]
    return tokens if len(tokens) <= most else tokens[: most - last] + tokens[len(tokens) - last :]


asked = [{before}]
asked += [*cut(ids(question), {prompt.max_length_prompt}, {prompt.keep_prompt!r}), *ids({middle!r})]
room = min({prompt.max_length_answer}, {prompt.max_length} - len(asked) - len(END))
answered = cut(ids({opening!r} + response if response else ""), room, {prompt.keep_answer!r})
with torch.inference_mode():
    logits = model(input_ids=torch.tensor([[*asked, *answered, *END]])).logits
print(dict(zip(config.id2label.values(), logits.float().softmax(-1)[0].tolist())))
```

The probabilities of several folders are averaged; those of rows that a model was trained on say nothing."""


def _table(title: str, rows: Mapping[str, str]) -> str:
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"## {title}\n\n| | |\n|---|---|\n{lines}"


def _plain(text: str) -> str:
    """A name that breaks neither a table nor a code span."""
    return text.replace("|", "¦").replace("`", "'").replace("\n", " ")
