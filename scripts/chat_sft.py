"""Teach a base model to chat.

python -m scripts.chat_sft --model-tag d12
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --device-batch-size=16
"""

import argparse
import time

from nanochat import batches, checkpoint, memory, paths, results, runtime, saver, schedules
from nanochat.bpb import bits_per_byte
from nanochat.chat_eval import chatcore, evaluate_task
from nanochat.compilation import compiled, will_compile
from nanochat.download import DownloadError
from nanochat.gpt import GPTConfig, build_model
from nanochat.optim import MuonAdamW, orthogonalization_dtype, param_groups
from nanochat.progress import Progress, is_due, summary, throughput
from nanochat.train import train
from tasks import mixtures
from tasks.arc import ARC
from tasks.common import Slice
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SpellingBee


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", default="dummy", help="wandb run name; dummy: no wandb")
    add("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    add("--model-tag", help="which base model (default: the largest d<N>)")
    add("--model-step", type=int, help="which checkpoint of it (default: the newest)")
    add("--load-optimizer", type=int, default=1, choices=[0, 1], help="go on with the moments of pretraining")
    add("--mixture", default="default", choices=mixtures.NAMES, help="what is taught (tasks/mixtures.py)")
    add("--identity", help="JSONL file of conversations, in place of the mixture's about itself (dev/make_identity.py)")
    add("--max-conversations", type=int, default=-1, help="of the mixture, the first so many (-1: all)")
    add("--mmlu-epochs", type=int, default=3)
    add("--gsm8k-epochs", type=int, default=4)
    add("--num-iterations", type=int, default=-1, help="optimizer steps (-1: one epoch)")
    # inherited from pretraining where not given
    add("--max-seq-len", type=int)
    add("--device-batch-size", type=memory.row_count, help="rows at once, or auto (default on GPUs)")
    add("--total-batch-size", type=int, help="tokens a step")
    add("--embedding-lr", type=float)
    add("--unembedding-lr", type=float)
    add("--matrix-lr", type=float)
    add("--scalar-lr", type=float, default=0.5)
    add("--smear-lr", type=float, default=0.2)
    add("--init-lr-frac", type=float, default=0.8, help="share of these rates at which SFT begins")
    add("--warmup-ratio", type=float, default=0.0)
    add("--warmdown-ratio", type=float, default=0.5)
    add("--final-lr-frac", type=float, default=0.0)
    add("--momentum-ramp-steps", type=int, default=300)
    add("--compile", type=int, default=-1, choices=[-1, 0, 1], help="torch.compile (-1: on GPUs)")
    # along the way
    add("--eval-every", type=int, default=200, help="steps between measurements of bits per byte (-1: never)")
    add("--eval-tokens", type=int, default=40 * 524288)
    add("--chatcore-every", type=int, default=200, help="steps between measurements of ChatCORE (-1: never)")
    add("--chatcore-max-cat", type=int, default=-1, help="problems of a multiple-choice task (-1: all)")
    add("--chatcore-max-sample", type=int, default=24, help="problems of a generative task")
    saver.add_flags(parser)
    args = parser.parse_args(argv)
    if args.max_conversations != -1 and args.max_conversations < 1:
        parser.error(f"--max-conversations is {args.max_conversations}; expected 1 or more, or -1 for all")
    for name in ("max_seq_len", "total_batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected 1 or more")
    saver.check_flags(parser, args)
    return args


def main(args):
    with runtime.stage(args.device_type, (ValueError, DownloadError), training=True) as machine:
        teach(args, machine)


def teach(args, machine):
    base = checkpoint.find("base", args.model_tag, args.model_step)
    base_meta = checkpoint.read_meta(base)
    tag = base_meta["tag"]
    tokenizer = checkpoint.load_tokenizer(base_meta)
    config = GPTConfig(**base_meta["model_config"])
    T = args.max_seq_len or config.sequence_len
    total_batch_size = args.total_batch_size or base_meta["plan"]["total_batch_size"]
    compiles, default = will_compile(args.compile, machine), base_meta["device_batch_size"]
    at_once = memory.choose_rows(args.device_batch_size, config, T, machine, compiles, default)
    rows_per_step, device_batch = memory.split_batch(total_batch_size, T, at_once, machine)
    folder = paths.checkpoint_dir("sft", tag)
    resumed = checkpoint.find_resume("sft", tag, args.resume, args.resume_from_step, machine)
    identity = {
        "model_config": config.__dict__,
        "tokenizer": base_meta["tokenizer"],
        "base": {"step": base_meta["step"], "saved": base_meta.get("saved")},
    }
    meta = checkpoint.read_meta(resumed) if resumed else {}
    if resumed:
        checkpoint.check_resumable(resumed, meta, **identity)
    progress = Progress(**meta.get("progress", {}))
    first_step = progress.step
    resume_step = first_step if resumed else -1

    model = build_model(config, machine, seed=None)
    checkpoint.load_weights(resumed or base, model)
    precision = orthogonalization_dtype(machine.device, machine.dtype)
    groups = optimizer_groups(args, model, base_meta["flags"])
    optimizer = MuonAdamW(groups, machine.rank, machine.world_size, precision, compiles)
    if resumed or args.load_optimizer:
        checkpoint.load_optimizer(resumed or base, optimizer)
    mixture = mixtures.training(args.mixture, args.identity, args.mmlu_epochs, args.gsm8k_epochs)
    conversations = Slice(mixture, stop=args.max_conversations) if args.max_conversations > 0 else mixture
    scratch = paths.checkpoint_dir("sft", f".{tag}.rows")
    began = time.perf_counter()
    rows = batches.render_conversations(conversations, tokenizer, T, machine, scratch / "train")
    rendering = time.perf_counter() - began
    held_out = mixtures.validation(args.mixture)
    validation = batches.render_conversations(held_out, tokenizer, T, machine, scratch / "validation")
    identity["rows"] = {"length": T, "a_step": rows_per_step, "fingerprint": rows.fingerprint}
    if resumed:
        checkpoint.check_resumable(resumed, meta, rows=identity["rows"])
        checkpoint.tell_dtype(meta, machine)
        checkpoint.restore_rng(meta, machine)
    examinations = chatcore_tasks() if args.chatcore_every > 0 else {}  # fetched now, not in mid-training
    validation_rows = max(1, min(args.eval_tokens // T, validation.num_rows))
    num_iterations = args.num_iterations if args.num_iterations > 0 else max(1, rows.num_rows // rows_per_step)
    machine.print(
        f"{tag}: {len(conversations):,} conversations in {rows.num_rows:,} rows of {T} tokens, "
        f"{rows.mask.mean():.0%} of the tokens learned; {num_iterations:,} steps of {rows_per_step} rows, "
        f"{device_batch.rows} at once, {machine.dtype}, attention {model.attention_backend}"
        + (f"; going on at step {first_step}" if resumed else "")
    )
    last_step = progress.last_step(num_iterations, args.stop_after)
    lock = checkpoint.set_aside(folder, machine, after=resume_step)
    train_model = compiled(model, compiles)
    names = ("chat_sft", tag, machine, args.run, vars(args), "nanochat-sft")
    sink = results.Results(*names, resume_step, progress.measured_at, meta.get("wandb_id"), spent=progress.elapsed)
    when = (args.save_every, args.save_minutes, args.keep)
    keeper = saver.Saver(folder, model, optimizer, machine, resume_step, *when, sink.log_file, lock)

    def set_rates(step):
        multiplier = schedules.learning_rate_by_progress(
            step / num_iterations, args.warmup_ratio, args.warmdown_ratio, args.final_lr_frac
        )
        optimizer.set_rates(multiplier, schedules.sft_muon_momentum(step, args.momentum_ramp_steps))
        return multiplier

    def measure(step, last):
        if is_due(step, args.eval_every, last) or (step == 0 and args.eval_every > 0):
            began = time.perf_counter()
            bpb = bits_per_byte(
                train_model, validation, validation_rows, device_batch.rows, tokenizer.token_bytes(), machine
            )
            progress.saw_bpb(bpb)
            sink.log(step, {"val/bpb": bpb, "val/dt": time.perf_counter() - began})
            machine.print(f"step {step}: validation bits per byte {bpb:.4f}")

    def save(step):
        meta = {
            "stage": "sft",
            "tag": tag,
            **identity,
            "corpus": base_meta["corpus"],
            "flags": vars(args),
            "device_batch_size": device_batch.rows,
            "next_row": step * rows_per_step,
            "progress": progress.as_dict(),
            "wandb_id": sink.wandb_id,
        }
        keeper.save(step, meta)

    def examine(step, last):
        if is_due(step, args.chatcore_every, last):
            keeper.ensure(save, step)  # an examination takes long, and may fail
            began = time.perf_counter()
            scores = quick_chatcore(args, examinations, model, tokenizer, machine)
            progress.chatcore = chatcore(scores)
            by_task = {f"chatcore/{name}": score["accuracy"] for name, score in scores.items()}
            seconds = time.perf_counter() - began
            sink.log(step, {"chatcore_metric": progress.chatcore, **by_task, "chatcore/dt": seconds})
            machine.print(f"step {step}: ChatCORE {progress.chatcore:.4f}")

    flops_per_token = model.flops_per_token()

    def describe(step, seconds):
        speed = throughput(step, seconds, total_batch_size, flops_per_token, machine)
        return {**speed, "train/epoch": (step + 1) * rows_per_step / rows.num_rows}

    train(
        train_model,
        optimizer,
        batches.read_steps(rows, first_step, rows_per_step, machine),
        progress,
        machine,
        sink,
        keeper,
        num_iterations=last_step,
        device_batch=device_batch,
        on_nan=args.on_nan,
        set_rates=set_rates,
        measure=measure,
        save=save,
        examine=examine,
        describe=describe,
    )
    final = summary(progress, total_batch_size, flops_per_token, machine)
    sink.finish(
        {
            "conversations": len(conversations),
            "available": len(mixture),
            "rendering_seconds": rendering,
            "rows": rows.num_rows,
            "num_iterations": num_iterations,
            "final": {**final, "chatcore_metric": progress.chatcore},
        }
    )
    machine.print(f"the model is in {folder / f'step_{progress.step:06d}'}")


def optimizer_groups(args, model, base_flags):
    """The base run's rates as they stood on its command line, or this one's, times --init-lr-frac; no weight decay."""
    rates = {name: getattr(args, name) for name in ("embedding_lr", "unembedding_lr", "matrix_lr")}
    rates = {name: base_flags[name] if rate is None else rate for name, rate in rates.items()}
    rates = {name: rate * args.init_lr_frac for name, rate in {**rates, "scalar_lr": args.scalar_lr}.items()}
    return param_groups(model.roles(), model.config.n_embd, weight_decay=0.0, smear_lr=args.smear_lr, **rates)


def chatcore_tasks():
    return {
        "ARC-Easy": ARC("ARC-Easy", "test"),
        "ARC-Challenge": ARC("ARC-Challenge", "test"),
        "MMLU": MMLU("all", "test"),
        "GSM8K": GSM8K("test"),
        "HumanEval": HumanEval(),
        "SpellingBee": SpellingBee(size=256, split="test"),
    }


def quick_chatcore(args, tasks, model, tokenizer, machine):
    """name -> result, over a part of each task."""
    scores = {}
    for name, task in tasks.items():
        limit = args.chatcore_max_cat if task.kind == "categorical" else args.chatcore_max_sample
        scores[name], _ = evaluate_task(task, model, tokenizer, machine, max_problems=limit if limit > 0 else None)
    return scores


if __name__ == "__main__":
    main(parse_args())
