"""The benchmarks run, end with one line of JSON, and say what they compared."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import byte_tokenizer, random_model, serving, small_config

from nanochat.batches import best_fit
from nanochat.engine import Engine
from nanochat.engine_worker import EngineWorker
from scripts import bench_data, bench_infer, bench_serve, bench_train

SMALL = "--device-type cpu --depth 2 --aspect-ratio 32 --head-dim 32 --max-seq-len 64 --device-batch-size 2 "
SMALL += "--vocab-size 256 --steps 2"


def last_line(text):
    return json.loads(text.splitlines()[-1])


def test_training_on_random_rows_needs_nothing_but_torch(base_dir):
    """On a bare GPU machine there may be no tokenizer, no parquet, no safetensors."""
    program = (
        "import sys\n"
        "for name in 'safetensors tiktoken rustbpe pyarrow tqdm requests yaml'.split():\n"
        "    sys.modules[name] = None\n"
        "from scripts import bench_train\n"
        f"bench_train.main(bench_train.parse_args({SMALL.split()!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = last_line(done.stdout)
    assert list(found)[0] == "tok_per_sec" and found["tok_per_sec"] > 0
    assert found["total_batch_size"] == 128 and found["attention"] == "blocked" and found["mfu"] is None


@pytest.mark.parametrize("variant", bench_train.VARIANTS)
def test_a_variant_is_the_same_model_computed_otherwise(variant, capsys):
    losses = []
    for extra in ([], ["--variant", variant]):
        flags = [*SMALL.split(), "--window-pattern", "S", "--max-seq-len", "300", *extra]
        bench_train.main(bench_train.parse_args(flags))
        losses.append(last_line(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_against_a_variant_gives_ratios(capsys):
    bench_train.main(bench_train.parse_args([*SMALL.split(), "--against", "plain-loss"]))
    found = last_line(capsys.readouterr().out)
    assert found["against"] == "plain-loss" and found["speed_ratio"] > 0 and found["memory_ratio"] > 0
    assert len(found["variant_runs"]) == 2 and found["variant"] is None


def test_a_trace_is_written(tmp_path, capsys):
    bench_train.main(bench_train.parse_args([*SMALL.split(), "--trace", str(tmp_path / "trace.json")]))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert last_line(capsys.readouterr().out)["steps"] == 2


def test_packing_by_buckets_and_by_scanning_is_the_same(capsys):
    bench_data.main(bench_data.parse_args("--megabytes 0.3 --vocab-size 400 --documents 3000 --buffer 50".split()))
    found = last_line(capsys.readouterr().out)
    assert found["pack_over_scan"] > 0 and 0 <= found["cropped_share"] < 0.5 and found["read_tok_per_sec"] > 0


def test_the_linear_scan_takes_the_largest_that_fits_and_crops_the_shortest():
    assert bench_data.linear_scan([5, 3, 9, 4], 8, 4) == [[(0, 5), (1, 3)], [(3, 4), (2, 4)]]
    lengths = [30, 12, 9, 3, 40, 2, 8, 11, 1, 7]  # some longer than a row
    assert bench_data.linear_scan(lengths, 8, 4) == best_fit(lengths, 8, crop=True, buffer=4)


def test_the_torch_that_was_measured_is_named(capsys):
    bench_train.main(bench_train.parse_args(SMALL.split()))
    assert last_line(capsys.readouterr().out)["torch"] == torch.__version__


def test_inference_is_measured_by_rows_and_prompts(capsys):
    flags = "--device-type cpu --depth 2 --aspect-ratio 32 --head-dim 32 --max-seq-len 64 --vocab-size 300 --steps 2"
    bench_infer.main(bench_infer.parse_args([*flags.split(), "--rows", "1,3", "--prompts", "4,16"]))
    found = last_line(capsys.readouterr().out)
    assert [(part["rows"], part["prompt"]) for part in found["decode"]] == [(1, 4), (1, 16), (3, 4), (3, 16)]
    assert [part["prompt"] for part in found["first_token"]] == [4, 16]
    assert all(part["tok_per_sec"] > 0 and part["share"] > 0 for part in [*found["decode"], *found["first_token"]])
    assert found["step"]["ratio"] == pytest.approx(found["step"]["ms"] / found["step"]["bare_ms"], rel=0.05)
    assert found["decoder"] == "ragged" and found["newcomer"]["prompt"] == 16
    with pytest.raises(SystemExit, match="too short for 12 steps"):
        bench_infer.main(bench_infer.parse_args([*flags.split(), "--steps", "12"]))
    for wrong in (
        ["--rows", "0"],
        ["--prompts", "a"],
        ["--examine", "arithmetic"],
        ["--steps", "0"],
        ["--rows", "²"],
        ["--vocab-size", "200"],
    ):
        with pytest.raises(SystemExit):
            bench_infer.parse_args(wrong)


def test_a_load_on_the_server_leaves_every_answer_its_own(random_server, capsys):
    address, worker = random_server
    found = bench_serve.load(address, os.getpid(), clients=24, seconds=3, max_tokens=12)
    assert found["answers"] > 24 and found["refused"] > 0 and found["hung_up"] > 0
    assert (found["wrong"], found["failed"], found["stuck"]) == (0, 0, 0), capsys.readouterr().out
    assert found["different_answers"] > 100 and not worker.load and not worker.failure


@pytest.fixture
def random_server():
    tokenizer = byte_tokenizer()
    model = random_model(small_config(tokenizer.vocab_size, sequence_len=128), seed=3)
    worker = EngineWorker(Engine(model, tokenizer, max_rows=8), capacity=16)
    with serving([worker], tokenizer, 128) as (address, _):
        yield address, worker
