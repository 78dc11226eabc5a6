"""nanochat's model for transformers: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).

This file travels with an exported model and needs torch and transformers only. The model is a transformer with rotary
positions, QK norm, sliding windows, value embeddings, smear (each token is mixed with a share of the one before) and
backout (the middle layer's state is taken off the last). norm is RMS norm without a learned scale; no biases.

B batch, T tokens of a call, S tokens of a call and of its cache, C model width, H query heads, K key/value heads,
D head width.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

SOFTCAP = 15.0
ROTARY_BASE = 100000.0
QK_SCALE = 1.2
SMEAR_CHANNELS = 24  # the first channels decide how much of the previous token is mixed in
GATE_CHANNELS = 12  # likewise for value embeddings
VOCAB_MULTIPLE = 64  # the tables' rows beyond vocab_size are no tokens

# transformers 5 calls past_key_values cache, and warns of the old name
CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NanochatConfig(PretrainedConfig):
    model_type = "nanochat_gpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "sequence_len",
    }

    def __init__(
        self,
        vocab_size=32768,
        sequence_len=2048,
        n_layer=12,
        n_head=6,
        n_kv_head=6,
        n_embd=768,
        window_pattern="SSSL",
        use_cache=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size, self.sequence_len, self.n_layer = vocab_size, sequence_len, n_layer
        self.n_head, self.n_kv_head, self.n_embd = n_head, n_kv_head, n_embd
        self.window_pattern, self.use_cache = window_pattern, use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def windows(self):
        """How many tokens before itself a token sees, by layer; the last layer is always a long one."""
        sizes = {"L": self.sequence_len, "S": math.ceil(self.sequence_len / 4 / 128) * 128}
        pattern = self.window_pattern.upper()
        letters = [pattern[i % len(pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [sizes[letter] for letter in letters]


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary embedding, halves convention. x: (B, T, heads, D), cos and sin: (B or 1, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def rotary(positions, head_dim, dtype):
    """cos and sin at positions (B or 1, T). Made anew in each call, in float32 at least: there is no buffer that
    loading could leave empty, or a cast of the model make coarse."""
    precise = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, dtype=precise, device=positions.device) / head_dim
    angles = positions.to(precise)[:, :, None, None] * ROTARY_BASE**-exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


def has_value_embedding(layer, n_layer):
    """Every other layer, the last always among them."""
    return layer % 2 == (n_layer - 1) % 2


def linear(in_features, out_features):
    return nn.Linear(in_features, out_features, bias=False)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.window = layer, config.windows[layer]
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        self.c_q = linear(config.n_embd, config.n_embd)
        self.c_k = linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = linear(config.n_embd, config.n_embd)
        if has_value_embedding(layer, config.n_layer):
            self.ve_gate = linear(GATE_CHANNELS, config.n_kv_head)

    def forward(self, x, value_embedding, cos, sin, mask, cache):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if value_embedding is not None:  # (B, T, K D), one gate per key/value head
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_embedding.view_as(v)
        q = norm(rotate(q, cos, sin)) * QK_SCALE
        k = norm(rotate(k, cos, sin)) * QK_SCALE
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
            k, v = (y[:, :, -(T + self.window) :] for y in (k, v))  # what is before no query sees
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=self.n_head != self.n_kv_head)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, x0, scales, value_embedding, cos, sin, mask, cache):
        """x, x0: (B, T, C); scales: of the two."""
        x = scales[0] * x + scales[1] * x0
        x = x + self.attn(norm(x), value_embedding, cos, sin, mask, cache)
        return x + self.mlp(norm(x))


class NanochatForCausalLM(PreTrainedModel, GenerationMixin):
    """input_ids (B, T) -> logits (B, T, vocab_size) in float32; with labels (B, T), -100 where none, the loss as well:
    the model shifts them. attention_mask (B, S) is 0 at padding, on the left or on the right."""

    config_class = NanochatConfig
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    # a rounded scale of the residual stream is an error in every token
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"]

    def __init__(self, config):
        super().__init__(config)
        vocab = math.ceil(config.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        width, kv_width, layers = (
            config.n_embd,
            config.n_embd // config.n_head * config.n_kv_head,
            range(config.n_layer),
        )
        blocks = nn.ModuleList(Block(config, layer) for layer in layers)
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(vocab, width), "h": blocks})
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(vocab, kv_width) for i in layers if has_value_embedding(i, config.n_layer)}
        )
        self.lm_head = linear(width, vocab)
        self.smear_gate = linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.post_init()

    @property
    def dtype(self):
        """That of the activations: the first parameters are scalars, which stay in float32."""
        return self.transformer.wte.weight.dtype

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError("the vocabulary of a nanochat model is fixed: its value embeddings are tables of it")

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        cache=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        **kwargs,
    ):
        for name in ("inputs_embeds", "position_ids"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} was given; this model needs input_ids, and attention_mask for padding")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None
        if cache is None and use_cache:
            cache = DynamicCache()
        x = self.hidden(input_ids, attention_mask, cache)
        if not isinstance(logits_to_keep, int):
            x = x[:, logits_to_keep]
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits = self.lm_head(x)[..., : self.config.vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_FIELD: cache})
        return output.to_tuple() if return_dict is False else output

    def hidden(self, idx, attention_mask, cache):
        """idx: (B, T) -> the normed last state (B, T, C)."""
        if cache is not None and not all(isinstance(y, DynamicLayer) and not y.is_sliding for y in cache.layers):
            raise ValueError(f"the cache is {cache}; expected a DynamicCache: give no cache_implementation")
        T = idx.size(1)
        past = 0 if cache is None else cache.get_seq_length()
        real = self.real_tokens(attention_mask, past + T)
        if real is None:
            positions = torch.arange(past, past + T, device=idx.device).unsqueeze(0)
        else:
            positions = (real.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        cos, sin = rotary(positions, self.config.n_embd // self.config.n_head, self.dtype)
        masks = {window: visible(T, past + T, window, real, idx.device) for window in set(self.config.windows)}
        x = self.smear(norm(self.transformer.wte(idx)), real, cache)
        x0 = x
        for i, block in enumerate(self.transformer.h):
            scales = torch.stack([self.resid_lambdas[i], self.x0_lambdas[i]])
            value_embedding = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            x = block(x, x0, scales, value_embedding, cos, sin, masks[self.config.windows[i]], cache)
            if i == self.config.n_layer // 2:
                x_mid = x
        return norm(x - self.backout_lambda[0].to(x.device) * x_mid.to(x.device))  # layers may lie on several devices

    def real_tokens(self, attention_mask, length):
        """(B, S), true where there is no padding; None where there is none at all."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.size(1) != length:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, {length}): "
                "one column for each token, those in the cache included"
            )
        real = attention_mask.bool()
        return None if real.all() else real

    def smear(self, x, real, cache):
        """Mix a gated share of the previous token into each; the first of a row has none. The cache holds the embedded
        tokens as one layer more, so whatever cuts or reorders it does so with them."""
        T, embedded = x.size(1), x
        if cache is not None:
            while len(cache.layers) <= self.config.n_layer:  # generate() makes as many as the model has
                cache.layers.append(DynamicLayer())
            embedded = cache.update(x.unsqueeze(1), x.unsqueeze(1)[..., :0], self.config.n_layer)[0].squeeze(1)
        before = embedded[:, -(T + 1) :]
        before = F.pad(before, (0, 0, T + 1 - before.size(1), 0))[:, :-1]
        if real is not None:
            before = before * F.pad(real, (1, 0))[:, -(T + 1) : -1].unsqueeze(2)
        gate = self.smear_lambda[0] * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return x + gate * before


def visible(T, S, window, real, device):
    """Which of the last T + window of S tokens the last T see: (B or 1, 1, T, ...); None: all before them, and
    themselves. A token sees itself, padding too (a row of which nothing is seen would be NaN), and as many as `window`
    real tokens before it."""
    if real is None and (T == 1 or (S == T and window >= T - 1)):
        return None
    first = max(0, S - T - window)
    query, key = torch.arange(S - T, S, device=device).unsqueeze(1), torch.arange(first, S, device=device)
    mask = ((key <= query) & (key >= query - window)).unsqueeze(0)
    if real is not None:
        mask = (mask & real[:, None, first:]) | (key == query)
    return mask.unsqueeze(1)
