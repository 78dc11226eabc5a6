"""From logits to tokens: greedy, or drawn with a noise that is a function of (seed, position); and log-probabilities.

A request draws the same tokens alone and in company: what is done for it depends on its own settings only.

B rows, n of them drawn alike, k candidates, V vocabulary.
"""

from typing import NamedTuple

import torch


class Draw(NamedTuple):
    """How row `row` of the logits is drawn; top_k 0 is all."""

    row: int
    temperature: float
    top_k: int
    top_p: float
    noise: float  # in [0, 1)


Group = tuple[int, bool, torch.Tensor]  # candidates, whether top-p counts, (4, n): row, temperature, top_p, noise


def grouped(draws: list[Draw], vocab_size: int, device: torch.device) -> list[Group]:
    """What sample() needs on the device, made before the logits are there: those who have equally many candidates go
    together."""
    alike: dict[tuple[int, bool], list[Draw]] = {}
    for draw in draws:
        alike.setdefault((min(draw.top_k or vocab_size, vocab_size), draw.top_p < 1), []).append(draw)
    groups = []
    for (count, cut), members in alike.items():
        numbers = list(zip(*[(draw.row, draw.temperature, draw.top_p, draw.noise) for draw in members], strict=True))
        table = torch.tensor(numbers, dtype=torch.float32, pin_memory=device.type == "cuda")
        groups.append((count, cut, table.to(device, non_blocking=True)))
    return groups


def sample(logits: torch.Tensor, groups: list[Group]) -> torch.Tensor:
    """logits: (B, V) -> (B): the likeliest tokens, but for the rows of the groups: top-k, then temperature, softmax,
    top-p, and the inverse of the cumulative distribution at the row's noise."""
    tokens = logits.argmax(dim=-1)
    for count, cut, table in groups:
        rows = table[0].long()
        temperature, top_p, noise = table[1:].unsqueeze(2)
        values, ids = logits[rows], None  # (n, V)
        if count < values.size(1) or cut:
            values, ids = values.topk(count, dim=-1)  # (n, k), likeliest first
        probs = torch.softmax((values - values.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
        if cut:
            before = probs.cumsum(dim=-1) - probs
            before[:, 0] = -1  # the likeliest always stays
            probs = probs.masked_fill(before >= top_p, 0.0)
        cumulative = probs.cumsum(dim=-1)
        choice = (cumulative <= noise * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
        found = choice if ids is None else ids.gather(1, choice.clamp(max=count - 1))
        found = torch.where(choice < count, found, tokens[rows].unsqueeze(1))  # noise that was rounded up to 1
        tokens[rows] = found.squeeze(1)
    return tokens


def log_probabilities(
    logits: torch.Tensor, tokens: list[int], count: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each row of logits (n, V): the log-probability of its token, and the `count` likeliest tokens with theirs. As
    the model gives them, without temperature, top-k or top-p."""
    logs = torch.log_softmax(logits, dim=-1)
    chosen = logs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    values, ids = logs.topk(count, dim=-1)
    likeliest = [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return list(zip(chosen, likeliest, strict=True))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a request's seed and a position (the SplitMix64 finalizer)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & mask
    for _ in range(2):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return (z >> 11) / (1 << 53)
