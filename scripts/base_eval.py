"""Evaluate a base model: CORE, bits per byte on train and validation text, samples.

python -m scripts.base_eval --model-tag d12
python -m scripts.base_eval --eval core --max-per-task 100 --bundle eval_bundle_tinyworld
python -m scripts.base_eval --hf-path openai-community/gpt2
"""

import argparse
import math
import time
from types import SimpleNamespace

from tqdm import tqdm

from nanochat import paths, runtime, samples
from nanochat.batches import TextRows
from nanochat.bpb import bits_per_byte
from nanochat.checkpoint import load_model
from nanochat.core_bundle import find_bundle
from nanochat.core_eval import evaluate_core
from nanochat.core_references import GPT2_CORE, GPT2_TASKS
from nanochat.dataset import iter_documents, token_files
from nanochat.download import DownloadError
from nanochat.results import Results
from nanochat.scoring import Scored, score_sequences

KINDS = ("sample", "bpb", "core")
FOREIGN_LOGITS = 1 << 28  # held at a time: 1 GB in float32


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", default=",".join(KINDS), help=f"which of {','.join(KINDS)}, joined by commas")
    parser.add_argument("--hf-path", help="examine this Hugging Face causal model instead of one of ours")
    parser.add_argument("--model-tag", help="which model (default: the largest d<N>)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--bundle", default="eval_bundle", help="name or path of the CORE bundle")
    parser.add_argument("--max-per-task", type=int, default=-1, help="examples of a CORE task at most (-1: all)")
    parser.add_argument("--device-batch-size", type=int, default=32, help="rows of sequence_len tokens at a time")
    parser.add_argument("--split-tokens", type=int, default=40 * 524288, help="tokens of each split for bits per byte")
    parser.add_argument("--corpus", help="text for bits per byte (default: what the model was trained on)")
    parser.add_argument("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    args = parser.parse_args(argv)
    if args.max_per_task == 0 or args.max_per_task < -1:
        parser.error(f"--max-per-task is {args.max_per_task}; expected 1 or more, or -1 for all")
    args.kinds = [kind for kind in args.eval.split(",") if kind]
    if not args.kinds or set(args.kinds) - set(KINDS):
        parser.error(f"--eval is {args.eval!r}; expected some of {','.join(KINDS)}")
    return args


# --- a foreign model, called as ours is


class ForeignModel:
    """A causal model of another kind. Its logits stand for its last state: what lies between, a bias, a scale, a cap,
    is its own affair."""

    def __init__(self, model):
        self.model = model
        config = model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        self.config = SimpleNamespace(sequence_len=limit, vocab_size=config.vocab_size)

    def hidden(self, idx):
        return self.model(input_ids=idx, use_cache=False).logits  # (B, T, V)

    def logits(self, x):
        return x.float()


class ForeignTokenizer:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if self.bos is None:
            raise ValueError("--hf-path: the tokenizer has neither a beginning nor an end mark to begin a text with")

    def encode_batch(self, texts):
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def load_foreign(path: str, machine):
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise SystemExit("--hf-path needs the transformers package: pip install 'transformers>=4.56'") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        # not cast afterwards: the buffers of rotary embeddings have to stay in float32
        model = AutoModelForCausalLM.from_pretrained(path, dtype=machine.dtype)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"--hf-path {path}: no model could be loaded: {str(error).splitlines()[0]}") from None
    return ForeignModel(model.to(machine.device).eval()), ForeignTokenizer(tokenizer)


def foreign_bits_per_byte(model, tokenizer, meta, corpus, split, num_tokens, token_budget, machine) -> float:
    """Over whole documents until `num_tokens`, in pieces that fit the model; bytes are those of the text itself."""
    longest = min(model.config.sequence_len or 1024, 2048)  # as long as our rows: a longer look back would flatter it
    nats, size, tokens, waiting = 0.0, 0, 0, []
    bar = tqdm(
        desc=f"bits per byte, {split}",
        total=num_tokens,
        unit="tok",
        leave=False,
        disable=None if machine.is_main else True,
    )
    for i, text in enumerate(iter_documents(corpus, split)):
        ids = tokenizer.encode_batch([text])[0]
        tokens += len(ids)
        bar.update(len(ids))
        if i % machine.world_size == machine.rank:
            pieces = [[tokenizer.bos, *ids[at : at + longest - 1]] for at in range(0, len(ids), longest - 1)]
            waiting += [Scored(piece, 1, len(piece)) for piece in pieces]
            size += len(text.encode("utf-8"))
        if sum(len(piece.ids) for piece in waiting) >= token_budget:
            nats += sum(float(losses.sum()) for losses in score_sequences(model, waiting, machine.device, token_budget))
            waiting = []
        if tokens >= num_tokens:
            break
    bar.close()
    nats += sum(float(losses.sum()) for losses in score_sequences(model, waiting, machine.device, token_budget))
    nats, size = (sum(parts) for parts in zip(*machine.gather((nats, size)), strict=True))
    return nats / (math.log(2) * size) if size else math.nan


# --- what is evaluated


def our_bits_per_byte(model, tokenizer, meta, corpus, split, num_tokens, token_budget, machine) -> float:
    """Over packed rows; of the training shards those that the model was trained on, since others may have come."""
    T, training = model.config.sequence_len, split == "train"
    limit = (len(meta["shards"]) or None) if training and corpus == meta["corpus"] else None  # an import names none
    files = token_files(corpus, tokenizer.fingerprint, split, limit)
    rows = TextRows(files, T, tokenizer.bos, tokenizer.vocab_size, seed=42 if training else None)
    num_rows = min(rows.num_rows, max(1, num_tokens // T))
    return bits_per_byte(model, rows, num_rows, max(1, token_budget // T), tokenizer.token_bytes(), machine)


def print_samples(found: dict) -> None:
    for sample in found["prompted"]:
        print(f"{sample['prompt']}|{sample['text']}")
    for text in found["unconditioned"]:
        print("-" * 80, text, sep="\n")
    print("-" * 80, flush=True)


def core(model, tokenizer, args, token_budget, machine) -> dict:
    """CORE, with the GPT-2 family beside it where the bundle is the published one."""
    if machine.is_main:
        find_bundle(args.bundle)  # one process fetches it
    machine.barrier()
    foreign = isinstance(model, ForeignModel)
    found = evaluate_core(
        model, tokenizer, find_bundle(args.bundle), machine, args.max_per_task, token_budget,
        max_length=model.config.sequence_len if foreign else None,
    )  # fmt: skip
    published = set(found["tasks"]) == set(GPT2_TASKS)
    return found | ({"references": GPT2_CORE, "references_by_task": GPT2_TASKS} if published else {})


def main(args):
    machine = runtime.start(args.device_type)
    try:
        evaluate(args, machine)
    except (ValueError, DownloadError) as error:
        raise SystemExit(str(error)) from None
    finally:
        runtime.close(machine)


def evaluate(args, machine):
    if args.hf_path:
        model, tokenizer = load_foreign(args.hf_path, machine)
        tag, meta = args.hf_path.strip("/").replace("/", "--"), {"step": None, "corpus": "climbmix"}
    else:
        model, tokenizer, meta = load_model("base", machine, tag=args.model_tag, step=args.step)
        model.eval()
        tag = meta["tag"]
    corpus, sequence_len = args.corpus or meta["corpus"], model.config.sequence_len or 1024
    token_budget = args.device_batch_size * sequence_len
    if args.hf_path:  # a foreign model gives the logits of every token at once
        token_budget = min(token_budget, 4096, FOREIGN_LOGITS // model.config.vocab_size)
    if args.hf_path and not args.corpus and len(args.kinds) > 1 and not paths.corpus_dir(corpus).is_dir():
        args.kinds = [kind for kind in args.kinds if kind != "bpb"]
        machine.print(f"no bits per byte: the corpus {corpus} is not here; name one of your own with --corpus")
    machine.print(f"{tag}, step {meta['step']}, on {machine.device}: {', '.join(args.kinds)}")
    results = Results("base_eval", tag, machine, config=vars(args))
    summary = {"model": tag, "step": meta["step"], "corpus": corpus, "took": {}}
    began = time.perf_counter()

    def lap(kind):
        summary["took"][kind] = time.perf_counter() - began - sum(summary["took"].values())

    if "sample" in args.kinds:
        if args.hf_path:
            machine.print("no samples: the engine drives nanochat models only")
        elif machine.is_main:
            summary["samples"] = {
                "prompted": samples.prompted(model, tokenizer),
                "unconditioned": samples.unconditioned(model, tokenizer),
            }
            print_samples(summary["samples"])
        lap("sample")
    if "bpb" in args.kinds:
        summary["bpb"], summary["bpb_tokens"] = {}, args.split_tokens
        for name, split in (("train", "train"), ("val", "validation")):
            measure = foreign_bits_per_byte if args.hf_path else our_bits_per_byte
            value = measure(model, tokenizer, meta, corpus, split, args.split_tokens, token_budget, machine)
            summary["bpb"][name] = value
            machine.print(f"bits per byte, {name}: {value:.6f}")
        lap("bpb")
    if "core" in args.kinds:
        summary["core"] = core(model, tokenizer, args, token_budget, machine)
        lap("core")
    results.finish(summary)
    machine.print(f"results: {paths.results_dir(tag) / 'base_eval.json'}")


if __name__ == "__main__":
    main(parse_args())
