"""How fast does this machine train a model? Real micro-batches and real updates on random tokens, timed for a while."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanochat import fp8, memory, runtime
from nanochat.compilation import compiled
from nanochat.gpt import GPTConfig, build_model
from nanochat.memory import DeviceBatch
from nanochat.optim import MuonAdamW, orthogonalization_dtype, param_groups
from nanochat.runtime import Runtime
from nanochat.scaling import meta_model
from nanochat.training_step import accumulate, optimizer_step

WARM_STEPS, MIN_STEPS = 3, 5
AFFORDABLE = 10  # steps of one micro-batch that should fit into the time there is
SHARE = 0.3  # of the rate of plain products that a step reaches, for choosing what to time only
LOADAVG, BUSY = Path("/proc/loadavg"), 0.3  # how many threads run now; a share of the cores
PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024, "mps": 2048}  # of the matrices whose product is that rate


@dataclass(frozen=True)
class Speed:
    """What one device was timed at, and what follows from it for others of the family, by their FLOPs."""

    config: GPTConfig
    rows: int
    micro_seconds: float  # forward and backward pass of so many rows
    update_seconds: float  # of all parameters

    def step_seconds(self, config: GPTConfig, tokens: int, ranks: int = 1) -> float:
        """An optimizer step of so many tokens, the ranks sharing both parts; what they say to each other is not in."""
        micro_flops = self.rows * self.config.sequence_len * meta_model(self.config).flops_per_token()
        passes = tokens * meta_model(config).flops_per_token() * self.micro_seconds / micro_flops
        return (passes + self.update_seconds * update_flops(config) / update_flops(self.config)) / ranks


def update_flops(config: GPTConfig) -> float:
    """Of the optimizer, roughly: what orthogonalizing takes, 25 C a weight of the matrices."""
    return 25 * config.n_embd * meta_model(config).counts()["transformer_matrices"]


def probe(
    config: GPTConfig, rows: int, machine: Runtime, compiles: bool, in_fp8: bool = False, seconds: float = 20
) -> Speed:
    """Times micro-batches of so many rows, and whole steps of one micro-batch, in turn; the difference is the update.

    Takes fewer rows, then a model of half the depth and width, as long as the estimate says that it would not be done
    in `seconds` (compilation aside) or not fit: the config and rows of what it returns say what was timed.
    """
    config, rows = affordable(config, rows, machine, compiles, seconds)
    machine.print(
        f"timing depth {config.n_layer}, width {config.n_embd}, {rows} row{'s' * (rows > 1)} at once on "
        f"{runtime.device_name(machine.device)}: {seconds:.0f} s{', and first the compiler' if compiles else ''}"
    )
    model = build_model(config, machine)
    precision = orthogonalization_dtype(machine.device, machine.dtype)
    groups = param_groups(model.roles(), config.n_embd)
    optimizer = MuonAdamW(groups, machine.rank, machine.world_size, precision, compiles)
    if in_fp8:
        fp8.enable_where_possible(model, machine)
    train_model = compiled(model, compiles)
    tokens = torch.randint(config.vocab_size, (rows, config.sequence_len + 1), device=machine.device)
    batch, device_batch = (tokens[:, :-1], tokens[:, 1:]), DeviceBatch(rows, machine)
    num_targets = torch.tensor(batch[1].numel(), device=machine.device)

    def micro():
        accumulate(train_model, optimizer, batch, device_batch, 1.0, num_targets)

    def whole():
        optimizer_step(train_model, optimizer, batch, device_batch, machine)

    micros, wholes, deadline = [], [], None
    while deadline is None or time.perf_counter() < deadline or len(wholes) < MIN_STEPS:
        micro_seconds = timed(micro, machine)
        optimizer.zero_grad()
        whole_seconds = timed(whole, machine)
        if deadline is not None:
            micros.append(micro_seconds)
            wholes.append(whole_seconds)
        elif optimizer.steps == WARM_STEPS:
            deadline = time.perf_counter() + seconds
    micro_seconds = statistics.median(micros)
    return Speed(config, rows, micro_seconds, max(0.0, statistics.median(wholes) - micro_seconds))


def affordable(config: GPTConfig, rows: int, machine: Runtime, compiles: bool, seconds: float) -> tuple[GPTConfig, int]:
    """The shape, or a smaller one of the family, of which some steps can be taken in the time that there is."""
    rate = SHARE * product_rate(machine)
    free = machine.free_memory()

    def too_long():
        passes = rows * config.sequence_len * meta_model(config).flops_per_token()
        return (passes + update_flops(config)) / rate > seconds / AFFORDABLE

    def too_large():
        return memory.most_rows(free, config, config.sequence_len, machine, compiles) < rows

    while rows > 1 and (too_long() or too_large()):
        rows //= 2
    while config.n_layer > 2 and (too_long() or too_large()):
        heads = max(1, config.n_head // 2)
        config = replace(
            config, n_layer=config.n_layer // 2, n_head=heads, n_kv_head=heads, n_embd=heads * config.head_dim
        )
    return config, rows


def busy() -> str:
    """Whether other processes keep the cores busy, in words, or nothing: a shared CPU trains many times slower. Linux
    says so; elsewhere nobody knows."""
    running = []
    while LOADAVG.exists() and len(running) < 10:
        time.sleep(0.05)
        running.append(int(LOADAVG.read_text().split()[3].partition("/")[0]) - 1)  # this one runs, too
    others, cores = statistics.mean(running or [0]), runtime.usable_cores()
    return f"other processes run on this host, {others:.1f} on {cores} cores" if others > BUSY * cores else ""


def product_rate(machine: Runtime) -> float:
    """FLOP/s of a product of two large matrices."""
    side = PRODUCT_SIDE[machine.device.type]
    a, b = (torch.randn(side, side, device=machine.device).to(machine.dtype) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b, machine) for _ in range(3))


def timed(work: Callable, machine: Runtime) -> float:
    """Seconds."""
    machine.synchronize()
    begin = time.perf_counter()
    work()
    machine.synchronize()
    return time.perf_counter() - begin
