"""The rehearsal: it runs what the speedrun would run, in small; what it says of the whole is arithmetic on what it
saw."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from nanochat import paths, rehearsal, runtime
from nanochat.progress import is_due
from nanochat.runtime import kill_family
from scripts import rehearse

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for name in ("NANOCHAT_DATA_MIRROR", "IDENTITY", "SINGLE_HOURS", "WANDB_RUN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def gpus(tmp_path, monkeypatch, count):
    tool = tmp_path / "tools" / "nvidia-smi"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text("#!/bin/sh\n" + "echo '81559, NVIDIA H100 80GB HBM3'\n" * count)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


# -- arithmetic


@pytest.mark.parametrize("num_steps", [1, 7, 10, 100])
@pytest.mark.parametrize("every", [-1, 1, 3, 10, 50, 1000])
def test_measurements_are_counted_as_the_training_loop_makes_them(num_steps, every):
    made = sum(is_due(step, every, step == num_steps) for step in range(num_steps + 1))
    assert rehearsal.times_due(every, num_steps, from_start=False) == made
    assert rehearsal.times_due(every, num_steps, from_start=True) == made + (every > 0)


def log_of(first, count, seconds, wait=0.0):
    """Steps of so many seconds, a part of which is waiting for rows; the first two are slow."""
    return [
        {"step": first + i, "train/dt": (seconds + (5 if i < 2 else 0)) * (1 - wait), "train/data_wait": wait}
        for i in range(count)
    ]


def test_a_training_is_its_start_its_steps_and_its_measurements():
    log = [*log_of(0, 5, 9.0), *log_of(5, 10, 2.0, wait=0.25), {"step": 15, "val/bpb": 1.0, "val/dt": 3.0}]
    found = {"final": {"step": 15}}
    wall = 40 + 10 * 2.0 + 10 + 3.0  # 40 to start, 10 more in the first two steps
    seconds, said = rehearsal.training(Namespace(eval_every=25), found, log, wall, num_steps=100, first=5, share=0.5)
    assert seconds == pytest.approx(
        50 + 100 * 2.0 + 5 * 6.0
    )  # what the first steps take longer, they do in the run, too
    assert "100 steps of 2.0 s, 5 measurements of 6.0 s" in said
    log += [{"step": 20, "val/bpb": 1.0, "val/dt": 1.0}]  # the first measurement was compiled
    seconds, _ = rehearsal.training(Namespace(eval_every=25), found, log, wall + 1, num_steps=100, first=5, share=0.5)
    assert seconds == pytest.approx(52 + 100 * 2.0 + 5 * 2.0)


def test_a_run_that_was_over_before_it_was_killed_has_a_forecast_all_the_same():
    log = [*log_of(0, 5, 1.0), {"step": 5, "val/bpb": 1.0, "val/dt": 3.0}]
    seconds, _ = rehearsal.training(Namespace(eval_every=5), {}, log, 7.0, num_steps=5, first=5)
    assert seconds == 7.0


def test_fine_tuning_on_a_part_of_the_mixture_grows_to_the_whole():
    found = {
        "final": {"step": 10},
        "available": 400,
        "conversations": 100,
        "rendering_seconds": 7.0,
        "num_iterations": 30,
    }
    log = log_of(0, 10, 1.0)
    wall = 20 + 7 + 10 + 10
    args = Namespace(eval_every=-1, num_iterations=-1)
    assert rehearsal.fine_tuning(args, found, log, wall)[0] == pytest.approx(30 + 4 * 7 + 120 * 1.0)
    args = Namespace(eval_every=-1, num_iterations=50)
    assert rehearsal.fine_tuning(args, found, log, wall)[0] == pytest.approx(30 + 4 * 7 + 50 * 1.0)


def test_examinations_grow_to_what_there_is():
    tasks = {
        "a": {"seconds": 2.0, "problems": 64, "available": 640},
        "b": {"seconds": 1.0, "problems": 50, "available": 50},
    }
    assert rehearsal.chat_seconds({"tasks": tasks}, None) == pytest.approx(21)
    assert rehearsal.chat_seconds({"tasks": tasks}, 128) == pytest.approx(5)
    assert rehearsal.chat_evaluation(Namespace(max_problems=None), {"tasks": tasks}, wall=10)[0] == pytest.approx(28)
    core = {"core": {"tasks": {"a": {"seconds": 2.0, "examples": 64, "available": 640}}}}
    assert rehearsal.core_seconds(core, -1) == pytest.approx(20) and rehearsal.core_seconds(core, 32) == pytest.approx(
        1
    )
    found = {**core, "took": {"sample": 1.0, "bpb": 2.0, "core": 2.5}, "bpb_tokens": 100}
    args = Namespace(split_tokens=800, max_per_task=-1)
    assert rehearsal.base_evaluation(args, found, wall=10)[0] == pytest.approx(4.5 + 1 + 16 + 20)


# -- the commands


@pytest.mark.parametrize("profile", ["smoke", "tiny", "single", "gpt2"])
def test_every_command_of_a_profile_is_understood_as_it_is_and_shortened(base, monkeypatch, profile):
    gpus(base, monkeypatch, {"gpt2": 8, "single": 2}.get(profile, 0))
    commands = rehearse.commands_of_speedrun([f"--profile={profile}"])
    assert [command.stage for command in commands if command.module == "scripts.base_train"] == ["03_pretrain"]
    assert {command.stage for command in commands} >= set(rehearse.STAGES) - {"07_rl"}
    for command in commands:
        assert command.ranks == ({"gpt2": 8, "single": 2}.get(profile, 1) if "torchrun" in command.words else 1)
        if command.module.startswith("scripts."):
            real, short = command.parsed(), rehearse.shortened(command)
            rehearsed = rehearse.Command(command.stage, [*command.words, *short]).parsed()
            shape = (
                "depth",
                "total_batch_size",
                "device_batch_size",
                "num_iterations",
                "max_seq_len",
                "fp8",
                "compile",
            )
            assert [getattr(real, name, None) for name in shape] == [getattr(rehearsed, name, None) for name in shape]
    in_the_background = [command.module for command in commands if command.beside]
    assert in_the_background == (["nanochat.dataset"] if profile in ("single", "gpt2") else [])


def test_a_flag_that_a_later_stage_does_not_know_is_found_at_once(base, monkeypatch, capsys):
    found = [
        rehearse.Command("03_pretrain", ["python", "-m", "scripts.base_train", "--depth=2", "--model-tag=t"]),
        rehearse.Command("05_sft", ["python", "-m", "scripts.chat_sft", "--mixtures=tiny"]),
    ]
    monkeypatch.setattr(rehearse, "commands_of_speedrun", lambda flags: found)
    with pytest.raises(SystemExit):
        rehearse.main(rehearse.parse_args([]))
    assert "--mixtures" in capsys.readouterr().err and not (base / "base").exists()


def test_what_fails_is_named_with_the_hour_and_what_needs_it_is_not_tried(base, monkeypatch, capsys):
    found = [
        rehearse.Command("01_data", ["python", "-m", "nanochat.tinyworld", "--megabytes=0.5"]),
        rehearse.Command("02_tokenizer", ["python", "-m", "scripts.tok_train", "--corpus=nowhere", "--vocab-size=512"]),
        rehearse.Command("03_pretrain", ["python", "-m", "scripts.base_train", "--depth=2", "--model-tag=t"]),
    ]
    monkeypatch.setattr(rehearse, "commands_of_speedrun", lambda flags: found)
    with pytest.raises(SystemExit) as ended:
        rehearse.main(rehearse.parse_args([]))
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "WOULD HAVE FAILED, after about" in said and "scripts.tok_train: exit 1: " in said and "nowhere" in said
    assert "scripts.base_train: not tried, because 02_tokenizer failed" in said
    written = json.loads((paths.results_dir("t") / "rehearsal.json").read_text())
    assert written["stages"]["02_tokenizer"]["failed"] and not written["stages"]["01_data"]["failed"]
    assert (base / "base" / "rehearsal" / "logs").is_dir()


def test_shards_that_are_fetched_in_the_rehearsal_are_kept_for_the_run(base, monkeypatch):
    """One more than there are, by the real downloader, and its time is the forecast of the others."""
    stage = rehearse.Rehearsal(paths.base_dir() / "rehearsal", "t")
    command = rehearse.Command("01_data", ["python", "-m", "nanochat.dataset", "-n", "8"])
    asked = []

    def run(command, log, flags, environment=None):
        asked.append((command.words[-1], flags, (environment or stage.environment)["NANOCHAT_BASE_DIR"]))
        if environment:
            folder = paths.corpus_dir("climbmix")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"shard_{int(command.words[-1]) - 1:05d}.parquet").write_text("")
        command.seconds = 4.0

    monkeypatch.setattr(stage, "run", run)
    stage.rehearse(command)
    real, rehearsed = str(paths.base_dir()), str(paths.base_dir() / "rehearsal")
    assert asked == [("1", [], real), ("1", ["-n", "1"], rehearsed)]
    assert stage.forecast(command) == (7 * 4.0, "7 shards of 4.0 s")
    again = rehearse.Command("02_tokenizer", ["python", "-m", "nanochat.dataset", "-n", "20"], beside=True)
    assert stage.forecast(again)[0] == 12 * 4.0  # eight are there by then
    assert stage.environment["NANOCHAT_DATA_MIRROR"] == str(paths.base_dir() / "corpora")


TORCHRUN = """$ python -m torch.distributed.run -m scripts.base_train
W1126 14:02:44.1 25539 torch/distributed/run.py:852] Setting OMP_NUM_THREADS
step 1/9 | loss 5.0\rstep 2/9 | loss 4.9
{said}
W1126 14:02:44.542000 25539 lib/torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 25557 closing
E1126 14:02:44.574000 25539 lib/torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1)
Traceback (most recent call last):
  File "lib/torch/distributed/run.py", line 1032, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
scripts.base_train FAILED
============================================================
"""


def test_the_reason_of_a_failure_is_the_workers_last_word_not_torchruns(tmp_path):
    log = tmp_path / "log"
    log.write_text(TORCHRUN.format(said="no tokenizer at nowhere; make one with: python -m scripts.tok_train"))
    assert rehearsal.reason(log) == "no tokenizer at nowhere; make one with: python -m scripts.tok_train"
    log.write_text("Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\n\n")
    assert rehearsal.reason(log) == rehearsal.last_line(log) == "torch.OutOfMemoryError: CUDA out of memory"
    log.write_text("")
    assert rehearsal.reason(log) == ""


def test_gpus_that_are_not_there_are_not_rehearsed_on(base, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU on this machine")
    with pytest.raises(SystemExit, match="torch sees none here"):
        rehearse.main(rehearse.parse_args(["--profile=gpt2"]))
    assert not (base / "base").exists()


def test_a_disk_that_is_too_small_is_a_failure(base, monkeypatch, capsys):
    found = [
        rehearse.Command("01_data", ["python", "-m", "nanochat.tinyworld", "--megabytes=0.5"]),
        rehearse.Command("03_pretrain", ["python", "-m", "scripts.base_train", "--depth=2", "--model-tag=t"]),
    ]
    monkeypatch.setattr(rehearse, "commands_of_speedrun", lambda flags: found)
    monkeypatch.setattr(rehearse.Rehearsal, "rehearse", lambda self, command: None)
    monkeypatch.setattr(rehearse.Rehearsal, "forecast", lambda self, command: (1.0, ""))
    monkeypatch.setattr(rehearse, "memory_of", lambda commands, place: {"peaks": {}, "there": None})
    monkeypatch.setattr(rehearse, "cost_of", lambda commands, place, seconds: None)
    for free, ends in ((5, True), (50, False)):
        monkeypatch.setattr(rehearse, "disk_of", lambda commands, place, free=free: {"needed": 9e9, "free": free * 1e9})
        if ends:
            with pytest.raises(SystemExit):
                rehearse.main(rehearse.parse_args([]))
        else:
            rehearse.main(rehearse.parse_args([]))
        assert ("DOES NOT FIT" in capsys.readouterr().out) == ends


# -- killing


@pytest.mark.parametrize("by", ["proc", "ps"])
def test_a_family_is_killed_to_the_last(tmp_path, monkeypatch, by):
    """Children in sessions of their own, too, as torchrun's are."""
    if by == "ps":
        if not shutil.which("ps"):
            pytest.skip("no ps on this machine")
        monkeypatch.setattr(runtime.glob, "glob", lambda pattern: [])
    child = f"import time, pathlib; pathlib.Path({str(tmp_path / 'born')!r}).write_text(''); time.sleep(60)"
    parent = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True).wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    deadline = time.time() + 30
    while not (tmp_path / "born").exists() and time.time() < deadline:
        time.sleep(0.05)
    kill_family(process.pid)
    assert process.wait() == -9
    assert process.stdout.read() == b""  # it ends when nobody holds it any more


# -- all of it


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rehearsal_that_is_told_to_end_leaves_no_training_behind(base, number):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scripts.rehearse", "--profile", "smoke"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = paths.base_dir() / "rehearsal" / "logs" / "03_pretrain-base_train.log"
    deadline = time.time() + 120
    while not log.exists() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    family = [child for child, parent in runtime.processes() if parent == process.pid]
    process.send_signal(number)
    said = process.communicate(timeout=30)[0].decode()
    assert process.returncode == 128 + number and family
    assert "stopped at 03_pretrain" in said and "Traceback" not in said
    assert [path.name for path in (paths.base_dir() / "rehearsal").iterdir()] == ["logs"]
    assert not set(family) & {child for child, _ in runtime.processes()}


def test_the_smoke_profile_is_rehearsed_from_end_to_end(base):
    mine = ROOT / "report.md"  # the report of a run, which the rehearsal's may not replace
    before = mine.read_text() if mine.exists() else None
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "scripts.rehearse", "--profile", "smoke"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((paths.results_dir("smoke") / "rehearsal.json").read_text())
    assert list(found["stages"]) == list(rehearse.STAGES)
    assert all(one["forecast"] > 0 and not one["failed"] for one in found["stages"].values())
    assert found["resumed_at"] and found["resumed_at"] % rehearse.SAVE_EVERY == 0
    assert "20 steps of" in found["stages"]["03_pretrain"]["rests_on"]
    assert found["memory"]["peaks"].keys() == {"base_train", "chat_sft"} and found["disk"]["needed"] > 1e5
    assert (mine.read_text() if mine.exists() else None) == before
    # the run that follows finds nothing of it but the logs
    left = sorted(path.name for path in paths.base_dir().iterdir())
    assert left == ["compiled", "rehearsal", "results", "task_data"]
    assert [path.name for path in (paths.base_dir() / "rehearsal").iterdir()] == ["logs"]
    assert [path.name for path in paths.results_dir("").iterdir()] == ["smoke"]
