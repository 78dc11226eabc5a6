"""Bits per byte: the loss of text, whatever the tokenizer."""

import math

import torch
from tqdm import tqdm

from nanochat.gpt import GPT
from nanochat.runtime import Runtime


@torch.no_grad()
def bits_per_byte(
    model: GPT, rows, num_rows: int, device_batch_size: int, token_bytes: list[int], runtime: Runtime
) -> float:
    """Sum of the loss over targets that are text, over ln 2 times their bytes; special tokens (0 bytes) and ignored
    targets count in neither. The first num_rows of `rows`, shared among the ranks; token_bytes: (vocab_size,)."""
    device = torch.device("cpu") if runtime.device.type == "mps" else runtime.device  # MPS has no float64
    nats, total_bytes = torch.zeros(2, dtype=torch.float64, device=device)
    sizes_by_id = torch.tensor(token_bytes, device=device)
    share = range(runtime.rank * num_rows // runtime.world_size, (runtime.rank + 1) * num_rows // runtime.world_size)
    firsts = range(share.start, share.stop, device_batch_size)
    for first in tqdm(firsts, desc="bits per byte", leave=False, disable=None if runtime.is_main else True):
        batch = rows.read(first, min(device_batch_size, share.stop - first))
        inputs, targets = (tensor.to(runtime.device) for tensor in batch)
        losses = model(inputs, targets, loss_reduction="none").to(device)
        targets = targets.to(device)
        sizes = torch.where(targets >= 0, sizes_by_id[targets.clamp(min=0)], 0)
        nats += (losses.double() * (sizes > 0)).sum()
        total_bytes += sizes.sum()
    runtime.sum(nats), runtime.sum(total_bytes)
    if total_bytes == 0:
        raise ValueError("bits per byte: there is no text among the targets")
    return (nats / (math.log(2) * total_bytes)).item()
