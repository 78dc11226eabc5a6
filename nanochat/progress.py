"""What a training run knows of itself between two steps, and the summary of it at the end."""

from dataclasses import asdict, dataclass

from nanochat.runtime import Runtime, peak_flops

WARM_STEPS = 10  # steps that are not timed: compilation, cold caches
LOSS_EMA = 0.9
SCALE_DOUBLES_AFTER = 1000  # good steps in float16


@dataclass
class Progress:
    """Saved with every checkpoint."""

    step: int = 0  # steps done
    elapsed: float = 0.0  # seconds in the loop, of all processes of the run
    measured_at: int = -1  # the step before which bits per byte were last asked for
    ema_loss: float = 0.0
    ema_steps: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite
    training_time: float = 0.0  # seconds in steps after the tenth
    waiting_time: float = 0.0  # seconds before these steps until their rows were there
    timed_steps: int = 0
    loss_scale: float = 2.0**15  # used in float16 only
    scaled_steps: int = 0  # good ones since the scale was last changed
    val_bpb: float | None = None
    min_val_bpb: float | None = None
    chatcore: float | None = None
    core: float | None = None

    def as_dict(self) -> dict:
        return asdict(self)

    def last_step(self, num_iterations: int, stop_after: int = -1) -> int:
        """Where a run of so many steps ends that goes on from here: after stop_after more of them, unless it is -1."""
        if self.step > num_iterations:
            raise ValueError(
                f"the checkpoint has {self.step} steps behind it, and this run is of {num_iterations}: give "
                f"--num-iterations {self.step} or more, or go back with --resume-from-step"
            )
        return min(num_iterations, self.step + stop_after) if stop_after > 0 else num_iterations

    def saw_loss(self, loss: float) -> None:
        """Count a step's loss into the moving average."""
        self.ema_loss = LOSS_EMA * self.ema_loss + (1 - LOSS_EMA) * loss
        self.ema_steps += 1

    def saw_scaled_step(self, finite: bool) -> None:
        """The scale of float16's losses: halved after an overflow, doubled after a thousand good steps."""
        self.scaled_steps = self.scaled_steps + 1 if finite else 0
        if not finite:
            self.loss_scale /= 2
        elif self.scaled_steps == SCALE_DOUBLES_AFTER:
            self.loss_scale, self.scaled_steps = self.loss_scale * 2, 0

    def saw_bpb(self, bpb: float) -> None:
        self.val_bpb = bpb
        self.min_val_bpb = bpb if self.min_val_bpb is None else min(bpb, self.min_val_bpb)

    def seconds_a_step(self, newest: float) -> float:
        """On average, the wait for its rows included; of the newest step as long as there is no average."""
        return (self.training_time + self.waiting_time) / self.timed_steps if self.timed_steps else newest

    @property
    def smooth_loss(self) -> float:
        """The debiased moving average."""
        return self.ema_loss / (1 - LOSS_EMA**self.ema_steps) if self.ema_steps else float("nan")


def loss_and_bpb(values: dict, progress: Progress) -> str:
    """What a live line shows of training that follows a loss."""
    return (
        f"loss {progress.smooth_loss:.4f} | bpb {'-' if progress.val_bpb is None else format(progress.val_bpb, '.4f')}"
    )


def throughput(step: int, seconds: float, tokens_per_step: int, flops_per_token: int, runtime: Runtime) -> dict:
    """What is logged of the speed of a step. Tokens: of all ranks."""
    rate, peak = tokens_per_step / seconds, peak_flops(runtime.device)
    return {
        "train/tok_per_sec": rate,
        "train/mfu": rate * flops_per_token / (peak * runtime.world_size) if peak else None,
        "total_training_flops": flops_per_token * tokens_per_step * (step + 1),
    }


def is_due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every so many steps, and after the last, happens at this one. -1: never."""
    return every > 0 and (last or (step > 0 and step % every == 0))


def summary(progress: Progress, tokens_per_step: int, flops_per_token: int, runtime: Runtime) -> dict:
    """The `final` part of a training stage's JSON."""
    tokens = progress.step * tokens_per_step
    timed = progress.training_time > 0
    rate = progress.timed_steps * tokens_per_step / progress.training_time if timed else None
    peak = peak_flops(runtime.device)
    return {
        "step": progress.step,
        "train_loss": progress.smooth_loss,
        "val_bpb": progress.val_bpb,
        "min_val_bpb": progress.min_val_bpb,
        "skipped_steps": progress.skipped,
        "tok_per_sec": rate,
        "mfu": rate * flops_per_token / (peak * runtime.world_size) if timed and peak else None,
        "data_wait": progress.waiting_time / (progress.waiting_time + progress.training_time) if timed else None,
        "peak_memory_bytes": runtime.peak_memory(),
        "tokens": tokens,
        "total_training_flops": float(tokens * flops_per_token),
        "total_training_time": progress.training_time,
    }
