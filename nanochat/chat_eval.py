"""Examinations of a chat model: multiple choice read off the logits, everything else by what it writes; ChatCORE.

Shapes: B problems of a batch, T tokens, C width, V vocabulary.
"""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import comb

import torch
from tqdm import tqdm

from nanochat import chat, decoding
from nanochat.engine import Engine, Request
from nanochat.scoring import batches

CHATCORE_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")


def evaluate_task(
    task,
    model,
    tokenizer,
    runtime,
    batch_size: int = 64,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int = 50,
    num_samples: int = 1,
    max_problems: int | None = None,
    rehearse: bool = False,
) -> tuple[dict, list[dict]]:
    """Examine the model on the first `max_problems` of a task (by default all), `batch_size` at a time; the ranks share
    the problems.

    rehearse: all answers are as long as the expected ones, for a model that has not learned yet to end its own.
    With several samples a problem counts as solved when one of them is right (pass@n); multiple choice takes one.
    Returns, on every rank, {accuracy, problems, available (in the task), baseline, seconds; pass@k of samples} and a
    record of each problem, in order: {index, prompt, expected, answers, verdicts, correct, maybe said}.
    """
    count = len(task) if max_problems is None else min(len(task), max_problems)
    if count < 1:
        raise ValueError(f"{task.name}: expected at least one problem, got {count} (of {len(task)} there are)")
    if num_samples < 1:
        raise ValueError(f"{task.name}: expected at least one sample a problem, got {num_samples}")
    started = time.time()
    problems = {i: task[i] for i in range(runtime.rank, count, runtime.world_size)}
    if task.kind == "categorical":
        answered = choose_letters(problems, model, tokenizer, runtime.device, batch_size)
    else:
        sampling = {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
        static = decoding.available(runtime)
        answered = write_answers(problems, model, tokenizer, batch_size, num_samples, sampling, static, rehearse)

    progress = {"total": len(problems), "desc": task.name, "unit": "problem", "leave": False}
    judges = ThreadPoolExecutor(torch.get_num_threads())  # a verdict on a program takes a process, and maybe seconds
    with (
        judges,
        tqdm(**progress, disable=None if runtime.is_main else True) as bar,
    ):
        records = []
        for index, answers, said in answered:
            records.append(judges.submit(judge, task, index, problems[index], answers, said))
            records[-1].add_done_callback(lambda _: bar.update())
        records = [record.result() for record in records]
    records = sorted((record for part in runtime.gather(records) for record in part), key=lambda r: r["index"])
    summary = {
        "accuracy": sum(record["correct"] for record in records) / len(records),
        "problems": len(records),
        "available": len(task),
        "baseline": task.baseline,
        "seconds": round(time.time() - started, 3),
    }
    if len(records[0]["answers"]) > 1:
        summary["pass@k"] = pass_at_k(records, num_samples)
    return summary, records


def judge(task, index: int, conversation: dict, answers: list[str], said: list[str]) -> dict:
    """The record of one problem: right when any of the answers is. said: the answers with their tool calls."""
    *before, reference = conversation["messages"]
    verdicts = [task.verdict(conversation, answer) for answer in answers]
    record = {
        "index": index,
        "prompt": "\n\n".join(chat.readable(message["content"]) for message in before),
        "expected": chat.readable(reference["content"]),
        "answers": answers,
        "verdicts": verdicts,
        "correct": "right" in verdicts,
    }
    return record if said == answers else {**record, "said": said}


def pass_at_k(records: list[dict], num_samples: int, counts: Iterable[int] = ()) -> dict[str, float]:
    """For k of `counts`, by default 1, 2, 4, ... and all: the share of problems that k samples are expected to solve,
    estimated from all of them without bias (arXiv 2107.03374)."""
    powers = {1 << i for i in range(num_samples.bit_length()) if 1 << i < num_samples}
    counts = counts or sorted({*powers, num_samples})
    wrong = [sum(verdict != "right" for verdict in record["verdicts"]) for record in records]
    return {str(k): sum(1 - comb(w, k) / comb(num_samples, k) for w in wrong) / len(wrong) for k in counts}


def chatcore(results: dict[str, dict]) -> float:
    """The mean over tasks of accuracy above guessing: 0 is chance, 1 is perfect."""
    centered = [(task["accuracy"] - task["baseline"]) / (1 - task["baseline"]) for task in results.values()]
    return sum(centered) / len(centered)


# --- multiple choice


@torch.no_grad()  # not inference_mode: tables that the model grows here must still serve training
def choose_letters(
    problems: dict[int, dict], model, tokenizer, device: torch.device, batch_size: int
) -> Iterator[tuple[int, list[str], list[str]]]:
    """(index, [letter], the same) of each problem: the likeliest of its letters as the first token of the answer.

    Prompts of like length go through the model together, as many as have the tokens of `batch_size` whole sequences;
    the head is computed at their last tokens only.
    """
    prompts = {i: chat.prompt(tokenizer, conversation) for i, conversation in problems.items()}
    indices, token_budget = list(prompts), batch_size * model.config.sequence_len
    for group in batches([len(prompts[i]) for i in indices], token_budget, device):
        batch = [indices[position] for position in group]
        lengths = torch.tensor([len(prompts[i]) for i in batch])
        idx = torch.full((len(batch), int(lengths.max())), tokenizer.bos)  # (B, T), padded on the right
        for row, i in enumerate(batch):
            idx[row, : len(prompts[i])] = torch.tensor(prompts[i])
        x = model.hidden(idx.to(device))  # (B, T, C)
        last = x[torch.arange(len(batch), device=device), (lengths - 1).to(device)]  # (B, C)
        logits = model.logits(last).cpu()  # (B, V)
        for row, i in enumerate(batch):
            letters = problems[i]["letters"]
            tokens = [letter_token(tokenizer, letter) for letter in letters]
            letter = letters[int(logits[row, tokens].argmax())]
            yield i, [letter], [letter]


def letter_token(tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise ValueError(
            f"the answer {letter!r} is {len(ids)} tokens of this tokenizer; multiple choice needs one. "
            f"Train a tokenizer on text that has it: python -m scripts.tok_train"
        )
    return ids[0]


# --- free answers


def write_answers(
    problems: dict[int, dict],
    model,
    tokenizer,
    batch_size: int,
    num_samples: int,
    sampling: dict,
    static: bool,
    rehearse: bool = False,
) -> Iterator[tuple[int, list[str], list[str]]]:
    """(index, answers, the same with their tool calls) of each problem as it is done; `batch_size` answers are in
    progress at a time.

    Every prompt is read whole and every answer may take all of its tokens, beyond the length of the training rows too.
    """
    if not problems:  # of this rank, where there are more ranks
        return
    prompts = {i: chat.prompt(tokenizer, conversation) for i, conversation in problems.items()}
    max_length = max(map(len, prompts.values())) + sampling["max_tokens"]
    engine = Engine(model, tokenizer, max_rows=batch_size, max_length=max_length, static=static)
    max_tokens = sampling["max_tokens"]
    if rehearse:
        engine.ends = set()
    index_of, tokens_of = {}, {}  # by request id
    for index in sorted(prompts, key=lambda i: -len(prompts[i])):  # the longest do not end alone
        if rehearse:
            expected = chat.answer_tokens(tokenizer, problems[index])
            sampling = sampling | {"max_tokens": min(max_tokens, expected)}
        for sample in range(num_samples):  # noise is drawn from the seed, so it names the problem and the sample
            id = engine.submit(Request(prompts[index], seed=index * num_samples + sample, **sampling))
            index_of[id], tokens_of[id] = index, []
    done = {index: {} for index in prompts}  # the tokens of each problem's answers, by request id
    while engine.busy:
        for event in engine.step():
            if event.token is not None:
                tokens_of[event.id].append(event.token)
            if event.finish:
                index = index_of[event.id]
                done[index][event.id] = tokens_of.pop(event.id)
                if len(done[index]) == num_samples:
                    answers = [tokens for _, tokens in sorted(done.pop(index).items())]
                    visible = [chat.visible_text(tokenizer, tokens) for tokens in answers]
                    yield index, visible, [chat.spoken_text(tokenizer, tokens) for tokens in answers]
