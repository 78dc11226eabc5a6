"""Let a chat model practise: it answers questions, and learns from which answers were right.

python -m scripts.chat_rl --model-tag d12
torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --device-batch-size=16
"""

import argparse
import itertools
import time

import numpy as np

from nanochat import checkpoint, decoding, memory, paths, results, rollouts, runtime, saver, schedules
from nanochat.chat_eval import evaluate_task, pass_at_k
from nanochat.download import DownloadError
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig, build_model
from nanochat.optim import MuonAdamW, orthogonalization_dtype, param_groups
from nanochat.progress import Progress, is_due
from nanochat.train import train
from tasks import mixtures

MOMENTUM = 0.95
LINEAR_TO_ZERO = (0.0, 1.0, 0.0)  # no warm-up, all of the run is warm-down, to nothing


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", default="dummy", help="wandb run name; dummy: no wandb")
    add("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    add("--model-tag", help="which SFT model (default: the largest d<N>)")
    add("--model-step", type=int, help="which checkpoint of it (default: the newest)")
    add("--task", default="gsm8k", choices=mixtures.PRACTICE, help="what is practised (tasks/mixtures.py)")
    add("--seed", type=int, default=42, help="of the order of the questions and the noise of the answers")
    # how long
    add("--num-epochs", type=int, default=1, help="times that each question comes")
    add("--num-iterations", type=int, default=-1, help="optimizer steps (-1: by --num-epochs)")
    # answers
    add("--examples-per-step", type=int, default=16, help="questions a step, over all ranks")
    add("--num-samples", type=int, default=16, help="answers to each question")
    add("--max-new-tokens", type=int, default=256)
    add("--temperature", type=float, default=1.0, help="of the sampled answers; they are learned from at 1")
    add("--top-k", type=int, default=50)
    # learning
    add("--device-batch-size", type=int, default=8, help="answers that are learned from at once")
    add("--embedding-lr", type=float, default=0.2)
    add("--unembedding-lr", type=float, default=0.004)
    add("--matrix-lr", type=float, default=0.02)
    add("--scalar-lr", type=float, default=0.5)
    add("--smear-lr", type=float, default=0.2)
    add("--weight-decay", type=float, default=0.0)
    add("--init-lr-frac", type=float, default=0.05, help="share of these rates at which RL begins")
    # along the way
    add("--eval-every", type=int, default=60, help="steps between examinations on held-out questions (-1: never)")
    add("--eval-examples", type=int, default=400, help="of these so many")
    add("--eval-samples", type=int, default=8, help="answers to each of them")
    add("--log-questions", type=int, default=4, help="questions a step whose answers are kept to read")
    add(
        "--rehearse",
        action="store_true",
        help="for a model that has learned nothing: answers as long as the expected ones",
    )
    saver.add_flags(parser)
    parser.set_defaults(save_every=60)
    args = parser.parse_args(argv)
    counts = "num_epochs examples_per_step num_samples max_new_tokens device_batch_size eval_examples eval_samples"
    for name in counts.split():
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected 1 or more")
    if args.num_samples == 1:
        parser.error("--num-samples is 1; expected 2 or more: an answer is compared with others to its question")
    if args.temperature <= 0:
        parser.error(f"--temperature is {args.temperature}; expected more than 0: else all answers are the same")
    if min(args.seed, args.top_k, args.log_questions) < 0:
        parser.error("--seed, --top-k and --log-questions are 0 or more")
    saver.check_flags(parser, args)
    return args


def main(args):
    with runtime.stage(args.device_type, (ValueError, DownloadError), training=True) as machine:
        practise(args, machine)


def practise(args, machine):
    sft = checkpoint.find("sft", args.model_tag, args.model_step)
    sft_meta = checkpoint.read_meta(sft)
    tag = sft_meta["tag"]
    tokenizer = checkpoint.load_tokenizer(sft_meta)
    config = GPTConfig(**sft_meta["model_config"])
    folder = paths.checkpoint_dir("rl", tag)
    resumed = checkpoint.find_resume("rl", tag, args.resume, args.resume_from_step, machine)
    identity = {
        "model_config": config.__dict__,
        "tokenizer": sft_meta["tokenizer"],
        "sft": {"step": sft_meta["step"], "saved": sft_meta.get("saved")},
        "practice": {name: getattr(args, name) for name in ("task", "seed", "examples_per_step", "num_samples")},
    }
    meta = checkpoint.read_meta(resumed) if resumed else {}
    if resumed:
        checkpoint.check_resumable(resumed, meta, **identity)
    progress = Progress(**meta.get("progress", {}))
    first_step = progress.step
    resume_step = first_step if resumed else -1

    reference = reference_model(config, sft, machine)
    model = build_model(config, machine, seed=None)
    checkpoint.load_weights(resumed or sft, model)
    precision = orthogonalization_dtype(machine.device, machine.dtype)
    optimizer = MuonAdamW(optimizer_groups(args, model), machine.rank, machine.world_size, precision)
    if resumed:
        checkpoint.load_optimizer(resumed, optimizer)
        checkpoint.tell_dtype(meta, machine)
        checkpoint.restore_rng(meta, machine)
    task, held_out = mixtures.practice(args.task), mixtures.held_out(args.task)
    per_step = args.examples_per_step
    num_iterations = args.num_iterations if args.num_iterations > 0 else max(1, args.num_epochs * len(task) // per_step)
    longest = rollouts.longest(task, tokenizer, args.max_new_tokens)
    at_once = -(-per_step // machine.world_size) * args.num_samples
    at_once = memory.rollouts_that_fit(at_once, config, longest, machine)
    engine = Engine(model, tokenizer, at_once, longest, decoding.available(machine))
    device_batch = memory.DeviceBatch(args.device_batch_size, machine)
    machine.print(
        f"{tag}: {len(task):,} questions; {num_iterations:,} steps of {per_step} with {args.num_samples} answers each, "
        f"{at_once} under way and {device_batch.rows} learned from at once, {machine.dtype}, "
        f"attention {model.attention_backend}" + (f"; going on at step {first_step}" if resumed else "")
    )
    last_step = progress.last_step(num_iterations, args.stop_after)
    lock = checkpoint.set_aside(folder, machine, after=resume_step)
    names = ("chat_rl", tag, machine, args.run, vars(args), "nanochat-rl")
    sink = results.Results(*names, resume_step, wandb_id=meta.get("wandb_id"), beside="answers", spent=progress.elapsed)
    when = (args.save_every, args.save_minutes, args.keep)
    keeper = saver.Saver(folder, model, optimizer, machine, resume_step, *when, sink.log_file, lock)
    told = {}  # of the step at hand

    def steps():
        for step in itertools.count(first_step):
            numbers = range(step * per_step, (step + 1) * per_step)
            questions = [task[question_at(number, len(task), args.seed)] for number in numbers]
            seeds = [(args.seed << 40) + number * args.num_samples for number in numbers]
            share = slice(machine.rank, None, machine.world_size)
            sampling = (args.num_samples, args.max_new_tokens, args.temperature, args.top_k)
            began = time.perf_counter()
            engine.refresh(model)
            own = rollouts.sample(
                engine, task, questions[share], seeds[share], *sampling, machine.is_main, args.rehearse
            )
            seconds = time.perf_counter() - began
            entropy, kl = rollouts.entropy_and_kl(engine.model, reference, own, machine)
            own_of, seconds_of = zip(*machine.gather((own, seconds)), strict=True)
            dealt = (group for of_round in itertools.zip_longest(*own_of) for group in of_round)
            groups = [group for group in dealt if group is not None]  # in the order of the questions
            sink.log_beside(step, list(map(rollouts.record, questions[: args.log_questions], groups)))
            told.update(rollouts.figures(groups, max(seconds_of)), entropy=entropy, kl=kl)
            told["tokens"] = rollouts.num_learned(groups)
            yield rollouts.rows_of(groups, tokenizer.bos, machine)

    def set_rates(step):
        multiplier = schedules.learning_rate_by_progress(step / num_iterations, *LINEAR_TO_ZERO)
        if told["tokens"] == 0:  # there is no gradient, but the momentum of former ones would go on
            multiplier = 0.0
        optimizer.set_rates(multiplier, MOMENTUM)
        return multiplier

    def save(step):
        meta = {
            "stage": "rl",
            "tag": tag,
            **identity,
            "corpus": sft_meta["corpus"],
            "flags": vars(args),
            "device_batch_size": device_batch.rows,
            "progress": progress.as_dict(),
            "wandb_id": sink.wandb_id,
        }
        keeper.save(step, meta)

    def examine(step, last):
        if is_due(step, args.eval_every, last) or (step == 0 and args.eval_every > 0):
            if step > 0:
                keeper.ensure(save, step)  # an examination takes long, and may fail
            sampling = (args.max_new_tokens, args.temperature, args.top_k, args.eval_samples, args.eval_examples)
            summary, records = evaluate_task(
                held_out, model, tokenizer, machine, at_once, *sampling, rehearse=args.rehearse
            )
            passed = pass_at_k(records, args.eval_samples, range(1, args.eval_samples + 1))
            sink.log(step, {**{f"pass@{k}": share for k, share in passed.items()}, "val/dt": summary["seconds"]})
            shown = ", ".join(f"pass@{k} {passed[str(k)]:.3f}" for k in sorted({1, args.eval_samples}))
            machine.print(f"step {step}: {len(records)} held-out questions, {shown}")

    def describe(step, seconds):
        logged = {name: value for name, value in told.items() if name != "tokens"}
        return {"train/tok_per_sec": told["tokens"] / seconds, **logged}

    def headline(values, progress):
        return (
            f"reward {values['reward']:.3f} | {values['sequence_length']:.0f} tokens | entropy {values['entropy']:.3f} "
            f"| KL {values['kl']:.3f} | skipped {values['skipped_questions']:.0%} "
            f"| answered in {values['rollout/dt']:.1f} s"
        )

    train(
        rollouts.policy_loss(model),
        optimizer,
        steps(),
        progress,
        machine,
        sink,
        keeper,
        num_iterations=last_step,
        device_batch=device_batch,
        on_nan=args.on_nan,
        set_rates=set_rates,
        measure=lambda step, last: None,
        save=save,
        examine=examine,
        describe=describe,
        headline=headline,
    )
    summary = {"task": args.task, "questions": len(task), "num_iterations": num_iterations}
    sink.finish({**summary, **rollouts.history(sink.logged())})
    machine.print(f"the model is in {folder / f'step_{progress.step:06d}'}")


def reference_model(config, sft, machine):
    """The model that practice starts from, as it stays."""
    model = build_model(config, machine, seed=None)
    checkpoint.load_weights(sft, model)
    return decoding.inference_copy(model)


def optimizer_groups(args, model):
    names = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "smear_lr")
    rates = {name: getattr(args, name) * args.init_lr_frac for name in names}
    return param_groups(model.roles(), model.config.n_embd, weight_decay=args.weight_decay, **rates)


def question_at(number: int, count: int, seed: int) -> int:
    """Which of `count` questions the run's `number`-th is: each comes once an epoch, every time in another order."""
    epoch, place = divmod(number, count)
    return int(np.random.default_rng((seed, epoch)).permutation(count)[place])


if __name__ == "__main__":
    main(parse_args())
