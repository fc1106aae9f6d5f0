"""A training that is cut off goes on from its last state on disk, to the same bytes."""

import dataclasses
import functools
import itertools
import shutil

import numpy as np
import pytest
import torch
from helpers import digests
from small_decoders import make_inputs, make_params, make_rows, make_targets

from stackllm.engine.local import Engine, Task
from stackllm.engine.progress import Reporter
from stackllm.errors import TrainingError
from stackllm.finetune import callbacks
from stackllm.finetune.dataset import TrainingParams
from stackllm.finetune.model import LoraParams
from stackllm.finetune.sampler import Steps
from stackllm.members import decoder
from stackllm.store.units import make_unit

UNIT = make_unit("members/decoder/round0_fold0_seed0", 1, "a training")


class CutOffError(Exception):
    """What a test raises in place of a power cut."""


@pytest.fixture
def train(make_backbone, tmp_path, monkeypatch):
    """Train a decoder as a unit, and cut it off at a batch."""
    monkeypatch.setattr(callbacks, "SAVE_SECONDS", 0.0)
    rows = make_rows(12)
    params = make_params(
        make_backbone("llama", 2),
        "all",
        lora=LoraParams(r=2, dropout=0.3),
        training=TrainingParams(epochs=3, batch_size=4, accumulation=2, learning_rate=1e-2),
    )
    inputs = make_inputs(tmp_path, params, rows)
    whole = decoder.sequences

    def run(
        root, cut_at=None, error=CutOffError, patience=0, precision="float32", optimizer="adamw"
    ):
        seen = []

        def sequences(*args):
            lengths, collate = whole(*args)

            def counting(chosen):
                seen.append(chosen)
                if len(seen) == cut_at:
                    raise error
                return collate(chosen)

            return lengths, counting

        training = dataclasses.replace(params.training, patience=patience, optimizer=optimizer)
        own = dataclasses.replace(params, precision=precision, training=training)
        if optimizer != "adamw":  # smaller tensors keep moments in 32 bits
            own = dataclasses.replace(own, lora=LoraParams(r=128, dropout=0.3))
        monkeypatch.setattr(decoder, "sequences", sequences)
        engine = Engine(root, 1, Reporter(quiet=True))
        engine.ensure("test", [Task(UNIT, fit, (inputs, make_targets(rows), own))])
        return len(seen)

    return run


def fit(folder, inputs, targets, params):
    decoder.fit(inputs, targets, params, 0, folder)


@pytest.mark.parametrize(
    ("patience", "precision", "optimizer"),
    [(0, "float16", "paged_adamw_8bit"), (1, "float32", "adamw")],
)
def test_wherever_it_is_cut_off_it_ends_in_the_same_bytes(
    train, tmp_path, monkeypatch, patience, precision, optimizer
):
    # a scale that overflows at first, so that it is another at each cut
    larger = functools.partial(torch.amp.GradScaler, init_scale=2.0**22, growth_interval=3)
    monkeypatch.setattr(torch.amp, "GradScaler", larger)
    train = functools.partial(train, patience=patience, precision=precision, optimizer=optimizer)
    batches = train(tmp_path / "whole")
    expected = digests(tmp_path / "whole")
    repeated = []
    for cut_at in range(4, batches + 1, 7):
        root = tmp_path / f"cut{cut_at}"
        with pytest.raises(CutOffError):
            train(root, cut_at)
        again = train(root)
        assert digests(root) == expected
        repeated.append(cut_at + again - batches)
    assert len(repeated) > 3
    # what is read anew: texts for the warm head, held-out groups, and less than two steps of two
    assert max(repeated[len(repeated) // 2 :]) < batches / 2


def test_a_damaged_state_gives_way_to_a_new_start(train, tmp_path):
    train(tmp_path / "whole")
    with pytest.raises(CutOffError):
        train(tmp_path / "cut", 20)
    (stored,) = (tmp_path / "cut/checkpoints").rglob("weights.safetensors")
    content = bytearray(stored.read_bytes())
    content[-3] ^= 4
    stored.write_bytes(content)
    train(tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/quarantine")
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_states_of_other_settings_are_not_used(train, tmp_path, monkeypatch):
    with pytest.raises(CutOffError):
        train(tmp_path / "run", 20)
    other = make_unit(UNIT.path, 1, "another training")
    monkeypatch.setattr(f"{__name__}.UNIT", other)
    train(tmp_path / "run")
    train(tmp_path / "fresh")
    assert digests(tmp_path / "run") == digests(tmp_path / "fresh")


def test_before_a_loss_that_is_no_number_the_weights_are_kept(train, tmp_path):
    from safetensors.torch import load_file

    with pytest.raises(TrainingError, match="kept in") as caught:
        train(tmp_path / "run", 20, TrainingError("the loss is nan at step 9."))
    folder = tmp_path / "run/last_good" / UNIT.path / "adapter"
    assert str(folder) in str(caught.value)
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert any(
        value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name
    )  # they start at zero
    train(tmp_path / "run")
    assert not folder.exists()


@pytest.mark.parametrize("n_rows", [1, 7, 16, 37])
@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_row_counts_once_in_a_step_whoever_reads_it(monkeypatch, n_rows, n_ranks, batch_size):
    lengths = np.random.default_rng(0).integers(1, 50, n_rows)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", str(n_ranks))
    found = []
    for rank in range(n_ranks):
        monkeypatch.setenv("RANK", str(rank))
        steps = Steps(lengths, 8, batch_size, seed=3)
        passes = list(steps)
        assert len(passes) == len(steps)
        assert max(map(len, passes)) <= batch_size
        found.append((steps.passes(8), passes))
    for epoch_step in range(-(-n_rows // 8)):
        shares = {}
        for a_step, passes in found:
            own = passes[epoch_step * a_step : (epoch_step + 1) * a_step]
            for row, share in itertools.chain.from_iterable(own):
                shares[row] = shares.get(row, 0) + share
        assert sum(shares.values()) == pytest.approx(1)
        assert len(set(np.round([share for share in shares.values() if share], 12))) == 1
    rows = [row for _, passes in found for each in passes for row, share in each if share]
    assert sorted(rows) == list(range(n_rows))


def test_epochs_differ_in_order_and_are_the_same_again():
    lengths = np.arange(40)
    steps = Steps(lengths, 8, 8, seed=0)
    orders = []
    for epoch in (0, 1, 0, 1):
        steps.epoch = epoch
        orders.append(list(steps))
    assert orders[0] == orders[2] != orders[1] == orders[3]
