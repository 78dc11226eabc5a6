"""What fits on a device: an estimate from the model's shape, and the number of rows that follows from it.

T tokens of a row, C model width, K key/value width, L layers, V vocabulary.
"""

import argparse

import torch

from nanochat.gpt import GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.losses import GPU_CHUNK
from nanochat.runtime import Runtime
from nanochat.scaling import meta_model

# Numbers of width C and K that a layer keeps of a token for its backward pass (test_memory.py counts them), and the
# share of them that the compiler keeps.
KEPT_BY_WIDTH, KEPT_BY_KV_WIDTH = 17, 4.5
KEPT_ONCE = 6  # times C: embedding, smear, backout, loss
KEPT_WHEN_COMPILED = 0.75
USABLE = 0.92  # of what is free: the allocator's cuttings, the collectives' buffers


def fixed_bytes(config: GPTConfig, world_size: int, dtype: torch.dtype) -> int:
    """Weights, gradients, this rank's optimizer state, the weights cast to dtype, and the logits of one chunk."""
    counts = meta_model(config).counts()
    cast = counts["transformer_matrices"] + counts["lm_head"]
    casts = 0 if dtype == torch.float32 else dtype.itemsize * cast
    state = state_bytes(config) // world_size
    return 2 * weight_bytes(config, dtype) + state + casts + GPU_CHUNK * (4 + 4 + dtype.itemsize)


def weight_bytes(config: GPTConfig, dtype: torch.dtype) -> int:
    """Tables are kept in bfloat16 where that is computed in, all else in float32."""
    counts = meta_model(config).counts()
    tables = counts["wte"] + counts["value_embeds"]
    return tables * (2 if dtype == torch.bfloat16 else 4) + (counts["total"] - tables) * 4


def state_bytes(config: GPTConfig) -> int:
    """The optimizer's: two numbers a parameter of AdamW, one of Muon."""
    counts = meta_model(config).counts()
    return 8 * (counts["wte"] + counts["value_embeds"] + counts["lm_head"]) + 4 * counts["transformer_matrices"]


def row_bytes(config: GPTConfig, sequence_len: int, dtype: torch.dtype, compiled: bool) -> int:
    """What a row keeps for its backward pass."""
    kv_width = config.n_kv_head * config.head_dim
    kept = config.n_layer * (KEPT_BY_WIDTH * config.n_embd + KEPT_BY_KV_WIDTH * kv_width)
    kept = kept * (KEPT_WHEN_COMPILED if compiled else 1) + KEPT_ONCE * config.n_embd
    return int(sequence_len * kept * dtype.itemsize)


def rows_that_fit(config: GPTConfig, sequence_len: int, runtime: Runtime, compiled: bool) -> int:
    """As most_rows, on every rank, and 1 at least."""
    free = min(runtime.gather(runtime.free_memory()))
    return max(1, most_rows(free, config, sequence_len, runtime, compiled))


def most_rows(free: int, config: GPTConfig, sequence_len: int, runtime: Runtime, compiled: bool) -> int:
    """The largest power of two of rows that the estimate finds room for in `free` bytes of each rank; 0: not one."""
    room = USABLE * free - fixed_bytes(config, runtime.world_size, runtime.dtype)
    rows = max(0, int(room // row_bytes(config, sequence_len, runtime.dtype, compiled)))
    return 1 << (rows.bit_length() - 1) if rows else 0


def training_bytes(rows: int, config: GPTConfig, sequence_len: int, runtime: Runtime, compiled: bool) -> int:
    """What training takes on each rank with so many rows at once. Of runtime only ranks and dtype count."""
    fixed = fixed_bytes(config, runtime.world_size, runtime.dtype)
    return fixed + rows * row_bytes(config, sequence_len, runtime.dtype, compiled)


def row_count(text: str) -> int | str:
    """What --device-batch-size takes: a number of rows, or auto."""
    if text != "auto" and (not text.isdigit() or int(text) < 1):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of rows, 1 or more")
    return text if text == "auto" else int(text)


def choose_rows(
    asked: int | str | None, config: GPTConfig, sequence_len: int, runtime: Runtime, compiled: bool, default: int
) -> int:
    """Rows on a device at once: as asked; where nothing is asked, by the estimate on GPUs and the default elsewhere."""
    if asked is None:
        asked = "auto" if runtime.device.type == "cuda" else default
    return rows_that_fit(config, sequence_len, runtime, compiled) if asked == "auto" else asked


def rollouts_that_fit(asked: int, config: GPTConfig, length: int, runtime: Runtime) -> int:
    """Answers under way at once, of `length` tokens with their prompts: as many as asked for, or with a line that says
    so as many as fit into half of what is left beside weights, gradients and optimizer state."""
    room = (runtime.free_memory() - fixed_bytes(config, runtime.world_size, runtime.dtype)) // 2
    fitting = max(1, min(asked, room // KVCache.row_bytes(config, length, runtime.dtype)))
    if fitting < asked:
        print(f"rank {runtime.rank}: memory for {fitting} answers at once, of the {asked} of a step", flush=True)
    return fitting


class DeviceBatch:
    """Rows on a device at once; the last of a step may be fewer. Halved where memory runs out: the rows of a step stay
    what they are."""

    def __init__(self, rows: int, runtime: Runtime):
        self.rows, self.runtime = rows, runtime

    def halve(self, error: RuntimeError) -> None:
        """After an out-of-memory error; anything else, and an error with a single row, is raised again."""
        if not is_out_of_memory(error):
            raise error
        if self.rows == 1:
            raise ValueError(
                "one row does not fit into the memory of the device: a smaller --depth, --max-seq-len, or in RL "
                "--max-new-tokens is needed"
            ) from error
        self.rows //= 2
        print(
            f"rank {self.runtime.rank}: out of memory with {self.rows * 2} rows at once; going on with {self.rows}",
            flush=True,
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own kind on GPUs; elsewhere, and from the libraries below it, the words."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in words)


def split_batch(total_batch_size: int, sequence_len: int, at_once: int, runtime: Runtime) -> tuple[int, DeviceBatch]:
    """The rows of a step over all ranks, and the device batch: at_once, or a rank's whole share where that is smaller.

    total_batch_size in tokens. ValueError, naming the nearest batches and the nearest numbers of ranks, when the step
    does not divide among the ranks.
    """
    ranks = runtime.world_size
    rows, rest = divmod(total_batch_size, sequence_len)
    if rest or rows < 1 or rows % ranks:
        tokens = ranks * sequence_len
        nearest = [n for n in (total_batch_size // tokens * tokens, -(-total_batch_size // tokens) * tokens) if n > 0]
        message = (
            f"--total-batch-size {total_batch_size} does not divide by {ranks} ranks x {sequence_len} tokens; "
            f"the nearest that do: {' or '.join(map(str, nearest))}"
        )
        if not rest and rows > 0:  # a run that goes on has to keep its batch
            fewer = max(n for n in range(1, ranks) if rows % n == 0)
            more = [n for n in range(ranks + 1, rows + 1) if rows % n == 0][:1]
            message += f"; the nearest numbers of ranks: {' or '.join(map(str, [fewer, *more]))}"
        raise ValueError(message)
    return rows, DeviceBatch(min(at_once, rows // ranks), runtime)
