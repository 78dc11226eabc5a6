"""Pretrain a base model: one dial, --depth, sets everything else.

python -m scripts.base_train --depth 12
torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=24 --target-param-data-ratio=8 --fp8
"""

import argparse
import time

import torch

from nanochat import batches, checkpoint, dataset, fp8, memory, paths, results, runtime, saver, schedules
from nanochat.bpb import bits_per_byte
from nanochat.compilation import compiled, will_compile
from nanochat.core_bundle import find_bundle
from nanochat.core_eval import evaluate_core
from nanochat.download import DownloadError
from nanochat.gpt import build_model
from nanochat.optim import MuonAdamW, orthogonalization_dtype, param_groups
from nanochat.progress import Progress, is_due, summary, throughput
from nanochat.samples import prompted
from nanochat.scaling import add_horizon_flags, add_model_flags, check_model_flags, shape_and_plan
from nanochat.tokenizer import Tokenizer
from nanochat.train import train


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", default="dummy", help="wandb run name; dummy: no wandb")
    add("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    add("--corpus", default="climbmix", help="which corpus to read")
    add("--vocab-size", type=int, default=32768, help="with the corpus, names the tokenizer")
    add("--num-files", type=int, default=-1, help="training shards to read (-1: all that are on disk)")
    add_model_flags(parser)
    add_horizon_flags(parser)
    # optimization
    add("--device-batch-size", type=memory.row_count, help="rows at once, or auto (default: auto on GPUs, else 32)")
    add("--embedding-lr", type=float, default=0.3)
    add("--unembedding-lr", type=float, default=0.008)
    add("--matrix-lr", type=float, default=0.02)
    add("--scalar-lr", type=float, default=0.5)
    add("--smear-lr", type=float, default=0.2, help="of smear and backout; never scaled")
    add("--smear-init", type=float, default=0.0, help="first scale of smear; at 2 short runs learn to look things up")
    add("--weight-decay", type=float, default=0.28, help="of Muon")
    add("--no-scaling", action="store_true", help="take rates and weight decay as given, whatever batch and horizon")
    add("--warmup-steps", type=int, default=40)
    add("--warmdown-ratio", type=float, default=0.65)
    add("--final-lr-frac", type=float, default=0.05)
    add("--momentum-ramp-steps", type=int, default=400)
    add("--seed", type=int, default=42, help="of the first weights, and of the order of the rows without --in-order")
    add("--in-order", action="store_true", help="read the shards in order, not shuffled")
    add("--fp8", action="store_true", help="matrix products in fp8 (Hopper and later)")
    add("--fp8-recipe", default="tensorwise", choices=["tensorwise"])
    add("--compile", type=int, default=-1, choices=[-1, 0, 1], help="torch.compile (-1: on GPUs)")
    # along the way
    add("--eval-every", type=int, default=250, help="steps between measurements of bits per byte (-1: never)")
    add("--eval-tokens", type=int, default=80 * 524288)
    add("--core-metric-every", type=int, default=2000, help="steps between measurements of CORE (-1: never)")
    add("--core-metric-max-per-task", type=int, default=500)
    add("--bundle", default="eval_bundle", help="name or path of the CORE bundle")
    add("--sample-every", type=int, default=2000, help="steps between samples (-1: never)")
    add("--model-tag", default="", help="name of the model (default: d<depth>)")
    saver.add_flags(parser)
    args = parser.parse_args(argv)
    check_model_flags(parser, args)
    for name in ("num_iterations", "total_batch_size", "core_metric_max_per_task"):
        if getattr(args, name) != -1 and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected 1 or more, or -1")
    saver.check_flags(parser, args)
    args.model_tag = args.model_tag or f"d{args.depth}"
    return args


def main(args):
    with runtime.stage(args.device_type, (ValueError, DownloadError), training=True) as machine:
        pretrain(args, machine)


def pretrain(args, machine):
    tokenizer_name = f"{args.corpus}-{args.vocab_size}"
    tokenizer = Tokenizer.load(paths.tokenizer_dir(tokenizer_name))
    config, the_plan = shape_and_plan(args, tokenizer.vocab_size, args.weight_decay)
    T, num_iterations = config.sequence_len, the_plan.num_iterations
    compiles = will_compile(args.compile, machine)
    at_once = memory.choose_rows(args.device_batch_size, config, T, machine, compiles, default=32)
    rows_per_step, device_batch = memory.split_batch(the_plan.total_batch_size, T, at_once, machine)
    folder = paths.checkpoint_dir("base", args.model_tag)
    resumed = checkpoint.find_resume("base", args.model_tag, args.resume, args.resume_from_step, machine)
    meta = checkpoint.read_meta(resumed) if resumed else {}
    progress = Progress(**meta.get("progress", {}))
    first_step = progress.step
    resume_step = first_step if resumed else -1
    order_seed = None if args.in_order else args.seed

    files = dataset.token_files(
        args.corpus, tokenizer.fingerprint, "train", args.num_files if args.num_files > 0 else None
    )
    identity = {
        "model_config": config.__dict__,
        "tokenizer": {"name": tokenizer_name, "fingerprint": tokenizer.fingerprint},
        "rows": {"corpus": args.corpus, "seed": order_seed, "a_step": rows_per_step},
    }
    if resumed:
        checkpoint.check_resumable(resumed, meta, **identity)
        checkpoint.tell_dtype(meta, machine)
        files = pinned(files, meta["shards"])
    batches.pack_shards(files, T, machine)
    rows = batches.TextRows(files, T, tokenizer.bos, tokenizer.vocab_size, order_seed)
    validation_files = dataset.token_files(args.corpus, tokenizer.fingerprint, "validation")
    validation = batches.TextRows(validation_files, T, tokenizer.bos, tokenizer.vocab_size, seed=None)
    validation_rows = max(1, min(args.eval_tokens // T, validation.num_rows))

    model = build_model(config, machine, args.seed)
    torch.nn.init.constant_(model.smear_lambda, args.smear_init)
    precision = orthogonalization_dtype(machine.device, machine.dtype)
    groups = optimizer_groups(args, model, the_plan)
    optimizer = MuonAdamW(groups, machine.rank, machine.world_size, precision, compiles)
    if resumed:
        checkpoint.load_weights(resumed, model)
        checkpoint.load_optimizer(resumed, optimizer)
        checkpoint.restore_rng(meta, machine)
    counts = model.counts()
    machine.print(
        f"{args.model_tag}: {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, T {T}, vocabulary "
        f"{config.vocab_size}; {counts['total']:,} parameters\n"
        f"{num_iterations:,} steps of {the_plan.total_batch_size:,} tokens = {the_plan.tokens:,} tokens, "
        f"{the_plan.tokens / T / rows.num_rows:.2f} epochs of {len(files)} shards, {the_plan.total_flops:.2e} FLOPs\n"
        f"{runtime.device_name(machine.device)} x {machine.world_size}, {machine.dtype}, {device_batch.rows} rows "
        f"at once, attention {model.attention_backend}" + (f"; going on at step {first_step}" if resumed else "")
    )
    if args.fp8:
        fp8.enable_where_possible(model, machine)
    bundle = core_bundle(args.bundle, machine) if args.core_metric_every > 0 else None
    last_step = progress.last_step(num_iterations, args.stop_after)
    lock = checkpoint.set_aside(folder, machine, after=resume_step)
    train_model = compiled(model, compiles)
    names = ("base_train", args.model_tag, machine, args.run, vars(args), "nanochat")
    sink = results.Results(*names, resume_step, progress.measured_at, meta.get("wandb_id"), spent=progress.elapsed)
    when = (args.save_every, args.save_minutes, args.keep)
    keeper = saver.Saver(folder, model, optimizer, machine, resume_step, *when, sink.log_file, lock)

    def set_rates(step):
        multiplier = schedules.learning_rate(
            step, num_iterations, args.warmup_steps, args.warmdown_ratio, args.final_lr_frac
        )
        momentum = schedules.muon_momentum(step, num_iterations, args.warmdown_ratio, args.momentum_ramp_steps)
        optimizer.set_rates(multiplier, momentum, schedules.weight_decay(step, num_iterations))
        return multiplier

    def measure(step, last):
        if is_due(step, args.eval_every, last) or (step == 0 and args.eval_every > 0):
            began = time.perf_counter()
            with fp8.disabled(model):
                bpb = bits_per_byte(
                    train_model, validation, validation_rows, device_batch.rows, tokenizer.token_bytes(), machine
                )
            progress.saw_bpb(bpb)
            sink.log(step, {"val/bpb": bpb, "val/dt": time.perf_counter() - began})
            machine.print(f"step {step}: validation bits per byte {bpb:.4f}")

    def save(step):
        meta = {
            "stage": "base",
            "tag": args.model_tag,
            **identity,
            "corpus": args.corpus,
            "flags": vars(args),
            "plan": the_plan.as_dict(),
            "device_batch_size": device_batch.rows,
            "next_row": step * rows_per_step,
            "shards": [file.tokens.name for file in files],
            "progress": progress.as_dict(),
            "wandb_id": sink.wandb_id,
        }
        keeper.save(step, meta)

    def examine(step, last):
        with fp8.disabled(model):
            if is_due(step, args.core_metric_every, last):
                keeper.ensure(save, step)  # an examination takes long, and may fail
                began = time.perf_counter()
                core = evaluate_core(model, tokenizer, bundle, machine, args.core_metric_max_per_task)
                progress.core = core["metric"]
                centered = {label: task["centered"] for label, task in core["tasks"].items()}
                seconds = time.perf_counter() - began
                sink.log(step, {"core_metric": core["metric"], "centered_results": centered, "core/dt": seconds})
                machine.print(f"step {step}: CORE {core['metric']:.4f}")
            if is_due(step, args.sample_every, last) and machine.is_main:
                for sample in prompted(model, tokenizer):
                    print(f"{sample['prompt']}|{sample['text']!r}")

    def describe(step, seconds):
        speed = throughput(step, seconds, the_plan.total_batch_size, the_plan.flops_per_token, machine)
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
    sink.finish(
        {
            "plan": the_plan.as_dict(),
            "model": {"config": config.__dict__, "counts": counts},
            "tokenizer": tokenizer_name,
            "vocabulary": tokenizer.fingerprint,
            "corpus": args.corpus,
            "shards": len(files),
            "final": {
                **summary(progress, the_plan.total_batch_size, the_plan.flops_per_token, machine),
                "core_metric": progress.core,
            },
        }
    )
    machine.print(f"the model is in {folder / f'step_{progress.step:06d}'}")


def core_bundle(name, machine):
    """The folder of the CORE bundle, fetched now if need be: not after hours of training."""
    if machine.is_main:
        find_bundle(name)
    machine.barrier()
    return find_bundle(name)


def optimizer_groups(args, model, the_plan):
    scale = 1.0 if args.no_scaling else the_plan.lr_scale
    return param_groups(
        model.roles(),
        model.config.n_embd,
        unembedding_lr=args.unembedding_lr * scale,
        embedding_lr=args.embedding_lr * scale,
        matrix_lr=args.matrix_lr * scale,
        scalar_lr=args.scalar_lr * scale,
        smear_lr=args.smear_lr,
        weight_decay=args.weight_decay if args.no_scaling else the_plan.weight_decay,
    )


def pinned(files, names):
    """The token files that the interrupted run read, in its order; later arrivals wait for the next run."""
    by_name = {file.tokens.name: file for file in files}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(f"the checkpoint was reading {missing[0]}, which is gone: download and tokenize it again")
    return [by_name[name] for name in names]


if __name__ == "__main__":
    main(parse_args())
