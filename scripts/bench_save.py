"""How long a save holds the training loop, against the same save done synchronously. Trains the real model on random
rows; needs nothing but torch. The last line is JSON.

python -m scripts.bench_save --depth 4
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from nanochat import runtime
from nanochat.gpt import build_model
from nanochat.memory import DeviceBatch
from nanochat.optim import MuonAdamW, orthogonalization_dtype, param_groups
from nanochat.saver import Saver, write
from nanochat.scaling import model_config
from nanochat.training_step import optimizer_step


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    add("--depth", type=int, default=4)
    add("--vocab-size", type=int, default=32768)
    add("--max-seq-len", type=int, default=256)
    add("--rows", type=int, default=2, help="rows of a step")
    add("--saves", type=int, default=5, help="of each kind")
    add("--folder", help="where to write (default: a temporary folder)")
    return parser.parse_args(argv)


def main(args):
    with runtime.stage(args.device_type, training=True) as machine:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            print(json.dumps(measure(args, machine, folder)))
        finally:
            shutil.rmtree(folder)


def measure(args, machine, folder) -> dict:
    config = model_config(args.depth, args.vocab_size, sequence_len=args.max_seq_len)
    model = build_model(config, machine)
    groups = param_groups(model.roles(), config.n_embd)
    optimizer = MuonAdamW(groups, dtype=orthogonalization_dtype(machine.device, machine.dtype))
    device_batch = DeviceBatch(args.rows, machine)
    saver = Saver(folder, model, optimizer, machine, keep=1)
    rows = torch.randint(0, args.vocab_size, (args.rows, args.max_seq_len + 1)).to(machine.device)

    def timed(work) -> float:
        machine.synchronize()
        begin = time.perf_counter()
        work()
        machine.synchronize()
        return time.perf_counter() - begin

    def step():
        batch = (rows[:, :-1], rows[:, 1:])
        outcome = optimizer_step(model, optimizer, batch, device_batch, machine, news=saver.news)
        saver.heard(outcome.news)

    saver.copies.result()
    alone = [timed(step) for _ in range(6)][1:]
    held, beside, synchronous, writing = [], [], [], []
    for number in range(args.saves):
        begin = time.perf_counter()
        held.append(timed(lambda number=number: saver.save(number, {})))
        while saver.writing is not None:
            beside.append(timed(step))
        writing.append(time.perf_counter() - begin)
        synchronous.append(timed(lambda: write(folder / "synchronous", saver.files(), {})))
        shutil.rmtree(folder / "synchronous")
    held, synchronous = statistics.median(held), statistics.median(synchronous)
    return {
        "held_share": round(held / synchronous, 4),
        "held_ms": round(1000 * held, 1),
        "synchronous_ms": round(1000 * synchronous, 1),
        "save_to_complete_ms": round(1000 * statistics.median(writing), 1),
        "step_ms": round(1000 * statistics.median(alone), 1),
        "step_ms_while_writing": round(1000 * statistics.median(beside), 1),
        "checkpoint_mb": round(sum(file.stat().st_size for file in folder.glob("step_*/*")) / 1e6, 1),
        "saves": args.saves,
        "depth": args.depth,
        "parameters": model.counts()["total"],
        "device": runtime.device_name(machine.device),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main(parse_args())
