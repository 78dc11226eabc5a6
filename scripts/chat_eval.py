"""Examine a chat model: `python -m scripts.chat_eval -i sft -a 'GSM8K|HumanEval'`, or `-a tinyworld`."""

import argparse
import json
from functools import partial

from nanochat import paths, samples
from nanochat import runtime as rt
from nanochat.chat_eval import CHATCORE_TASKS, chatcore, evaluate_task
from nanochat.checkpoint import CheckpointError, load_model
from nanochat.dataset import DownloadError
from nanochat.results import Results
from nanochat.sandbox import WALLS, SandboxError, walls
from tasks.arc import ARC
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SpellingBee
from tasks.tinyworld import TEST_KINDS, TinyWorld

# By name, what makes the task: its data are loaded only when it is asked for.
TASKS = {
    "ARC-Easy": partial(ARC, "ARC-Easy", "test"),
    "ARC-Challenge": partial(ARC, "ARC-Challenge", "test"),
    "MMLU": partial(MMLU, "all", "test"),
    "GSM8K": partial(GSM8K, "test"),
    "HumanEval": HumanEval,
    "SpellingBee": partial(SpellingBee, size=256, split="test"),
} | {kind: partial(TinyWorld, kind, "test") for kind in TEST_KINDS}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.chat_eval", description=__doc__)
    parser.add_argument(
        "-i", "--source", choices=("base", "sft", "rl"), default="sft", help="the stage that made the model"
    )
    parser.add_argument(
        "-a",
        "--task-name",
        default="|".join(CHATCORE_TASKS),
        help=f"names joined by '|': {', '.join(TASKS)}; tinyworld = all {len(TEST_KINDS)} of its kinds "
        "(default: the six of ChatCORE)",
    )
    parser.add_argument("-t", "--temperature", type=float, default=0.0)
    parser.add_argument("-m", "--max-new-tokens", type=int, default=512)
    parser.add_argument("-n", "--num-samples", type=int, default=1, help="answers a problem; any success counts")
    parser.add_argument("-k", "--top-k", type=int, default=50)
    parser.add_argument(
        "-b",
        "--batch-size",
        type=int,
        default=64,
        help="problems at a time; of multiple choice so many whole sequences",
    )
    parser.add_argument("-g", "--model-tag", help="default: the largest d<N>")
    parser.add_argument("-s", "--step", type=int, help="default: the newest")
    parser.add_argument("-x", "--max-problems", type=int, help="only the first so many of each task")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="for a model that has learned nothing: answers as long as the expected ones",
    )
    parser.add_argument("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    args = parser.parse_args(argv)
    args.names = task_names(args.task_name)
    if args.temperature < 0 or args.top_k < 0:
        parser.error(f"--temperature is {args.temperature} and --top-k {args.top_k}; expected 0 or more")
    for flag in ("max_new_tokens", "num_samples", "batch_size", "max_problems"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; expected at least 1")
    if args.num_samples > 1 and args.temperature == 0:
        parser.error("--num-samples above 1 needs a --temperature above 0: at 0 all samples are the same")
    return args


def task_names(joined):
    """The names in 'A|B', with tinyworld spelled out."""
    names = []
    for name in filter(None, joined.split("|")):
        names += TEST_KINDS if name == "tinyworld" else [name]
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise SystemExit(f"--task-name has no task {unknown[0]!r}; expected some of: {', '.join(TASKS)}, tinyworld")
    return list(dict.fromkeys(names))


def main(args):
    runtime = rt.start(args.device_type)
    try:
        model, tokenizer, meta = load_model(args.source, runtime, tag=args.model_tag, step=args.step)
        evaluate(args, model, tokenizer, meta, runtime)
    except (CheckpointError, DownloadError, SandboxError, ValueError) as error:
        raise SystemExit(str(error)) from None
    finally:
        rt.close(runtime)


def evaluate(args, model, tokenizer, meta, runtime):
    model.eval()
    stage = f"chat_eval_{args.source}"
    results = Results(stage, meta["tag"], runtime, config=vars(args))
    examinations = {name: TASKS[name]() for name in args.names}  # a missing data set shows before the work begins
    if "HumanEval" in examinations:
        runtime.print(f"the programs of HumanEval run with {WALLS[walls()]}")
    talks = {}
    if runtime.is_main and args.source != "base":  # a base model cannot end an answer
        talks["conversations"] = samples.conversations(model, tokenizer)
    tasks, file = {}, paths.results_dir(meta["tag"]) / f"{stage}.problems.jsonl"
    if runtime.is_main:
        file.write_text("", encoding="utf-8")
    runtime.print(f"{'task':<22} {'accuracy':>8} {'problems':>9} {'baseline':>9} {'time':>10}")
    for name, task in examinations.items():
        tasks[name], records = evaluate_task(
            task,
            model,
            tokenizer,
            runtime,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            num_samples=args.num_samples,
            max_problems=args.max_problems,
            rehearse=args.rehearse,
        )
        if runtime.is_main:
            with open(file, "a", encoding="utf-8") as lines:
                lines.writelines(json.dumps({"task": name, **record}, ensure_ascii=False) + "\n" for record in records)
        runtime.print(row(name, tasks[name]))
    complete = all(name in tasks for name in CHATCORE_TASKS)
    score = chatcore({name: tasks[name] for name in CHATCORE_TASKS}) if complete else None
    results.finish({"source": args.source, "step": meta["step"], "tasks": tasks, "chatcore": score, **talks})
    needed = ", ".join(CHATCORE_TASKS)
    runtime.print(f"ChatCORE {score:.4f}" if complete else f"ChatCORE needs all of {needed}")
    runtime.print(f"every problem, answer and verdict: {file}")


def row(name, task):
    samples = "".join(f" | pass@{k} {share:.4f}" for k, share in task.get("pass@k", {}).items())
    line = f"{name:<22} {task['accuracy']:8.4f} {task['problems']:9d} {task['baseline']:9.2f} {task['seconds']:8.1f} s"
    return line + samples


if __name__ == "__main__":
    main(parse_args())
