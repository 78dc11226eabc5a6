"""The training stages over a small world: a corpus, its tokenizer, a model of two layers. For the tests of both."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import read_jsonl
from safetensors.torch import load_file

from nanochat import checkpoint, dataset, paths, results, tinyworld, train
from nanochat.saver import Saver
from nanochat.tokenizer import Tokenizer
from scripts import base_train, chat_rl, chat_sft, tok_train
from tasks import mixtures
from tasks.common import Task, check_index

REPOSITORY = Path(__file__).parent.parent
STEPS = 12
CORPUS = "--corpus tinyworld --vocab-size 512"
SHAPE = "--depth 2 --aspect-ratio 16 --head-dim 16 --max-seq-len 64 --device-batch-size 4 --total-batch-size 512"
OFTEN = "--eval-every 4 --eval-tokens 2048 --device-type cpu"
BASE = f"{CORPUS} {SHAPE} {OFTEN} --no-scaling --warmup-steps 2 --core-metric-every -1 --sample-every -1"
# at higher rates, orthogonalization and Adam's first steps make a mountain of float32's last bit
GENTLE = "--embedding-lr 0.02 --unembedding-lr 0.001 --matrix-lr 0.002 --scalar-lr 0.02"
SFT = f"--mixture tiny --max-seq-len 64 {OFTEN} --chatcore-every -1"
TINY = {"facts": 40, "arithmetic": 20, "counting": 10, "multiple_choice": 10, "stories": 20, "unknown": 10}
RL = (
    "--examples-per-step 4 --num-samples 4 --max-new-tokens 12 --device-batch-size 3 --device-type cpu --scalar-lr 0.02"
)
CLOCKS = {"train/dt", "train/data_wait", "train/tok_per_sec", "train/mfu", "total_training_time"}
CLOCKS |= {"rollout/dt", "rollout/tok_per_sec", "val/dt", "core/dt", "chatcore/dt"}


def make_world(folder):
    """Makes `folder` the artifact root while the generator lives; in it a corpus with token files and a model `d2`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        patch.setenv("NANOCHAT_DTYPE", "float32")  # ranks and device batches are compared to its last bits
        patch.setattr(mixtures, "TINY", TINY)
        tinyworld.write_corpus(paths.corpus_dir("tinyworld"), 1, 0.3, 2)
        tok_train.main(tok_train.parse_args(CORPUS.split()))
        dataset.tokenize("tinyworld", the_tokenizer(), num_workers=1, progress=False)
        pretrain("d2", f"--num-iterations {STEPS} --save-every 4 --sample-every 100")
        yield folder


def the_tokenizer():
    return Tokenizer.load(paths.tokenizer_dir("tinyworld-512"))


def pretrain(tag, more="", flags=BASE):
    base_train.main(base_train.parse_args(f"{flags} --model-tag {tag} {more}".split()))


def teach(tag, more=""):
    if "--resume" not in more:
        shutil.rmtree(paths.checkpoint_dir("sft", tag), ignore_errors=True)
    chat_sft.main(chat_sft.parse_args(f"{SFT} --model-tag {tag} {more}".split()))


class Letters(Task):
    """Say the letter e: what a model that knows nothing can learn from rewards."""

    name = "letters"

    def __init__(self, size=30, verb="is"):
        self.size, self.verb = size, verb

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        asked = {"role": "user", "content": f"What {self.verb} {check_index(index, self.size)}?"}
        return {"messages": [asked, {"role": "assistant", "content": "e"}]}

    def evaluate(self, conversation, answer):
        return "e" in answer

    def reward(self, conversation, answer):
        return min(answer.count("e"), 6) / 6


def practise(tag, more=""):
    """RL on Letters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtures, "practice", lambda name: Letters())
        patch.setattr(mixtures, "held_out", lambda name: Letters(8, "was"))
        chat_rl.main(chat_rl.parse_args(f"{RL} --model-tag {tag} {more}".split()))


def lines(tag, stage="base_train"):
    """The logged lines without what a clock said."""
    logged = read_jsonl(paths.results_dir(tag) / f"{stage}.jsonl")
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in logged]


def losses(tag, stage="base_train"):
    return [line["train/step_loss"] for line in lines(tag, stage) if "train/step_loss" in line]


def assert_same_files(one, other):
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors")) and len(names) >= 2
    for name in names:
        tensors, others = load_file(one / name), load_file(other / name)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors), name


def assert_same_run(one, other, stage="base"):
    """Two tags: the same lines, weights, moments and progress, to the bit."""
    log = {"base": "base_train", "sft": "chat_sft", "rl": "chat_rl"}[stage]
    assert lines(one, log) == lines(other, log)
    folder, other_folder = checkpoint.find(stage, one), checkpoint.find(stage, other)
    assert folder.name == other_folder.name
    assert_same_files(folder, other_folder)
    progress, other_progress = (checkpoint.read_meta(path)["progress"] for path in (folder, other_folder))
    clocks = {"training_time": 0, "waiting_time": 0, "timed_steps": 0, "elapsed": 0}
    assert progress | clocks == other_progress | clocks
    if stage == "rl":
        return
    final, other_final = (results.read(tag, log)["final"] for tag in (one, other))
    for key in ("step", "train_loss", "val_bpb", "min_val_bpb", "tokens", "total_training_flops"):
        assert final[key] == other_final[key], key


class Killed(BaseException):
    """Nothing in the code may catch this."""


def kill_in_step(patch, number):
    """The run dies in its step `number` (from 1); what it saved before that is complete."""
    save = Saver.save
    patch.setattr(Saver, "save", lambda self, *args: (save(self, *args), self.finish()))
    step, count = train.optimizer_step, iter(range(1, 10**6))

    def dying(*args, **kwargs):
        if next(count) == number:
            raise Killed
        return step(*args, **kwargs)

    patch.setattr(train, "optimizer_step", dying)


def rename_model(tag, stage="base"):
    for path in paths.checkpoint_dir(stage, tag).glob("*/meta.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tag": tag}))


def one_thread():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def torchrun(*command, ranks=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    how = dict(cwd=REPOSITORY, capture_output=True, text=True, env=one_thread(), timeout=300)
    done = subprocess.run([*launcher, *command], **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def complaint(run, *args):
    with pytest.raises(SystemExit) as error:
        run(*args)
    message = error.value.code
    assert isinstance(message, str) and "\n" not in message.strip(), message
    return message
