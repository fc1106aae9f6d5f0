"""Compares every type that transformers generates text with to transformers, one row at a time: ``make families``.

Writes docs/families.md for people, and stackllm/llm/families.json for the program.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import small_families as small

from stackllm.llm.families import LISTED, Family, Level, families

TARGET = Path(__file__).with_name("families.md")
TOLERANCE = 1e-4
"""Of float32, relative to the largest number: what is right here is a hundred times nearer."""

_BOTH_WAYS = "reads a text in both directions, so that it cannot say how likely one is"
_HALF = "is half of a model that turns one text, or speech, into another"
_MORE = "is made for more than text"
_PADDED = "cannot be told which tokens are padding"
REFUSED = {
    _BOTH_WAYS: """bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
        roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod""",
    _HALF: """bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet
        gemma4_assistant gemma4_unified_assistant trocr whisper""",
    _MORE: """fuyu git got_ocr2 mllama moshi moss_transcribe_diarize musicgen musicgen_melody""",
    _PADDED: "cpmant reformer",
}
"""Types that are not read at all, by the reason."""

INTRODUCTION = """# Types of models

Made by `make families` with transformers {version}; not edited by hand. Of each of the {n} types that transformers
generates text with, a small model with random weights was read with stackllm and with plain transformers, one row at a
time, in float32 on a CPU. *Right* means equal to {tolerance:g} of the largest number.

- **encoder**: pooled layers and likelihoods. **rater**: scores of answers of one token and of several.
- **top layers**: logits of a classifier whose upper layers start from the cached output of the lower ones.
- **all layers**: logits of a classifier that reads whole texts, rows of unlike length side by side. Where transformers
  has no classifier of a type, it is its body with a linear layer on the last real token (*ours*).

How rows are read together, where that is not said otherwise, is *shared*: what the answers to a question begin with is
read once. *Padded in front only* does the same, but what prompts of several questions have in common is shared only by
beginnings of one length: layers that are no attention would take padding inside for text. *Rows whole* reads every text
from its first token on, side by side; *one at a time* not even that.

{counts}

Refused means a sentence before any work. A type that is not listed here is newer than this page: encoder and rater read
it one row at a time, which is slow and right for any model.

An adapter of a type whose classifier is ours is loaded as any other once transformers knows that class:

```python
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig
from stackllm.llm.heads import add_classifier

config = AutoConfig.from_pretrained(folder)
add_classifier(config)
model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=config.num_labels)
```

What a GPU's own kernels make of padding in layers that are no attention was not tried: these are the paths in plain torch.

"""
_OFF = "off by"
_HEADER = "| type | encoder | rater | top layers | all layers |\n|---|---|---|---|---|\n"
_LEVELS = {
    "shared": "right", "front": "right, padded in front only", "whole": "right, rows whole",
    "alone": "right, one at a time",
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What came out of a type.

    Parameters
    ----------
    kind
        What its language model calls itself.
    family
        For the program.
    cells
        For people: encoder, rater, top layers, all layers.
    """

    kind: str
    family: Family
    cells: tuple[str, str, str, str]


def main() -> None:
    """Write both files."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    verdicts = {}
    for name in sorted(NAMES):
        verdicts[name] = judge(name)
        print(name, *verdicts[name].cells, sep=" | ", flush=True)
    plain = dataclasses.asdict(Family())
    listed = {
        name: {
            key: it for key, it in dataclasses.asdict(verdict.family).items() if it != plain[key]
        }
        for name, verdict in verdicts.items()
    }
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in listed.items()]
    LISTED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    rows = [f"| {name} | " + " | ".join(it.cells) + " |\n" for name, it in verdicts.items()]
    counts = Counter(it.cells[1].split(":")[0] for it in verdicts.values())
    summary = "; ".join(f"{kind}: {n}" for kind, n in counts.most_common())
    head = INTRODUCTION.format(
        version=transformers.__version__,
        n=len(rows),
        tolerance=TOLERANCE,
        counts=f"Rater: {summary}.",
    )
    TARGET.write_text(head + _HEADER + "".join(rows), encoding="utf-8")


def judge(name: str) -> Verdict:
    """Compare a type."""
    reason = next((why for why, names in REFUSED.items() if name in names.split()), "")
    if reason:
        return Verdict(
            name, Family(refused=reason), (f"refused: it {reason}",) * 2 + ("no", "as transformers")
        )
    try:
        model = small.small_model(name)
    except Exception as error:  # whatever stands in the way of a small model
        why = f"not compared: {_first_line(error)}"
        return Verdict(name, Family(), (why, why, "no", "no"))
    kind = model.config.model_type  # of a model that sees as well, its text model's
    for level in get_args(Level):
        families()[name] = families()[kind] = Family(level, classifies=True, trunk=True)
        encoder = _try(lambda: small.encoder_error(model))
        rater = _try(lambda: small.rater_error(model))
        if not rater and not encoder.startswith(_OFF):
            break
    pools = not encoder
    made = None

    def classify() -> float:
        nonlocal made
        with tempfile.TemporaryDirectory() as folder:
            small.adapters_that_learn(small.classifier(model, Path(folder)))
            made = small.classifier(model, Path(folder))
        return small.classifier_error(model, made)

    own = not small.has_classifier(name)
    whole = f"only {kind} was tried" if own and kind != name else _try(classify)
    starts = made is not None and small.starts_from_trunk(made)
    trunk = _try(lambda: small.trunk_error(model, made)) if starts else "no"
    family = Family(level, pools, own and not whole, not trunk)
    families()[name] = families()[kind] = family  # what comes later may be of the same kind
    cells = (
        _LEVELS[level] if pools else "refused: its layers do not hand on one state of each token",
        _LEVELS[level] if not rater else f"wrong: {rater}",
        "right" if not trunk else "no" if trunk == "no" else f"no: {trunk}",
        ("right, ours" if own else "right") if not whole else f"refused: {whole}",
    )
    return Verdict(kind, family, cells)


def _try(measure: Callable[[], float]) -> str:
    """Empty if an error is within the tolerance; else it, or why it cannot be had."""
    try:
        error = measure()
    except Exception as trouble:
        return _first_line(trouble)
    return "" if error < TOLERANCE else f"{_OFF} {error:.1g}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:100].replace("|", "/")


if __name__ == "__main__":
    main()
