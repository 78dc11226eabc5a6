"""Saving beside the training: complete or not there, whatever happens to the process, the disk or a rank."""

import errno
import json
import os
import shutil
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    CPU,
    MERGES,
    all_ranks,
    byte_tokenizer,
    optimizer_of,
    random_model,
    rank_of,
    save_checkpoint,
    small_config,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from nanochat import checkpoint, saver
from nanochat.runtime import StopSignals
from nanochat.saver import Saver

CONFIG = small_config(byte_tokenizer(MERGES).vocab_size, n_layer=3)


@pytest.fixture
def model():
    return random_model(CONFIG, seed=3)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "base_checkpoints" / "d2"


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until the gate is set."""
    gate, write = threading.Event(), saver.write
    monkeypatch.setattr(saver, "write", lambda *args: (gate.wait(60), write(*args)))
    yield gate
    gate.set()


def step(one):
    """What a training step does for the saver."""
    one.heard(one.news())


def until_written(one):
    while one.writing is not None:
        step(one)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- beside the training


def test_a_save_is_complete_at_the_step_after_it_is_written(folder, model, gate):
    one = Saver(folder, model, optimizer_of(model), CPU)
    one.save(10, {})
    step(one)
    assert checkpoint.list_steps(folder) == []  # the loop went on, nothing is listed yet
    gate.set()
    one.writing.result()
    assert checkpoint.list_steps(folder) == []
    step(one)
    assert names(folder) == ["step_000010"]


def test_what_is_saved_is_the_state_at_the_time_of_saving(folder, model, gate):
    optimizer = optimizer_of(model)
    one = Saver(folder, model, optimizer, CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = optimizer.state["lm_head.weight"]["exp_avg"].fill_(0.5).clone()
    one.save(10, {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    optimizer.state["lm_head.weight"]["exp_avg"].zero_()
    gate.set()
    assert one.finish()
    written = load_file(folder / "step_000010" / "model.safetensors")
    assert written.keys() == before.keys() and all(torch.equal(written[name], before[name]) for name in before)
    states = load_file(folder / "step_000010" / "optim_00000.safetensors")
    (saved,) = [tensor for key, tensor in states.items() if key.startswith("lm_head.weight:exp_avg:")]
    assert torch.equal(saved, moments)


def test_the_thread_that_saves_makes_no_team_of_threads_of_its_own(folder):
    """With more OpenMP threads than cores, those of the training sleep between regions: a third of a step's time."""
    if not os.path.exists("/proc/self/task"):
        pytest.skip("no /proc")
    large = random_model(small_config(512, n_embd=512))
    torch.zeros(1 << 20).add_(1)  # the training's own team
    before = len(os.listdir("/proc/self/task"))
    one = Saver(folder, large, optimizer_of(large), CPU)
    one.save(10, {})
    assert one.finish()
    assert len(os.listdir("/proc/self/task")) <= before + 1


def test_a_second_save_waits_for_the_first(folder, model, gate):
    one = Saver(folder, model, None, CPU)
    one.save(10, {})
    second = threading.Thread(target=one.save, args=(20, {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join()
    assert checkpoint.list_steps(folder) == [10]
    assert one.finish() and checkpoint.list_steps(folder) == [10, 20]


def test_the_meta_holds_what_a_reader_wants_to_know(folder, model):
    save_checkpoint(folder, 10, model, optimizer_of(model), {"tag": "d2", "progress": {"step": 10}}, CPU)
    meta = checkpoint.read_meta(folder / "step_000010")
    assert (meta["format_version"], meta["step"], meta["tag"]) == (checkpoint.FORMAT_VERSION, 10, "d2")
    assert {"saved", "dtype", "rng", "environment", "optimizer_steps", "progress"} <= meta.keys()
    assert {"git_commit", "torch", "python", "nanochat", "world_size"} <= meta["environment"].keys()


def test_generators_go_on_where_they_stood(folder, model):
    torch.manual_seed(5)
    save_checkpoint(folder, 10, model, None, {}, CPU)
    expected = torch.rand(3)
    torch.manual_seed(6)
    checkpoint.restore_rng(checkpoint.read_meta(folder / "step_000010"), CPU)
    assert torch.equal(torch.rand(3), expected)
    checkpoint.restore_rng(checkpoint.read_meta(folder / "step_000010"), rank_of(3, 4))  # the run had one rank
    assert torch.equal(torch.rand(3), expected)


# -- when


def test_saves_fall_due_by_steps_by_the_clock_and_at_the_end(folder, model, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(saver, "time", clock)
    one = Saver(folder, model, None, CPU, saved=4, every=4, minutes=2)
    step(one)
    assert [n for n in range(10) if one.due(n, False)] == [8]  # 4 is on disk already
    assert one.due(9, True)
    clock.now = 121.0
    step(one)
    assert one.due(5, False)
    one.save(5, {})
    step(one)
    assert not one.due(6, False) and not one.due(5, True)
    assert one.finish()
    never = Saver(folder, model, None, CPU)
    clock.now = 1e6
    step(never)
    assert not any(never.due(n, False) for n in range(10)) and never.due(10, True)


def test_the_clock_of_the_first_rank_decides_for_all(folder, model, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(saver, "time", clock)

    def work(rank):
        one = Saver(folder, model, None, rank_of(rank, 2), minutes=1)
        clock.now = 61.0
        return one.news()

    assert [news[0] for news in all_ranks(2, monkeypatch, work)] == [1.0, 0.0]


# -- rotation


def test_the_newest_are_kept(folder, model):
    one = Saver(folder, model, None, CPU, keep=2)
    for number in (8, 9, 10, 100):
        one.save(number, {})
        assert one.finish()
    one.thread.shutdown()
    assert names(folder) == ["step_000010", "step_000100"]


def test_an_old_checkpoint_is_not_listed_while_its_files_go_away(folder, model, monkeypatch):
    listed = []
    rmtree = shutil.rmtree

    def watched(path, **how):
        listed.append((os.path.basename(path), checkpoint.list_steps(folder)))
        rmtree(path, **how)

    monkeypatch.setattr(shutil, "rmtree", watched)
    one = Saver(folder, model, None, CPU, keep=1)
    for number in (1, 2):
        one.save(number, {})
        assert one.finish()
    one.thread.shutdown()
    assert listed == [(".step_000001.old", [2])]


# -- killed


@pytest.mark.parametrize("stop_at", range(1, 10))
def test_a_save_that_is_killed_leaves_the_older_checkpoints_only(folder, model, monkeypatch, stop_at):
    """At every call that touches the disk; the next run cleans up and saves."""
    optimizer = optimizer_of(model)
    save_checkpoint(folder, 10, model, optimizer, {}, CPU)

    class Killed(BaseException):
        pass

    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function.__name__)
            if len(calls) == stop_at:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(saver, "save_file", counted(saver.save_file))
        patch.setattr(saver.json, "dumps", counted(json.dumps))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "rename", counted(os.rename))
        try:
            save_checkpoint(folder, 20, model, optimizer, {}, CPU)
        except Killed:
            assert checkpoint.list_steps(folder) in ([10], [10, 20])
        assert stop_at <= len(calls) + 1
    for number in checkpoint.list_steps(folder):
        checkpoint.load_weights(folder / f"step_{number:06d}", random_model(CONFIG))
        checkpoint.load_optimizer(folder / f"step_{number:06d}", optimizer_of(model))
    if checkpoint.list_steps(folder) == [10]:
        save_checkpoint(folder, 20, model, optimizer, {}, CPU)
    assert names(folder) == ["step_000010", "step_000020"]


def test_every_file_is_on_disk_before_the_folder_gets_its_name(folder, model, monkeypatch):
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc")
    flushed, fsync = [], os.fsync

    def watched(number):
        flushed.append((os.readlink(f"/proc/self/fd/{number}"), checkpoint.list_steps(folder)))
        fsync(number)

    monkeypatch.setattr(os, "fsync", watched)
    save_checkpoint(folder, 10, model, optimizer_of(model), {}, CPU)
    before = {os.path.basename(path) for path, listed in flushed if not listed}
    assert {*names(folder / "step_000010"), ".step_000010.partial"} <= before
    assert (str(folder), [10]) in flushed  # and its name after that


# -- the disk


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def broken(*args):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [full, broken])
def test_a_full_disk_costs_one_warning_and_the_older_checkpoint_stays(folder, model, monkeypatch, capsys, error):
    one = Saver(folder, model, optimizer_of(model), CPU, keep=1)
    one.save(10, {})
    assert one.finish()
    with monkeypatch.context() as patch:
        patch.setattr(saver, "save_file", error)
        one.save(20, {})
        until_written(one)
        step(one)
        assert not one.finish()
    (warning,) = capsys.readouterr().out.splitlines()
    assert "WARNING: step 20 could not be saved" in warning and "No space left" in warning
    assert str(folder / "step_000010") in warning
    assert names(folder) == ["step_000010"]  # and what was begun has gone from the full disk
    one.save(30, {})
    assert one.finish() and checkpoint.list_steps(folder) == [30]


def test_a_disk_that_would_be_full_is_not_filled(folder, model, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(saver, "save_file", lambda *args: pytest.fail("wrote"))
    one = Saver(folder, model, None, CPU)
    one.save(10, {})
    assert not one.finish()
    assert "GB are needed and 0.000 GB free" in capsys.readouterr().out
    assert names(folder) == []


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path, model, capsys):
    (tmp_path / "file").write_text("")
    one = Saver(tmp_path / "file" / "d2", model, None, CPU)
    assert "WARNING: checkpoints cannot be written at present" in capsys.readouterr().out  # at once, not after hours
    one.save(10, {})
    until_written(one)
    said = capsys.readouterr().out
    assert "WARNING" in said and "there is no checkpoint" in said


def test_a_mistake_of_ours_is_not_taken_for_a_full_disk(folder, model, monkeypatch):
    monkeypatch.setattr(saver, "save_file", lambda *args: 1 / 0)
    one = Saver(folder, model, None, CPU)
    one.save(10, {})
    with pytest.raises(ZeroDivisionError):
        until_written(one)


def test_the_last_step_is_tried_again_until_there_is_room(folder, model, monkeypatch, capsys):
    tries = []

    def room_at_last(tensors, path):
        tries.append(path)
        return full() if len(tries) < 4 else save_file(tensors, path)

    save_file = saver.save_file
    monkeypatch.setattr(saver, "save_file", room_at_last)
    monkeypatch.setattr(saver.time, "sleep", lambda seconds: None)
    one = Saver(folder, model, None, CPU)

    def save(number):
        one.save(number, {})

    save(10)
    one.ensure(save, 10, StopSignals())
    one.ensure(save, 10)  # it is there
    assert len(tries) == 4 and checkpoint.list_steps(folder) == [10]
    assert capsys.readouterr().out.count("trying again") == 2
    monkeypatch.setattr(saver, "save_file", full)
    one.ensure(save, 11)  # a single try costs a warning
    assert capsys.readouterr().out.count("WARNING") == 1
    with pytest.raises(ValueError, match="step 11 could not be saved.*step_000010.*--resume"):
        one.ensure(save, 11, StopSignals())
    signals = StopSignals()
    signals.received = signal.SIGTERM
    with pytest.raises(SystemExit) as stop:  # nobody waits ten minutes for a machine that goes away
        one.ensure(save, 12, signals)
    assert stop.value.code == 143 and "step 12, NOT SAVED" in capsys.readouterr().out


def test_a_checkpoint_that_is_there_is_not_called_lost_for_what_comes_after(folder, model, monkeypatch, capsys):
    one = Saver(folder, model, None, CPU, keep=1)
    monkeypatch.setattr(one, "_rotate", full)
    one.save(10, {})
    assert one.finish() and checkpoint.list_steps(folder) == [10]
    assert "WARNING" in capsys.readouterr().out


def test_the_command_to_go_on_with_is_one_that_is_taken():
    for command in (
        "a --depth=2",
        "a --depth=2 --resume",
        "a --resume-from-step 4 --depth=2",
        "a --depth=2 --resume-from-step=4",
    ):
        assert saver._resuming(command) == "a --depth=2 --resume"


# -- many ranks


def test_a_folder_that_is_another_one_on_another_node_is_found_at_the_beginning(tmp_path, model, monkeypatch):
    monkeypatch.setattr(saver, "SECONDS_TO_SEE", 0.2)

    def work(rank):
        with pytest.raises(ValueError, match="what rank 1 writes.*NANOCHAT_BASE_DIR"):
            Saver(tmp_path / f"node{rank}", model, None, rank_of(rank, 2))

    all_ranks(2, monkeypatch, work)
    assert not list(tmp_path.glob("node*/.step_*"))


def test_a_checkpoint_is_complete_when_every_rank_has_written(folder, model, monkeypatch):
    """Rank 1 is slow: rank 0 must not rename before it is done."""
    slow, write = threading.Event(), saver.write

    def write_slowly(partial, files, *rest):
        if any(name.startswith("optim_00001") for name in files):
            slow.wait(60)
        write(partial, files, *rest)

    monkeypatch.setattr(saver, "write", write_slowly)

    def work(rank):
        runtime = rank_of(rank, 2)
        one = Saver(folder, model, optimizer_of(model, rank, 2), runtime)
        one.save(10, {})
        if rank == 0:
            one.writing.result()
        runtime.barrier()
        listed = []
        for ready in (False, True):
            if ready:
                slow.set()
                if rank == 1:
                    one.writing.result()
                runtime.barrier()
            one.heard([sum(values) for values in zip(*runtime.gather(one.news()), strict=True)])
            runtime.barrier()
            listed.append(checkpoint.list_steps(folder))
        return listed

    assert all_ranks(2, monkeypatch, work) == [[[], [10]]] * 2
    assert names(folder / "step_000010") == [
        "meta.json",
        "model.safetensors",
        "optim_00000.safetensors",
        "optim_00001.safetensors",
    ]
    assert len(checkpoint.read_meta(folder / "step_000010")["rng"]) == 2


def test_a_rank_that_could_not_write_is_named_and_nobody_gets_a_checkpoint(folder, model, monkeypatch, capsys):
    save_file = saver.save_file
    monkeypatch.setattr(
        saver, "save_file", lambda tensors, path: full() if "00001" in str(path) else save_file(tensors, path)
    )

    def work(rank):
        one = Saver(folder, model, optimizer_of(model, rank, 2), rank_of(rank, 2))
        one.save(10, {})
        return one.finish()

    assert all_ranks(2, monkeypatch, work) == [False, False]
    assert "rank 1: [Errno 28] No space" in capsys.readouterr().out
    assert names(folder) == []


def test_files_of_a_killed_run_with_more_ranks_do_not_join_a_checkpoint(folder, model):
    partial = folder / ".step_000010.partial"
    partial.mkdir(parents=True)
    (partial / "optim_00003.safetensors").write_bytes(b"half")
    save_checkpoint(folder, 10, model, optimizer_of(model), {}, CPU)
    assert "optim_00003.safetensors" not in names(folder / "step_000010") and names(folder) == ["step_000010"]
