"""Checkpoints: what is saved comes back to the bit, on any number of ranks; what is half there is not there."""

import json
import os
import re
import subprocess
import sys
import threading

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

from nanochat import checkpoint, paths
from nanochat.checkpoint import CheckpointError
from nanochat.gpt import build_model
from nanochat.runtime import Runtime
from nanochat.tokenizer import TokenizerError

TOKENIZER = byte_tokenizer(MERGES)
CONFIG = small_config(TOKENIZER.vocab_size, n_layer=3)


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))


def meta_of(tag="d2", stage="base"):
    return {
        "stage": stage,
        "tag": tag,
        "model_config": CONFIG.__dict__,
        "tokenizer": {"name": "toy-276", "fingerprint": TOKENIZER.fingerprint},
        "progress": {"step": 7},
    }


def save(tag="d2", step=10, model=None, optimizer=None, stage="base", runtime=CPU):
    model = model or build_model(CONFIG, CPU)
    folder = paths.checkpoint_dir(stage, tag)
    save_checkpoint(folder, step, model, optimizer, meta_of(tag, stage), runtime)
    return folder / f"step_{step:06d}"


def trained():
    """A model and its optimizer after three steps: every state has a value of its own."""
    model = random_model(CONFIG, seed=3)
    optimizer = optimizer_of(model)
    for seed in range(3):
        gradients_and_step(model, optimizer, seed)
    return model, optimizer


def gradients_and_step(model, optimizer, seed):
    idx = torch.randint(0, CONFIG.vocab_size, (2, 17), generator=torch.Generator().manual_seed(seed))
    model(idx[:, :-1], idx[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


def states(optimizer):
    return {
        (name, key): (tensor, first)
        for name, shares in optimizer.state_shares().items()
        for key, (tensor, first, _) in shares.items()
    }


# -- there and back


def test_weights_and_optimizer_come_back_to_the_bit():
    model, optimizer = trained()
    folder = save(model=model, optimizer=optimizer)
    again = random_model(CONFIG, seed=8)
    other = optimizer_of(again)
    checkpoint.load_weights(folder, again)
    checkpoint.load_optimizer(folder, other)
    for (name, one), (_, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    assert states(optimizer).keys() == states(other).keys()
    for key, (tensor, _) in states(optimizer).items():
        assert tensor.abs().sum() > 0, key
        assert torch.equal(tensor, states(other)[key][0]), key
    assert other.steps == optimizer.steps == 3
    gradients_and_step(model, optimizer, 9)  # and so does what follows
    gradients_and_step(again, other, 9)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_is_safetensors_and_json_only():
    folder = save(optimizer=trained()[1])
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "optim_00000.safetensors", "meta.json"}
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["step"] == 10 and meta["format_version"] == checkpoint.FORMAT_VERSION
    assert meta_of().items() <= meta.items()


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 4), (4, 2), (1, 3), (3, 2), (2, 2)])
def test_optimizer_state_is_read_on_another_number_of_ranks(monkeypatch, writers, readers):
    model, optimizer = trained()
    source = save(step=1, model=model, optimizer=optimizer)
    shares = {}

    def rewrite(rank):
        mine = optimizer_of(model, rank, writers)
        checkpoint.load_optimizer(source, mine)
        save(step=2, model=model, optimizer=mine, runtime=rank_of(rank, writers))

    all_ranks(writers, monkeypatch, rewrite)
    folder = paths.checkpoint_dir("base", "d2") / "step_000002"
    assert len(list(folder.glob("optim_*"))) == writers
    for rank in range(readers):
        reader = optimizer_of(model, rank, readers)
        checkpoint.load_optimizer(folder, reader)
        assert reader.steps == 3
        for key, (tensor, first) in states(reader).items():
            shares.setdefault(key, []).append((tensor, first))
    whole = states(optimizer)
    assert shares.keys() == whole.keys()
    for key, parts in shares.items():
        covered = torch.zeros(whole[key][0].size(0), dtype=torch.bool)
        for tensor, first in parts:
            assert torch.equal(tensor, whole[key][0][first : first + tensor.size(0)]), key
            covered[first : first + tensor.size(0)] = True
        assert covered.all(), key


def test_bfloat16_tables_come_back_and_widen():
    half = Runtime(torch.device("cpu"), torch.bfloat16)
    model = build_model(CONFIG, half)
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    folder = save(model=model)
    again, wide = build_model(CONFIG, half, seed=None), build_model(CONFIG, CPU, seed=None)
    checkpoint.load_weights(folder, again)
    checkpoint.load_weights(folder, wide)
    assert again.transformer.wte.weight.dtype == torch.bfloat16
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)
    assert wide.transformer.wte.weight.dtype == torch.float32
    assert torch.equal(wide.transformer.wte.weight, model.transformer.wte.weight.float())


def test_load_model_gives_model_tokenizer_and_meta():
    TOKENIZER.save(paths.tokenizer_dir("toy-276"))
    model = random_model(CONFIG, seed=4)
    save("d2", 10, model=model)
    save("d2", 20)
    loaded, tokenizer, meta = checkpoint.load_model("base", CPU, tag="d2", step=10)
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(idx), model(idx))
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    assert (meta["step"], meta["tag"], meta["model_config"]) == (10, "d2", CONFIG.__dict__)
    assert checkpoint.load_model("base", CPU)[2]["step"] == 20


# -- which one is meant


def test_without_a_tag_the_largest_depth_is_taken_by_number():
    for tag in ("d2", "d10", "d9", "zebra"):
        save(tag)
    assert checkpoint.find("base").parent.name == "d10"


def test_without_depth_tags_the_model_written_last_is_taken():
    for age, tag in enumerate(("b", "c", "a")):
        folder = save(tag).parent
        os.utime(folder, (1000 + age, 1000 + age))
    assert checkpoint.find("base").parent.name == "a"


def test_the_newest_step_is_taken_by_number():
    for step in (9, 100, 1_000_000, 20):
        save(step=step)
    assert checkpoint.list_steps(paths.checkpoint_dir("base", "d2")) == [9, 20, 100, 1_000_000]
    assert checkpoint.find("base", "d2").name == "step_1000000"
    assert checkpoint.find("base", "d2", -1).name == "step_1000000"
    assert checkpoint.find("base", "d2", 20).name == "step_000020"


def test_a_tag_without_a_whole_checkpoint_is_passed_over():
    save("d2")
    (paths.checkpoint_dir("base", "d30") / "step_000005").mkdir(parents=True)
    (paths.checkpoint_dir("base", "d31") / ".step_000005.partial").mkdir(parents=True)
    assert checkpoint.find("base").parent.name == "d2"


@pytest.mark.parametrize(("stage", "maker"), [("base", "base_train"), ("sft", "chat_sft"), ("rl", "chat_rl")])
def test_no_model_at_all_names_the_command_that_makes_one(stage, maker):
    with pytest.raises(CheckpointError, match=f"python -m scripts.{maker}"):
        checkpoint.find(stage)


def test_an_unknown_tag_or_step_says_what_there_is():
    save("d2", 10)
    save("d2", 30)
    save("mine")
    with pytest.raises(CheckpointError, match="'d4'.*d2, mine.*base_train.*--model-tag d4"):
        checkpoint.find("base", "d4")
    with pytest.raises(CheckpointError, match="no step 20.*10, 30"):
        checkpoint.find("base", "d2", 20)


def test_where_to_go_on_is_the_newest_or_a_given_step_or_the_beginning():
    def resume(newest, step=-1):
        return checkpoint.find_resume("base", "d2", newest, step, CPU)

    assert resume(True) is None
    for step in (9, 10):
        save(step=step)
    assert resume(False) is None
    assert resume(True).name == "step_000010"
    assert resume(False, 9).name == "step_000009"
    with pytest.raises(CheckpointError, match="no step 11"):
        resume(False, 11)


def test_all_ranks_go_on_from_the_step_that_the_first_one_sees(monkeypatch):
    """A network file system may show other nodes an older list."""
    for step in (9, 10):
        save(step=step)
    seen, stale = {}, threading.local()
    real = checkpoint.list_steps
    monkeypatch.setattr(checkpoint, "list_steps", lambda folder: [] if getattr(stale, "on", False) else real(folder))

    def work(rank):
        stale.on = rank == 1
        seen[rank] = checkpoint.find_resume("base", "d2", True, -1, rank_of(rank, 2)).name

    all_ranks(2, monkeypatch, work)
    assert seen == {0: "step_000010", 1: "step_000010"}


def test_a_rank_that_never_sees_the_checkpoint_says_so(monkeypatch):
    save(step=9)
    monkeypatch.setattr(checkpoint, "SECONDS_TO_SEE", 0.1)
    monkeypatch.setattr(Runtime, "gather", lambda self, value: [paths.checkpoint_dir("base", "d2") / "step_000010"] * 2)
    with pytest.raises(CheckpointError, match="rank 1 does not see .*step_000010.*NANOCHAT_BASE_DIR"):
        checkpoint.find_resume("base", "d2", True, -1, rank_of(1, 2))


def test_what_the_first_rank_cannot_find_is_said_by_all(monkeypatch):
    def work(rank):
        with pytest.raises(CheckpointError, match="no base model with tag 'd2'"):
            checkpoint.find_resume("base", "d2", False, 5, rank_of(rank, 2))

    all_ranks(2, monkeypatch, work)


def test_going_back_to_a_step_puts_the_later_ones_aside(capsys):
    for step in (5, 10, 15):
        save(step=step)
    folder = paths.checkpoint_dir("base", "d2")
    checkpoint.set_aside(folder, CPU, after=5)
    assert checkpoint.list_steps(folder) == [5]
    (aside,) = (path for path in folder.parent.iterdir() if path.is_dir() and path != folder)
    assert checkpoint.list_steps(aside) == [10, 15] and str(aside) in capsys.readouterr().out
    checkpoint.set_aside(folder, CPU, after=5)
    assert len([path for path in folder.parent.iterdir() if path.is_dir()]) == 2
    assert checkpoint.find("base").parent == folder


# -- what does not fit


def test_another_tokenizer_than_the_checkpoints_is_refused():
    save()
    byte_tokenizer(MERGES[::-1]).save(paths.tokenizer_dir("toy-276"))
    with pytest.raises(TokenizerError, match="toy-276.*'d2'.*python -m scripts.base_train --model-tag d2"):
        checkpoint.load_model("base", CPU)


def test_a_checkpoint_whose_tokenizer_is_gone_says_how_to_make_it():
    save()
    with pytest.raises(TokenizerError, match="tok_train --corpus toy --vocab-size 276"):
        checkpoint.load_model("base", CPU)


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_truncated_weights_name_the_file_and_the_way_out(size):
    TOKENIZER.save(paths.tokenizer_dir("toy-276"))
    path = save() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} cannot be read.*older step"):
        checkpoint.load_model("base", CPU)


@pytest.mark.parametrize("size", [0, 1000])
def test_truncated_optimizer_state_names_the_file(size):
    model, optimizer = trained()
    path = save(model=model, optimizer=optimizer) / "optim_00000.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="optim_00000"):
        checkpoint.load_optimizer(path.parent, optimizer_of(model))


def test_a_missing_optimizer_is_said():
    with pytest.raises(CheckpointError, match="no optimizer state"):
        checkpoint.load_optimizer(save(), optimizer_of(build_model(CONFIG, CPU)))


def test_a_missing_file_of_a_rank_is_said(monkeypatch):
    model, optimizer = trained()
    source = save(step=1, model=model, optimizer=optimizer)

    def rewrite(rank):
        mine = optimizer_of(model, rank, 2)
        checkpoint.load_optimizer(source, mine)
        save(step=2, model=model, optimizer=mine, runtime=rank_of(rank, 2))

    all_ranks(2, monkeypatch, rewrite)
    folder = paths.checkpoint_dir("base", "d2") / "step_000002"
    (folder / "optim_00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="optimizer state"):
        checkpoint.load_optimizer(folder, optimizer_of(model))


def test_weights_of_another_shape_are_said():
    folder = save()
    other = build_model(small_config(TOKENIZER.vocab_size, n_layer=3, n_embd=64), CPU)
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.load_weights(folder, other)


def test_a_newer_format_asks_for_an_update():
    path = save() / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": checkpoint.FORMAT_VERSION + 1}))
    with pytest.raises(CheckpointError, match="format 2.*up to 1.*update"):
        checkpoint.load_model("base", CPU)


@pytest.mark.parametrize("text", ["", "{", "{}"])
def test_a_damaged_meta_names_the_file(text):
    path = save() / "meta.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="meta.json"):
        checkpoint.load_model("base", CPU)


HOLDER = """
import sys, time
from pathlib import Path
from nanochat import checkpoint
lock = checkpoint.claim(Path(sys.argv[1]))
print("mine", flush=True)
time.sleep(60)
"""


def test_a_model_is_trained_by_one_process_at_a_time(base_dir, monkeypatch, capsys):
    """Two of them would write into each other's files. The lock goes with the process, however it ends."""
    monkeypatch.setattr(checkpoint, "SECONDS_TO_END", 0.3)
    folder = paths.checkpoint_dir("base", "d2")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "mine\n"
        with pytest.raises(CheckpointError, match=f"process {holder.pid} is training d2 already.*another --model-tag"):
            checkpoint.set_aside(folder, CPU)
        with monkeypatch.context() as patch:  # a node that may be gone, on a file system that keeps its locks
            patch.setattr(checkpoint.platform, "node", lambda: "another-node")
            checkpoint.set_aside(folder, CPU)
        assert "is taken for dead" in capsys.readouterr().out
    finally:
        holder.kill()
        holder.wait()
    checkpoint.set_aside(folder, CPU)
    checkpoint.set_aside(folder, CPU)  # the same process may begin again
