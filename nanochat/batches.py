"""Rows for training, packed from token files or conversations. Row r of a run is a pure function: of the files, the
tokenizer, the sequence length, the seed and r. So the rows of a step are the same on 1, 2, 4 or 8 ranks and for any
device batch, and the whole state of the data is one integer.

T sequence length; a row holds T + 1 tokens: inputs are the first T, targets the last T, -1 where nothing is learned.
"""

import itertools
import shutil
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanochat import chat
from nanochat.runtime import Runtime

BLOCK_DOCUMENTS = 4096  # documents that are packed together
WAITING = 100  # conversations among which the best fitting is looked for
IGNORE = -1


def best_fit(lengths, capacity: int, crop: bool, buffer: int | None = None) -> list[list[tuple[int, int]]]:
    """Pack documents into rows; a row is a list of (document, tokens taken from its beginning).

    Takes the largest waiting document that still fits. When none fits: with `crop` the shortest one is cut to fill the
    row exactly and the rest of it is dropped; without, the row ends short. `buffer` is how many documents wait at once
    (default: all). Waiting documents lie in buckets by length, and one bit per length says which buckets hold any: the
    largest that fits is the highest bit below the space left.
    """
    buckets: dict[int, deque] = {}
    occupied = 0  # bit n: a document of length n waits; documents that fit in no row wait under capacity + 1
    incoming = iter(enumerate(int(n) for n in lengths))
    waiting = 0
    rows, row, space = [], [], capacity
    while True:
        for document, length in itertools.islice(incoming, None if buffer is None else buffer - waiting):
            bucket = min(length, capacity + 1)
            buckets.setdefault(bucket, deque()).append((document, length))
            occupied |= 1 << bucket
            waiting += 1
        if not waiting:
            break
        fitting = occupied & ((1 << (space + 1)) - 1)
        if not fitting and not crop:
            rows.append(row)
            row, space = [], capacity
            continue
        bucket = (fitting or (occupied & -occupied)).bit_length() - 1
        document, length = buckets[bucket].popleft()
        if not buckets[bucket]:
            occupied ^= 1 << bucket
        waiting -= 1
        take = min(length, space)
        row.append((document, take))
        space -= take
        if space == 0:
            rows.append(row)
            row, space = [], capacity
    if row:
        rows.append(row)
    return rows


# -- text


class TextRows:
    """Rows of pretraining text: no padding, every row begins with bos, as does every document in it.

    files: token files (dataset.TokenFile). seed: of the order of blocks, anew each epoch; None = as they lie on disk.
    """

    def __init__(self, files: list, sequence_len: int, bos: int, vocab_size: int, seed: int | None = 42):
        self.sequence_len, self.bos, self.seed = sequence_len, bos, seed
        dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.tokens = [np.memmap(file.tokens, dtype=dtype, mode="r") for file in files]
        self.offsets = [np.load(file.offsets, mmap_mode="r") for file in files]
        plans = [load_plan(file.offsets, sequence_len) for file in files]
        self.documents, self.takes, self.row_starts = zip(*[plan[:3] for plan in plans], strict=True)
        # one line a block: shard, its first row in the shard, its number of rows
        blocks = [
            (shard, first, last - first)
            for shard, plan in enumerate(plans)
            for first, last in itertools.pairwise(plan[3].tolist())
        ]
        self.blocks = np.array(blocks, dtype=np.int64)
        self.num_rows = int(self.blocks[:, 2].sum())
        self._order = (None, None, None)

    def _epoch(self, epoch: int):
        """The blocks in the order of this epoch, and the row number at which each ends."""
        if self._order[0] != epoch:
            order = np.arange(len(self.blocks))
            if self.seed is not None:
                order = np.random.default_rng((self.seed, epoch)).permutation(len(self.blocks))
            self._order = (epoch, order, np.cumsum(self.blocks[order, 2]))
        return self._order[1:]

    def row(self, r: int) -> np.ndarray:
        """Row r of the run: (T + 1,) token ids."""
        epoch, r = divmod(r, self.num_rows)
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, r, side="right"))
        shard, first, count = self.blocks[order[place]].tolist()
        index = first + r - (int(ends[place]) - count)
        out = np.empty(self.sequence_len + 1, dtype=np.int64)
        at = 0
        for piece in range(self.row_starts[shard][index], self.row_starts[shard][index + 1]):
            start, take = int(self.offsets[shard][self.documents[shard][piece]]), int(self.takes[shard][piece])
            out[at] = self.bos
            out[at + 1 : at + take] = self.tokens[shard][start : start + take - 1]
            at += take
        return out

    def read(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows first .. first + count - 1 as inputs and targets, each (count, T) int64."""
        rows = torch.from_numpy(np.stack([self.row(r) for r in range(first, first + count)]))
        return rows[:, :-1], rows[:, 1:]


def load_plan(offsets: Path, sequence_len: int) -> tuple[np.ndarray, ...]:
    """How a shard's documents lie in rows: document and take of each piece, first piece of each row, first row of each
    block. Kept beside the token file, since packing a hundred shards takes a minute."""
    path = offsets.with_name(offsets.name.removesuffix(".idx.npy") + f".rows{sequence_len}.npz")
    if path.exists() and path.stat().st_mtime_ns >= offsets.stat().st_mtime_ns:
        try:
            with np.load(path) as arrays:
                return tuple(arrays[key] for key in ("documents", "takes", "row_starts", "block_starts"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            print(f"{path} is damaged; packing that shard again", flush=True)
    plan = pack_blocks(np.diff(np.load(offsets)), sequence_len)
    partial = path.with_name(f"{path.name}.{np.random.default_rng().integers(1 << 62)}.npz")
    np.savez(partial, documents=plan[0], takes=plan[1], row_starts=plan[2], block_starts=plan[3])
    partial.replace(path)
    return plan


def pack_shards(files: list, sequence_len: int, runtime: Runtime) -> None:
    """Make the plans of all shards that have none yet; the first rank does, with a bar, and the others wait."""
    if runtime.is_main:
        for file in tqdm(files, desc="packing shards", disable=None if len(files) > 10 else True):
            load_plan(file.offsets, sequence_len)
    runtime.barrier()


def pack_blocks(token_counts: np.ndarray, sequence_len: int) -> tuple[np.ndarray, ...]:
    """Pack a shard, block by block. A block's last row, if short, is filled with its first documents once more."""
    capacity = sequence_len + 1
    documents, takes, row_starts, block_starts = [], [], [0], [0]
    for first in range(0, len(token_counts), BLOCK_DOCUMENTS):
        lengths = token_counts[first : first + BLOCK_DOCUMENTS] + 1  # bos
        rows = best_fit(lengths, capacity, crop=True)
        again = itertools.cycle(enumerate(lengths.tolist()))
        while (space := capacity - sum(take for _, take in rows[-1])) > 0:
            document, length = next(again)
            rows[-1].append((document, min(length, space)))
        for i in np.random.default_rng(0).permutation(len(rows)):  # best fit leaves them sorted by length
            documents += [first + document for document, _ in rows[i]]
            takes += [take for _, take in rows[i]]
            row_starts.append(len(documents))
        block_starts.append(len(row_starts) - 1)
    kinds = (np.int32, np.int32, np.int64, np.int64)
    return tuple(
        np.array(values, dtype=kind)
        for values, kind in zip((documents, takes, row_starts, block_starts), kinds, strict=True)
    )


# -- conversations


class ConversationRows:
    """Rows of whole conversations, best fit among WAITING of them, the rest of a row padded with bos and not learned.

    ids, mask: all conversations back to back, cut to T + 1 tokens each; offsets: (conversations + 1,).
    """

    def __init__(self, ids: np.ndarray, mask: np.ndarray, offsets: np.ndarray, sequence_len: int, bos: int):
        self.ids, self.mask, self.offsets = ids, mask, offsets
        self.sequence_len, self.bos = sequence_len, bos
        lengths = np.diff(offsets)
        if not len(lengths):
            raise ValueError("there are no conversations to train on")
        if lengths.max() > sequence_len + 1:
            raise ValueError(f"a conversation of {lengths.max()} tokens is longer than a row of {sequence_len + 1}")
        self.rows = best_fit(lengths, sequence_len + 1, crop=False, buffer=WAITING)
        self.num_rows = len(self.rows)

    @property
    def fingerprint(self) -> int:
        """Of all tokens in their order: a run goes on only with the conversations that it began with."""
        return zlib.crc32(self.ids)

    def read(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows first .. first + count - 1 as inputs and targets, each (count, T) int64."""
        ids = np.full((count, self.sequence_len + 1), self.bos, dtype=np.int64)
        targets = np.full((count, self.sequence_len + 1), IGNORE, dtype=np.int64)
        for i in range(count):
            at = 0
            for conversation, length in self.rows[(first + i) % self.num_rows]:
                part = slice(self.offsets[conversation], self.offsets[conversation] + length)
                ids[i, at : at + length] = self.ids[part]
                targets[i, at : at + length] = np.where(self.mask[part], ids[i, at : at + length], IGNORE)
                at += length
        return torch.from_numpy(ids[:, :-1]), torch.from_numpy(targets[:, 1:])


def render_conversations(conversations, tokenizer, sequence_len: int, runtime: Runtime, folder: Path):
    """ConversationRows of a sequence of conversations (a task), each cut to a row.

    Every rank renders its share; with several ranks the shares are exchanged in files under `folder`.
    """
    share = range(
        runtime.rank * len(conversations) // runtime.world_size,
        (runtime.rank + 1) * len(conversations) // runtime.world_size,
    )
    dtypes = (np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32, bool)
    rendered = []  # as arrays: lists of numbers would take twenty times the memory
    for i in tqdm(share, desc="rendering conversations", disable=None if runtime.is_main else True):
        pair = chat.render(tokenizer, conversations[i], sequence_len + 1)
        rendered.append(tuple(np.array(part, dtype) for part, dtype in zip(pair, dtypes, strict=True)))
    lengths = np.concatenate(runtime.gather(np.array([len(ids) for ids, _ in rendered], dtype=np.int64)))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    arrays = [
        np.concatenate([pair[part] for pair in rendered]) if rendered else np.zeros(0, dtype)
        for part, dtype in enumerate(dtypes)
    ]
    if runtime.world_size > 1:
        arrays = exchange(arrays, runtime, folder)
    return ConversationRows(*arrays, offsets, sequence_len, tokenizer.bos)


def exchange(arrays: list[np.ndarray], runtime: Runtime, folder: Path) -> list[np.ndarray]:
    """The arrays of all ranks, joined in order of rank. Each file is closed before another rank opens it, which is what
    network file systems ask for."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, array in enumerate(arrays):
        np.save(folder / f"{part}_{runtime.rank}.npy", array)
    runtime.barrier()
    joined = [
        np.concatenate([np.load(folder / f"{part}_{rank}.npy") for rank in range(runtime.world_size)])
        for part in range(len(arrays))
    ]
    runtime.barrier()
    if runtime.is_main:
        shutil.rmtree(folder)
    return joined


# -- steps


def read_steps(rows, first_step: int, rows_per_step: int, runtime: Runtime) -> Iterator[tuple]:
    """This rank's (inputs, targets) of each step from first_step on, for ever, on the device. A thread reads ahead."""
    share = rows_per_step // runtime.world_size
    pin = runtime.device.type == "cuda"

    def load(step):
        batch = rows.read(step * rows_per_step + runtime.rank * share, share)
        return tuple(
            tensor.contiguous().pin_memory() if pin else tensor for tensor in batch
        )  # a view is not pinned whole

    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(load, first_step)
        for step in itertools.count(first_step + 1):
            current, pending = pending.result(), reader.submit(load, step)
            yield tuple(tensor.to(runtime.device, non_blocking=True) for tensor in current)
