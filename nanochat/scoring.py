"""Losses of text that is given: many sequences at a time, what they share read once, the head only where it is asked.

Shapes: B rows of a batch, T tokens, C width, V vocabulary, P shared tokens, N scored ones, K key/value heads, D their
width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanochat.attention import attend_cached
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache, Pass

WORTH_SHARING = 16  # tokens that sequences begin with: fewer are read again
CPU_TOKENS = 4096  # of a batch at most: more only wait for memory (dev/LOG.md)
HEAD_ROWS = 512  # positions whose logits are held at a time


@dataclass(frozen=True)
class Scored:
    """One sequence to read; its tokens `ids[start:end]` are scored, each given all before it (so start >= 1)."""

    ids: list[int]
    start: int
    end: int


def crop(sequence: Scored, max_length: int) -> Scored:
    """The sequence without its left end, where it is longer than a model can read."""
    cut = max(0, len(sequence.ids) - max_length)
    return Scored(sequence.ids[cut:], max(1, sequence.start - cut), sequence.end - cut)


def common_prefix(sequences: list[list[int]]) -> int:
    """Length of the common prefix."""
    for position, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return position
    return min(len(ids) for ids in sequences)


def batches(lengths: list[int], token_budget: int, device: torch.device) -> Iterator[list[int]]:
    """Indices of like length, longest first, rows x longest <= token_budget (one row always passes)."""
    if device.type == "cpu":
        token_budget = min(token_budget, CPU_TOKENS)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        rows = max(1, token_budget // max(1, lengths[order[0]]))
        yield order[:rows]
        order = order[rows:]


@torch.no_grad()  # not inference_mode: tables that the model grows here must still serve training
def score_sequences(
    model, sequences: list[Scored], device: torch.device, token_budget: int, greedy: bool = False
) -> list[torch.Tensor]:
    """For each sequence a CPU tensor over its scored tokens: the loss in nats; with `greedy`, whether the token is the
    model's first choice. `model` has GPT's hidden() and logits(); padding stands on the right, where nothing before it
    can see."""
    results: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    asked = [i for i, sequence in enumerate(sequences) if sequence.end > sequence.start]
    for batch in batches([len(sequences[i].ids) - 1 for i in asked], token_budget, device):
        batch = [asked[position] for position in batch]
        chosen = [sequences[i] for i in batch]
        idx = _padded([sequence.ids[:-1] for sequence in chosen], device)  # (B, T)
        scored = [(row, t - 1, s.ids[t]) for row, s in enumerate(chosen) for t in range(s.start, s.end)]
        values = _score(model, model.hidden(idx), scored, greedy)
        for i, part in zip(batch, values.split([s.end - s.start for s in chosen]), strict=True):
            results[i] = part
    return results


def score_alternatives(
    model, groups: list[list[Scored]], device: torch.device, token_budget: int
) -> list[list[torch.Tensor]]:
    """Losses of the scored tokens, by the way that reads fewer tokens: shared beginnings once, or sequence by sequence
    (a foreign model always)."""
    together = [isinstance(model, GPT) and len(group) > 1 and shared_length(group) >= WORTH_SHARING for group in groups]
    shared = iter(score_groups(model, [g for g, t in zip(groups, together, strict=True) if t], device, token_budget))
    alone = [sequence for group, t in zip(groups, together, strict=True) for sequence in group if not t]
    single = iter(score_sequences(model, alone, device, token_budget))
    return [next(shared) if t else [next(single) for _ in g] for g, t in zip(groups, together, strict=True)]


def shared_length(group: list[Scored]) -> int:
    """How many tokens all sequences of a group begin with, up to the one from which the first scored token follows."""
    return min(common_prefix([sequence.ids for sequence in group]), *(sequence.start for sequence in group)) - 1


@torch.no_grad()
def score_groups(
    model: GPT, groups: list[list[Scored]], device: torch.device, token_budget: int
) -> list[list[torch.Tensor]]:
    """The losses of each group's sequences, as score_sequences gives them. What a group shares, at least one token, is
    read once, into a cache; then the ends of its sequences, side by side in one row, each seeing what is shared and
    itself."""
    results: list[list[torch.Tensor]] = [[] for _ in groups]
    shared = [shared_length(group) for group in groups]
    assert min(shared, default=1) > 0, "a group that shares nothing is scored sequence by sequence"
    sizes = [n + sum(len(s.ids) - n for s in group) for n, group in zip(shared, groups, strict=True)]
    for batch in batches(sizes, token_budget, device):
        lengths = [shared[i] for i in batch]
        prefixes = _padded([groups[i][0].ids[: shared[i]] for i in batch])  # (B, P)
        cache = KVCache(model.config, *prefixes.shape, model.dtype, device)
        reading = Pass(cache, list(enumerate(prefixes.tolist())))
        model.hidden(reading.idx, reading)
        cache.lengths[:] = lengths  # without the padding

        ends = [[s.ids[shared[i] : -1] for s in groups[i]] for i in batch]
        idx = _padded([[id for end in row for id in end] for row in ends], device)  # (B, T)
        x = model.hidden(idx, Branches(cache, [[len(end) for end in row] for row in ends], idx.size(1)))
        scored = []
        for row, i in enumerate(batch):
            at = -shared[i]  # of a sequence's first token in its row
            for s in groups[i]:
                scored += [(row, at + t - 1, s.ids[t]) for t in range(s.start, s.end)]
                at += len(s.ids) - 1 - shared[i]
        counts = [s.end - s.start for i in batch for s in groups[i]]
        values = iter(_score(model, x, scored).split(counts))
        for i in batch:
            results[i] = [next(values) for _ in groups[i]]
    return results


def _padded(rows: list[list[int]], device: torch.device | str = "cpu") -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long).to(device)


def _score(model, x: torch.Tensor, scored: list[tuple[int, int, int]], greedy: bool = False) -> torch.Tensor:
    """x: (B, T, C); scored: N of (row, position, the id that follows) -> (N,) on the CPU. The head is computed for
    these only, and for so many at a time that their logits stay small."""
    rows, positions, targets = torch.tensor(scored, dtype=torch.long, device=x.device).view(-1, 3).unbind(dim=1)
    values = []
    for row, position, wanted in zip(*(of.split(HEAD_ROWS) for of in (rows, positions, targets)), strict=True):
        logits = model.logits(x[row, position])  # (n, V)
        values.append(logits.argmax(-1) == wanted if greedy else F.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(values).cpu()


class Branches:
    """A pass over a cache (as kv_cache.Pass is one), where several continuations of each of its rows are read side by
    side. A token stands where it would after the row, and sees the row and what is before it in its own branch. Nothing
    is stored."""

    def __init__(self, cache: KVCache, sizes: list[list[int]], width: int):
        """sizes: of the branches of each row; width: T, of a row of branches and padding."""
        self.cache, self.oldest = cache, int(cache.lengths.min())
        self.lengths = torch.from_numpy(cache.lengths).to(cache.device).unsqueeze(1)  # (B, 1)
        last = cache.ids[range(cache.max_rows), cache.lengths - 1]
        self.last = torch.from_numpy(last).to(cache.device).unsqueeze(1)
        numbers = [[branch for branch, size in enumerate(row) for _ in range(size)] for row in sizes]
        offsets = [[offset for size in row for offset in range(size)] for row in sizes]
        self.branch = _padded([row + [-1] * (width - len(row)) for row in numbers], cache.device)  # (B, T)
        self.positions = self.lengths + _padded([row + [0] * (width - len(row)) for row in offsets], cache.device)
        self.longest = max(int(length) + max(row) for length, row in zip(cache.lengths, sizes, strict=True))
        self.masks = {}

    def before(self, idx: torch.Tensor) -> torch.Tensor:
        return torch.where(self.positions == self.lengths, self.last, idx.roll(1, dims=1))

    def layer(self, layer: int) -> "BranchesLayer":
        return BranchesLayer(self, self.cache.keys[layer], self.cache.values[layer])

    def mask(self, window: int, first: int) -> torch.Tensor:
        """(B, 1, T, S + T): S of the cache from `first` on, T of this pass."""
        if window not in self.masks:
            stored = torch.arange(first, self.cache.max_length, device=self.branch.device)  # (S,)
            distance = self.positions.unsqueeze(2) - stored
            of_row = (stored < self.lengths).unsqueeze(1) & (distance <= window)  # (B, T, S)
            distance = self.positions.unsqueeze(2) - self.positions.unsqueeze(1)
            same = self.branch.unsqueeze(2) == self.branch.unsqueeze(1)
            own = same & (distance >= 0) & (distance <= window)  # (B, T, T); padding sees padding
            self.masks[window] = torch.cat([of_row, own], dim=2).unsqueeze(1)
        return self.masks[window]


class BranchesLayer(NamedTuple):
    """One layer of it; keys and values of the cache, (B, S, K, D)."""

    branches: Branches
    keys: torch.Tensor
    values: torch.Tensor

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, backend: str) -> torch.Tensor:
        first = max(0, self.branches.oldest - window)
        keys, values = (
            torch.cat([stored[:, first:], new], dim=1).transpose(1, 2)
            for stored, new in ((self.keys, k), (self.values, v))
        )
        return attend_cached(q, keys, values, self.branches.mask(window, first))
