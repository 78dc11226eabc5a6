"""One token more for each of some rows, in shapes that never change: on GPUs recorded once as a CUDA graph and then
replayed, so that a step costs what its memory traffic costs, and not hundreds of launches.

B rows of a step, those that are not used included; R positions that a window reaches back; K key/value heads, H query
heads, D head width, C model width, V vocabulary.
"""

import torch

from nanochat.attention import attend_cached
from nanochat.compilation import compile_function
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.runtime import Runtime

SIZES = (1, 8, 64)  # rows of a step; and as many as the engine has
REACH = 64  # windows are read in multiples of it


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
    """A pass over a cache (as kv_cache.Pass is one) of one token for each of `size` rows, or of fewer: the others write
    to the cache's last row, which must be no one's."""

    def __init__(self, cache: KVCache, size: int):
        self.cache, self.longest = cache, cache.max_length
        self.host = torch.zeros(4, size, dtype=torch.long, pin_memory=cache.device.type == "cuda")
        self.inputs = torch.zeros(4, size, dtype=torch.long, device=cache.device)
        self.idx, self.previous, self.positions, self.rows = self.inputs.unsqueeze(2)  # (B, 1) each

    def fill(self, rows: list[int], ids: list[int]) -> None:
        """The rows that take part, and the token of each."""
        cache, numbers = self.cache, self.host.numpy()
        starts = cache.lengths[rows]
        if starts.max() >= cache.max_length:
            raise ValueError(f"the cache holds {cache.max_length} positions a row; {starts.max() + 1} are needed")
        cache.ids[rows, starts] = ids
        numbers[:] = [[0], [0], [0], [cache.max_rows - 1]]
        numbers[:, : len(rows)] = ids, cache.ids[rows, starts - 1], starts, rows
        self.inputs.copy_(self.host, non_blocking=True)

    def before(self, idx: torch.Tensor) -> torch.Tensor:
        return self.previous

    def layer(self, layer: int) -> "StaticLayer":
        return StaticLayer(self, self.cache.keys[layer], self.cache.values[layer])


class StaticLayer:
    """One layer of it. keys, values: (rows, S, K, D), of all rows of the cache."""

    def __init__(self, step: StaticPass, keys: torch.Tensor, values: torch.Tensor):
        self.positions, self.rows = step.positions, step.rows
        self.keys, self.values = keys, values

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, backend: str) -> torch.Tensor:
        """Store k and v, (B, 1, K, D), and attend for q, (B, 1, H, D) -> (B, 1, H, D).

        Positions before the beginning of a row are all read at its first: they cost nothing but that.
        """
        self.keys[self.rows, self.positions] = k
        self.values[self.rows, self.positions] = v
        length = self.keys.size(1)
        back = torch.arange(min(length, -(-(window + 1) // REACH) * REACH), device=q.device)  # (R)
        seen = (back <= window) & (back <= self.positions)  # (B, R)
        places = (self.positions - back).clamp(min=0)
        keys, values = self.keys[self.rows, places], self.values[self.rows, places]  # (B, R, K, D)
        if not torch.compiler.is_compiling():
            return attend_cached(q, keys.transpose(1, 2), values.transpose(1, 2), seen[:, None, None])
        # as sums, and not as products of matrices, the compiler reads the cache where it lies
        B, _, H, D = q.shape
        q = q.view(B, 1, -1, H // keys.size(2), D).float()  # (B, 1, K, H / K, D)
        scores = (q * keys.unsqueeze(3).float()).sum(dim=-1) * D**-0.5  # (B, R, K, H / K)
        probs = torch.softmax(scores.masked_fill(~seen[:, :, None, None], float("-inf")), dim=1)
        y = (probs.unsqueeze(4) * values.unsqueeze(3).float()).sum(dim=1)  # (B, K, H / K, D)
        return y.view(B, 1, H, D).to(v.dtype)


class Decoder:
    """decoder(rows, ids) -> the logits (n, V) after one token more for each of n rows of the cache, whose lengths grow.
    compiles: the blocks, which takes a minute or more once, and joins many small kernels into few."""

    def __init__(self, model: GPT, cache: KVCache, compiles: bool = False):
        self.model, self.cache = model, cache
        self.run_block = compile_function(model.run_block) if compiles else model.run_block
        self.sizes = [*(size for size in SIZES if size < cache.max_rows - 1), cache.max_rows - 1]
        self.recorded: dict[int, tuple] = {}
        self.pool = torch.cuda.graph_pool_handle() if cache.device.type == "cuda" else None

    def __call__(self, rows: list[int], ids: list[int]) -> torch.Tensor:
        step, replay = self.prepare(next(size for size in self.sizes if size >= len(rows)))
        step.fill(rows, ids)
        logits = replay()[: len(rows)]
        self.cache.lengths[rows] += 1
        return logits

    def prepare(self, size: int) -> tuple:
        """The pass of a size and what runs it; recorded the first time."""
        if size not in self.recorded:
            step = StaticPass(self.cache, size)
            step.fill([self.cache.max_rows - 1], [0])  # no one's row
            record = self._record if self.cache.device.type == "cuda" else (lambda forward: forward)
            self.recorded[size] = step, record(lambda: self._forward(step))
        return self.recorded[size]

    def _forward(self, step: StaticPass) -> torch.Tensor:
        x = self.model.hidden(step.idx, step, self.run_block)  # (B, 1, C)
        return self.model.logits(x[:, 0])

    def _record(self, forward):
        current, side = torch.cuda.current_stream(self.cache.device), torch.cuda.Stream(self.cache.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, and lets the libraries take the memory that they keep
                forward()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may drive other GPUs in the meantime
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            logits = forward()

        def replay():
            graph.replay()
            return logits

        return replay
