"""Fine-tuning as a person runs it: what is learned is what the assistant says, in rows of any length, killed or not."""

import json
import shutil

import pytest
import torch
from helpers import CPU, byte_tokenizer
from safetensors.torch import load_file
from small_runs import (
    GENTLE,
    SFT,
    STEPS,
    TINY,
    Killed,
    assert_same_run,
    kill_in_step,
    lines,
    losses,
    make_world,
    rename_model,
    teach,
    the_tokenizer,
    torchrun,
)

from nanochat import batches, checkpoint, paths, results, terminal
from nanochat.batches import best_fit
from nanochat.chat import render
from scripts import chat_sft, show_row
from tasks import mixtures
from tasks.common import Mixture, Task
from tasks.customjson import CustomJSON


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def taught(world):
    """The SFT of model d2 under the tag `pupil`: rows shorter than many conversations."""
    shutil.copytree(paths.checkpoint_dir("base", "d2"), paths.checkpoint_dir("base", "pupil"))
    rename_model("pupil")
    teach("pupil", "--save-every 4")


def sft_args(more=""):
    return chat_sft.parse_args(f"{SFT} {more}".split())


def test_conversations_longer_than_the_row_teach_and_the_epoch_ends(taught):
    lengths = [len(render(the_tokenizer(), talk)[0]) for talk in mixtures.training("tiny")]
    assert sum(length > 65 for length in lengths) > 20
    steps = losses("pupil", "chat_sft")
    written = results.read("pupil", "chat_sft")
    assert written["conversations"] == len(lengths) == sum(TINY.values())
    assert written["rows"] <= len(lengths)
    assert len(steps) == written["final"]["step"] == written["rows"] // 8
    assert all(0 < loss < 20 for loss in steps)  # and none is NaN
    assert sum(steps[-3:]) < sum(steps[:3])
    assert written["final"]["val_bpb"] < next(line["val/bpb"] for line in lines("pupil", "chat_sft"))


def test_the_results_of_sft_hold_what_the_report_reads(taught):
    written = results.read("pupil", "chat_sft")
    assert {"stage", "tag", "command", "started", "seconds", "environment", "config", "final"} <= written.keys()
    assert written["final"].keys() >= {
        *("step", "train_loss", "val_bpb", "min_val_bpb", "chatcore_metric", "tok_per_sec", "mfu"),
        *("peak_memory_bytes", "total_training_flops", "tokens", "total_training_time"),
    }


def test_the_loss_of_sft_is_that_of_what_the_assistant_says(taught):
    """The first step's loss, computed by hand: every conversation of its rows, bos as padding, one mean over all."""
    tokenizer, T = the_tokenizer(), 64
    talks = mixtures.training("tiny")
    rendered = [render(tokenizer, talks[i], T + 1) for i in range(len(talks))]
    rows = best_fit([len(ids) for ids, _ in rendered], T + 1, crop=False, buffer=100)[:8]
    model, _, _ = checkpoint.load_model("base", CPU, "pupil")
    total, count = 0.0, 0
    for row in rows:
        ids = [token for conversation, _ in row for token in rendered[conversation][0]]
        mask = [learned for conversation, _ in row for learned in rendered[conversation][1]]
        ids += [tokenizer.bos] * (T + 1 - len(ids))
        with torch.no_grad():
            logs = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
        for t, learned in enumerate(mask[1:]):
            if learned:
                total -= logs[t, ids[t + 1]].item()
                count += 1
    assert 0 < count < 8 * T
    assert losses("pupil", "chat_sft")[0] == pytest.approx(total / count, rel=1e-5)


def test_sft_that_is_killed_and_resumed_equals_one_that_was_not(taught, monkeypatch):
    shutil.copytree(paths.checkpoint_dir("base", "pupil"), paths.checkpoint_dir("base", "truant"))
    rename_model("truant")
    with monkeypatch.context() as patch:
        kill_in_step(patch, 7)
        with pytest.raises(Killed):
            teach("truant", "--save-every 4")
    teach("truant", "--save-every 4 --resume")
    assert_same_run("truant", "pupil", "sft")


def test_iterations_of_sft_are_optimizer_steps_and_the_rate_stays_positive(world):
    teach("d2", "--num-iterations 3 --device-batch-size 2")  # four device batches a step
    logged = [line for line in lines("d2", "chat_sft") if "train/lrm" in line]
    assert [line["step"] for line in logged] == [0, 1, 2]
    assert all(line["train/lrm"] > 0 for line in logged)
    assert results.read("d2", "chat_sft")["final"]["step"] == 3
    assert checkpoint.find("sft", "d2").name == "step_000003"


def test_sft_may_begin_with_fresh_moments(world):
    teach("d2", "--num-iterations 1 --load-optimizer 0")
    assert load_file(checkpoint.find("sft", "d2") / "optim_00000.safetensors")
    assert checkpoint.read_meta(checkpoint.find("sft", "d2"))["optimizer_steps"] == 1
    teach("d2", "--num-iterations 1")
    assert checkpoint.read_meta(checkpoint.find("sft", "d2"))["optimizer_steps"] == STEPS + 1


def test_a_row_in_which_nothing_is_learned_does_no_harm(world, tmp_path):
    """Questions longer than the row: what is left of these conversations has no answer."""
    path = tmp_path / "identity.jsonl"
    mute = [{"role": "user", "content": "why " * 100}, {"role": "assistant", "content": "because"}]
    path.write_text((json.dumps(mute) + "\n") * 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtures, "training", lambda *args: Mixture([CustomJSON(path)]))
        teach("d2", "--num-iterations 2 --eval-every -1")
    assert losses("d2", "chat_sft") == [0.0, 0.0]
    weights = load_file(checkpoint.find("sft", "d2") / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_two_ranks_teach_as_one_does(world, tmp_path):
    teach("d2", f"{GENTLE} --num-iterations 4")
    alone = losses("d2", "chat_sft")
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nfrom scripts import chat_sft\nfrom tasks import mixtures\nmixtures.TINY = {TINY}\n"
        "if __name__ == '__main__':\n    chat_sft.main(chat_sft.parse_args(sys.argv[1:]))\n"
    )
    torchrun(str(program), *f"{SFT} {GENTLE} --model-tag d2 --num-iterations 4".split())
    assert losses("d2", "chat_sft") == pytest.approx(alone, rel=1e-4)
    assert losses("d2", "chat_sft")[0] == pytest.approx(alone[0], rel=1e-5)


# -- looking at rows


def shown(capsys, arguments):
    """(ids, learned) of the table that show_row prints."""
    show_row.main(show_row.parse_args(["--table", "--device-type", "cpu", *arguments.split()]))
    out = capsys.readouterr().out
    found = [line.split() for line in out.splitlines() if line[:6].strip().isdigit()]
    return [int(line[1]) for line in found], ["yes" in line[2] for line in found], out


def test_a_row_is_shown_as_it_was_taught(taught, capsys):
    tokenizer = the_tokenizer()
    rows = batches.render_conversations(mixtures.training("tiny"), tokenizer, 64, CPU, None)
    some = False
    for row in (0, 5, rows.num_rows - 1, rows.num_rows + 2):
        inputs, targets = (part[0].tolist() for part in rows.read(row, 1))
        ids, learned, out = shown(capsys, f"-g pupil --row {row}")
        assert ids == inputs[: len(ids)] or ids[:-1] == inputs
        assert set(inputs[len(ids) :]) <= {tokenizer.bos}, "only padding is left out"
        said = [False, *(target != batches.IGNORE for target in targets)]
        assert learned == said[: len(ids)] and not any(said[len(ids) :])
        some = some or any(learned)
    assert some
    ids, learned, _ = shown(capsys, "-g pupil -i base --row 3")
    meta = checkpoint.read_meta(checkpoint.find("base", "pupil"))
    rows = show_row.pretraining_rows(meta, tokenizer)
    assert ids == rows.row(3).tolist() and learned == [False, *[True] * 64]


def test_probabilities_are_those_of_the_trained_model(taught, capsys):
    ids, _, out = shown(capsys, "-g pupil -s 4 --probabilities")
    model, *_ = checkpoint.load_model("sft", CPU, "pupil", 4)
    with torch.no_grad():
        logits = model.logits(model.hidden(torch.tensor([ids[:-1]])))[0]
    expected = torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]]
    shares = [line[25:36].strip() for line in out.splitlines() if line[:6].strip().isdigit()]
    assert shares == ["", *map(terminal.percent, expected.tolist())]


def test_a_row_in_colour_and_without(taught, capsys, monkeypatch):
    show_row.main(show_row.parse_args(["-g", "pupil", "--device-type", "cpu"]))
    plain = capsys.readouterr().out
    assert "[<|assistant_end|>]" in plain and "<|user_start|>" in plain and "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_row.main(show_row.parse_args(["-g", "pupil", "--device-type", "cpu"]))
    colour = capsys.readouterr().out
    assert "\x1b[32;1m<|assistant_end|>\x1b[0m" in colour and "\x1b[36;2m<|user_start|>\x1b[0m" in colour


def test_a_row_needs_only_the_conversations_that_could_be_in_it(monkeypatch):
    texts = ["x " * (i * 7 % 23 + 1) for i in range(3000)]
    talks = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in texts
    ]
    monkeypatch.setattr(mixtures, "training", lambda *args: Mixture([Conversations(talks)]))
    flags = {"mixture": "tiny", "identity": None, "mmlu_epochs": 1, "gsm8k_epochs": 1}
    tokenizer = byte_tokenizer()
    whole = batches.render_conversations(mixtures.training(), tokenizer, 128, CPU, None)
    for row in (0, 77, 150, 400, whole.num_rows - 1, whole.num_rows):
        rows = show_row.fine_tuning_rows({"flags": flags, "rows": {"length": 128}}, tokenizer, row, CPU)
        assert all(torch.equal(*pair) for pair in zip(rows.read(row, 1), whole.read(row, 1), strict=True))
        assert row > 100 or len(rows.offsets) < 1000


class Conversations(Task):
    def __init__(self, talks):
        self.talks = talks

    def __len__(self):
        return len(self.talks)

    def __getitem__(self, index):
        return self.talks[index]
