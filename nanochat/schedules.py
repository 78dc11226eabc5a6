"""Learning rate, momentum and weight decay as pure functions of progress."""

import math


def learning_rate(it: int, num_iterations: int, warmup_steps: int, warmdown_ratio: float, final_frac: float) -> float:
    """Multiplier of the learning rates at step `it`: up, flat, then linearly down to `final_frac`."""
    if it < warmup_steps:
        return (it + 1) / warmup_steps
    warmdown = round(warmdown_ratio * num_iterations)
    if it <= num_iterations - warmdown:
        return 1.0
    left = (num_iterations - it) / warmdown
    return left + (1 - left) * final_frac


def learning_rate_by_progress(progress: float, warmup_ratio: float, warmdown_ratio: float, final_frac: float) -> float:
    """The same shape by share of the data consumed (0..1), for SFT and RL."""
    if progress < warmup_ratio:
        return (progress + 1e-8) / warmup_ratio
    if progress <= 1 - warmdown_ratio:
        return 1.0
    left = max(0.0, (1 - progress) / warmdown_ratio)
    return left + (1 - left) * final_frac


def muon_momentum(it: int, num_iterations: int, warmdown_ratio: float, ramp_steps: int = 400) -> float:
    """0.85 -> 0.97 over the ramp, which has precedence; flat; then down to 0.90 with the learning rate.

    In a short run the ramp would eat the warm-down, so it is bounded by 35 % of the steps (no effect from 1,143 on).
    """
    ramp_steps = min(ramp_steps, max(1, int(0.35 * num_iterations)))
    if it < ramp_steps:
        return 0.85 + (0.97 - 0.85) * it / ramp_steps
    warmdown = round(warmdown_ratio * num_iterations)
    if it <= num_iterations - warmdown:
        return 0.97
    left = (num_iterations - it) / warmdown
    return 0.90 + (0.97 - 0.90) * left


def sft_muon_momentum(it: int, ramp_steps: int = 300) -> float:
    return 0.85 + (0.95 - 0.85) * min(it / ramp_steps, 1.0)


def weight_decay(it: int, num_iterations: int) -> float:
    """Multiplier of Muon's weight decay: a half cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * it / num_iterations))
