"""Training that loses nothing: signals, steps that are not finite, memory that runs out, ranks that come and go."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from helpers import CPU, optimizer_of, random_model, small_config
from safetensors.torch import load_file
from small_runs import (
    BASE,
    GENTLE,
    REPOSITORY,
    STEPS,
    TINY,
    Killed,
    assert_same_run,
    complaint,
    kill_in_step,
    lines,
    losses,
    make_world,
    one_thread,
    pretrain,
    rename_model,
    teach,
    torchrun,
)

from nanochat import checkpoint, paths, results, saver, train, training_step
from nanochat.gpt import GPT
from nanochat.memory import DeviceBatch
from scripts import base_train
from tasks import mixtures

ALL = f"--num-iterations {STEPS}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


def steps(tag, stage="base"):
    return checkpoint.list_steps(paths.checkpoint_dir(stage, tag))


def at_step(patch, number, act):
    """act() in the midst of step `number` (from 0)."""
    real, count = training_step.accumulate, iter(range(10**6))

    def accumulate(*args):
        total = real(*args)
        return act(total, *args) if next(count) == number else total

    patch.setattr(training_step, "accumulate", accumulate)


# -- signals


def send(number):
    def act(total, *args):
        os.kill(os.getpid(), number)
        return total

    return act


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_ends_with_its_code_and_says_how_to_go_on(world, monkeypatch, capsys, number):
    tag = f"stopped-by-{number}"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        at_step(patch, 5, send(number))
        pretrain(tag, ALL)
    assert stop.value.code == 128 + number
    assert steps(tag) == [6]
    last = capsys.readouterr().out.splitlines()[-2:]
    assert number.name in last[0] and "step_000006" in last[0] and last[1].endswith("--resume")
    assert results.read(tag, "base_train") is None
    pretrain(tag, f"{ALL} --resume")
    assert_same_run(tag, "d2")


@pytest.mark.parametrize("step", [0, 2, 3, 7, 11])
def test_a_run_that_is_stopped_at_any_step_goes_on_to_the_bit(world, monkeypatch, step):
    """At steps before which bits per byte are due (4, 8, 12) these are measured by the run that goes on."""
    tag = f"stopped-at-{step}"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, step, send(signal.SIGTERM))
        pretrain(tag, f"{ALL} --save-every 4")
    assert steps(tag)[-1] == step + 1
    pretrain(tag, f"{ALL} --save-every 4 --resume")
    assert_same_run(tag, "d2")


def test_a_run_that_is_killed_in_the_step_after_a_stop_logs_nothing_twice(world, monkeypatch):
    """Stopped before bits per byte were measured; the next life measures them, and is killed before it saves."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 3, send(signal.SIGTERM))
        pretrain("stop-kill", ALL)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_step(patch, 1)
        pretrain("stop-kill", f"{ALL} --resume")
    assert [line["step"] for line in lines("stop-kill") if "val/bpb" in line] == [0, 4]
    pretrain("stop-kill", f"{ALL} --resume")
    assert_same_run("stop-kill", "d2")


def test_sft_is_stopped_and_goes_on_to_the_bit(world, monkeypatch):
    for tag in ("pupil", "truant"):
        shutil.copytree(paths.checkpoint_dir("base", "d2"), paths.checkpoint_dir("base", tag))
        rename_model(tag)
    teach("pupil", "--save-every 4")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 5, send(signal.SIGINT))
        teach("truant")
    assert steps("truant", "sft") == [6]
    teach("truant", "--resume")
    assert_same_run("truant", "pupil", "sft")
    for path in paths.results_dir("truant").glob("chat_sft*"):
        path.write_bytes((paths.results_dir("pupil") / path.name).read_bytes())
    shutil.rmtree(paths.checkpoint_dir("sft", "truant"))
    shutil.copytree(paths.checkpoint_dir("sft", "pupil"), paths.checkpoint_dir("sft", "truant"))
    teach("truant", "--save-every 4 --resume-from-step 4")
    assert_same_run("truant", "pupil", "sft")


def test_sft_does_not_go_on_with_other_conversations_or_another_base(world, monkeypatch):
    teach("d2", "--num-iterations 2 --eval-every -1")
    monkeypatch.setattr(mixtures, "TINY", {**TINY, "facts": 41})
    assert "rows" in complaint(teach, "d2", "--num-iterations 3 --eval-every -1 --resume")
    monkeypatch.setattr(mixtures, "TINY", TINY)
    assert "base" in complaint(teach, "d2", "--num-iterations 3 --eval-every -1 --resume --model-step 8")


LONG = f"{BASE} {GENTLE} --num-iterations 100000 --eval-every -1"


@pytest.fixture
def running():
    """start(command) -> a process in a session of its own; what a failing test leaves behind is killed, torchrun's
    ranks too."""
    started = []

    def start(command):
        how = dict(cwd=REPOSITORY, env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(subprocess.Popen(command, start_new_session=True, **how))
        return started[-1]

    yield start
    for run in started:
        for pid in [*workers(run), run.pid] if run.poll() is None else []:
            os.kill(pid, signal.SIGKILL)


def long_run(running, tag, ranks, more=""):
    """A run that would take for ever, in processes of its own; returns once it has logged a few steps."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "scripts.base_train", *f"{LONG} --model-tag {tag} {more}".split()]
    run = running(command)
    log = paths.results_dir(tag) / "base_train.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 5):
        assert run.poll() is None and time.time() < deadline, run.communicate()[0]
        time.sleep(0.1)
    return run


def workers(run):
    """The processes that torchrun started."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid, parent in zip(listed[::2], listed[1::2], strict=True) if int(parent) == run.pid]


def test_a_second_ctrl_c_ends_the_run_at_once(world, tmp_path, running):
    slow = tmp_path / "slow.py"  # a step that takes longer than anybody waits
    slow.write_text(
        "import sys, time\nfrom nanochat import training_step\nfrom scripts import base_train\n"
        "def accumulate(*args):\n    print('in a step', flush=True)\n    time.sleep(600)\n"
        "training_step.accumulate = accumulate\nbase_train.main(base_train.parse_args(sys.argv[1:]))\n"
    )
    run = running([sys.executable, str(slow), *f"{LONG} --model-tag twice".split()])
    while "in a step" not in (line := run.stdout.readline()):
        assert line, "the run ended"
    run.send_signal(signal.SIGINT)
    while "SIGINT" not in (line := run.stdout.readline()):
        assert line, "the run ended"
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGINT


def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_step(world, running):
    run = long_run(running, "one-of-two", 2)
    os.kill(workers(run)[-1], signal.SIGUSR1)
    said = run.communicate(timeout=120)[0]
    assert run.returncode != 0 and said.count("SIGUSR1: stopped after step") == 1, said
    (step,) = steps("one-of-two")
    assert f"stopped after step {step}, saved" in said and "--resume" in said
    assert len(losses("one-of-two")) == step
    assert len(list(checkpoint.find("base", "one-of-two").glob("optim_*"))) == 2


def test_a_rank_that_dies_is_named(world, running):
    run = long_run(running, "two-of-three", 3, "--total-batch-size 768")
    victim = sorted(workers(run))[1]
    rank = int(re.search(r"\0RANK=(\d)\0", open(f"/proc/{victim}/environ").read())[1]) if os.path.exists("/proc") else 1
    os.kill(victim, signal.SIGKILL)
    said = run.communicate(timeout=120)[0]
    others = {0, 1, 2} - {rank}
    for other in others:
        assert f"rank {other}: rank {rank} of 3 does not answer" in said, said
    assert "--resume" in said


def test_a_signal_in_the_last_measurement_ends_the_run_before_its_examination(world, monkeypatch):
    real = base_train.bits_per_byte

    def measured(*args):
        if len(losses("late")) == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(base_train, "bits_per_byte", measured)
    monkeypatch.setattr(base_train, "core_bundle", lambda *args: None)
    monkeypatch.setattr(base_train, "evaluate_core", lambda *args: pytest.fail("examined"))
    with pytest.raises(SystemExit) as stop:
        pretrain("late", f"{ALL} --core-metric-every 100")
    assert stop.value.code == 143 and steps("late") == [STEPS]


# -- what is kept


def test_checkpoints_by_the_clock_and_the_newest_kept(world, monkeypatch):
    pretrain("clock", f"{ALL} --save-minutes 1e-9 --keep 2")
    kept = steps("clock")
    assert kept[-1] == STEPS and len(kept) == 2
    assert not list(paths.checkpoint_dir("base", "clock").glob(".*"))
    assert_same_run("clock", "d2")


def test_a_full_disk_does_not_stop_the_training(world, monkeypatch, capsys):
    def full(tensors, path):
        if "_000008" in str(path):
            raise OSError(28, "No space left on device")
        return save_file(tensors, path)

    save_file = saver.save_file
    monkeypatch.setattr(saver, "save_file", full)
    pretrain("full", f"{ALL} --save-every 4")
    assert capsys.readouterr().out.count("WARNING: step 8 could not be saved") == 1
    assert steps("full") == [4, 12]
    assert_same_run("full", "d2")


def test_an_examination_that_fails_loses_nothing(world, monkeypatch):
    monkeypatch.setattr(base_train, "core_bundle", lambda *args: None)
    monkeypatch.setattr(base_train, "evaluate_core", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain("failing", f"{ALL} --core-metric-every 4")
    assert steps("failing") == [4]  # saved for the examination


def test_the_log_is_cut_from_its_end(world, tmp_path, monkeypatch):
    """However long the log, a resume reads only what it drops."""
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"step": {n}, "train/loss": 1.0}}\n' for n in range(5000)) + '{"step": 50')
    read, precedes = [], results._precedes
    monkeypatch.setattr(results, "_precedes", lambda line, *rest: (read.append(line), precedes(line, *rest))[1])
    results.cut(log, 4990, 4990)
    assert log.read_text().endswith('{"step": 4989, "train/loss": 1.0}\n') and len(read) == 12
    for text in ("", '{"step": 1'):
        log.write_text(text)
        results.cut(log, 5, 5)
        assert log.read_text() == ""


# -- steps that are not finite


def spoil(total, model, optimizer, *args):
    """A gradient that overflowed."""
    optimizer.groups[-1]["named"][0][1].grad[0, 0] = float("inf")
    return total


@pytest.mark.parametrize("act", [lambda total, *args: total * float("nan"), spoil], ids=["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_before_it_does_harm(world, monkeypatch, capsys, act):
    with monkeypatch.context() as patch:
        at_step(patch, 6, act)
        with pytest.raises(SystemExit) as stop:
            pretrain("nan", f"{ALL} --save-every 4")
    assert stop.value.code == 1
    message = capsys.readouterr().out.splitlines()[-1]
    assert "step 6" in message and "rank 0" in message and "--on-nan skip" in message
    assert f"{paths.checkpoint_dir('base', 'nan') / 'step_000004'}" in message
    assert steps("nan") == [4]
    pretrain("nan", f"{ALL} --save-every 4 --resume")
    assert_same_run("nan", "d2")


def test_a_step_that_is_not_finite_can_be_left_out(world, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 6, spoil)
        pretrain("skips", f"{ALL} --on-nan skip --save-every 4")
    assert "step 6: the loss or a gradient of rank 0 is not finite; the step is left out" in capsys.readouterr().out
    logged = [line for line in lines("skips") if "train/loss" in line]
    assert [line.get("train/skipped") for line in logged] == [None] * 6 + [1] * 6
    assert results.read("skips", "base_train")["final"]["skipped_steps"] == 1
    assert checkpoint.read_meta(checkpoint.find("base", "skips"))["optimizer_steps"] == STEPS - 1
    assert losses("skips")[:7] == losses("d2")[:7] and losses("skips")[7:] != losses("d2")[7:]
    weights = load_file(checkpoint.find("base", "skips") / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_run_that_is_shorter_than_its_checkpoint_is_refused(world):
    shutil.copytree(paths.checkpoint_dir("base", "d2"), paths.checkpoint_dir("base", "short"))
    message = complaint(pretrain, "short", "--num-iterations 10 --resume")
    assert "12" in message and "--num-iterations" in message
    assert steps("short") == [4, 8, 12]


def test_a_run_that_is_nothing_but_skips_gives_up(world, monkeypatch, capsys):
    monkeypatch.setattr(training_step, "accumulate", lambda *args: torch.tensor(float("nan")))
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: torch.tensor(0.0))
    with pytest.raises(SystemExit):
        pretrain("hopeless", "--num-iterations 50 --on-nan skip --eval-every -1")
    message = capsys.readouterr().out.splitlines()[-1]
    assert f"step {train.MAX_SKIPPED}" in message and "no checkpoint" in message
    assert "10 steps in a row" in message and "--on-nan" not in message


def test_all_ranks_skip_what_one_of_them_saw(world, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom nanochat import training_step\nfrom scripts import base_train\n"
        "real, count = training_step.accumulate, iter(range(100))\n"
        "def accumulate(*args):\n"
        "    total = real(*args)\n"
        "    return total * float('nan') if next(count) == 2 and os.environ['RANK'] == '1' else total\n"
        "training_step.accumulate = accumulate\nbase_train.main(base_train.parse_args(sys.argv[1:]))\n"
    )
    flags = f"{BASE} {GENTLE} --num-iterations 5 --eval-every -1 --on-nan skip --model-tag one-skips".split()
    assert "step 2: the loss or a gradient of rank 1 is not finite" in torchrun(str(program), *flags)
    assert len(losses("one-skips")) == 5 and losses("one-skips")[2] is None


def test_float16_scales_its_losses_and_skips_what_overflows(world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    with monkeypatch.context() as patch:
        at_step(patch, 2, spoil)
        pretrain("half", "--num-iterations 6 --save-every 2 --eval-every -1")
    progress = checkpoint.read_meta(checkpoint.find("base", "half"))["progress"]
    assert (progress["loss_scale"], progress["scaled_steps"], progress["skipped"]) == (2.0**14, 3, 0)
    assert losses("half")[-1] < losses("half")[0]
    with monkeypatch.context() as patch:
        at_step(patch, 2, spoil)
        kill_in_step(patch, 5)
        with pytest.raises(Killed):
            pretrain("half-killed", "--num-iterations 6 --save-every 2 --eval-every -1")
    pretrain("half-killed", "--num-iterations 6 --save-every 2 --eval-every -1 --resume")
    assert_same_run("half-killed", "half")


# -- memory that runs out


class Small:
    """A device that holds only so many rows."""

    def __init__(self, patch, rows):
        self.rows, self.tried = rows, []
        real = GPT.forward

        def forward(model, idx, targets=None, *args, **kwargs):
            if targets is not None and torch.is_grad_enabled():
                self.tried.append(len(idx))
                if len(idx) > self.rows:
                    real(model, idx, targets, *args, **kwargs).backward()  # a part is done already
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return real(model, idx, targets, *args, **kwargs)

        patch.setattr(GPT, "forward", forward)


def test_a_device_batch_that_does_not_fit_is_halved_and_the_step_begun_again(world, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        small = Small(patch, 2)
        pretrain("halved", f"{ALL} --device-batch-size 8 --save-every 4")
    assert small.tried[:4] == [8, 4, 2, 2] and set(small.tried[2:]) == {2}
    said = capsys.readouterr().out
    assert "out of memory with 8 rows at once; going on with 4" in said and said.count("going on with") == 2
    assert checkpoint.read_meta(checkpoint.find("base", "halved"))["device_batch_size"] == 2
    pretrain("two-rows", f"{ALL} --device-batch-size 2 --save-every 4")
    assert losses("halved") == losses("two-rows")


def test_nothing_of_a_step_that_ran_out_of_memory_outlives_it():
    """It ends in the backward pass, where the graph is at its largest; the next try begins without it."""
    graphs, alive = [], []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            graphs.append(weakref.ref(kept := x * 2))
            ctx.save_for_backward(kept)
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            if len(graphs) < 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return grad * ctx.saved_tensors[0]

    def model(x, y, loss_reduction):
        alive.append([graph for graph in graphs if graph() is not None])
        return Node.apply(x.float().requires_grad_())

    rows = torch.ones(8, 4)
    device_batch = DeviceBatch(8, CPU)
    optimizer = optimizer_of(random_model(small_config(64)))
    training_step.accumulate(model, optimizer, (rows, rows), device_batch, 1.0, torch.tensor(3))
    assert device_batch.rows == 2 and alive[:3] == [[], [], []]


def test_one_row_that_does_not_fit_says_what_to_do(world, monkeypatch):
    Small(monkeypatch, 0)
    message = complaint(pretrain, "huge", f"{ALL} --eval-every -1")
    assert "--depth" in message and "--max-seq-len" in message


def test_another_error_is_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        DeviceBatch(8, None).halve(RuntimeError("shapes do not match"))


# -- another number of ranks


def test_a_run_goes_on_with_other_numbers_of_ranks_in_float64(world):
    """20 steps, on 1 rank; and on 2, 3, 1, 4 ranks in turn: rows, weights and moments are the same to 1e-9."""
    program = str(REPOSITORY / "tests" / "elastic.py")
    alone = torchrun(program, "alone", "20", ranks=1)
    together = "".join(
        torchrun(program, "turns", str(last), ranks=ranks) for ranks, last in ((2, 5), (3, 11), (1, 14), (4, 20))
    )
    seen = [re.findall(r"^rows .*", said, flags=re.M) for said in (alone, together)]
    assert len(seen[0]) == 20 and seen[0] == seen[1]
    one, other = (checkpoint.find("base", tag, 20) for tag in ("alone", "turns"))
    weights, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights["lm_head.weight"].dtype == torch.float64
    assert max((weights[name] - others[name]).abs().max().item() for name in weights) < 1e-9
    moved = load_file(checkpoint.find("base", "turns", 5) / "model.safetensors")
    assert max((weights[name] - moved[name]).abs().max().item() for name in weights) > 1e-3


def test_a_run_goes_on_with_other_numbers_of_ranks_in_float32(world):
    flags = f"{BASE} {GENTLE} --total-batch-size 768 --num-iterations 20 --save-every 7 --eval-every -1 --model-tag"
    pretrain("still", f"{GENTLE} --total-batch-size 768 --num-iterations 20 --eval-every -1")
    torchrun("-m", "scripts.base_train", "--", *f"{flags} moving".split(), ranks=3)
    for step, ranks in ((7, 2), (14, 1)):
        again = f"{flags} moving --resume-from-step {step}".split()
        torchrun("-m", "scripts.base_train", "--", *again, ranks=ranks)
    assert losses("moving") == pytest.approx(losses("still"), rel=1e-3)
    assert checkpoint.read_meta(checkpoint.find("base", "moving"))["environment"]["world_size"] == 1
