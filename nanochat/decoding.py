"""One token more for each of some rows, in shapes that never change: on GPUs recorded once as a CUDA graph and then
replayed, so that a step costs what its memory traffic costs, and not hundreds of launches.

B rows of a step, those that are not used included; R positions that a window reaches back; K key/value heads, H query
heads, D head width, C model width, V vocabulary.
"""

import threading
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch

from nanochat.attention import attend_cached
from nanochat.compilation import compile_function
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.runtime import Runtime

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # rows of a step; and as many as the engine has
COMPILED_SIZES = (1, 8, 64)  # each takes its time to compile
REACH = 64  # windows are read in multiples of it
ONE_AT_A_TIME = threading.Lock()  # torch records one graph at a time in a process


def available(runtime: Runtime) -> bool:
    """Whether steps of fixed shapes pay on this device, and were not found wrong there by scripts.doctor."""
    return runtime.device.type == "cuda" and "graphs" not in runtime.disabled


def inference_copy(model: GPT) -> GPT:
    """The model with its matrices in the dtype that it computes in: cast once and not at every step. What has that
    dtype already is shared."""
    with torch.device("meta"):
        copy = GPT(model.config, model.dtype, model.attention_backend)
    copy.load_state_dict({name: _cast(value, model.dtype) for name, value in model.state_dict().items()}, assign=True)
    return copy


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.dim() > 1 else value


@torch.no_grad()
def cast_again(model: GPT, copy: GPT) -> None:
    """After the model has learned more: its weights into the copy, where they stand."""
    for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
        if ours.data_ptr() != theirs.data_ptr():
            ours.copy_(theirs)


class StaticPass:
    """A pass over a cache (as kv_cache.Pass is one) of one token for each of `size` rows. Where there are fewer, the
    shortest is there several times, and writes the same each time."""

    def __init__(self, cache: KVCache, size: int):
        self.cache, self.longest = cache, cache.max_length
        self.host = torch.zeros(4, size, dtype=torch.long, pin_memory=cache.device.type == "cuda")
        self.inputs = torch.zeros(4, size, dtype=torch.long, device=cache.device)
        self.idx, self.previous, self.positions, self.begins = self.inputs.unsqueeze(2)  # (B, 1) each

    def fill(self, rows: list[int], ids: list[int]) -> None:
        """The rows that take part, and the token of each."""
        cache, numbers = self.cache, self.host.numpy()
        starts = cache.lengths[rows]
        if starts.max() >= cache.max_length:
            raise ValueError(f"the cache holds {cache.max_length} positions a row; {starts.max() + 1} are needed")
        cache.ids[rows, starts] = ids
        numbers[:, : len(rows)] = ids, cache.ids[rows, starts - 1], starts, np.multiply(rows, cache.max_length)
        numbers[:, len(rows) :] = numbers[:, starts.argmin(), None]
        self.inputs.copy_(self.host, non_blocking=True)

    def look_back(self, windows: list[int]) -> None:
        """For each window, for all of its layers: where in the cache the positions from each row's newest back lie,
        (B, R), and a mask (B, 1, 1, R), 0 or -inf. Before its beginning a row is read at its first place only, again
        and again: that is in the GPU's own cache then."""
        self.windows = {}
        for window in set(windows):
            reach = min(self.cache.max_length, -(-(window + 1) // REACH) * REACH)
            back = torch.arange(reach, device=self.inputs.device)
            places = self.begins + (self.positions - back).clamp(min=0)
            mask = torch.zeros(places.shape, dtype=self.cache.keys.dtype, device=places.device)
            mask = mask.masked_fill_((back > window) | (back > self.positions), float("-inf"))
            self.windows[window] = places, mask[:, None, None]

    def before(self, idx: torch.Tensor) -> torch.Tensor:
        return self.previous

    def layer(self, layer: int) -> "StaticLayer":
        return StaticLayer(self, self.cache.keys[layer], self.cache.values[layer])


class StaticLayer:
    """One layer of it. keys, values: (S of all rows, K, D)."""

    def __init__(self, step: StaticPass, keys: torch.Tensor, values: torch.Tensor):
        self.step, self.keys, self.values = step, keys.flatten(0, 1), values.flatten(0, 1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, backend: str) -> torch.Tensor:
        """Store k and v, (B, 1, K, D), and attend for q, (B, 1, H, D) -> (B, 1, H, D)."""
        newest = (self.step.begins + self.step.positions).squeeze(1)
        self.keys[newest], self.values[newest] = k.squeeze(1), v.squeeze(1)
        places, mask = self.step.windows[window]
        keys, values = self.keys[places], self.values[places]  # (B, R, K, D)
        if not torch.compiler.is_compiling():
            return attend_cached(q, keys.transpose(1, 2), values.transpose(1, 2), mask)
        # as sums, and not as products of matrices, the compiler reads the cache where it lies
        B, _, H, D = q.shape
        q = q.view(B, 1, -1, H // keys.size(2), D).float()  # (B, 1, K, H / K, D)
        scores = (q * keys.unsqueeze(3).float()).sum(dim=-1) * D**-0.5  # (B, R, K, H / K)
        probs = torch.softmax(scores + mask.view(B, -1, 1, 1), dim=1)
        y = (probs.unsqueeze(4) * values.unsqueeze(3).float()).sum(dim=1)  # (B, K, H / K, D)
        return y.view(B, 1, H, D).to(v.dtype)


class Decoder:
    """decoder(rows, ids) -> the logits (n, V) after one token more for each of n rows of the cache, whose lengths grow.
    compiles: the blocks, which takes a minute or more once, and joins many small kernels into few."""

    def __init__(self, model: GPT, cache: KVCache, compiles: bool = False):
        self.model, self.cache = model, cache
        self.run_block = compile_function(model.run_block) if compiles else model.run_block
        sizes = COMPILED_SIZES if compiles else SIZES
        self.sizes = [*(size for size in sizes if size < cache.max_rows), cache.max_rows]
        self.recorded: dict[int, tuple] = {}
        self.pool = torch.cuda.graph_pool_handle() if cache.device.type == "cuda" else None

    def __call__(self, rows: list[int], ids: list[int]) -> torch.Tensor:
        size = next(size for size in self.sizes if size >= len(rows))
        if size not in self.recorded:
            step = StaticPass(self.cache, size)
            step.fill(rows, ids)
            forward = partial(self._forward, step)
            self.recorded[size] = step, forward if self.pool is None else record(forward, self.cache.device, self.pool)
        step, replay = self.recorded[size]
        step.fill(rows, ids)
        logits = replay()[: len(rows)]
        self.cache.lengths[rows] += 1
        return logits

    def _forward(self, step: StaticPass) -> torch.Tensor:
        step.look_back(self.model.config.windows)
        x = self.model.hidden(step.idx, step, self.run_block)  # (B, 1, C)
        return self.model.logits(x[:, 0])


@lru_cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """One a device for all recordings: libraries keep memory for every stream that they were used on."""
    return torch.cuda.Stream(device)


def record(forward: Callable[[], torch.Tensor], device: torch.device, pool) -> Callable[[], torch.Tensor]:
    """What does the same on the GPU as `forward`, from the same memory to the same memory."""
    with ONE_AT_A_TIME, torch.cuda.device(device):
        current, stream, graph = torch.cuda.current_stream(), stream_of(device), torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets the libraries take the memory that they keep
                forward()
        current.wait_stream(stream)
        # other threads drive other GPUs in the meantime
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = forward()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay
