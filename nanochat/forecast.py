"""What a planned run will take, and what may come out of it: the rest of its speedrun, shards, disk, known results.
Pure functions."""

import math

import torch

from nanochat.gpt import GPTConfig
from nanochat.memory import state_bytes, weight_bytes
from nanochat.scaling import Plan

TOKENS_A_SHARD = 34.5e6  # of ClimbMix, that reach a row: 170 shards serve the 5.84e9 tokens of depth 24 at ratio 8
MIN_SHARDS = 8  # what the tokenizer is trained on
SHARD_DISK = 0.2e9  # bytes of text and of tokens
OTHER_DISK = {"climbmix": 5e9}  # the CORE bundle, chat data sets, results
CHECKPOINTS = 6  # of pretraining and of SFT, two kept and one being written

# Published results of this recipe on 8 x H100, and compute-optimal fits of the same project to an older data set.
SPEEDRUN = {"flops": 2.788e19, "bits_per_byte": 0.718, "core": 0.2626}  # depth 24, ratio 8, fp8, ClimbMix
FITS = ((1e18, 0.897), (2e18, 0.862), (5e18, 0.829), (1e19, 0.800))  # FLOPs, bits per byte on FineWeb-EDU
NEAR = 0.1
OPTIMAL_RATIOS = (7, 14)  # tokens per scaling parameter of which the fits, and the speedrun, speak


def other_seconds(pretraining: float, on_gpu: bool) -> float:
    """Tokenizer, examinations, SFT and report, downloads aside. GPUs: what makes of 99 minutes of pretraining a
    speedrun of two hours. CPUs: profile tiny, RL included, 12 min 20 s of which 6 min 48 s are pretraining."""
    return 600 + 0.1 * pretraining if on_gpu else 30 + 0.75 * pretraining


def shards(tokens: int) -> int:
    """Of ClimbMix, for one epoch."""
    return max(MIN_SHARDS, math.ceil(tokens / TOKENS_A_SHARD))


def disk_bytes(config: GPTConfig, dtype: torch.dtype, corpus: str, num_shards: int) -> float:
    checkpoint = weight_bytes(config, dtype) + state_bytes(config)
    return num_shards * SHARD_DISK + CHECKPOINTS * checkpoint + OTHER_DISK.get(corpus, 0.2e9)


def known_result(plan: Plan, corpus: str) -> dict:
    """bits_per_byte and core where a known run or fit is near, else None, and `source`, which says why."""
    unknown = {"bits_per_byte": None, "core": None}
    if corpus != "climbmix":
        return unknown | {"source": f"nothing is known of runs on {corpus}"}
    ratio = plan.tokens / plan.scaling_params
    if not OPTIMAL_RATIOS[0] <= ratio <= OPTIMAL_RATIOS[1]:
        return unknown | {"source": f"no known run has {ratio:.2g} tokens a scaling parameter"}
    if abs(plan.total_flops / SPEEDRUN["flops"] - 1) <= NEAR:
        result = {key: SPEEDRUN[key] for key in ("bits_per_byte", "core")}
        return result | {"source": "known of depth 24 at ratio 8 on ClimbMix (GPT-2: CORE 0.2565)"}
    if FITS[0][0] <= plan.total_flops <= FITS[-1][0]:
        bpb = round(_between(FITS, plan.total_flops), 3)
        return {"bits_per_byte": bpb, "core": None, "source": "a fit to older runs on FineWeb-EDU, not on ClimbMix"}
    return unknown | {"source": f"no known point is near {plan.total_flops:.1e} FLOPs"}


def _between(points: tuple, x: float) -> float:
    """Linear in log x between the two points beside it."""
    (x0, y0), (x1, y1) = next(pair for pair in zip(points, points[1:], strict=False) if pair[0][0] <= x <= pair[1][0])
    return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)
