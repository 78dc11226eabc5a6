"""A training in float64 for test_durability.py: torchrun ... tests/elastic.py TAG LAST. It goes on from the newest
checkpoint of the tag, saves after step LAST, and prints which rows each step saw."""

import dataclasses
import sys
import zlib

import torch
from helpers import save_checkpoint

from nanochat import batches, checkpoint, dataset, paths, runtime, schedules
from nanochat.gpt import GPTConfig, build_model
from nanochat.memory import split_batch
from nanochat.optim import MuonAdamW, param_groups
from nanochat.tokenizer import Tokenizer
from nanochat.training_step import optimizer_step

ROWS, STEPS = 12, 20


def main(tag, last):
    with runtime.stage("cpu") as machine:
        machine = dataclasses.replace(machine, dtype=torch.float64)
        tokenizer = Tokenizer.load(paths.tokenizer_dir("tinyworld-512"))
        files = dataset.token_files("tinyworld", tokenizer.fingerprint, "train")
        rows = batches.TextRows(files, 32, tokenizer.bos, tokenizer.vocab_size)
        per_step, device_batch = split_batch(ROWS * 32, 32, 4, machine)
        config = GPTConfig(32, tokenizer.vocab_size, n_layer=3, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")
        model = build_model(config, machine).double()
        # Adam divides by the size of the gradient: at high rates, rounding in gradients near zero moves a table's row
        groups = param_groups(model.roles(), 32, embedding_lr=3e-4)
        optimizer = MuonAdamW(groups, machine.rank, machine.world_size, torch.float64)
        folder, first = paths.checkpoint_dir("base", tag), 0
        if steps := checkpoint.list_steps(folder):
            first = steps[-1]
            checkpoint.load_weights(folder / f"step_{first:06d}", model)
            checkpoint.load_optimizer(folder / f"step_{first:06d}", optimizer)
        reader = batches.read_steps(rows, first, per_step, machine)
        for step in range(first, last):
            multiplier = schedules.learning_rate(step, STEPS, 2, 0.5, 0.1)
            optimizer.set_rates(multiplier, schedules.muon_momentum(step, STEPS, 0.5, 10), 1.0)
            inputs, targets = next(reader)
            optimizer_step(model, optimizer, (inputs, targets), device_batch, machine)
            seen = [row for part in machine.gather(inputs.tolist()) for row in part]
            machine.print("rows", step, zlib.crc32(str(seen).encode()))
        save_checkpoint(folder, last, model, optimizer, {}, machine)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
