"""Trains under a killer: kill -9 at random moments, restart, and at the end the same model as without it.

    python dev/drill.py --kills 50 [--ranks 1,2] [--seed S] [--folder F]

A small model is trained by scripts.base_train, saving every few steps and keeping two checkpoints. Each life of it ends
with a SIGKILL: while it starts, between two saves, during a save, or while an old checkpoint is deleted. --ranks:
numbers of ranks from which each life draws one; of several ranks one is killed, or all. Every checkpoint that is listed
is loaded after every kill, and in half of the lives when it is first listed, too. The last line is JSON; the exit code
is 1 if anything was lost, corrupt or different.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from nanochat import checkpoint, dataset, paths, tinyworld  # noqa: E402
from nanochat.gpt import GPTConfig, build_model  # noqa: E402
from nanochat.optim import MuonAdamW, param_groups  # noqa: E402
from nanochat.runtime import Runtime  # noqa: E402
from nanochat.tokenizer import Tokenizer  # noqa: E402
from scripts import tok_train  # noqa: E402

CPU = Runtime(torch.device("cpu"), torch.float32)
CORPUS = "--corpus tinyworld --vocab-size 512"
# Two million parameters, so that a save takes a while; low rates, so that ranks may differ in the last bits only.
FLAGS = (
    f"{CORPUS} --depth 2 --aspect-ratio 128 --head-dim 64 --max-seq-len 64 --device-batch-size 4 "
    "--total-batch-size 384 --device-type cpu --no-scaling --warmup-steps 2 --embedding-lr 0.02 --unembedding-lr 0.001 "
    "--matrix-lr 0.002 --scalar-lr 0.02 --eval-every 40 --eval-tokens 2048 --core-metric-every -1 --sample-every -1 "
    "--save-every 3 --keep 2 --resume"
)
MOMENTS = ("start", "step", "save", "rotation")
LIFE = 1.0  # seconds of training after which a life ends at the latest


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=50)
    add("--ranks", default="1", help="numbers of ranks, with commas")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=150, help="of one training; when it is through, another begins")
    add("--folder", help="where to work (default: a temporary folder)")
    return parser.parse_args(argv)


def main(args):
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="drill-"))
    os.environ.update(NANOCHAT_BASE_DIR=str(folder), NANOCHAT_DTYPE="float32", OMP_NUM_THREADS="1")
    try:
        found = drill(args.kills, [int(n) for n in args.ranks.split(",")], args.steps, random.Random(args.seed))
    finally:
        shutil.rmtree(folder)
    print(json.dumps(found))
    return int(bool(found["lost"] or found["corrupt"] or not found["equal"]))


def drill(kills: int, ranks: list[int], num_steps: int, rng: random.Random) -> dict:
    began = time.time()
    tinyworld.write_corpus(paths.corpus_dir("tinyworld"), 1, 0.3, 2)
    tok_train.main(tok_train.parse_args(CORPUS.split()))
    dataset.tokenize("tinyworld", Tokenizer.load(paths.tokenizer_dir("tinyworld-512")), num_workers=1, progress=False)
    still = Training("still", num_steps)
    still.start(ranks[0])
    still.wait()
    trainings, moments, lost, corrupt = [], Counter(), 0, 0
    while sum(moments.values()) < kills:
        run = Training(f"killed-{len(trainings)}", num_steps)
        trainings.append(run)
        while True:
            run.start(rng.choice(ranks))
            if sum(moments.values()) == kills:
                run.wait()
                break
            moment = run.kill(rng)
            if moment is None:  # it was through before the killer struck
                break
            moments[moment] += 1
            lost += max(run.steps(), default=0) < run.newest
            run.newest = max(run.steps(), default=0)
            corrupt += sum(not run.loads(step) for step in run.steps())
            print(
                f"kill {sum(moments.values())}: {moment}, {run.world_size} ranks, {run.tag} has {run.steps()}",
                flush=True,
            )
        corrupt += run.unreadable
    constant = len(ranks) == 1
    losses = all(run.losses() == still.losses() for run in trainings)
    files = all(run.files() == still.files() for run in trainings)
    near = all(close(run.losses(), still.losses()) for run in trainings)
    return {
        "kills": sum(moments.values()),
        "lost": lost,
        "corrupt": corrupt,
        "equal": losses and files if constant else near,
        "equal_means": "losses, weights and moments to the bit" if constant else "losses to 1e-3",
        "final_loss_equal": all(run.losses()[-2:] == still.losses()[-2:] for run in trainings),
        "moments": dict(sorted(moments.items())),
        "trainings": len(trainings),
        "steps": num_steps,
        "ranks": ranks,
        "seconds": round(time.time() - began, 1),
    }


class Training:
    """One run of base_train, life after life."""

    def __init__(self, tag: str, num_steps: int):
        self.tag, self.num_steps = tag, num_steps
        self.folder = paths.checkpoint_dir("base", tag)
        self.newest, self.unreadable, self.seen = 0, 0, set()

    def start(self, world_size: int) -> None:
        self.world_size = world_size
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "scripts.base_train", *FLAGS.split()]
        command += ["--model-tag", self.tag, "--num-iterations", str(self.num_steps)]
        self.ranks = []
        for rank in range(world_size):
            meeting = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            environment = os.environ | {key: str(value) for key, value in meeting.items()}
            with open(paths.base_dir() / f"{self.tag}.log", "a") as log:
                self.ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))

    def running(self) -> bool:
        return any(rank.poll() is None for rank in self.ranks)

    def wait(self) -> None:
        while self.running():
            self.watch()
            time.sleep(0.01)
        if any(rank.returncode for rank in self.ranks):
            self.fail()

    def fail(self) -> None:
        codes = [rank.returncode for rank in self.ranks]
        raise SystemExit(f"{self.tag} ended with {codes}: {(paths.base_dir() / f'{self.tag}.log').read_text()[-3000:]}")

    def kill(self, rng: random.Random) -> str | None:
        """Wait for a random moment and kill; what the run was at, or None when it ended before."""
        wanted = rng.choice(MOMENTS)
        size = self.log_size()
        strike = time.time() + rng.uniform(0, 5) if wanted == "start" else None
        traced = None  # when the wanted trace was seen
        while self.running():
            if wanted in ("start", "step"):
                self.watch()
            now = time.time()
            size = min(size, self.log_size())  # a new life begins by cutting the log
            if strike is None and self.log_size() > size:  # it trains
                strike = now + rng.uniform(0, LIFE)
            if strike is None or now < strike:
                continue
            if wanted in ("start", "step") or now > strike + 10 * LIFE:
                break
            if traced is None and self.at() == wanted:
                traced = now + rng.uniform(0, 0.03 if wanted == "save" else 0.002)
            if traced is not None and now >= traced:
                break
        else:
            if any(rank.returncode for rank in self.ranks):
                self.fail()
            return None
        victims = self.ranks if rng.random() < 0.5 else [rng.choice(self.ranks)]
        for rank in victims:
            rank.send_signal(signal.SIGKILL)
        deadline = time.time() + 30
        while self.running() and time.time() < deadline:  # the others find out
            time.sleep(0.05)
        for rank in self.ranks:
            rank.kill()
            rank.wait()
        return "start" if self.log_size() == size else self.at()

    def watch(self) -> None:
        """Load what is listed for the first time."""
        for step in self.steps():
            if step not in self.seen:
                self.seen.add(step)
                self.newest = max(self.newest, step)
                self.unreadable += not self.loads(step) and step in self.steps()

    def at(self) -> str:
        """What it is doing, by the traces in its folder."""
        names = os.listdir(self.folder) if self.folder.exists() else []
        endings = {name.rpartition(".")[2] for name in names if name.startswith(".")}
        return "rotation" if "old" in endings else "save" if "partial" in endings else "step"

    def steps(self) -> list[int]:
        return checkpoint.list_steps(self.folder)

    def loads(self, step: int) -> bool:
        """Whether a checkpoint can be gone on from."""
        folder = checkpoint.step_folder(self.folder, step)
        try:
            meta = checkpoint.read_meta(folder)
            model = build_model(GPTConfig(**meta["model_config"]), CPU, seed=None)
            checkpoint.load_weights(folder, model)
            checkpoint.load_optimizer(folder, MuonAdamW(param_groups(model.roles(), model.config.n_embd)))
        except (checkpoint.CheckpointError, OSError) as error:
            print(f"{folder}: {error}", flush=True)
            return False
        return meta["step"] == step

    def log_size(self) -> int:
        try:
            return (paths.results_dir(self.tag) / "base_train.jsonl").stat().st_size
        except FileNotFoundError:  # also for a moment when a run begins afresh
            return 0

    def losses(self) -> list[float]:
        log = paths.results_dir(self.tag) / "base_train.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [line.get("train/step_loss", line.get("val/bpb")) for line in lines]

    def files(self) -> dict[str, bytes]:
        """Weights and optimizer state of the last checkpoint."""
        folder = checkpoint.step_folder(self.folder, self.num_steps)
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def close(losses: list[float], others: list[float]) -> bool:
    return len(losses) == len(others) and all(
        abs(one - other) <= 1e-3 * abs(other) for one, other in zip(losses, others, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main(parse_args()))
