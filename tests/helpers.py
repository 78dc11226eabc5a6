"""Small things that several tests need: tokenizers whose ids can be read, models that are random in every parameter."""

import contextlib
import json
import socket
import threading
import time

import numpy as np
import torch

from nanochat.dataset import TokenFile
from nanochat.gpt import GPTConfig, build_model
from nanochat.optim import MuonAdamW, param_groups
from nanochat.runtime import Runtime
from nanochat.saver import Saver
from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer

CPU = Runtime(torch.device("cpu"), torch.float32)
MERGES = (b"he", b"ll", b"lo", b"th", b" t", b" th", b" the", b"in", b"an", b"er", b"12")


def byte_tokenizer(merges=()) -> Tokenizer:
    """Ids 0..255 are the bytes: without merges, encode(text) is list(text.encode())."""
    return Tokenizer(SPLIT_PATTERN, [bytes([i]) for i in range(256)] + list(merges))


def rank_of(rank: int, world_size: int) -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, rank, rank, world_size)


def small_config(vocab_size: int, sequence_len: int = 64, **changes) -> GPTConfig:
    shape = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL") | changes
    return GPTConfig(sequence_len, vocab_size, **shape)


def random_model(config: GPTConfig, seed: int = 0, runtime: Runtime = CPU):
    """No parameter is left at a value that would hide a term."""
    model = build_model(config, runtime, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def optimizer_of(model, rank: int = 0, world_size: int = 1) -> MuonAdamW:
    rates = dict(unembedding_lr=0.004, embedding_lr=0.1, matrix_lr=0.02, scalar_lr=0.5, weight_decay=0.1)
    return MuonAdamW(param_groups(model.roles(), model.config.n_embd, **rates), rank, world_size)


def write_token_files(folder, documents: list[list[int]], name: str = "shard_00000", dtype=np.uint16) -> TokenFile:
    folder.mkdir(parents=True, exist_ok=True)
    file = TokenFile(folder / f"{name}.bin", folder / f"{name}.idx.npy")
    np.array([token for document in documents for token in document], dtype).tofile(file.tokens)
    np.save(file.offsets, np.cumsum([0, *map(len, documents)]).astype(np.int64))
    return file


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def all_ranks(world_size, monkeypatch, work):
    """Run work(rank) as that many threads, which exchange by the runtime's collectives; the values by rank."""
    meeting, shared, values = threading.Barrier(world_size, timeout=60), [None] * world_size, [None] * world_size
    failures = []

    def gather(self, value):
        if self.world_size == 1:
            return [value]
        meeting.wait()
        shared[self.rank] = value
        meeting.wait()
        found = list(shared)
        meeting.wait()
        return found

    def total(self, tensor):
        tensor.copy_(sum(gather(self, tensor.clone())))
        return tensor

    monkeypatch.setattr(Runtime, "gather", gather)
    monkeypatch.setattr(Runtime, "sum", total)
    monkeypatch.setattr(Runtime, "barrier", lambda self: gather(self, None))

    def one(rank):
        try:
            values[rank] = work(rank)
        except BaseException as error:
            failures.append(error)
            meeting.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return values


def save_checkpoint(folder, step, model, optimizer, meta, runtime) -> None:
    """Save once, and wait for it."""
    saver = Saver(folder, model, optimizer, runtime)
    saver.save(step, meta)
    if not saver.finish():
        raise OSError(f"step {step} could not be saved in {folder}")


@contextlib.contextmanager
def serving(workers, tokenizer, context: int, **options):
    """A chat server on a port of its own; yields (its address, the server)."""
    import uvicorn

    from nanochat.server import ChatServer, create_app

    app = create_app(workers, tokenizer, context, **options)
    server = ChatServer(uvicorn.Config(app, log_level="warning", ws="none"), app, workers)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join()
