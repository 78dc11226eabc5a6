"""torch.compile: where it pays, where it can run, and whether it ran again when it should not have."""

import sys
from collections.abc import Callable
from functools import lru_cache

import torch

from nanochat import attention
from nanochat.runtime import Runtime, missing_compiler

MANY = 512  # shapes of one function: kinds of layers, of passes, of parameters; for every GPU that a server drives


def compile_function(function: Callable) -> Callable:
    """Compiled for each new shape of the tensors that it is given. Where the graph would break, that is an error."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MANY  # of this thread
    return _compile(function)


@lru_cache
def _compile(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


def compiled(model, compiles: bool) -> Callable:
    """The model for training and its evaluation, forward(idx, targets, loss_reduction): as it is, or with its blocks
    and its loss compiled. All layers of a kind share their code, so that the time to compile does not grow with the
    depth."""
    if not compiles:
        return model
    device = model.lm_head.weight.device

    def forward(idx, targets, loss_reduction="mean"):
        if device.type == "cpu" and not torch.is_grad_enabled():  # evaluation alone is not worth a C++ compiler's time
            return model(idx, targets, loss_reduction)
        attention.prepare(model.attention_backend, idx.size(1), model.config.windows, device)
        hidden = model.hidden(idx, run_block=compile_function(model.run_block))
        return model.loss(hidden, targets, loss_reduction, compile_function=compile_function)

    return forward


def will_compile(choice: int, runtime: Runtime) -> bool:
    """Whether to compile, by the choice of the command line: 1 yes, 0 no, -1 on GPUs, where it always pays; on two CPU
    cores it does in runs of some hundred steps. Where it cannot, one line says so."""
    if choice == 0 or (choice == -1 and runtime.device.type != "cuda"):
        return False
    missing = "disabled by scripts.doctor" if "compile" in runtime.disabled else missing_compiler(runtime.device)
    if missing:
        runtime.print(f"torch.compile cannot be used, everything runs uncompiled and slower: {missing}")
    return not missing


def times_compiled() -> int:
    """How many graphs this process has compiled so far. After the first steps of a run it should stand still."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
