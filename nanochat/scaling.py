"""From one dial, the depth, to a whole run: shape, horizon, batch, learning rates, weight decay. Pure functions.

N scaling parameters (matrices of the blocks + head), D horizon in tokens, B batch in tokens.
"""

import argparse
import math
from dataclasses import asdict, astuple, dataclass
from functools import lru_cache

import torch

from nanochat.gpt import GPT, GPTConfig

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens, tuned at the reference depth
BATCH_EXPONENT = 0.383  # arXiv 2505.13738


def model_config(
    depth: int,
    vocab_size: int,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    sequence_len: int = 2048,
    window_pattern: str = "SSSL",
) -> GPTConfig:
    """Width is depth x aspect ratio, rounded up to whole heads."""
    n_head = math.ceil(depth * aspect_ratio / head_dim)
    return GPTConfig(sequence_len, vocab_size, depth, n_head, n_head, n_head * head_dim, window_pattern)


def meta_model(config: GPTConfig) -> GPT:
    """The model without memory behind it, for counting; made once for each shape."""
    return _meta_model(*astuple(config))


@lru_cache
def _meta_model(*shape) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig(*shape))


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--depth", type=int, default=20, help="layers; sets width, horizon, batch, learning rates")
    add("--aspect-ratio", type=int, default=64, help="width = depth x this, rounded up to whole heads")
    add("--head-dim", type=int, default=128, help="width of a head")
    add("--max-seq-len", type=int, default=2048, help="tokens in a row")
    add("--window-pattern", default="SSSL", help="S: a quarter window, L: a full one; tiled over the layers, last is L")


def add_horizon_flags(parser: argparse.ArgumentParser) -> None:
    """How long: the first that is given wins. And in steps of how much."""
    add = parser.add_argument
    add("--num-iterations", type=int, default=-1, help="optimizer steps")
    add("--target-flops", type=float, default=-1, help="train for this many FLOPs")
    add("--target-param-data-ratio", type=float, default=10.5, help="tokens per scaling parameter")
    add("--total-batch-size", type=int, default=-1, help="tokens a step (-1: by the scaling rule)")


def check_model_flags(parser: argparse.ArgumentParser, args) -> None:
    for name in ("depth", "aspect_ratio", "head_dim", "max_seq_len"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected 1 or more")


@dataclass(frozen=True)
class Plan:
    """A run, before it is run. Tokens where not said otherwise."""

    scaling_params: int
    flops_per_token: int
    horizon: int  # D: what batch, learning rates and weight decay are chosen for
    total_batch_size: int
    num_iterations: int
    lr_scale: float  # on the four learning rates of the command line
    weight_decay: float  # of Muon
    tokens: int  # that will be read
    total_flops: float

    def as_dict(self) -> dict:
        return asdict(self)


def plan(
    config: GPTConfig,
    reference: GPTConfig,
    ratio: float = 10.5,
    num_iterations: int = -1,
    target_flops: float = -1,
    total_batch_size: int = -1,
    weight_decay: float = 0.28,
) -> Plan:
    """config: the model to train. reference: the depth-12 model of the same family, for which batch, learning rates and
    decay were tuned. An explicit horizon (num_iterations, target_flops) changes neither of these three."""
    model = meta_model(config)
    scaling_params = _scaling_params(model)
    horizon = int(ratio * scaling_params)
    growth = scaling_params / _scaling_params(meta_model(reference))  # = D / D_ref
    if total_batch_size == -1:
        total_batch_size = 2 ** round(math.log2(REFERENCE_BATCH * growth**BATCH_EXPONENT))
    flops_per_token = model.flops_per_token()
    if num_iterations == -1:
        if target_flops > 0:
            num_iterations = round(target_flops / (flops_per_token * total_batch_size))
        else:
            num_iterations = horizon // total_batch_size
    if num_iterations < 1:
        raise ValueError(
            f"a horizon of {horizon:,} tokens is less than one batch of {total_batch_size:,}: "
            "give --num-iterations, or a smaller --total-batch-size"
        )
    batch_growth = total_batch_size / REFERENCE_BATCH
    return Plan(
        scaling_params=scaling_params,
        flops_per_token=flops_per_token,
        horizon=horizon,
        total_batch_size=total_batch_size,
        num_iterations=num_iterations,
        lr_scale=math.sqrt(batch_growth),
        weight_decay=weight_decay * math.sqrt(batch_growth) / growth,
        tokens=num_iterations * total_batch_size,
        total_flops=float(num_iterations * total_batch_size * flops_per_token),
    )


def shape_and_plan(args, vocab_size: int, weight_decay: float = 0.28) -> tuple[GPTConfig, Plan]:
    """The model's shape, and the run that the scaling rules (or the flags) make of it. args: the flags above."""
    shape = (args.aspect_ratio, args.head_dim, args.max_seq_len, args.window_pattern)
    config = model_config(args.depth, vocab_size, *shape)
    reference = model_config(REFERENCE_DEPTH, vocab_size, *shape)
    horizon = (args.target_param_data_ratio, args.num_iterations, args.target_flops)
    return config, plan(config, reference, *horizon, args.total_batch_size, weight_decay)


def _scaling_params(model: GPT) -> int:
    counts = model.counts()
    return counts["transformer_matrices"] + counts["lm_head"]
