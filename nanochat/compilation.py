"""torch.compile: where it pays, where it can run, and whether it ran again when it should not have."""

from collections.abc import Callable
from functools import lru_cache

import torch

from nanochat import attention


@lru_cache
def compile_function(function: Callable) -> Callable:
    torch._dynamo.config.recompile_limit = 64  # a function of one shape for each group of parameters, kind of layer...
    return torch.compile(function, dynamic=False, fullgraph=True)


def compiled(model, choice: int) -> Callable:
    """The model for training and its evaluation, forward(idx, targets, loss_reduction): as it is, or with its blocks
    compiled. All layers of a kind share their code, so that the time to compile does not grow with the depth."""
    device = model.lm_head.weight.device
    if not will_compile(choice, device):
        return model
    run_block = compile_function(model.run_block)
    # a C++ compiler does no better than the loss as it is written
    options = {} if device.type == "never" else {"compile_function": compile_function}

    def forward(idx, targets, loss_reduction="mean"):
        attention.prepare(model.attention_backend, idx.size(1), model.config.windows, device)
        return model.loss(model.hidden(idx, run_block=run_block), targets, loss_reduction, **options)

    return forward


def will_compile(choice: int, device: torch.device) -> bool:
    """Whether to compile: 1 yes, 0 no, -1 on GPUs."""
    return choice == 1 or (choice == -1 and device.type == "cuda")
