"""Types of models: what stackllm reads and trains of each, beside transformers with one row at a time."""

import re
from pathlib import Path

import pytest
import small_families as small
import torch
from small_encoders import write_encoder
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from stackllm.engine.local import Engine
from stackllm.engine.progress import Reporter
from stackllm.errors import UsageError
from stackllm.llm import families
from stackllm.llm.encode import EncoderParams, choose_layers
from stackllm.llm.families import Family, check_pools, level_of
from stackllm.llm.reading import Reading, read_ends
from stackllm.rating.local import RaterParams
from stackllm.settings import Settings, check_llms

TRIED = (
    "gpt2", "bloom", "mixtral", "gemma3_text", "gemma4_text", "granite", "cohere", "llama4_text", "mpt",
    "falcon_h1", "lfm2", "mamba", "zamba", "nemotron_h",
)  # fmt: skip
"""A type of each kind: what is done to scores, places, windows, experts, and layers that are no attention."""
PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture(scope="module", params=TRIED)
def model(request):
    return small.small_model(request.param)


@pytest.fixture
def unheard_of(monkeypatch):
    monkeypatch.setattr(families, "families", dict)


def test_every_type_that_generates_text_was_tried():
    new = [name for name in NAMES if name not in families.families()]
    assert not new, f"new types: {new}. Run make families, and look at what becomes of them."


def test_the_page_says_what_the_program_does():
    rows = re.findall(r"^\| ([\w-]+) \| (.+) \| (.+) \| (.+) \| (.+) \|$", PAGE.read_text(), re.M)
    cells = {name: rest for name, *rest in rows[1:]}
    assert set(NAMES) <= cells.keys()
    words = {
        "shared": "right", "front": "right, padded in front only", "whole": "right, rows whole",
        "alone": "right, one at a time",
    }  # fmt: skip
    for name, (encoder, rater, top, whole) in cells.items():
        family = families.families()[name]
        if family.refused:
            assert rater == f"refused: it {family.refused}"
        elif not rater.startswith("not compared"):
            assert rater == words[family.level]
            assert family.pools == (encoder == rater)
        assert family.trunk == (top == "right")
        assert family.classifies == whole.endswith("ours")


def test_encoder_and_rater_read_as_transformers_does(model):
    assert small.encoder_error(model) < 1e-4
    assert small.rater_error(model) < 1e-4


def test_classifiers_read_as_transformers_does_from_the_trunk_too(model, tmp_path):
    made = small.classifier(model, tmp_path)
    assert small.classifier_error(model, made) < 1e-4
    starts = families.families()[model.config.model_type].trunk
    assert small.starts_from_trunk(made) == starts
    assert not starts or small.trunk_error(model, made) < 1e-4


def test_every_adapter_learns(model, tmp_path):
    """Also where kernels take weights without calling their layer, and routers are linear layers by name."""
    learn, adapted = small.adapters_that_learn(small.classifier(model, tmp_path))
    layers = {re.search(r"\.(\d+)\.", name)[1] for name in adapted}
    assert len(layers) >= 2
    assert learn == adapted


@pytest.mark.parametrize("level", ["whole", "alone"])
def test_texts_are_read_right_without_sharing(make_model, monkeypatch, tmp_path, level):
    model = make_model("mistral")
    monkeypatch.setattr(families, "families", lambda: {"mistral": Family(level, trunk=True)})
    assert small.encoder_error(model) < 1e-4
    assert small.rater_error(model) < 1e-4
    assert small.trunk_error(model, small.classifier(model, tmp_path)) < 1e-4


@pytest.mark.usefixtures("unheard_of")
def test_a_type_that_nobody_has_tried_is_read_one_row_at_a_time(make_model):
    model = make_model("llama")
    assert level_of(model) == "alone"
    passes = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, given: passes.append(given["input_ids"].shape), with_kwargs=True
    )
    for ends in read_ends(model, small.PROMPTS, 10_000, root=[7, 7]):
        assert ends.reading == Reading()
        assert ends.of(ends.output.last_hidden_state).shape[:2] == ends.ids.shape
    assert passes == [(1, 2 + len(prefix) + len(ids)) for prefix, ids in small.ROWS]


def test_layers_that_are_no_attention_are_read_without_a_count_of_what_was_read():
    config = small.small_config("granitemoehybrid")
    config.layer_types = ["linear_attention"] * 4

    class Model:
        pass

    Model.config = config
    assert level_of(Model) == "whole"
    config.layer_types = ["linear_attention", "full_attention"] * 2
    assert level_of(Model) == "front"


def test_what_reads_in_both_directions_is_refused_before_any_work(tmp_path):
    backbone = write_encoder(tmp_path, "bert")
    engine = Engine(tmp_path / "cache", 1, Reporter(quiet=True))
    with pytest.raises(
        UsageError, match=r"of type bert, which reads a text in both .* decoder LLM"
    ):
        choose_layers(EncoderParams(backbone), engine)
    rater = RaterParams(ask=("mark",), backbone=backbone)
    with pytest.raises(UsageError, match=r"of type bert, which reads a text in both directions"):
        check_llms(Settings(encoder=None, rater=rater, members=()))


def test_states_that_are_no_states_of_tokens_are_not_pooled():
    config = small.small_config("gemma3n_text")
    with pytest.raises(UsageError, match=r'"x" is of type gemma3n_text, .* the rater can ask'):
        check_pools("x", config)


def test_peft_loads_an_adapter_whose_classifier_is_ours(make_backbone, tmp_path):
    from peft import AutoPeftModelForSequenceClassification
    from small_decoders import LORA

    from stackllm.finetune.model import Batch, logits, new_classifier, save_classifier
    from stackllm.llm.heads import add_classifier

    model, _ = new_classifier(make_backbone("granite"), "float32", 3, LORA, None, seed=0)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.normal_(0, 0.1)
    save_classifier(model.eval(), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    add_classifier(config)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=config.num_labels
    )
    ids, mask = torch.randint(5, 200, (2, 6)), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with torch.inference_mode():
        ours = logits(model, Batch(ids, None, mask))
        theirs = loaded.eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
