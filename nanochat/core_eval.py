"""CORE: in-context tasks, scored from the losses of continuations that are given (DCLM, arXiv 2406.11794).

`multiple_choice` and `schema` tasks take the alternative with the lowest mean loss; `language_modeling` asks that every
token of the continuation be the model's first choice.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from nanochat.core_bundle import CoreTask, load_bundle, read_rows

# CORE of the GPT-2 family under this definition: all 22 tasks whole, baselines of the old edition.
GPT2_CORE = {"GPT-2 124M": 0.1139, "GPT-2 355M": 0.1849, "GPT-2 774M": 0.2146, "GPT-2 1.6B": 0.256525}
TIE = 1e-5  # scores nearer than this are equal, so that the shape of a batch decides nothing
CHUNK = 256  # examples rendered and sorted by length at a time: bounds the memory that token lists take
MAX_LOGITS = {"cuda": 2**28, "cpu": 2**25, "mps": 2**25}  # elements of one batch of logits, where all are wanted


@dataclass(frozen=True)
class Scored:
    """One sequence to read; its tokens `ids[start:end]` are scored, each given all before it (so start >= 1)."""

    ids: list[int]
    start: int
    end: int


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
        start = _common(sequences)
        return [Scored(ids, start, len(ids)) for ids in sequences]
    ends = _common([ids[::-1] for ids in sequences])
    return [Scored(ids, max(1, len(ids) - ends), len(ids)) for ids in sequences]


def _common(sequences: list[list[int]]) -> int:
    """Length of the common prefix."""
    for position, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return position
    return min(len(ids) for ids in sequences)


# --- scoring


def batches(sequences: list[Scored], token_budget: int) -> Iterator[list[int]]:
    """Indices of sequences of like length, longest first, rows x longest <= token_budget (one row always passes)."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    while order:
        rows = max(1, token_budget // len(sequences[order[0]].ids))
        yield order[:rows]
        order = order[rows:]


@torch.no_grad()  # not inference_mode: tables that the model grows here must still serve training
def score_sequences(
    model: Callable, sequences: list[Scored], device: torch.device, token_budget: int, greedy: bool = False
) -> list[torch.Tensor]:
    """For each sequence a CPU tensor over its scored tokens: the loss in nats; with `greedy`, whether the token is the
    model's first choice. `model` is called as GPT is; padding stands on the right, where nothing before it can see."""
    results: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    for batch in batches(sequences, token_budget):
        longest = len(sequences[batch[0]].ids)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, T+1)
        scored = torch.zeros(len(batch), longest, dtype=torch.bool)
        for row, i in enumerate(batch):
            ids[row, : len(sequences[i].ids)] = torch.tensor(sequences[i].ids)
            scored[row, sequences[i].start : sequences[i].end] = True
        idx, targets = ids[:, :-1].to(device), ids[:, 1:].to(device)  # (B, T) each
        if greedy:
            values = model(idx).argmax(dim=-1) == targets
        else:
            wanted = targets.masked_fill(~scored[:, 1:].to(device), -1)
            values = model(idx, wanted, loss_reduction="none").view(idx.shape)
        values = values.cpu()
        for row, i in enumerate(batch):
            results[i] = values[row, sequences[i].start - 1 : sequences[i].end - 1].clone()
    return results


def first_lowest(scores: list[float]) -> int:
    """Index of the lowest score; scores within TIE of it are equal and the first of them wins."""
    lowest = min(scores)
    return next(i for i, score in enumerate(scores) if score <= lowest + TIE)


def predict(
    model: Callable, tokenizer, task: CoreTask, rows: list[dict], indices: list[int], device: torch.device,
    token_budget: int = 16384, max_length: int | None = None,
) -> list[int]:  # fmt: skip
    """For each of `indices` into `rows` the alternative chosen; for language modeling 1 where the continuation is
    what the model would say, else 0. Sequences longer than `max_length` lose their left end."""
    scored, owners = [], []
    prompts = [render(task, rows[i], shots_of(rows, i, task.shots)) for i in indices]
    distinct = [list(dict.fromkeys(group)) for group in prompts]  # a repeated choice is scored once
    tokens = iter(tokenizer.encode_batch([text for group in distinct for text in group]))
    for owner, group in enumerate(distinct):
        for sequence in spans(task, [[tokenizer.bos, *next(tokens)] for _ in group]):
            cut = max(0, len(sequence.ids) - max_length) if max_length else 0
            scored.append(Scored(sequence.ids[cut:], max(1, sequence.start - cut), sequence.end - cut))
            owners.append(owner)
    greedy = task.kind == "language_modeling"
    budget = min(token_budget, MAX_LOGITS[device.type] // model.config.vocab_size) if greedy else token_budget
    values: list[list[float]] = [[] for _ in indices]
    for owner, result in zip(owners, score_sequences(model, scored, device, budget, greedy), strict=True):
        value = (result.all() if greedy else result.float().mean()) if len(result) else (0 if greedy else math.inf)
        values[owner].append(float(value))
    if greedy:
        return [int(value[0]) for value in values]
    best = [group[first_lowest(value)] for group, value in zip(distinct, values, strict=True)]
    return [group.index(prompt) for group, prompt in zip(prompts, best, strict=True)]


def evaluate_core(
    model: Callable, tokenizer, bundle_dir: Path, runtime, max_per_task: int = -1, token_budget: int = 16384,
    max_length: int | None = None,
) -> dict:  # fmt: skip
    """CORE of a model over a bundle: the mean over its tasks of (accuracy - baseline) / (1 - baseline).

    `model` needs `config.vocab_size` and GPT's call; `tokenizer` `bos` and `encode_batch`. Examples are split over the
    ranks; every rank returns the same {metric, tasks {label: {accuracy, centered, baseline, examples, seconds}},
    bundle, baselines, max_per_task}.
    """
    table = {}
    for task in load_bundle(bundle_dir):
        started, rows, hits = time.monotonic(), read_rows(task, max_per_task), 0
        mine = list(range(runtime.rank, len(rows), runtime.world_size))
        bar = tqdm(total=len(mine), desc=task.label, unit="ex", leave=False, disable=None if runtime.is_main else True)
        for at in range(0, len(mine), CHUNK):
            chunk = mine[at : at + CHUNK]
            answers = predict(model, tokenizer, task, rows, chunk, runtime.device, token_budget, max_length)
            hits += sum(answer == rows[i].get("gold", 1) for i, answer in zip(chunk, answers, strict=True))
            bar.update(len(chunk))
        bar.close()
        accuracy = sum(runtime.gather(hits)) / len(rows)
        centered = (accuracy - task.baseline) / (1 - task.baseline)
        table[task.label] = {
            "accuracy": accuracy, "centered": centered, "baseline": task.baseline,
            "examples": len(rows), "seconds": time.monotonic() - started,
        }  # fmt: skip
        runtime.print(
            f"{task.label:34s} accuracy {accuracy:.4f} | centered {centered:7.4f} | "
            f"{len(rows):5d} examples | {table[task.label]['seconds']:.1f} s"
        )
    metric = sum(entry["centered"] for entry in table.values()) / len(table)
    runtime.print(f"CORE {metric:.4f} over {len(table)} tasks")
    return {
        "metric": metric, "tasks": table, "bundle": Path(bundle_dir).name, "baselines": "eval_meta_data.csv",
        "max_per_task": max_per_task,
    }  # fmt: skip
