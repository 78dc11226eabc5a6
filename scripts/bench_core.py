"""How much faster CORE is examined in batches, with shared beginnings read once and the head only where it is asked,
than one example at a time with all logits; in one run, example by example the same predictions. The last line is JSON.

python -m scripts.bench_core --model-tag d12 --max-per-task 64
"""

import argparse
import json
import math
import time

import torch
import torch.nn.functional as F

from nanochat import runtime as rt
from nanochat.checkpoint import load_model
from nanochat.core_bundle import find_bundle, load_bundle, read_rows
from nanochat.core_eval import first_lowest, predict, render, shots_of, spans


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", default="base", choices=["base", "sft"], help="the stage that made the model")
    add("--model-tag", help="which model (default: the largest d<N>)")
    add("--step", type=int, help="which checkpoint (default: the newest)")
    add("--bundle", default="eval_bundle", help="name or path of the CORE bundle")
    add("--tasks", default="", help="labels joined by commas (default: all)")
    add("--max-per-task", type=int, default=64, help="examples of a task at most (-1: all)")
    add("--token-budget", type=int, default=16384, help="tokens in a batch at most, padding included")
    add("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    return parser.parse_args(argv)


@torch.no_grad()
def one_by_one(model, tokenizer, task, rows, index, device):
    """The prediction for one example: its sequences as a batch of their own, the logits of every token."""
    prompts = render(task, rows[index], shots_of(rows, index, task.shots))
    sequences = spans(task, [[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(prompts)])
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.tensor([sequence.ids + [tokenizer.bos] * (longest - len(sequence.ids)) for sequence in sequences])
    logits = model(ids[:, :-1].to(device))  # (alternatives, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(device), reduction="none")
    losses, best = losses.view(len(sequences), -1).cpu(), logits.argmax(dim=-1).cpu()
    if task.kind == "language_modeling":
        (scored,) = sequences
        return int((best[0, scored.start - 1 : scored.end - 1] == ids[0, scored.start : scored.end]).all())
    means = [float(row[s.start - 1 : s.end - 1].mean()) for row, s in zip(losses, sequences, strict=True)]
    return first_lowest([math.inf if math.isnan(mean) else mean for mean in means])  # of nothing: a choice in another


def main(args):
    with rt.stage(args.device_type) as machine:
        model, tokenizer, meta = load_model(args.source, machine, tag=args.model_tag, step=args.step)
        model.eval()
        tasks = load_bundle(find_bundle(args.bundle))
        labels = [task.label for task in tasks]
        wanted = [label for label in args.tasks.split(",") if label] or labels
        if set(wanted) - set(labels):
            raise ValueError(f"--tasks is {args.tasks!r}; expected some of {','.join(labels)}")
        table, differing = {}, []
        print(f"{'task':<34} {'examples':>8} {'one by one':>11} {'batched':>9} {'times':>6} {'differ':>6}")
        for task in tasks:
            if task.label not in wanted:
                continue
            rows = read_rows(task, args.max_per_task)
            indices = list(range(len(rows)))
            batched, answers = timed(
                lambda: predict(model, tokenizer, task, rows, indices, machine.device, args.token_budget)  # noqa: B023
            )
            slow, expected = timed(
                lambda: [one_by_one(model, tokenizer, task, rows, i, machine.device) for i in indices]  # noqa: B023
            )
            differ = [f"{task.label}[{i}]" for i in indices if answers[i] != expected[i]]
            differing += differ
            table[task.label] = {"examples": len(rows), "one_by_one_s": round(slow, 3), "batched_s": round(batched, 3)}
            print(
                f"{task.label:<34} {len(rows):8d} {slow:9.2f} s {batched:7.2f} s {slow / batched:6.1f} {len(differ):6}",
                flush=True,
            )
        slow, batched = (sum(entry[key] for entry in table.values()) for key in ("one_by_one_s", "batched_s"))
        summary = {
            "one_by_one_s": round(slow, 2), "batched_s": round(batched, 2), "times": round(slow / batched, 2),
            "differing": differing, "max_per_task": args.max_per_task, "model": meta["tag"], "step": meta["step"],
            "device": rt.device_name(machine.device), "dtype": str(machine.dtype).removeprefix("torch."),
            "tasks": table,
        }  # fmt: skip
        print(json.dumps(summary))


def timed(work):
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main(parse_args())
