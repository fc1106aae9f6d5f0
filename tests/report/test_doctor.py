"""What ``stackllm doctor`` says of machines that are only pretended, and of what would fit on them."""

import json

import pytest
from click.testing import CliRunner
from machines import A10, H100, P100, T4

from stackllm.cli import cli
from stackllm.report import doctor as module
from stackllm.report.doctor import examine


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory):
    """A folder with the configuration of Llama 3.1 8B: what it needs is known without its weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama") / "8b"
    LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.mark.parametrize(
    ("seen", "dtype", "fits"),
    [
        ((T4, T4), "float16", ("on Tesla T4", "on Tesla T4", "on all GPUs together", "on no GPU")),
        ((T4,), "float16", ("on Tesla T4", "on Tesla T4", "on no GPU", "on no GPU")),
        ((H100,), "bfloat16", ("on NVIDIA H100 80GB HBM3",) * 4),
        ((A10, T4), "float16", ("on NVIDIA A10G, Tesla T4",) * 2 + ("on NVIDIA A10G",) + ("on all",)),
    ],
    ids=["two T4s", "a T4", "an H100", "mixed"],
)  # fmt: skip
def test_what_fits_where(pretend_gpus, eight_billion, seen, dtype, fits, monkeypatch):
    monkeypatch.setattr(module, "is_ready", lambda name: True)
    monkeypatch.setattr(module, "sizes_of", sizes_without_weights)
    pretend_gpus(*seen)
    told = examine(eight_billion)
    for number, gpu in enumerate(seen):
        line = told[f"gpu {number}"]
        major, minor = gpu.capability
        assert line.startswith(
            f"{gpu.name}, {gpu.memory / 2**30:.1f} GiB, capability {major}.{minor}"
        )
    assert told["precision"].startswith(f"{dtype} (")
    assert told["parameters"] == "8,030 million"
    order = [name for name in told if name.startswith("in ")]
    assert order == ["in nf4", "in int8", f"in {dtype}", "in float32"]
    for name, where in zip(order, fits, strict=True):
        assert f"fits {where}" in told[name], told[name]
    read, tuned = told["in nf4"].split("; ")
    assert read.startswith("read ")
    assert tuned.startswith("fine-tune ")
    assert f"fits {fits[0]}" in tuned  # 8B with adapters on all layers: the point of QLoRA


def sizes_without_weights(folder):
    """As ``sizes_of``, of a folder that holds nothing but a configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stackllm.llm.estimate import sizes_of_skeleton

    with torch.device("meta"):
        return sizes_of_skeleton(
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        )


def test_a_machine_without_gpus_is_measured_by_its_memory(make_backbone, pretend_gpus):
    pretend_gpus()
    told = examine(make_backbone("llama", 2))
    assert told["gpu"] == "none"
    assert "fits into this machine's memory" in told["in float32"]
    assert told["bitsandbytes"] != "not installed"


def test_a_gpu_that_this_torch_has_no_kernels_for_is_told(pretend_gpus, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    pretend_gpus(P100, T4)
    told = examine("none")
    assert "no kernels for it" in told["gpu 0"]
    assert "no kernels for it" not in told["gpu 1"]


def test_the_command_tells_the_same_to_programs(make_backbone, pretend_gpus):
    pretend_gpus(T4)
    name = make_backbone("llama", 2)
    text = CliRunner().invoke(cli, ["doctor", "--backbone", name])
    program = CliRunner().invoke(cli, ["doctor", "--backbone", name, "--json"])
    assert text.exit_code == program.exit_code == 0, text.output
    told = json.loads(program.stdout)
    assert "Tesla T4" in told["gpu 0"]
    assert "in nf4: read" in text.output


@pytest.mark.parametrize("name", ["./nowhere", "none", "org/never-fetched"])
def test_a_backbone_that_is_not_here_is_a_sentence(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = examine(name)
    assert told["memory that it needs"].startswith("not known")
