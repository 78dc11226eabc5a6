"""The model a second time, written from its mathematics alone: float64, one row, one token and one head at a time.

Slow and plain on purpose: nothing is shared with nanochat/gpt.py but the names of the weights. Every step is a torch
operation, so gradients come out of it too.
"""

import math

import torch

EPSILON = torch.finfo(torch.float64).eps  # torch's default of RMS norm, at this precision


def norm(x):
    return x / torch.sqrt((x * x).mean() + EPSILON)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def window_of_layer(config, layer):
    """How many positions before its own a layer may look at."""
    if layer == config.n_layer - 1:
        letter = "L"
    else:
        letter = config.window_pattern[layer % len(config.window_pattern)].upper()
    if letter == "L":
        return config.sequence_len
    window = 0
    while window < config.sequence_len / 4:  # a quarter, rounded up to whole 128s
        window += 128
    return window


def rotated(vector, position):
    """Pair (j, j + D/2) turned clockwise by position / base^(2j/D)."""
    width = len(vector)
    half = width // 2
    first, second = [], []
    for j in range(half):
        angle = position / 100000 ** (2 * j / width)
        a, b = vector[j], vector[j + half]
        first.append(a * math.cos(angle) + b * math.sin(angle))
        second.append(-a * math.sin(angle) + b * math.cos(angle))
    return torch.stack(first + second)


def attention(weights, config, layer, inputs, ids):
    """inputs: one normed vector a position -> one vector a position."""
    name = f"transformer.h.{layer}.attn."
    width = config.n_embd // config.n_head
    window = window_of_layer(config, layer)
    has_value_embedding = layer % 2 == (config.n_layer - 1) % 2
    queries, keys, values = [], [], []  # [position][head]
    for position, x in enumerate(inputs):
        q = (weights[name + "c_q.weight"] @ x).split(width)
        k = (weights[name + "c_k.weight"] @ x).split(width)
        v = list((weights[name + "c_v.weight"] @ x).split(width))
        if has_value_embedding:
            gates = 3 * sigmoid(weights[name + "ve_gate.weight"] @ x[:12])
            embedding = weights[f"value_embeds.{layer}.weight"][ids[position]].split(width)
            for head in range(config.n_kv_head):
                v[head] = v[head] + gates[head] * embedding[head]
        queries.append([1.2 * norm(rotated(head, position)) for head in q])
        keys.append([1.2 * norm(rotated(head, position)) for head in k])
        values.append(v)
    outputs = []
    queries_per_key = config.n_head // config.n_kv_head
    for position in range(len(inputs)):
        seen = range(max(0, position - window), position + 1)
        heads = []
        for head in range(config.n_head):
            kv_head = head // queries_per_key
            scores = torch.stack([queries[position][head] @ keys[s][kv_head] for s in seen]) / math.sqrt(width)
            shares = torch.exp(scores) / torch.exp(scores).sum()
            heads.append(sum(share * values[s][kv_head] for share, s in zip(shares, seen, strict=True)))
        outputs.append(weights[name + "c_proj.weight"] @ torch.cat(heads))
    return outputs


def row_logits(weights, config, ids):
    """ids: the ids of one row -> (T, vocab_size)."""
    plain = [norm(weights["transformer.wte.weight"][i]) for i in ids]
    stream = [plain[0]]
    for before, x in zip(plain, plain[1:], strict=False):
        gate = sigmoid(weights["smear_gate.weight"][0] @ x[:24])
        stream.append(x + weights["smear_lambda"][0] * gate * before)
    start = stream
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}.mlp."
        resid, again = weights["resid_lambdas"][layer], weights["x0_lambdas"][layer]
        stream = [resid * x + again * x0 for x, x0 in zip(stream, start, strict=True)]
        attended = attention(weights, config, layer, [norm(x) for x in stream], ids)
        stream = [x + y for x, y in zip(stream, attended, strict=True)]
        hidden = [torch.relu(weights[name + "c_fc.weight"] @ norm(x)) ** 2 for x in stream]
        stream = [x + weights[name + "c_proj.weight"] @ h for x, h in zip(stream, hidden, strict=True)]
        if layer == config.n_layer // 2:
            middle = stream
    logits = []
    for x, mid in zip(stream, middle, strict=True):
        last = norm(x - weights["backout_lambda"][0] * mid)
        y = (weights["lm_head.weight"] @ last)[: config.vocab_size]
        logits.append(15 * torch.tanh(y / 15))
    return torch.stack(logits)


def reference_logits(weights, config, idx):
    """weights: by parameter name. idx: (B, T) -> logits (B, T, vocab_size) float64."""
    weights = {name: weight.double() for name, weight in weights.items()}
    return torch.stack([row_logits(weights, config, row.tolist()) for row in idx])


def reference_losses(logits, targets):
    """One loss a target, 0 where the target is -1. logits: (B, T, V), targets: (B, T) -> (B, T)."""
    rows = []
    for scores, row in zip(logits, targets.tolist(), strict=True):
        losses = [
            scores.new_zeros(()) if target == -1 else torch.log(torch.exp(s).sum()) - s[target]
            for s, target in zip(scores, row, strict=True)
        ]
        rows.append(torch.stack(losses))
    return torch.stack(rows)


def reference_loss(logits, targets):
    """Mean over the targets kept."""
    return reference_losses(logits, targets).sum() / (targets != -1).sum()


def difference(found, expected):
    """The largest difference, relative to the largest of what is expected."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def random_ids(config, rows, length, seed=3):
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
