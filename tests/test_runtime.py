"""Where things lie and what the machine is: read from the environment when asked, never before."""

from pathlib import Path

import pytest
import torch

from nanochat import paths
from nanochat.runtime import Runtime, compute_dtype, peak_flops, start

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in ("NANOCHAT_DTYPE", "NANOCHAT_ATTENTION", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_everything_lies_under_the_base_and_nothing_is_made_by_asking(base_dir):
    found = {
        paths.base_dir(): ".",
        paths.corpus_dir("mine"): "corpora/mine",
        paths.tokenizer_dir("mine-4096"): "tokenizers/mine-4096",
        paths.checkpoint_dir("base", "d4"): "base_checkpoints/d4",
        paths.checkpoint_dir("sft", "d4"): "chatsft_checkpoints/d4",
        paths.checkpoint_dir("rl", "d4"): "chatrl_checkpoints/d4",
        paths.checkpoint_dir("base"): "base_checkpoints",
        paths.results_dir("d4"): "results/d4",
        paths.scores_file(): "results/scores.json",
        paths.report_dir(): "report",
        paths.task_dir(): "task_data",
        paths.eval_bundle_dir(): "eval_bundle",
        paths.eval_bundle_dir("other"): "other",
    }
    assert {path: path.relative_to(base_dir).as_posix() for path in found} == found
    assert not base_dir.exists()


def test_the_base_is_read_on_call(base_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "elsewhere"))
    assert paths.results_dir("d4") == tmp_path / "elsewhere" / "results" / "d4"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/there")
    assert paths.base_dir() == tmp_path / "there"
    for unset in ("", None):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", "") if unset == "" else monkeypatch.delenv("NANOCHAT_BASE_DIR")
        assert paths.base_dir() == tmp_path / ".cache" / "nanochat"


def test_mirror_and_hub_are_read_on_call(monkeypatch):
    monkeypatch.delenv("NANOCHAT_DATA_MIRROR", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert paths.data_mirror() is None and paths.hf_endpoint() == "https://huggingface.co"
    monkeypatch.setenv("NANOCHAT_DATA_MIRROR", "some/where")
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:1/")
    assert paths.data_mirror() == Path("some/where") and paths.hf_endpoint() == "http://localhost:1"


def test_a_cpu_computes_in_float32_unless_told_otherwise(monkeypatch):
    runtime = start("cpu")
    assert runtime == Runtime(CPU, torch.float32, rank=0, local_rank=0, world_size=1, attention="")
    assert runtime.is_main
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    monkeypatch.setenv("NANOCHAT_ATTENTION", "sdpa")
    assert start("cpu") == Runtime(CPU, torch.bfloat16, attention="sdpa")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float8")
    with pytest.raises(SystemExit, match="'float8'.*float32, bfloat16"):
        compute_dtype(CPU)


@pytest.mark.parametrize("units", [{"_is_avx512_bf16_supported"}, {"_is_amx_tile_supported"}, set()])
def test_a_cpu_trains_in_bfloat16_where_it_multiplies_it_and_serves_in_float32(monkeypatch, units):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in units)
    assert start("cpu").dtype == torch.float32
    assert start("cpu", training=True).dtype == (torch.bfloat16 if units else torch.float32)
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    assert start("cpu", training=True).dtype == torch.float32


def test_an_unknown_device_is_an_error_that_names_the_known_ones():
    with pytest.raises(SystemExit, match="'tpu'.*cuda, cpu or mps"):
        start("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_says_what_to_do():
    with pytest.raises(SystemExit, match="--device-type cpu"):
        start("cuda")


def test_a_runtime_cannot_be_changed():
    with pytest.raises(AttributeError):
        Runtime(CPU, torch.float32).rank = 1


def test_one_rank_has_nobody_to_talk_to():
    runtime = Runtime(CPU, torch.float32)
    tensor = torch.ones(3)
    assert runtime.sum(tensor) is tensor and tensor.tolist() == [1, 1, 1]
    assert runtime.gather({"a": 1}) == [{"a": 1}]
    runtime.barrier()


def test_only_the_first_rank_prints(capsys):
    Runtime(CPU, torch.float32, rank=0, world_size=2).print("first", 1)
    Runtime(CPU, torch.float32, rank=1, world_size=2).print("second", 2)
    assert capsys.readouterr().out == "first 1\n"


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("Something Else", None),
    ],
)
def test_peak_of_a_device_by_its_name(name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == flops


def test_a_cpu_has_no_known_peak():
    assert peak_flops(CPU) is None
