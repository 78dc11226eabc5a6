"""How fast the answers of a step of reinforcement learning are sampled, in turns, by a trained chat model: all of them
together, as scripts.chat_rl does it; one question after the other, its answers together; one answer after the other.
The last line is JSON.

python -m scripts.bench_rl --task tiny --max-new-tokens 32
"""

import argparse
import json
import statistics
import time

from nanochat import rollouts, runtime
from nanochat.checkpoint import load_model
from nanochat.decoding import available
from nanochat.download import DownloadError
from nanochat.engine import Engine
from tasks import mixtures


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    add("--model-tag", help="which SFT model (default: the largest d<N>)")
    add("--model-step", type=int, help="which checkpoint of it (default: the newest)")
    add("--task", default="gsm8k", choices=mixtures.PRACTICE)
    add("--examples-per-step", type=int, default=16)
    add("--num-samples", type=int, default=16)
    add("--max-new-tokens", type=int, default=256)
    add("--temperature", type=float, default=1.0)
    add("--top-k", type=int, default=50)
    add("--rounds", type=int, default=3, help="times that each way has its turn")
    args = parser.parse_args(argv)
    if min(args.examples_per_step, args.num_samples, args.max_new_tokens, args.rounds) < 1:
        parser.error("--examples-per-step, --num-samples, --max-new-tokens and --rounds are 1 or more")
    return args


def main(args):
    with runtime.stage(args.device_type, (ValueError, DownloadError), training=True) as machine:
        model, tokenizer, meta = load_model("sft", machine, args.model_tag, args.model_step)
        task = mixtures.practice(args.task)
        questions = [task[i] for i in range(args.examples_per_step)]
        longest = rollouts.longest(task, tokenizer, args.max_new_tokens)
        rows = {"together": len(questions) * args.num_samples, "by_question": args.num_samples, "by_answer": 1}
        engines = {way: Engine(model, tokenizer, rows[way], longest, available(machine)) for way in rows}
        sampling = (args.max_new_tokens, args.temperature, args.top_k)
        seconds, answers = {way: [] for way in rows}, {}
        for turn in range(args.rounds + 1):  # the first warms up
            for way, engine in engines.items():
                engine.refresh(model)
                machine.synchronize()
                began = time.perf_counter()
                answers[way] = sample(way, engine, task, questions, args.num_samples, sampling)
                machine.synchronize()
                if turn:
                    seconds[way].append(time.perf_counter() - began)
    spent = {way: statistics.median(seconds[way]) for way in rows}
    chosen = sum(rollout.num_chosen for rollout in answers["together"])
    pairs = zip(answers["together"], answers["by_answer"], strict=True)
    found = {
        "device": runtime.device_name(machine.device),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "model": meta["tag"],
        "task": args.task,
        "questions": len(questions),
        "samples": args.num_samples,
        "tokens": chosen,
        "seconds": spent,
        "tok_per_sec": {way: chosen / spent[way] for way in rows},
        "speedup_over": {way: spent[way] / spent["together"] for way in ("by_question", "by_answer")},
        "answers_that_differ": sum(one.ids != other.ids for one, other in pairs),
    }
    for way in rows:
        print(f"{way:<12} {spent[way]:8.3f} s {chosen / spent[way]:10,.0f} tokens/s")
    print(json.dumps(found))


def sample(way, engine, task, questions, num_samples, sampling) -> rollouts.Group:
    """All answers, in the order of the questions."""
    seeds = [i * num_samples for i in range(len(questions))]
    if way == "together":
        groups = rollouts.sample(engine, task, questions, seeds, num_samples, *sampling)
    elif way == "by_question":
        pairs = zip(questions, seeds, strict=True)
        groups = [rollouts.sample(engine, task, [one], [seed], num_samples, *sampling)[0] for one, seed in pairs]
    else:
        numbered = [(one, seed + i) for one, seed in zip(questions, seeds, strict=True) for i in range(num_samples)]
        groups = [rollouts.sample(engine, task, [one], [seed], 1, *sampling)[0] for one, seed in numbered]
    return [rollout for group in groups for rollout in group]


if __name__ == "__main__":
    main(parse_args())
