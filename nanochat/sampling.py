"""From logits to tokens: the likeliest, or drawn with a noise that is a function of (seed, position, token).

A request draws the same tokens alone and in company. Its logits differ in their last bits then, as sums are rounded in
another order; by the inverse of a cumulative distribution over a whole vocabulary that would turn one draw in some
hundred, since every boundary moves. With a noise of its own for each token, only two that are all but equal can change
places.

B rows, n of them drawn alike, k candidates, V vocabulary.
"""

from typing import NamedTuple

import torch

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64
COLDEST = 1e-30  # temperature that still divides in float32


class Draw(NamedTuple):
    """How row `row` of the logits is drawn; top_k 0 is all."""

    row: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    position: int


# k; whether top-p counts; (n) keys of the noise; (3, n) row, temperature, top-p
Group = tuple[int, bool, torch.Tensor, torch.Tensor]


def grouped(draws: list[Draw], vocab_size: int, device: torch.device) -> list[Group]:
    """What sample() needs on the device, made before the logits are there: those who have equally many candidates go
    together."""
    alike: dict[tuple[int, bool], list[Draw]] = {}
    for draw in draws:
        alike.setdefault((min(draw.top_k or vocab_size, vocab_size), draw.top_p < 1), []).append(draw)

    def upload(numbers, dtype):
        return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)

    groups = []
    for (count, cut), members in alike.items():
        keys = [signed(key(draw.seed, draw.position)) for draw in members]
        numbers = list(zip(*[(draw.row, max(draw.temperature, COLDEST), draw.top_p) for draw in members], strict=True))
        groups.append((count, cut, upload(keys, torch.int64), upload(numbers, torch.float32)))
    return groups


def sample(logits: torch.Tensor, groups: list[Group]) -> torch.Tensor:
    """logits: (B, V) -> (B): the likeliest tokens, but for the rows of the groups: top-k, then temperature, softmax and
    top-p, and of the tokens that are left the one that is first in a race in which each arrives at its own rate."""
    tokens = logits.argmax(dim=-1)
    for count, cut, keys, table in groups:
        rows = table[0].long()
        temperature, top_p = table[1:].unsqueeze(2)
        values = logits[rows]  # (n, V)
        ids = torch.arange(values.size(1), device=values.device).unsqueeze(0)
        if count < values.size(1) or cut:
            values, ids = values.topk(count, dim=-1)  # (n, k), likeliest first
        values = (values - values.amax(dim=-1, keepdim=True)) / temperature
        if cut:
            probs = torch.softmax(values, dim=-1)
            before = probs.cumsum(dim=-1) - probs
            before[:, 0] = -1  # the likeliest always stays
            values = values.masked_fill(before >= top_p, float("-inf"))
        first = (values - arrival(keys.unsqueeze(1), ids).log()).argmax(dim=-1, keepdim=True)
        tokens[rows] = ids.expand(values.shape).gather(1, first).squeeze(1)
    return tokens


def key(seed: int, position: int) -> int:
    """64 bits from a request's seed and a position."""
    return mixed((seed * GOLDEN + mixed(position * SECOND + GOLDEN)) % 2**64)


def mixed(z: int) -> int:
    """The finalizer of SplitMix64."""
    z %= 2**64
    z = (z ^ (z >> 30)) * FIRST % 2**64
    z = (z ^ (z >> 27)) * SECOND % 2**64
    return z ^ (z >> 31)


def signed(z: int) -> int:
    """The 64 bits as torch.int64 has them."""
    return z - 2**64 if z >= 2**63 else z


def arrival(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """keys: (n, 1), ids: (n or 1, k) -> (n, k) float32, exponentially distributed: mixed(key + id * GOLDEN), of which
    48 bits are taken."""
    z = keys + ids * signed(GOLDEN)  # wraps around
    for shift, factor in ((30, FIRST), (27, SECOND)):
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * signed(factor)
    z = z ^ ((z >> 31) & (2**33 - 1))
    high, low = (z >> 40) & (2**24 - 1), (z >> 16) & (2**24 - 1)
    return -torch.log1p(-(high.float() * 2**-24 + (low.float() + 0.5) * 2**-48))  # exact where it is small


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
