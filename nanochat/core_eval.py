"""CORE: in-context tasks, scored from the losses of continuations that are given (DCLM, arXiv 2406.11794).

`multiple_choice` and `schema` tasks take the alternative with the lowest mean loss; `language_modeling` asks that every
token of the continuation be the model's first choice.
"""

import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanochat.core_bundle import CoreTask, load_bundle, read_rows
from nanochat.scoring import Scored, common_prefix, crop, score_alternatives, score_sequences

TIE = 1e-5  # scores nearer than this are equal, so that the shape of a batch decides nothing
CHUNK, CPU_CHUNK = 256, 64  # examples rendered and sorted by length at a time: enough to fill batches of like length


# --- from an example to scored sequences


def shots_of(rows: list[dict], index: int, count: int) -> list[dict]:
    """The solved examples shown before example `index`; all the others when there are fewer than `count`."""
    others = [i for i in range(len(rows)) if i != index]
    return [rows[i] for i in random.Random(1234 + index).sample(others, min(count, len(others)))]


def render(task: CoreTask, row: dict, shots: list[dict]) -> list[str]:
    """The prompts of one example: one for each alternative; for language modeling without and with the continuation.

    Only language-modeling contexts are trimmed: a query's trailing blank stays, and the delimiter follows it.
    """
    delimiter = task.delimiter
    if task.kind == "multiple_choice":
        solved = [shot["query"] + delimiter + shot["choices"][shot["gold"]] for shot in shots]
        items = [row["query"] + delimiter + choice for choice in row["choices"]]
    elif task.kind == "schema":
        solved = [shot["context_options"][shot["gold"]] + delimiter + shot["continuation"] for shot in shots]
        items = [context + delimiter + row["continuation"] for context in row["context_options"]]
    else:
        solved = [shot["context"].strip() + delimiter + shot["continuation"] for shot in shots]
        context = row["context"].strip() + delimiter
        items = [context, context + row["continuation"]]
    prompts = ["\n\n".join([*solved, item]) for item in items]
    if task.kind == "language_modeling":
        prompts[0] = prompts[0].rstrip()  # the delimiter's blank belongs to the first token of the continuation
    return prompts


def spans(task: CoreTask, sequences: list[list[int]]) -> list[Scored]:
    """What is scored of the tokens of `render`'s prompts (different from one another), each beginning with bos."""
    if task.kind == "language_modeling":
        without, whole = sequences
        if whole[: len(without)] != without:
            raise ValueError(
                f"{task.label}: the tokens before a continuation change when it follows; "
                f"its delimiter {task.delimiter!r} does not fit this tokenizer"
            )
        return [Scored(whole, len(without), len(whole))]
    if task.kind == "multiple_choice":
        start = common_prefix(sequences)
        return [Scored(ids, start, len(ids)) for ids in sequences]
    ends = common_prefix([ids[::-1] for ids in sequences])
    return [Scored(ids, max(1, len(ids) - ends), len(ids)) for ids in sequences]


# --- choosing


def first_lowest(scores: list[float]) -> int:
    """Index of the lowest score; scores within TIE of it are equal and the first of them wins."""
    lowest = min(scores)
    return next(i for i, score in enumerate(scores) if score <= lowest + TIE)


def predict(
    model, tokenizer, task: CoreTask, rows: list[dict], indices: list[int], device: torch.device,
    token_budget: int = 16384, max_length: int | None = None,
) -> list[int]:  # fmt: skip
    """For each of `indices` into `rows` the alternative chosen; for language modeling 1 where the continuation is
    what the model would say, else 0. Sequences longer than `max_length` lose their left end."""
    prompts = [render(task, rows[i], shots_of(rows, i, task.shots)) for i in indices]
    language = task.kind == "language_modeling"
    distinct = prompts if language else [list(dict.fromkeys(group)) for group in prompts]  # a repeated choice: once
    tokens = iter(tokenizer.encode_batch([text for group in distinct for text in group]))
    groups = [spans(task, [[tokenizer.bos, *next(tokens)] for _ in group]) for group in distinct]
    if max_length:
        groups = [[crop(sequence, max_length) for sequence in group] for group in groups]
    if language:
        hits = score_sequences(model, [sequence for (sequence,) in groups], device, token_budget, greedy=True)
        return [int(len(hit) > 0 and bool(hit.all())) for hit in hits]
    values = score_alternatives(model, groups, device, token_budget)
    means = [[float(losses.mean()) if len(losses) else math.inf for losses in group] for group in values]
    best = [group[first_lowest(scores)] for group, scores in zip(distinct, means, strict=True)]
    return [group.index(prompt) for group, prompt in zip(prompts, best, strict=True)]


def evaluate_core(
    model, tokenizer, bundle_dir: Path, runtime, max_per_task: int = -1, token_budget: int = 16384,
    max_length: int | None = None,
) -> dict:  # fmt: skip
    """CORE of a model over a bundle: the mean over its tasks of (accuracy - baseline) / (1 - baseline).

    `model` needs GPT's hidden() and logits(), `tokenizer` bos and encode_batch(). Examples are split over the
    ranks; every rank returns the same {metric, interval, tasks {label: {accuracy, centered, baseline, examples,
    available, seconds}}, bundle, baselines, max_per_task}.
    """
    table = {}
    for task in load_bundle(bundle_dir):
        started, rows, hits = time.monotonic(), read_rows(task, max_per_task), 0
        mine = list(range(runtime.rank, len(rows), runtime.world_size))
        bar = tqdm(total=len(mine), desc=task.label, unit="ex", leave=False, disable=None if runtime.is_main else True)
        size = CPU_CHUNK if runtime.device.type == "cpu" else CHUNK
        for at in range(0, len(mine), size):
            chunk = mine[at : at + size]
            answers = predict(model, tokenizer, task, rows, chunk, runtime.device, token_budget, max_length)
            hits += sum(answer == rows[i].get("gold", 1) for i, answer in zip(chunk, answers, strict=True))
            bar.update(len(chunk))
        bar.close()
        accuracy = sum(runtime.gather(hits)) / len(rows)
        centered = (accuracy - task.baseline) / (1 - task.baseline)
        table[task.label] = {
            "accuracy": accuracy, "centered": centered, "baseline": task.baseline,
            "examples": len(rows), "available": len(rows) if max_per_task < 0 else len(read_rows(task)),
            "seconds": time.monotonic() - started,
        }  # fmt: skip
        runtime.print(
            f"{task.label:34s} accuracy {accuracy:.4f} | centered {centered:7.4f} | "
            f"{len(rows):5d} examples | {table[task.label]['seconds']:.1f} s"
        )
    metric = sum(entry["centered"] for entry in table.values()) / len(table)
    low, high = interval(table)
    runtime.print(f"CORE {metric:.4f} over {len(table)} tasks (95 % interval {low:.4f} to {high:.4f})")
    return {
        "metric": metric, "interval": [low, high], "tasks": table, "bundle": Path(bundle_dir).name,
        "baselines": "eval_meta_data.csv", "max_per_task": max_per_task,
    }  # fmt: skip


def interval(table: dict[str, dict], draws: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of CORE by bootstrap over the examples of each task: to draw n verdicts anew from n, of which a
    share is right, is to draw from a binomial distribution. A task of which all or no verdicts are right counts as
    certain, so that a few examples a task give an interval that is too narrow."""
    rng, scores = np.random.default_rng(0), 0
    for task in table.values():
        accuracy = rng.binomial(task["examples"], task["accuracy"], draws) / task["examples"]
        scores += (accuracy - task["baseline"]) / (1 - task["baseline"]) / len(table)
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)
