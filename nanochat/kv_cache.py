"""Keys and values of what was read: every row has room for its full length in every layer, and a length of its own.

A `Pass` reads some tokens more of some rows. They lie side by side without padding, as a batch of N rows of one token:
all that the model does is done token by token, but for attention, which the pass does row by row, or for several rows
at once where they lie beside each other.

N tokens of a pass, n rows of a run, T tokens of a row, S cached positions, H query heads, K key/value heads, D head
width, V vocabulary.
"""

import math
import mmap

import numpy as np
import torch

from nanochat.attention import attend, attend_cached
from nanochat.gpt import GPTConfig

# What can be read of the cache in the time that one more call of attention takes.
CALL_BYTES = {"cpu": 1 << 17, "mps": 1 << 22, "cuda": 1 << 25}


class KVCache:
    """ids[row, :lengths[row]] are the tokens whose keys and values are stored. Shortening a row, or sharing what it
    begins with (copy), is a matter of lengths: nothing else is kept."""

    def __init__(self, config: GPTConfig, max_rows: int, max_length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layer, max_rows, max_length, config.n_kv_head, config.head_dim)
        self.keys, self.values = (_zeros(shape, dtype, device) for _ in range(2))
        self.ids = np.zeros((max_rows, max_length), dtype=np.int64)
        self.lengths = np.zeros(max_rows, dtype=np.int64)
        self.max_rows, self.max_length, self.device = max_rows, max_length, device
        self.call = CALL_BYTES[device.type] // (2 * config.n_kv_head * config.head_dim * dtype.itemsize)  # in positions

    @staticmethod
    def row_bytes(config: GPTConfig, max_length: int, dtype: torch.dtype) -> int:
        return 2 * config.n_layer * config.n_kv_head * max_length * config.head_dim * dtype.itemsize

    def common_prefixes(self, ids: np.ndarray) -> np.ndarray:
        """With how many of these ids each row of self.ids begins, those behind its length too."""
        same = self.ids[:, : len(ids)] == ids
        return np.where(same.all(axis=1), same.shape[1], same.argmin(axis=1))

    def copy(self, source: int, target: int, length: int) -> None:
        """Let row target begin as row source does, and be that long."""
        for stored in (self.keys, self.values):
            stored[:, target, :length] = stored[:, source, :length]
        self.ids[target, :length] = self.ids[source, :length]
        self.lengths[target] = length


def _zeros(shape: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # mapped, they take memory only where something is written: most rows never reach their full length
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Pass:
    """model.hidden(step.idx, step) of a step = Pass(cache, [(row, its next ids), ...]); then step.end(). Nothing of it
    counts before that."""

    def __init__(self, cache: KVCache, segments: list[tuple[int, list[int]]]):
        self.cache = cache
        self.rows = np.array([row for row, _ in segments])
        self.counts = np.array([len(ids) for _, ids in segments])
        self.starts = cache.lengths[self.rows]
        self.longest = int((self.starts + self.counts).max())
        if self.longest > cache.max_length:
            raise ValueError(f"the cache holds {cache.max_length} positions a row; {self.longest} are needed")
        self.stops = self.counts.cumsum()  # in the batch
        begins = self.stops - self.counts
        rows = self.rows.repeat(self.counts)
        positions = (self.starts - begins).repeat(self.counts) + np.arange(self.stops[-1])
        cache.ids[rows, positions] = [id for _, ids in segments for id in ids]
        table = [
            cache.ids[rows, positions],
            cache.ids[rows, positions - 1],
            positions,
            rows * cache.max_length + positions,
        ]
        table = torch.from_numpy(np.stack(table)).to(cache.device)
        self.idx, self.previous, self.positions = table[:3].unsqueeze(2)  # (N, 1) each
        self.places = table[3]  # (N), of the new keys among those of all rows
        self.runs = [Run(self, first, last) for first, last in self._runs()]

    def before(self, idx: torch.Tensor) -> torch.Tensor:
        """The id before each of idx; any at all where a row begins."""
        return self.previous

    def layer(self, layer: int) -> "PassLayer":
        return PassLayer(self, self.cache.keys[layer], self.cache.values[layer])

    def end(self) -> None:
        self.cache.lengths[self.rows] = self.starts + self.counts

    def _runs(self) -> list[tuple[int, int]]:
        """Which segments share a call of attention (first, last exclusive): rows that are neighbours and get equally
        many tokens, from the same position on, or one token and not much is read in vain."""
        rows, counts, starts = self.rows.tolist(), self.counts.tolist(), self.starts.tolist()
        runs, first, longest, needed = [], 0, starts[0], starts[0]
        for i in range(1, len(rows)):
            longest, needed = max(longest, starts[i]), needed + starts[i]
            members = i + 1 - first
            like = rows[i] == rows[i - 1] + 1 and counts[i] == counts[i - 1]
            cheap = counts[i] == 1 and members * longest - needed <= members * self.cache.call
            if not like or not (cheap or starts[i] == starts[first] == longest):
                runs.append((first, i))
                first, longest, needed = i, starts[i], starts[i]
        return [*runs, (first, len(rows))]


class Run:
    """Neighbouring rows of a pass, whose attention is one call."""

    def __init__(self, step: Pass, first: int, last: int):
        self.batch = slice(int(step.stops[first] - step.counts[first]), int(step.stops[last - 1]))
        self.shape = (last - first, int(step.counts[first]))  # (n, T)
        self.rows = slice(int(step.rows[first]), int(step.rows[last - 1]) + 1)
        starts = step.starts[first:last]
        self.low, self.high = int(starts.min()), int(starts.max()) + self.shape[1]
        self.even = self.low + self.shape[1] == self.high  # all rows end at one position
        self.positions = step.positions[self.batch].view(self.shape)
        self.masks = {}

    def mask(self, window: int) -> torch.Tensor | None:
        """(n, 1, T, S), true where a position sees a key; None: each sees all."""
        if self.even and self.shape[1] == 1:
            return None
        if window not in self.masks:
            seen = torch.arange(max(0, self.low - window), self.high, device=self.positions.device)
            distance = self.positions.unsqueeze(2) - seen
            self.masks[window] = ((distance >= 0) & (distance <= window)).unsqueeze(1)
        return self.masks[window]


class PassLayer:
    """One layer of a pass. keys, values: (rows, S, K, D), of all rows of the cache."""

    def __init__(self, step: Pass, keys: torch.Tensor, values: torch.Tensor):
        self.step, self.keys, self.values = step, keys, values

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, backend: str) -> torch.Tensor:
        """Store k and v, (N, 1, K, D), and attend for q, (N, 1, H, D), to what its row holds -> (N, 1, H, D)."""
        for stored, new in ((self.keys, k), (self.values, v)):
            stored.flatten(0, 1).index_copy_(0, self.step.places, new.squeeze(1))
        parts = [self._attend(run, q, k, v, window, backend) for run in self.step.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, run, q, k, v, window, backend):
        q = q[run.batch].view(*run.shape, *q.shape[2:])  # (n, T, H, D)
        if run.high == run.shape[1] and run.even:  # all rows begin here
            k, v = (x[run.batch].view(*run.shape, *x.shape[2:]) for x in (k, v))
            return attend(q, k, v, window, backend).reshape(-1, 1, *q.shape[2:])
        first = max(0, run.low - window)
        keys, values = (x[run.rows, first : run.high].transpose(1, 2) for x in (self.keys, self.values))
        return attend_cached(q, keys, values, run.mask(window)).reshape(-1, 1, *q.shape[2:])
