"""How fast models answer here: time to the first token by length of the prompt, time per token and tokens a second by
number of rows, how long a newcomer holds the others up; and which share of the machine's own bandwidth or arithmetic
that is. The last line is JSON. The weights are random, unless a trained model is named.

python -m scripts.bench_infer
python -m scripts.bench_infer --depth 24 --compile 1 --rows 1,8,64
python -m scripts.bench_infer --source sft --examine arithmetic   # also: an examination, one by one and together
"""

import argparse
import json
import statistics
import time

import torch

from nanochat import runtime
from nanochat.chat_eval import evaluate_task
from nanochat.checkpoint import load_model
from nanochat.checks import check_rates
from nanochat.compilation import will_compile
from nanochat.decoding import available
from nanochat.engine import Engine, Request
from nanochat.gpt import build_model
from nanochat.kv_cache import KVCache
from nanochat.scaling import add_model_flags, check_model_flags, model_config
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from tasks.tinyworld import TEST_KINDS, TinyWorld

WARM_STEPS = 5  # recording, compilation, cold caches
ROUNDS = 5  # of what is done once a request
VOCABULARIES = range(256 + len(SPECIAL_TOKENS), 256 + 65536 + len(SPECIAL_TOKENS) + 1)  # of random models
COMPANY = 8  # rows that write while a newcomer's prompt is read


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    add("--source", choices=["base", "sft", "rl"], help="a trained model of this stage, in place of random weights")
    add("--model-tag", help="which model (default: the largest d<N>)")
    add("--step", type=int, help="which checkpoint (default: the newest)")
    add_model_flags(parser)
    add("--vocab-size", type=int, default=32768)
    add("--rows", default="1,2,4,8,16,32,64,128,256", help="requests at a time, joined by commas")
    add("--prompts", default="", help="lengths of prompts, joined by commas (default: by the length of a row)")
    add("--temperature", type=float, default=0.0, help="0 is argmax")
    add("--steps", type=int, help="timed ones, of each number of rows (default: 20, fewer where rows are short)")
    add("--compile", type=int, default=0, choices=[0, 1], help="compile the blocks of a step (GPUs; a minute or more)")
    add("--examine", choices=TEST_KINDS, help="examine the trained model in this task, one by one and together")
    add("--problems", type=int, default=128, help="of that examination")
    # a model that two cores can drive; on a GPU ask for --depth 24 --head-dim 128 --max-seq-len 2048
    parser.set_defaults(depth=4, head_dim=64, max_seq_len=512)
    args = parser.parse_args(argv)
    check_model_flags(parser, args)
    args.rows = numbers(parser, "rows", args.rows)
    args.prompts = numbers(parser, "prompts", args.prompts) if args.prompts else None
    if args.examine and args.source not in ("sft", "rl"):
        parser.error("--examine needs a model that was taught to answer: --source sft")
    if args.vocab_size not in VOCABULARIES:
        parser.error(f"--vocab-size is {args.vocab_size}; expected {VOCABULARIES[0]} to {VOCABULARIES[-1]}")
    if min(1 if args.steps is None else args.steps, args.problems) < 1:
        parser.error("--steps and --problems are 1 or more")
    return args


def numbers(parser: argparse.ArgumentParser, name: str, text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        parser.error(f"--{name} is {text!r}; expected numbers from 1 on, joined by commas")
    return [int(part) for part in text.split(",")]


def main(args):
    with runtime.stage(args.device_type) as machine:
        if args.source:
            model, tokenizer, _ = load_model(args.source, machine, args.model_tag, args.step)
        else:
            shape = (args.aspect_ratio, args.head_dim, args.max_seq_len, args.window_pattern)
            model = build_model(model_config(args.depth, args.vocab_size, *shape), machine)
            tokenizer = any_tokenizer(args.vocab_size)
        T = model.config.sequence_len
        longest = T // 4 - WARM_STEPS
        args.steps = args.steps or max(1, min(20, longest))
        if args.steps > longest:
            raise ValueError(f"rows of {T} tokens are too short for {args.steps} steps; --max-seq-len may be longer")
        compiles = bool(args.compile) and will_compile(1, machine)
        bench = Bench(model, tokenizer, machine, args, compiles)
        most = T // 2 - WARM_STEPS - args.steps  # the other half is the answer's
        asked = args.prompts or (T // 16, T // 4, T // 2)
        lengths = sorted({max(1, min(n, most)) for n in asked})
        if args.prompts and max(asked) > most:
            print(f"prompts of {most} tokens at most: a row has {T}, of which half is the answer's")
        found = {
            "step": bench.step_against_bare_forward(),
            "first_token": [bench.first_token(length) for length in lengths],
            "newcomer": bench.newcomer(max(lengths)),
            "decode": [bench.decode(rows, length) for rows in args.rows for length in lengths],
        }
        if args.examine:
            found["examination"] = bench.examination(args.examine, args.problems)
        print(json.dumps(found | bench.surroundings()))


def any_tokenizer(vocab_size: int) -> Tokenizer:
    """Every id is bytes of some kind: random models say anything."""
    count = vocab_size - len(SPECIAL_TOKENS)
    pairs = (bytes(divmod(number, 256)) for number in range(max(0, count - 256)))
    return Tokenizer(SPLIT_PATTERN, [*(bytes([i]) for i in range(min(256, count))), *pairs])


class Bench:
    def __init__(self, model, tokenizer, machine, args, compiles: bool):
        self.model, self.tokenizer, self.machine, self.args, self.compiles = model, tokenizer, machine, args, compiles
        self.rates = check_rates(machine)
        static = available(machine)
        # one engine for all, so that what is recorded or compiled serves all
        self.engine = Engine(
            model, tokenizer, max(*args.rows, COMPANY + 1), static=static, compiles=compiles and static
        )
        self.engine.ends = set()  # random models end anywhere
        config, counts = model.config, model.counts()
        self.matrices = counts["transformer_matrices"] + counts["lm_head"]
        self.position_bytes = KVCache.row_bytes(config, 1, model.dtype) // config.n_layer  # of a layer
        print(
            f"depth {config.n_layer}, width {config.n_embd}, {counts['total'] / 1e6:.1f} M parameters, "
            f"{model.dtype}, {runtime.device_name(machine.device)}: {self.rates['tflops']} TFLOP/s, "
            f"copies at {self.rates['gb_per_s']} GB/s",
            flush=True,
        )

    def request(self, length: int, seed: int = 0) -> Request:
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(0, 256, (length,), generator=generator).tolist()
        return Request(prompt, 1 << 20, self.args.temperature, seed=seed)

    def write(self, rows: int) -> list[int]:
        """Have so many requests write, or as many as there is memory for, and nothing else; their ids."""
        self.finish()
        ids = [self.engine.submit(self.request(2, seed)) for seed in range(rows)]
        while len(self.engine.writing) < min(rows, self.engine.max_rows):
            self.engine.step()
        return ids

    def finish(self) -> None:
        for row in [*self.engine.waiting.values(), *self.engine.reading, *self.engine.writing]:
            self.engine.cancel(row.id)
        self.engine.refresh(self.model)  # nothing is read from what was there before

    def limit(self, tokens: int, rows: int, length: int) -> tuple[float, float]:
        """Seconds that the machine's copies need for the bytes of a pass, and its products for the operations: `tokens`
        tokens in all, whose rows hold `length` positions."""
        config = self.model.config
        reach = [min(window + 1, length) for window in config.windows]
        read = self.matrices * self.model.dtype.itemsize + rows * sum(reach) * self.position_bytes
        operations = tokens * (2 * self.matrices + 4 * config.n_embd * sum(reach))
        return read / (self.rates["gb_per_s"] * 1e9), operations / (self.rates["tflops"] * 1e12)

    def timed(self, work) -> float:
        self.machine.synchronize()
        begin = time.perf_counter()
        work()
        self.machine.synchronize()
        return time.perf_counter() - begin

    def step_seconds(self) -> float:
        """The median of steps, after some that do not count."""
        seconds = [self.timed(self.engine.step) for _ in range(WARM_STEPS + self.args.steps)]
        return statistics.median(seconds[WARM_STEPS:])

    @torch.no_grad()
    def step_against_bare_forward(self) -> dict:
        """One row's step, against the model given one token and no past: what the engine itself takes. In turns, as
        machines drift."""
        self.write(1)
        idx = torch.tensor([[5]], device=self.machine.device)
        bare, steps = [], []
        for _ in range(3 * (WARM_STEPS + self.args.steps)):
            bare.append(self.timed(lambda: self.engine.model(idx)))
            steps.append(self.timed(self.engine.step))
        bare, step = (statistics.median(seconds[WARM_STEPS:]) for seconds in (bare, steps))
        print(f"a step of one row {1000 * step:.2f} ms, {step / bare:.2f} times the bare forward pass", flush=True)
        return {"ms": round(1000 * step, 3), "bare_ms": round(1000 * bare, 3), "ratio": round(step / bare, 3)}

    def first_token(self, length: int) -> dict:
        seconds = []
        for seed in range(1 + ROUNDS):
            self.finish()
            stream = self.engine.stream(self.request(length, seed))
            seconds.append(self.timed(lambda: next(stream)))  # noqa: B023
            stream.close()
        middle = statistics.median(seconds[1:])
        share = max(self.limit(length, 1, length // 2)) / middle  # the mean position has half before it
        print(f"prompt of {length:4}: first token after {1000 * middle:.1f} ms, {100 * share:.0f} % of the limit")
        rate = round(length / middle)
        return {"prompt": length, "ms": round(1000 * middle, 2), "tok_per_sec": rate, "share": round(share, 3)}

    def newcomer(self, length: int) -> dict:
        """A prompt that comes while others write: its first token, and the longest that they wait for one of theirs."""
        self.write(COMPANY)
        alone = self.step_seconds()
        id, steps, come = self.engine.submit(self.request(length, seed=COMPANY)), [], False
        while not come:
            begin = time.perf_counter()
            come = any(event.id == id for event in self.engine.step())
            steps.append(time.perf_counter() - begin)
        gap, total = (round(1000 * seconds, 2) for seconds in (max(steps), sum(steps)))
        print(f"beside {COMPANY} that write, a prompt of {length}: first token after {total} ms, longest step {gap} ms")
        return {"prompt": length, "ms": total, "longest_step_ms": gap, "step_ms": round(1000 * alone, 3)}

    def decode(self, rows: int, length: int) -> dict:
        """Steps of so many rows that hold `length` positions each: no prompts are read for it."""
        self.write(rows)
        rows = len(self.engine.writing)
        for row in self.engine.writing:
            for stored in (self.engine.cache.keys, self.engine.cache.values):
                stored[:, row.place, :length] = 0.01  # pages that were never written cost nothing to read
            self.engine.cache.lengths[row.place] = length
        middle = self.step_seconds()
        by_bytes, by_products = self.limit(rows, rows, length + WARM_STEPS + self.args.steps // 2)
        found = {
            "rows": rows,
            "prompt": length,
            "ms_per_token": round(1000 * middle, 3),
            "tok_per_sec": round(rows / middle, 1),
            "share": round(max(by_bytes, by_products) / middle, 3),
            "bound_by": "bytes" if by_bytes > by_products else "products",
            "cache_mb": round(rows * length * self.position_bytes * self.model.config.n_layer / 1e6, 1),
        }
        print(
            f"{rows:4} rows of {length:4}: {1000 * middle:8.2f} ms a token, {rows / middle:9.1f} tokens/s, "
            f"{100 * found['share']:3.0f} % of the limit by {found['bound_by']}, cache {found['cache_mb']} MB",
            flush=True,
        )
        return found

    def examination(self, kind: str, problems: int) -> dict:
        task, found = TinyWorld(kind, "test"), {"task": kind, "problems": problems}
        answers = {}
        for name, rows in (("together", problems), ("one_by_one", 1)):
            begin = time.perf_counter()
            summary, records = evaluate_task(
                task, self.model, self.tokenizer, self.machine, batch_size=rows, max_problems=problems
            )
            found[f"{name}_s"], found[f"{name}_accuracy"] = time.perf_counter() - begin, summary["accuracy"]
            answers[name] = [record["answers"] for record in records]
        found["times"] = round(found["one_by_one_s"] / found["together_s"], 2)
        found["differ"] = sum(a != b for a, b in zip(*answers.values(), strict=True))
        print(f"{problems} problems of {kind}: {found['times']} times faster together, {found['differ']} differ")
        return found

    def surroundings(self) -> dict:
        config = self.model.config
        return {
            "rates": self.rates,
            "weights_mb": round(self.matrices * self.model.dtype.itemsize / 1e6, 1),
            "peak_memory_mb": round(self.machine.peak_memory() / 1e6),
            "decoder": ("compiled" if self.compiles else "graphs") if available(self.machine) else "ragged",
            "temperature": self.args.temperature,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "depth": config.n_layer,
            "width": config.n_embd,
            "parameters": self.model.counts()["total"],
            "sequence_len": config.sequence_len,
            "window_pattern": config.window_pattern,
            "vocab_size": config.vocab_size,
            "device": runtime.device_name(self.machine.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


if __name__ == "__main__":
    main(parse_args())
