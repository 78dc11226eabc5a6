"""The training loop, as plain functions over callables; pretraining, SFT and RL share it."""

import math
import time
from collections.abc import Callable, Iterator

import torch

from nanochat.compilation import times_compiled
from nanochat.memory import DeviceBatch
from nanochat.optim import MuonAdamW
from nanochat.progress import WARM_STEPS, Progress, loss_and_bpb
from nanochat.results import LiveLine, Results, clock
from nanochat.runtime import Runtime, StopSignals
from nanochat.saver import Saver
from nanochat.training_step import Outcome, optimizer_step

MAX_SKIPPED = 10  # steps in a row that --on-nan skip leaves out before it gives up


def train(
    model,
    optimizer: MuonAdamW,
    batches: Iterator[tuple],
    progress: Progress,
    runtime: Runtime,
    results: Results,
    saver: Saver,
    *,
    num_iterations: int,
    device_batch: DeviceBatch,
    on_nan: str,
    set_rates: Callable[[int], float],
    measure: Callable[[int, bool], None],
    save: Callable[[int], None],
    examine: Callable[[int, bool], None],
    describe: Callable[[int, float], dict],
    headline: Callable[[dict, Progress], str] = loss_and_bpb,
) -> None:
    """Steps progress.step .. num_iterations - 1.

    batches yields this rank's (inputs, targets, ...) of each step. set_rates(step) sets the optimizer's rates and
    returns the learning-rate multiplier. Before every step, and with last=True after the last: measure(step, last) what
    belongs to a checkpoint, save(step) when the saver says so or a signal came, examine(step, last) what may take long.
    describe(step, seconds) adds to what is logged, train/tok_per_sec at least; headline(what is logged, progress) is
    what the live line shows first. on_nan: "stop", or "skip" a step whose loss or gradient is not finite.
    """

    def news():
        return [signals.received is not None, *saver.news()]

    live = LiveLine(runtime)
    scaling = runtime.dtype == torch.float16
    first_step, skipped_in_a_row, stop = progress.step, 0, False
    began = time.perf_counter() - progress.elapsed
    with StopSignals() as signals:
        while True:
            progress.elapsed = time.perf_counter() - began
            step = progress.step
            last = step == num_iterations
            if progress.measured_at != step and (last or not stop):  # measured, or left to the run that goes on
                measure(step, last)
                progress.measured_at = step
            if stop or saver.due(step, last):
                save(step)
            if last:
                saver.ensure(save, step, signals)
                stop = stop or any(runtime.gather(signals.received is not None))
            if stop:
                saver.leave(signals)
            if last:
                break
            examine(step, last)
            asked, graphs = time.perf_counter(), times_compiled()
            batch = next(batches)
            waited = time.perf_counter() - asked
            runtime.synchronize()
            begin = time.perf_counter()
            multiplier = set_rates(step)
            scale = progress.loss_scale if scaling else 1.0
            outcome = optimizer_step(model, optimizer, batch, device_batch, runtime, scale, news)
            runtime.synchronize()
            seconds = time.perf_counter() - begin
            stop, *saver_news = outcome.news
            saver.heard(saver_news)
            # float16's daily bread is that scaled gradients overflow
            overflow = scaling and math.isfinite(outcome.loss) and progress.loss_scale >= 1
            if scaling:
                progress.saw_scaled_step(outcome.finite)
            if outcome.finite:
                progress.saw_loss(outcome.loss)
                skipped_in_a_row = 0
            elif not overflow:
                progress.skipped += 1
                skipped_in_a_row += 1
                not_finite(step, outcome, runtime, saver, on_nan, skipped_in_a_row)
            progress.step += 1
            if step - first_step >= WARM_STEPS:
                progress.training_time += seconds
                progress.waiting_time += waited
                progress.timed_steps += 1
                if recompiled := times_compiled() - graphs:
                    runtime.print(f"step {step}: {recompiled} functions were compiled again")
                    results.log(step, {"train/recompiled": recompiled})
            values = {
                "train/loss": progress.smooth_loss if progress.ema_steps else None,
                "train/step_loss": outcome.loss if math.isfinite(outcome.loss) else None,
                "train/lrm": multiplier,
                **optimizer.muon_rates(),
                "train/dt": seconds,
                "train/data_wait": waited / (waited + seconds),
                "total_training_time": progress.training_time,
                **({"train/skipped": progress.skipped} if progress.skipped else {}),
                **describe(step, seconds),
            }
            results.log(step, values)
            mfu = values.get("train/mfu")
            live.show(
                f"step {step + 1}/{num_iterations} | {headline(values, progress)} | lr x{multiplier:.2f} "
                f"| {seconds * 1000:.0f} ms | {values['train/tok_per_sec']:,.0f} tok/s "
                f"| {f'MFU {mfu:.1%} | ' if mfu else ''}{runtime.peak_memory() / 1e9:.1f} GB "
                f"| ETA {clock(progress.seconds_a_step(waited + seconds) * (num_iterations - step - 1))}",
                last=step + 1 == num_iterations,
            )
    examine(num_iterations, True)


def not_finite(step: int, outcome: Outcome, runtime: Runtime, saver: Saver, on_nan: str, in_a_row: int) -> None:
    """Say which ranks saw what is no number, and stop, unless the step is to be left out."""
    ranks = [str(rank) for rank, finite in enumerate(runtime.gather(outcome.finite_here)) if not finite]
    where = f"rank {', '.join(ranks)}" if ranks else "all ranks together"
    what = f"step {step}: the loss or a gradient of {where} is not finite"
    if on_nan == "skip" and in_a_row <= MAX_SKIPPED:
        runtime.print(f"{what}; the step is left out")
        return
    saver.finish()
    advice = "--resume goes on from there: with lower rates"
    advice += f" ({MAX_SKIPPED} steps in a row were left out)" if on_nan == "skip" else ", or with --on-nan skip"
    runtime.print(f"{what}; {saver.last_good()}; {advice}")
    runtime.barrier()  # before torchrun notices that a rank has ended
    raise SystemExit(1)
