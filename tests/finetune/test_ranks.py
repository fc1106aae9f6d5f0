"""Several processes that train one model, started as ``accelerate launch`` starts them; gloo on a CPU."""

import contextlib
import json
import os
import pickle
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_table
from helpers import digests, stackllm
from safetensors.numpy import load_file
from small_decoders import make_inputs, make_params, make_rows, make_targets

from stackllm.errors import UsageError
from stackllm.finetune.dataset import TrainingParams
from stackllm.llm.backbone import load_model

PROGRAM = Path(__file__).with_name("two_ranks.py")
CONFIG = """
[encoder]
backbone = "none"
[run]
folds = 2
[[member]]
kind = "lexical"
[[member]]
kind = "decoder"
backbone = "{backbone}"
precision = "float32"
trainable_layers = 2
training = {{epochs = 1, batch_size = 4, learning_rate = {rate}}}
lora = {{dropout = 0.0, alpha = {alpha}}}
"""


def free_port() -> int:
    """A port that nobody else gets before a slow machine has started those who meet there.

    What a system hands out by itself, to whoever connects or binds to port 0, it takes from 32768 up
    (49152 on some): a port from there may be gone by the time that an interpreter has imported torch.
    """
    draw = random.Random()
    while True:
        port = draw.randrange(15_000, 32_000)
        with socket.socket() as listening, contextlib.suppress(OSError):
            listening.bind(("127.0.0.1", port))
            return port


def start(command, n_ranks, **options):
    """Start a command once a rank, as torchrun does."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            command,
            env={
                **os.environ, **shared,
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks),
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
        )
        for rank in range(n_ranks)
    ]  # fmt: skip


def finish(processes):
    told = [process.communicate(timeout=300) for process in processes]
    return [process.returncode for process in processes], told


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_two_ranks_end_with_the_same_weights_and_those_of_one(make_backbone, tmp_path):
    rows = make_rows(7)  # 21 rows in steps of 8: the last one does not share out evenly
    training = TrainingParams(
        epochs=2, batch_size=4, accumulation=2, learning_rate=1e-2, patience=1
    )
    params = make_params(make_backbone("llama", 2), "all", training=training)
    inputs = make_inputs(tmp_path, params, rows)
    given = tmp_path / "given.pickle"
    given.write_bytes(pickle.dumps((inputs, make_targets(rows), params)))
    for n_ranks in (1, 2):
        command = [sys.executable, str(PROGRAM), str(given), str(tmp_path / "out")]
        codes, told = finish(start(command, n_ranks))
        assert codes == [0] * n_ranks, told
    alone, first, second = (
        weights(tmp_path / "out" / name) for name in ("rank0-of-1", "rank0-of-2", "rank1-of-2")
    )
    assert any(abs(value).max() > 1e-3 for name, value in alone.items() if "lora_B" in name)
    for name, value in alone.items():
        assert (first[name] == second[name]).all(), name
        assert first[name] == pytest.approx(value, abs=2e-5), name


def launched(contest, *arguments):
    """The command in two processes, started by accelerate."""
    return subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", str(free_port()), "-m", "stackllm", *arguments,
        ],
        cwd=contest, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_a_command_that_accelerate_launches(make_backbone, tmp_path):
    backbone = make_backbone("llama", 3)
    for name in ("alone", "two"):
        write_table(tmp_path / name, 8, 4)
        config = CONFIG.format(backbone=backbone, rate=1e-4, alpha=16)
        (tmp_path / name / "stackllm.toml").write_text(config)
    alone = stackllm("features", "--json", "--jobs", "1", cwd=tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    two = launched(tmp_path / "two", "features", "--json")
    assert two.returncode == 0, two.stderr
    expected = {entry["model"]: entry["raw"] for entry in json.loads(alone.stdout)["leaderboard"]}
    found = {entry["model"]: entry["raw"] for entry in json.loads(two.stdout)["leaderboard"]}
    assert found == pytest.approx(expected, abs=1e-4)
    assert found["lexical"] == expected["lexical"]
    before = digests(tmp_path / "two/artifacts")
    again = launched(tmp_path / "two", "features", "--json")  # nothing is left to be done
    assert again.returncode == 0, again.stderr
    assert digests(tmp_path / "two/artifacts") == before


def test_a_dry_run_of_several_ranks_lists_units_once_and_leaves_nothing(make_backbone, tmp_path):
    write_table(tmp_path, 8, 4)
    config = CONFIG.format(backbone=make_backbone("llama", 3), rate=1e-4, alpha=16)
    (tmp_path / "stackllm.toml").write_text(config)
    command = [sys.executable, "-m", "stackllm", "features", "--dry-run"]
    codes, told = finish(start(command, 2, cwd=tmp_path))
    assert codes == [0, 0], told
    assert told[0][1].startswith("folds: new\n")
    assert told[1] == ("", "")
    assert not (tmp_path / "artifacts").exists()


def test_layers_over_all_devices_are_for_one_process(monkeypatch, make_backbone):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="is for one process"):
        load_model("AutoModelForCausalLM", make_backbone("llama", 2), "float32", devices="all")


def test_a_training_that_fails_is_said_once(make_backbone, tmp_path):
    write_table(tmp_path, 8, 4)
    config = CONFIG.format(backbone=make_backbone("llama", 3), rate=10, alpha=1_000_000)
    (tmp_path / "stackllm.toml").write_text(config)
    command = [sys.executable, "-m", "stackllm", "features", "--quiet"]
    first, second = start(command, 2, cwd=tmp_path)
    _, told = first.communicate(timeout=300)
    assert first.returncode == 65
    assert told.count("error:") == 1
    assert "members/decoder/round0_fold0_seed0" in told
    assert "Traceback" not in told
    told = second.communicate(timeout=60)[1]
    assert second.returncode == 1
    assert told.startswith("rank 1: ")
    assert "Traceback" not in told
