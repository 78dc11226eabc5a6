"""The model: a transformer with rotary positions, QK norm, sliding windows, value embeddings, smear and backout.

B batch, T time, C model width, H query heads, K key/value heads, D head width, L layers, V vocabulary padded up to a
multiple of 64. norm is RMS norm without a learned scale; there are no biases. Weights are float32 and are cast to the
dtype of the activations in each linear layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.attention import attend, choose_backend
from nanochat.losses import cross_entropy, softcapped_logits
from nanochat.runtime import Runtime

SOFTCAP = 15.0
ROTARY_BASE = 100000.0
QK_SCALE = 1.2
SMEAR_CHANNELS = 24  # the first channels decide how much of the previous token is mixed in
GATE_CHANNELS = 12  # likewise for value embeddings
VOCAB_MULTIPLE = 64

# The one table of parameter roles, by the beginning of the name: counts, FLOPs and optimizer groups all come from it.
ROLES = (
    ("lm_head", "lm_head."),
    ("wte", "transformer.wte."),
    ("value_embeds", "value_embeds."),
    ("resid_lambdas", "resid_lambdas"),
    ("x0_lambdas", "x0_lambdas"),
    ("smear_backout", "smear_lambda"),
    ("smear_backout", "backout_lambda"),
    ("smear_backout", "smear_gate."),
    ("transformer_matrices", "transformer.h."),
)
SCALAR_ROLES = ("resid_lambdas", "x0_lambdas", "smear_backout")


@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

    def __post_init__(self):
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(
                f"width {self.n_embd} must divide by {self.n_head} heads, and these by {self.n_kv_head} key/value heads"
            )
        if self.head_dim % 2 or self.n_embd < SMEAR_CHANNELS:
            raise ValueError(f"head width {self.head_dim} must be even and width {self.n_embd} >= {SMEAR_CHANNELS}")
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise ValueError(f"window pattern is {self.window_pattern!r}; expected letters S and L, for example SSSL")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def windows(self) -> list[int]:
        """The left window of each layer; the last layer always sees everything."""
        sizes = {"L": self.sequence_len, "S": math.ceil(self.sequence_len / 4 / 128) * 128}
        pattern = self.window_pattern.upper()
        letters = [pattern[i % len(pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [sizes[letter] for letter in letters]


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves convention. x: (B, T, heads, D), cos and sin: (B or 1, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class ReluSquared(torch.autograd.Function):
    """relu(x)^2 that keeps one tensor for its backward pass, 2 relu(x): a tenth of a step's time on a CPU."""

    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return (grad * y).mul_(2)


class Linear(nn.Linear):
    """A float32 weight, multiplied in the dtype of its input. `product` may be swapped for another (fp8.py)."""

    product = staticmethod(F.linear)

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return self.product(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.window = config.windows[layer]
        width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
        self.c_q = Linear(width, width)
        self.c_k = Linear(width, kv_width)
        self.c_v = Linear(width, kv_width)
        self.c_proj = Linear(width, width)
        if has_value_embedding(layer, config.n_layer):
            self.ve_gate = Linear(GATE_CHANNELS, config.n_kv_head)

    def forward(self, x, value_embedding, cos, sin, backend, cache):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if value_embedding is not None:  # (B, T, K D), one gate per key/value head
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_embedding.view_as(v)
        q = norm(rotate(q, cos, sin)) * QK_SCALE
        k = norm(rotate(k, cos, sin)) * QK_SCALE
        y = (attend if cache is None else cache.attend)(q, k, v, self.window, backend)
        return self.c_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(ReluSquared.apply(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, x0, scales, value_embedding, cos, sin, backend, cache):
        """x, x0: (B, T, C); scales: (2), of the two."""
        x = scales[0] * x + scales[1] * x0
        x = x + self.attn(norm(x), value_embedding, cos, sin, backend, cache)
        return x + self.mlp(norm(x))


def run_block(block: Block, *inputs) -> torch.Tensor:
    """What is compiled, once for all layers of a kind (compilation.py)."""
    return block(*inputs)


def has_value_embedding(layer: int, n_layer: int) -> bool:
    """Every other layer, the last always among them."""
    return layer % 2 == (n_layer - 1) % 2


class GPT(nn.Module):
    """model(idx) -> logits (B, T, vocab_size) float32; model(idx, targets) -> loss.

    dtype is that of the activations; attention_backend a name of attention.BACKENDS. Call init_weights() before use.
    """

    run_block = staticmethod(run_block)

    def __init__(self, config: GPTConfig, dtype: torch.dtype = torch.float32, attention_backend: str = "sdpa"):
        super().__init__()
        self.config, self.dtype, self.attention_backend = config, dtype, attention_backend
        vocab, width, kv_width = config.padded_vocab_size, config.n_embd, config.n_kv_head * config.head_dim
        layers = range(config.n_layer)
        blocks = nn.ModuleList(Block(config, layer) for layer in layers)
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(vocab, width), "h": blocks})
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(vocab, kv_width) for i in layers if has_value_embedding(i, config.n_layer)}
        )
        self.lm_head = Linear(width, vocab)
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.loss_in_fp8 = False
        self._rotary = None

    @torch.no_grad()
    def init_weights(self, seed: int = 42) -> None:
        """Every parameter gets a first value here, whatever lay in its memory before; same values on every device."""
        generator = torch.Generator().manual_seed(seed)

        def normal(weight, std):
            weight.copy_(torch.empty(weight.shape).normal_(0, std, generator=generator))

        def uniform(weight, low, high):
            weight.copy_(torch.empty(weight.shape).uniform_(low, high, generator=generator))

        bound = math.sqrt(3) / math.sqrt(self.config.n_embd)
        normal(self.transformer.wte.weight, 0.8)
        normal(self.lm_head.weight, 0.001)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                uniform(linear.weight, -bound, bound)
            uniform(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if hasattr(block.attn, "ve_gate"):
                uniform(block.attn.ve_gate.weight, 0, 0.02)
        for embedding in self.value_embeds.values():
            uniform(embedding.weight, -bound, bound)
        uniform(self.smear_gate.weight, 0, 0.02)
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)
        depth = torch.arange(self.config.n_layer) / max(self.config.n_layer - 1, 1)
        self.resid_lambdas.copy_(1.15 - 0.10 * depth)
        self.x0_lambdas.copy_(0.20 - 0.15 * depth)
        self.cast_embeddings()

    def cast_embeddings(self) -> None:
        """Embedding tables lie in memory in bfloat16 when that is the compute dtype: they are only looked up."""
        if self.dtype == torch.bfloat16:
            for embedding in (self.transformer.wte, *self.value_embeds.values()):
                embedding.to(self.dtype)

    def forward(self, idx, targets=None, loss_reduction="mean", cache=None):
        """idx: (B, T) -> logits (B, T, vocab_size) float32.

        With targets (B, T), -1 where none: the loss, "mean" or "sum" over the targets, or "none": (B, T), 0 at -1.
        """
        x = self.hidden(idx, cache)
        return self.logits(x) if targets is None else self.loss(x, targets, loss_reduction)

    def loss(self, x: torch.Tensor, targets: torch.Tensor, reduction: str = "mean", **options) -> torch.Tensor:
        """x: (B, T, C), as hidden() gives it. targets and reduction: as in forward(); options: of cross_entropy."""
        args = (x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.vocab_size, SOFTCAP, reduction)
        loss = cross_entropy(*args, in_fp8=self.loss_in_fp8, **options)
        return loss.view(targets.shape) if reduction == "none" else loss

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., C), as hidden() gives it -> (..., vocab_size) float32."""
        return softcapped_logits(x, self.lm_head.weight, self.config.vocab_size, SOFTCAP)

    def hidden(self, idx: torch.Tensor, cache=None, run_block: Callable = run_block) -> torch.Tensor:
        """idx: (B, T) -> the normed last state (B, T, C). cache: a pass over what was read before (kv_cache.Pass)."""
        cos, sin = self.rotary(idx, cache)
        x = norm(self.transformer.wte(idx).to(self.dtype))
        x = self.smear(x, idx, cache)
        x0 = x.view_as(x)  # one tensor given twice would make the first block a kind of its own to the compiler
        scales = torch.stack([self.resid_lambdas, self.x0_lambdas], dim=1)
        for i, block in enumerate(self.transformer.h):
            key = str(i)
            value_embedding = self.value_embeds[key](idx).to(self.dtype) if key in self.value_embeds else None
            layer = None if cache is None else cache.layer(i)
            x = run_block(block, x, x0, scales[i], value_embedding, cos, sin, self.attention_backend, layer)
            if i == self.config.n_layer // 2:
                x_mid = x
        return norm(x - self.backout_lambda[0] * x_mid)

    def smear(self, x: torch.Tensor, idx: torch.Tensor, cache=None) -> torch.Tensor:
        """Mix a gated share of the previous token into each; the first of a row has none."""
        before = x[:, :-1] if cache is None else norm(self.transformer.wte(cache.before(idx)).to(self.dtype))
        gate = self.smear_lambda[0] * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        if cache is None:
            return torch.cat([x[:, :1], x[:, 1:] + gate[:, 1:] * before], dim=1)
        return x + gate * before * (cache.positions > 0).unsqueeze(2)

    def rotary(self, idx: torch.Tensor, cache=None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin at the positions of idx, (1 or B, T, 1, D/2). The tables grow on demand."""
        T = idx.size(1)
        needed = T if cache is None else cache.longest
        if self._rotary is None or self._rotary[0].size(1) < needed or self._rotary[0].device != idx.device:
            length = max(needed, 10 * self.config.sequence_len)  # a new length would compile a compiled model anew
            length = 1 << (length - 1).bit_length()
            precise = torch.float64 if self.dtype == torch.float64 else torch.float32
            exponent = torch.arange(0, self.config.head_dim, 2, dtype=precise, device=idx.device) / self.config.head_dim
            angles = torch.outer(torch.arange(length, dtype=precise, device=idx.device), ROTARY_BASE**-exponent)
            self._rotary = tuple(table.to(self.dtype)[None, :, None, :] for table in (angles.cos(), angles.sin()))
        if cache is None:
            return tuple(table[:, :T] for table in self._rotary)
        return tuple(table[0][cache.positions] for table in self._rotary)

    def roles(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters by role, in the order of ROLES and then of the model."""
        roles = {role: [] for role, _ in ROLES}
        for name, parameter in self.named_parameters():
            role = next(role for role, prefix in ROLES if name.startswith(prefix))
            roles[role].append((name, parameter))
        return roles

    def counts(self) -> dict[str, int]:
        """Parameters by group, padded vocabulary rows included."""
        sizes = {role: sum(p.numel() for _, p in members) for role, members in self.roles().items()}
        counts = {group: sizes[group] for group in ("wte", "value_embeds", "lm_head", "transformer_matrices")}
        counts["scalars"] = sum(sizes[role] for role in SCALAR_ROLES)
        counts["total"] = sum(counts.values())
        return counts

    def flops_per_token(self) -> int:
        """Forward and backward: 6 a weight of every linear layer, and the products of attention within its window."""
        counts, config = self.counts(), self.config
        attention = sum(12 * config.n_embd * min(window, config.sequence_len) for window in config.windows)
        return 6 * (counts["transformer_matrices"] + counts["lm_head"]) + attention


def build_model(config: GPTConfig, runtime: Runtime, seed: int | None = 42) -> GPT:
    """The model on the runtime's device, in its dtype. seed: of the first weights; None leaves them to be loaded."""
    with torch.device("meta"):
        model = GPT(config, runtime.dtype, choose_backend(runtime, config.head_dim))
    model.to_empty(device=runtime.device)
    if seed is None:
        model.cast_embeddings()
    else:
        model.init_weights(seed)
    return model
