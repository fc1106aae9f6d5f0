"""One copy of the backbone per process, whatever is trained or asked there, and no training lost after its end."""

import dataclasses
import weakref

import numpy as np
import pytest
import torch
from helpers import digests
from scipy.sparse import csr_matrix
from small_decoders import N_CLASSES, make_inputs, make_params, make_rows, make_targets

from stackllm.crossfit.design import Design
from stackllm.engine.local import Engine
from stackllm.engine.progress import Reporter
from stackllm.errors import TrainingError, UsageError
from stackllm.finetune import memory
from stackllm.finetune import model as models
from stackllm.finetune import train as training
from stackllm.finetune.dataset import TrainingParams
from stackllm.finetune.model import LoraParams, load_classifier, logits, save_classifier
from stackllm.llm import backbone as loading
from stackllm.llm.resident import release
from stackllm.members import decoder, warm_head
from stackllm.members.build import StoredInputs
from stackllm.members.inputs import VIEWS, save_inputs
from stackllm.members.registry import Member
from stackllm.members.stage import cross_fit_members
from stackllm.store.digest import digest

PRECISIONS = ("float32", "bfloat16", "float16", "int8", "nf4")


@pytest.fixture
def loads(monkeypatch):
    """Of each loading of a backbone: its class, and how many others were alive when it began."""
    release()
    seen, alive = [], weakref.WeakSet()
    whole = loading.load_model

    def load_model(kind, *args, **options):
        seen.append((kind, len(alive)))
        model, tokenizer = whole(kind, *args, **options)
        alive.add(model)
        return model, tokenizer

    for module in (loading, models):
        monkeypatch.setattr(module, "load_model", load_model)
    yield seen
    release()


@pytest.fixture
def contest(make_backbone, tmp_path):
    """A member of a small contest, and what fits it at every place of round 0."""
    rows = make_rows(8)

    def fit(root, params, member="own"):
        inputs = make_inputs(tmp_path, params, rows)
        counts = dict.fromkeys(VIEWS, csr_matrix((len(rows), 1), dtype=np.float32))
        save_inputs(inputs.folder, dataclasses.replace(inputs, counts=counts))
        folds, n_train = np.repeat([0, 1, 2], 6), 18
        design = Design(
            np.arange(n_train) % 3, folds, np.repeat([0, 1], 3), inputs.groups, N_CLASSES
        )
        key = digest(rows)
        stored = StoredInputs(inputs.folder, {"inputs": key, "texts": key})
        engine = Engine(root, 1, Reporter(quiet=True))
        members = [Member(member, "decoder", params)]
        return cross_fit_members(
            members, design.first_fits(), design, stored, 0, engine, lambda _: None
        )[member]

    return fit


@pytest.mark.parametrize("layers", [2, "all"])
def test_a_grid_loads_its_backbone_once(make_backbone, contest, tmp_path, loads, layers):
    params = make_params(make_backbone("llama"), layers, seeds=(0, 1))
    contest(tmp_path / "run", params)
    kinds = ["AutoModelForSequenceClassification"]
    if layers == 2:  # the trunk's first, of which nothing is left when the other comes
        kinds.insert(0, "AutoModelForCausalLM")
    assert loads == [(kind, 0) for kind in kinds]


def test_a_model_is_the_same_whatever_was_computed_before(make_backbone, tmp_path, monkeypatch):
    rows = make_rows()
    params = make_params(
        make_backbone("llama"),
        2,
        lora=LoraParams(r=2, dropout=0.3),
        training=TrainingParams(epochs=1, batch_size=4, learning_rate=1e-2, patience=1),
    )
    inputs = make_inputs(tmp_path, params, rows)

    def fit(name, seed=3, params=params, batch=None):
        folder = tmp_path / name
        folder.mkdir()
        with monkeypatch.context() as patch:
            if batch:
                patch.setattr(decoder, "sequences", failing(batch))
            decoder.fit(inputs, make_targets(rows), params, seed, folder)
        return digests(folder)

    def failing(error):
        whole = decoder.sequences

        def sequences(*args):
            lengths, collate = whole(*args)
            passes = []

            def small(chosen):
                passes.append(chosen)
                if isinstance(error, TrainingError) and len(passes) == 5:
                    raise error
                if isinstance(error, torch.OutOfMemoryError) and len(chosen) > 2:
                    raise error
                return collate(chosen)

            return lengths, small

        return sequences

    release()
    first = fit("first")
    fit("another", seed=4)
    decoder.predict(inputs, np.arange(18), tmp_path / "another")
    assert fit("after a prediction") == first
    with pytest.raises(TrainingError, match="at step 2"):
        fit("failed", batch=TrainingError("no number at step 2."))
    assert fit("after a failure") == first
    wider = dataclasses.replace(params, lora=LoraParams(r=3, target_modules=("q_proj", "up_proj")))
    assert fit("other adapters", params=wider) != first
    nowhere = dataclasses.replace(params, lora=LoraParams(target_modules=("embed_tokens", "norm")))
    with pytest.raises(UsageError, match="norm"):
        fit("no adapters", params=nowhere)
    assert fit("after adapters that were refused") == first
    halved = fit("halved", batch=torch.OutOfMemoryError("this device is small"))
    memory._fitted.clear()  # else the next would begin with the rows that fitted
    assert fit("after too little memory") == first
    release()
    assert fit("halved alone", batch=torch.OutOfMemoryError("this device is small")) == halved


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layers", [2, "all"])
def test_what_is_trained_is_stored_and_loaded_to_the_bit(
    make_backbone, tmp_path, precision, layers
):
    rows = make_rows()
    params = make_params(make_backbone("llama"), layers, precision)
    inputs = make_inputs(tmp_path, params, rows)
    n_layers = None if layers == "all" else layers
    model, tokenizer = models.new_classifier(
        params.backbone, precision, N_CLASSES, params.lora, n_layers, 1, from_trunk=layers == 2
    )
    for value in models.trained(model).values():
        assert value.dtype == torch.float32
        value.data.normal_(0, 0.3)  # of which half precision would lose something
    lengths, collate = decoder.sequences(inputs, params, tokenizer)
    model.eval()
    before = training.read(logits, model, np.arange(18), lengths, collate)
    (tmp_path / "model").mkdir()
    save_classifier(model, tmp_path / "model")
    release()
    model, _ = load_classifier(
        tmp_path / "model", params.backbone, precision, N_CLASSES, n_layers=n_layers
    )
    assert {it.dtype for name, it in model.named_parameters() if "lora" in name} == {torch.float32}
    after = training.read(logits, model, np.arange(18), lengths, collate)
    np.testing.assert_array_equal(after, before)


class CutOffError(Exception):
    """What a test raises in place of a power cut."""


def test_a_prediction_that_dies_does_not_cost_the_training(
    make_backbone, contest, tmp_path, monkeypatch
):
    params = make_params(make_backbone("llama"), "all")
    contest(tmp_path / "whole", params)
    trained, predict = [], decoder.predict_rows

    def counting(*args, **options):
        trained.append(args)
        return training.train(*args, **options)

    def dying(*args):
        raise CutOffError

    monkeypatch.setattr(decoder, "train", counting)
    monkeypatch.setattr(decoder, "predict_rows", dying)
    for attempt in (1, 1):  # the second finds the model, and dies again
        with pytest.raises(CutOffError):
            contest(tmp_path / "run", params)
        assert len(trained) == attempt
    assert not list((tmp_path / "run").glob("members/*/*/manifest.json"))
    (weights,) = (tmp_path / "run/fitted").rglob("adapter_model.safetensors")
    monkeypatch.setattr(decoder, "predict_rows", predict)
    contest(tmp_path / "run", params)
    assert len(trained) == 3
    assert not weights.exists()
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_a_stored_model_that_is_damaged_or_of_other_settings_is_not_taken(
    make_backbone, contest, tmp_path, monkeypatch
):
    params = make_params(make_backbone("llama"), "all")
    predict = decoder.predict_rows
    monkeypatch.setattr(decoder, "predict_rows", lambda *_: 1 / 0)
    for root in ("damaged", "other"):
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            contest(tmp_path / root, params)
    monkeypatch.setattr(decoder, "predict_rows", predict)
    (weights,) = (tmp_path / "damaged/fitted").rglob("adapter_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(content)
    whole = contest(tmp_path / "whole", params)
    np.testing.assert_array_equal(contest(tmp_path / "damaged", params).oof, whole.oof)
    longer = dataclasses.replace(
        params, training=dataclasses.replace(params.training, learning_rate=0.05)
    )
    assert np.abs(contest(tmp_path / "other", longer).oof - whole.oof).max() > 1e-3


def test_a_warm_head_is_computed_once_for_all_seeds(make_backbone, contest, tmp_path, monkeypatch):
    params = make_params(make_backbone("llama"), 2, seeds=(0, 1), refit="full")
    suiting, heads = warm_head._suiting, []

    def counting(*args):
        heads.append(suiting(*args[:6], 5))  # all choose their penalty likewise
        return heads[-1]

    monkeypatch.setattr(warm_head, "_suiting", counting)
    contest(tmp_path / "run", params)
    assert len(heads) == 4  # of three folds, and of all rows
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*/manifest.json")}
    contest(tmp_path / "run", dataclasses.replace(params, seeds=(0, 1, 2)))
    assert len(heads) == 4
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())

    # what each of them would compute for itself is the same up to rounding
    started, starts = warm_head.start_head, []

    def both(model, inputs, *args):
        assert started(model, inputs, *args)
        starts.append(models.last_linear(model).weight.detach().clone())
        assert warm_head.warm_head(model, inputs.groups, *args)
        return True

    monkeypatch.setattr(decoder, "start_head", both)
    contest(tmp_path / "again", dataclasses.replace(params, seeds=(0,), refit="folds"))
    of_units = heads[-3:]
    assert len(starts) == 3
    for shared, (own, _) in zip(starts, of_units, strict=True):
        np.testing.assert_allclose(shared, own, rtol=1e-2, atol=1e-2 * np.abs(own).max())
