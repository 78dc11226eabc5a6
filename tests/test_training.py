"""Pretraining as a person runs it, at depth 2: it learns, goes on where it was killed, and divides among ranks."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    BASE,
    GENTLE,
    REPOSITORY,
    STEPS,
    Killed,
    assert_same_files,
    assert_same_run,
    kill_in_step,
    lines,
    losses,
    make_world,
    one_thread,
    pretrain,
    the_tokenizer,
    torchrun,
)

from nanochat import batches, checkpoint, dataset, paths, results, train
from scripts import base_train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


def test_the_loss_falls(world):
    assert len(losses("d2")) == STEPS
    assert losses("d2")[-1] < losses("d2")[0] - 1
    bpb = {line["step"]: line["val/bpb"] for line in lines("d2") if "val/bpb" in line}
    assert list(bpb) == [0, 4, 8, 12]  # before the first step and after the last, too
    assert bpb[12] < bpb[0] - 0.5


def test_the_first_loss_is_that_of_guessing(world):
    assert abs(losses("d2")[0] - torch.log(torch.tensor(512.0)).item()) < 0.1


def test_the_results_of_pretraining_hold_what_the_report_reads(world):
    written = results.read("d2", "base_train")
    assert {"stage", "tag", "command", "started", "seconds", "environment", "config"} <= written.keys()
    assert (written["stage"], written["tag"]) == ("base_train", "d2")
    assert {"plan", "model", "tokenizer", "corpus", "final"} <= written.keys()
    assert {"config", "counts"} <= written["model"].keys()
    assert (written["tokenizer"], written["corpus"]) == ("tinyworld-512", "tinyworld")
    final = written["final"]
    assert final.keys() >= {
        *("step", "train_loss", "val_bpb", "min_val_bpb", "core_metric", "tok_per_sec", "mfu"),
        *("peak_memory_bytes", "total_training_flops", "tokens", "total_training_time"),
    }
    assert final["step"] == STEPS and final["tokens"] == STEPS * 512
    environment = written["environment"].keys()
    assert environment >= {"git_commit", "nanochat", "torch", "python", "platform", "device", "world_size", "dtype"}
    assert written["config"]["depth"] == 2
    last = [line for line in lines("d2") if "train/loss" in line][-1]
    assert final["train_loss"] == last["train/loss"]
    assert final["total_training_flops"] == last["total_training_flops"]


def test_the_shown_loss_is_the_debiased_average_of_all_steps(world):
    average, shown = 0.0, [line["train/loss"] for line in lines("d2") if "train/loss" in line]
    for n, (loss, smooth) in enumerate(zip(losses("d2"), shown, strict=True), 1):
        average = 0.9 * average + 0.1 * loss
        assert smooth == pytest.approx(average / (1 - 0.9**n))


def test_a_run_is_the_same_every_time_and_saving_does_not_touch_it(world):
    pretrain("again", f"--num-iterations {STEPS}")
    assert_same_run("again", "d2")
    assert checkpoint.list_steps(paths.checkpoint_dir("base", "again")) == [STEPS]


@pytest.mark.parametrize("step", [2, 5, 8, 9, 12])
def test_a_run_that_is_killed_and_resumed_equals_one_that_was_not(world, monkeypatch, step):
    tag = f"killed{step}"
    with monkeypatch.context() as patch:
        kill_in_step(patch, step)
        with pytest.raises(Killed):
            pretrain(tag, f"--num-iterations {STEPS} --save-every 4")
    assert results.read(tag, "base_train") is None
    pretrain(tag, f"--num-iterations {STEPS} --save-every 4 --resume")
    assert_same_run(tag, "d2")


def test_a_run_that_is_killed_twice_equals_one_that_was_not(world, monkeypatch):
    for _ in range(2):
        with monkeypatch.context() as patch:
            kill_in_step(patch, 6)
            with pytest.raises(Killed):
                pretrain("twice", f"--num-iterations {STEPS} --save-every 4 --resume")
    assert checkpoint.list_steps(paths.checkpoint_dir("base", "twice")) == [4, 8]
    pretrain("twice", f"--num-iterations {STEPS} --save-every 4 --resume")
    assert_same_run("twice", "d2")


def test_a_run_in_slots_equals_one_in_one_piece(world):
    """--stop-after ends a process, not the run: schedules are of the whole, and a slot ends saved and measured."""
    for more, step in (("--stop-after 5", 5), ("--stop-after 4 --resume", 9), ("--stop-after 100 --resume", STEPS)):
        pretrain("slots", f"--num-iterations {STEPS} {more}")
        told = results.read("slots", "base_train")
        assert (told["final"]["step"], told["plan"]["num_iterations"]) == (step, STEPS)
        assert told["final"]["val_bpb"] is not None
        assert checkpoint.find("base", "slots").name == f"step_{step:06d}"
    assert losses("slots") == losses("d2")
    assert_same_files(checkpoint.find("base", "slots"), checkpoint.find("base", "d2"))


def test_going_on_from_a_given_step_makes_the_later_ones_again(world):
    folder = paths.checkpoint_dir("base", "given")
    shutil.copytree(paths.checkpoint_dir("base", "d2"), folder)
    shutil.copytree(paths.results_dir("d2"), paths.results_dir("given"))
    pretrain("given", f"--num-iterations {STEPS} --save-every 4 --resume-from-step 4")
    assert_same_run("given", "d2")


def test_resuming_a_finished_run_changes_nothing(world):
    shutil.copytree(paths.checkpoint_dir("base", "d2"), paths.checkpoint_dir("base", "finished"))
    shutil.copytree(paths.results_dir("d2"), paths.results_dir("finished"))
    pretrain("finished", f"--num-iterations {STEPS} --save-every 4 --resume")
    assert_same_run("finished", "d2")


def test_a_process_that_dies_while_it_saves_goes_on_from_the_last_whole_checkpoint(world):
    """A true SIGKILL, in the middle of the files of step 8."""
    program = """if True:
        import os, signal, sys
        from nanochat import saver
        from scripts import base_train
        save_file = saver.save_file
        def dying(tensors, path):
            if "000008" in str(path) and "model" in str(path):
                open(path, "wb").write(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            save_file(tensors, path)
        saver.save_file = dying
        base_train.main(base_train.parse_args(sys.argv[1:]))
        """
    flags = f"{GENTLE} --num-iterations {STEPS} --save-every 4"
    command = f"{BASE} {flags} --model-tag sigkill --resume".split()
    how = dict(cwd=REPOSITORY, capture_output=True, env=one_thread())
    died = subprocess.run([sys.executable, "-c", program, *command], **how)
    assert died.returncode == -9, died.stderr.decode()
    assert checkpoint.list_steps(paths.checkpoint_dir("base", "sigkill")) == [4]
    pretrain("sigkill", f"{flags} --resume")
    pretrain("alive", flags)
    assert losses("sigkill") == pytest.approx(losses("alive"), rel=1e-4)  # another process may have other threads
    assert not list(paths.checkpoint_dir("base", "sigkill").glob(".*"))


def test_a_log_whose_last_line_was_torn_does_not_stop_a_resume(world, monkeypatch):
    with monkeypatch.context() as patch:
        kill_in_step(patch, 6)
        with pytest.raises(Killed):
            pretrain("torn", f"--num-iterations {STEPS} --save-every 4")
    with open(paths.results_dir("torn") / "base_train.jsonl", "a") as log:
        log.write('{"step": 5, "train/lo')
    pretrain("torn", f"--num-iterations {STEPS} --save-every 4 --resume")
    assert_same_run("torn", "d2")


def test_shards_that_arrive_later_do_not_join_a_run_that_is_resumed(world, monkeypatch):
    pretrain("one-shard", f"--num-iterations {STEPS} --num-files 1")
    assert losses("one-shard") != losses("d2")
    with monkeypatch.context() as patch:
        kill_in_step(patch, 6)
        with pytest.raises(Killed):
            pretrain("later", f"--num-iterations {STEPS} --save-every 4 --num-files 1")
    pretrain("later", f"--num-iterations {STEPS} --save-every 4 --resume")
    assert_same_run("later", "one-shard")


def test_a_fresh_run_sets_the_older_model_aside(world):
    pretrain("fresh", "--num-iterations 2")
    before = load_file(checkpoint.find("base", "fresh") / "model.safetensors")
    pretrain("fresh", "--num-iterations 3")
    assert checkpoint.list_steps(paths.checkpoint_dir("base", "fresh")) == [3]
    (aside,) = paths.checkpoint_dir("base").glob("fresh.*")
    after = load_file(aside / "step_000002" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert checkpoint.find("base").parent.name == "d2"


def test_fresh_runs_in_quick_succession_each_keep_the_older_one(world):
    for _ in range(4):
        pretrain("quick", "--num-iterations 1 --eval-every -1")
    kept = [checkpoint.list_steps(path) for path in paths.checkpoint_dir("base").glob("quick*")]
    assert kept == [[1]] * 4


def test_the_device_batch_does_not_change_the_steps(world):
    for rows in (4, 1, 2, 8, 100):
        pretrain(f"device{rows}", f"{GENTLE} --num-iterations 8 --device-batch-size {rows} --eval-every -1")
        assert losses(f"device{rows}")[0] == pytest.approx(losses("device4")[0], rel=1e-6)
        assert losses(f"device{rows}") == pytest.approx(losses("device4"), rel=1e-4)
    assert losses("device4")[-1] < losses("device4")[0] - 0.1


def test_another_seed_is_another_run(world):
    pretrain("seed", "--num-iterations 2 --seed 7")
    assert losses("seed")[0] != losses("d2")[0]


def test_a_run_in_order_reads_the_corpus_from_its_beginning(world, monkeypatch):
    seen = []
    step = train.optimizer_step

    def watched(model, optimizer, batch, *args):
        seen.append(batch[0])
        return step(model, optimizer, batch, *args)

    monkeypatch.setattr(train, "optimizer_step", watched)
    pretrain("ordered", "--num-iterations 2 --in-order --eval-every -1")
    files = dataset.token_files("tinyworld", the_tokenizer().fingerprint, "train")
    rows = batches.TextRows(files, 64, the_tokenizer().bos, 512, seed=None)
    assert torch.equal(torch.cat(seen), rows.read(0, 16)[0])
    with pytest.raises(SystemExit, match="--resume"):
        pretrain("ordered", "--num-iterations 4 --resume")


def test_smear_begins_where_it_is_told(world):
    pretrain("smear", "--num-iterations 1 --eval-every -1 --smear-init 2 --smear-lr 0.001")
    smear = load_file(checkpoint.find("base", "smear") / "model.safetensors")["smear_lambda"]
    assert smear.item() == pytest.approx(2, abs=0.01)


def test_a_run_in_bfloat16_that_is_killed_and_resumed_equals_one_that_was_not(world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    flags = "--num-iterations 6 --save-every 2 --eval-every -1"
    pretrain("half", flags)
    with monkeypatch.context() as patch:
        kill_in_step(patch, 4)
        with pytest.raises(Killed):
            pretrain("half-killed", flags)
    pretrain("half-killed", f"{flags} --resume")
    assert_same_run("half-killed", "half")
    assert losses("half")[-1] < losses("half")[0] - 0.5
    weights = load_file(checkpoint.find("base", "half") / "model.safetensors")
    assert weights["transformer.wte.weight"].dtype == torch.bfloat16
    assert weights["lm_head.weight"].dtype == torch.float32


def test_training_asks_for_the_dtype_of_training_and_says_when_it_changes(world, monkeypatch, capsys):
    monkeypatch.delenv("NANOCHAT_DTYPE")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    pretrain("native", "--num-iterations 2 --save-every 1 --eval-every -1")
    assert results.read("native", "base_train")["environment"]["dtype"] == "bfloat16"
    assert "going on in" not in capsys.readouterr().out
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    pretrain("native", "--num-iterations 2 --eval-every -1 --resume-from-step 1")
    assert "NANOCHAT_DTYPE=bfloat16 keeps it" in capsys.readouterr().out


def test_two_ranks_train_in_bfloat16(world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    flags = f"{BASE} {GENTLE} --num-iterations 4 --eval-every -1 --model-tag".split()
    torchrun("-m", "scripts.base_train", "--", *flags, "half-ranks")
    base_train.main(base_train.parse_args([*flags, "half-rank"]))
    assert losses("half-ranks") == pytest.approx(losses("half-rank"), rel=0.01)


def test_an_epoch_ends_and_another_begins(world):
    pretrain(
        "epochs", "--num-iterations 70 --num-files 1 --eval-every -1 --total-batch-size 1024 --device-batch-size 16"
    )
    epochs = [line["train/epoch"] for line in lines("epochs")]
    assert epochs[-1] > 1 and epochs == sorted(epochs)
    assert losses("epochs")[-1] < losses("d2")[-1]


def test_two_ranks_take_the_steps_of_one_and_either_resumes_the_other(world):
    flags = f"{BASE} {GENTLE} --num-iterations 8 --save-every 4 --model-tag".split()
    said = torchrun("-m", "scripts.base_train", "--", *flags, "ranks")
    assert said.count("validation bits per byte") == 3  # one rank speaks
    base_train.main(base_train.parse_args([*flags, "rank"]))
    alone, together = lines("rank"), lines("ranks")
    assert losses("ranks") == pytest.approx(losses("rank"), rel=1e-4)
    assert losses("ranks")[0] == pytest.approx(losses("rank")[0], rel=1e-5)  # the same weights saw the same rows
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys() and one["step"] == two["step"]
        if "val/bpb" in one:
            assert two["val/bpb"] == pytest.approx(one["val/bpb"], rel=1e-4)
    folder = paths.checkpoint_dir("base", "ranks")
    assert len(list((folder / "step_000004").glob("optim_*"))) == 2
    pretrain("ranks", f"{GENTLE} --num-iterations 8 --save-every 4 --resume-from-step 4")
    assert losses("ranks") == pytest.approx(losses("rank"), rel=1e-4)
