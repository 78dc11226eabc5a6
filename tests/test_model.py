"""The model: the numbers of the reference implementation, a slow float64 one, first values."""

import json
import math
from pathlib import Path

import pytest
import torch
from reference_model import difference, random_ids, reference_logits, reference_loss, reference_losses
from safetensors.torch import load_file

from nanochat.gpt import GPT, GPTConfig, build_model
from nanochat.runtime import Runtime

GOLDEN = Path(__file__).parent / "data" / "golden"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def golden():
    return {name: load_file(GOLDEN / f"{name}.safetensors") for name in ("weights", "io", "grads")}


@pytest.fixture(scope="module")
def meta():
    return json.loads((GOLDEN / "meta.json").read_text())


@pytest.fixture
def golden_model(golden, meta):
    model = GPT(GPTConfig(**meta["config"]))
    model.load_state_dict(golden["weights"])
    return model


def test_golden_logits(golden_model, golden):
    with torch.no_grad():
        logits = golden_model(golden["io"]["idx"])
    assert logits.dtype == torch.float32
    assert difference(logits, golden["io"]["logits"]) < 1e-4


def test_golden_losses(golden_model, golden, meta):
    idx, targets = golden["io"]["idx"], golden["io"]["targets"]
    with torch.no_grad():
        each = golden_model(idx, targets, loss_reduction="none")
        mean = golden_model(idx, targets)
        total = golden_model(idx, targets, loss_reduction="sum")
    assert each.shape == targets.shape
    assert difference(each, golden["io"]["loss_per_token"]) < 1e-4
    assert (each[targets == -1] == 0).all() and (targets == -1).any()
    assert mean.item() == pytest.approx(golden["io"]["loss_mean"].item(), rel=1e-5)
    assert mean.item() == pytest.approx(meta["loss"], rel=1e-5)
    assert total.item() == pytest.approx(mean.item() * (targets != -1).sum().item(), rel=1e-5)


def test_golden_gradients(golden_model, golden):
    golden_model(golden["io"]["idx"], golden["io"]["targets"]).backward()
    found = {name: difference(p.grad, golden["grads"][name]) for name, p in golden_model.named_parameters()}
    assert found.keys() == golden["grads"].keys()
    assert {name: error for name, error in found.items() if not error < 1e-4} == {}


def test_gradients_of_the_per_token_losses_add_up_to_the_golden_ones(golden_model, golden):
    """`none` takes another path through the loss than `mean`."""
    targets = golden["io"]["targets"]
    losses = golden_model(golden["io"]["idx"], targets, loss_reduction="none")
    (losses.sum() / (targets != -1).sum()).backward()
    for name, p in golden_model.named_parameters():
        assert difference(p.grad, golden["grads"][name]) < 1e-4, name


def test_golden_counts_flops_and_windows(golden_model, meta):
    assert golden_model.counts() == meta["counts"]
    assert golden_model.flops_per_token() == meta["flops_per_token"]
    assert golden_model.config.windows == [left for left, right in meta["window_sizes"]]


def test_names_and_shapes_are_the_public_ones(golden_model, golden):
    assert {name: tensor.shape for name, tensor in golden_model.state_dict().items()} == {
        name: tensor.shape for name, tensor in golden["weights"].items()
    }
    model = GPT(GPTConfig(64, 300, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="L"))
    expected = {
        "transformer.wte.weight": (320, 64),
        "lm_head.weight": (320, 64),
        "smear_gate.weight": (1, 24),
        "smear_lambda": (1,),
        "backout_lambda": (1,),
        "resid_lambdas": (3,),
        "x0_lambdas": (3,),
        "value_embeds.0.weight": (320, 32),
        "value_embeds.2.weight": (320, 32),
        "transformer.h.0.attn.ve_gate.weight": (2, 12),
        "transformer.h.2.attn.ve_gate.weight": (2, 12),
    }
    for i in range(3):
        for name, shape in (("c_q", (64, 64)), ("c_k", (32, 64)), ("c_v", (32, 64)), ("c_proj", (64, 64))):
            expected[f"transformer.h.{i}.attn.{name}.weight"] = shape
        expected[f"transformer.h.{i}.mlp.c_fc.weight"] = (256, 64)
        expected[f"transformer.h.{i}.mlp.c_proj.weight"] = (64, 256)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


# -- against the slow implementation, in float64

CASES = {
    "vocabulary padded": dict(vocab_size=100, T=9),
    "vocabulary of one row over": dict(vocab_size=129, T=5),
    "fewer key/value heads": dict(n_head=4, n_kv_head=2, n_embd=64, T=11),
    "one key/value head": dict(n_head=3, n_kv_head=1, n_embd=48, T=10),
    "L shorter than T": dict(sequence_len=7, T=24, n_layer=3),
    "L of one": dict(sequence_len=1, T=6),
    "L of T - 1": dict(sequence_len=12, T=13),
    "L and S both shorter than T": dict(sequence_len=100, window_pattern="SL", T=141, n_layer=3, rows=1),
    "S below a long L": dict(sequence_len=1000, window_pattern="LSS", T=135, n_layer=2, rows=1),
    "S shorter than T": dict(sequence_len=512, window_pattern="S", T=133, n_layer=2, rows=1),
    "S of more than 128": dict(sequence_len=520, window_pattern="S", T=140, n_layer=2, rows=1),
    "one token": dict(T=1),
    "two tokens": dict(T=2),
    "one layer": dict(n_layer=1, T=8),
    "two layers": dict(n_layer=2, T=8),
    "five layers, lower case": dict(n_layer=5, window_pattern="slS", T=7),
    "six layers": dict(n_layer=6, window_pattern="SSSL", T=6),
    "long": dict(T=70, n_layer=2),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_slow_implementation(case, random_model):
    sizes = dict(CASES[case])
    length, rows = sizes.pop("T"), sizes.pop("rows", 2)
    model = random_model(dtype=torch.float64, **sizes)
    idx = random_ids(model.config, rows, length)
    targets = random_ids(model.config, rows, length, seed=4)
    targets[0, 0 : length - 1 : 3] = -1
    logits = reference_logits(model.state_dict(), model.config, idx)
    with torch.no_grad():
        assert model(idx).shape == (rows, length, model.config.vocab_size)
        assert difference(model(idx).double(), logits) < 1e-6  # logits are float32 at any dtype
        assert model(idx, targets).item() == pytest.approx(reference_loss(logits, targets).item(), rel=1e-9)
        each = model(idx, targets, loss_reduction="none")
        assert difference(each.double(), reference_losses(logits, targets)) < 1e-6


@pytest.mark.parametrize("case", ["vocabulary padded", "fewer key/value heads", "L shorter than T", "two tokens"])
def test_gradients_are_those_of_the_slow_implementation(case, random_model):
    sizes = dict(CASES[case])
    length = sizes.pop("T")
    model = random_model(dtype=torch.float64, **sizes)
    idx, targets = random_ids(model.config, 2, length), random_ids(model.config, 2, length, seed=4)
    targets[1, 0] = -1
    model(idx, targets).backward()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    reference_loss(reference_logits(weights, model.config, idx), targets).backward()
    for name, p in model.named_parameters():
        expected = weights[name].grad if weights[name].grad is not None else torch.zeros_like(p)
        assert difference(p.grad, expected) < 1e-9 or torch.equal(p.grad, expected), name


def test_a_document_mark_in_mid_row_is_smeared_with_what_precedes_it(random_model):
    """Only position 0 is exempt: documents in a row see one another, whatever id their mark has."""
    model = random_model(dtype=torch.float64, n_layer=2)
    bos = model.config.vocab_size - 1
    idx = random_ids(model.config, 2, 12) % (bos - 1)
    idx[:, 0] = idx[:, 6] = bos
    expected = reference_logits(model.state_dict(), model.config, idx)
    with torch.no_grad():
        assert difference(model(idx).double(), expected) < 1e-6
        smeared = model.smear(torch.nn.functional.rms_norm(model.transformer.wte(idx), (32,)), idx, None)
        plain = torch.nn.functional.rms_norm(model.transformer.wte(idx), (32,))
    assert torch.equal(smeared[:, 0], plain[:, 0])
    assert (smeared[:, 6] - plain[:, 6]).abs().max() > 1e-3


def test_padded_rows_of_the_vocabulary_are_never_seen(random_model):
    model = random_model(vocab_size=100)
    idx, targets = random_ids(model.config, 2, 9), random_ids(model.config, 2, 9, seed=4)
    logits, loss = model(idx), model(idx, targets)
    loss.backward()
    for table in (model.lm_head, model.transformer.wte, *model.value_embeds.values()):
        assert table.weight.size(0) == 128
        assert (table.weight.grad[100:] == 0).all()
    with torch.no_grad():
        model.lm_head.weight[100:] = 1e4
        assert torch.equal(model(idx), logits) and torch.equal(model(idx, targets), loss)


def test_the_future_is_never_seen_and_rows_do_not_touch(random_model):
    model = random_model(sequence_len=8, n_layer=3, n_kv_head=1)
    idx = random_ids(model.config, 3, 30)
    other = idx.clone()
    other[0, 17:] = (other[0, 17:] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = model(idx), model(other)
    assert difference(after[0, :17], before[0, :17]) < 1e-5
    assert difference(after[1:], before[1:]) < 1e-5
    assert (after[0, 17] - before[0, 17]).abs().max() > 1e-3


def test_logits_stay_within_the_softcap_and_are_float32(random_model):
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
        logits = model(random_ids(model.config, 2, 9))
    assert logits.dtype == torch.float32
    assert 14.9 < logits.abs().max() <= 15


def test_rotary_tables_grow_past_the_sequence_length(random_model):
    """The same model answers the same about a row, whether it saw long ones before or not."""
    sizes = dict(sequence_len=4, window_pattern="L", dtype=torch.float64)
    used, fresh = random_model(**sizes), random_model(**sizes)
    idx = random_ids(used.config, 1, 90)
    with torch.no_grad():
        short = used(idx[:, :3])
        long = used(idx)
        assert torch.equal(used(idx[:, :3]), short)
        assert torch.equal(fresh(idx), long)
        assert difference(long[:, :3], short) < 1e-6


# -- bfloat16


def test_bfloat16_is_near_float32(random_model):
    sizes = dict(n_layer=3, n_embd=64, vocab_size=100)
    exact, model = random_model(**sizes), random_model(dtype=torch.bfloat16, **sizes)
    model.load_state_dict(exact.state_dict())
    tables = [name for name, p in model.named_parameters() if p.dtype == torch.bfloat16]
    assert tables == ["transformer.wte.weight", "value_embeds.0.weight", "value_embeds.2.weight"]
    idx, targets = random_ids(model.config, 2, 21), random_ids(model.config, 2, 21, seed=4)
    hidden = model.hidden(idx)
    assert hidden.dtype == torch.bfloat16 and model(idx).dtype == torch.float32
    assert (model(idx) - exact(idx)).std() / exact(idx).std() < 0.05
    losses = model(idx, targets), exact(idx, targets)
    assert losses[0].dtype == torch.float32
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == p.dtype
        cosine = torch.cosine_similarity(p.grad.flatten().float(), q.grad.flatten(), dim=0)
        assert p.numel() < 4 or cosine > 0.97, (name, cosine)


# -- first values


def poisoned(config, dtype=torch.float32):
    with torch.device("meta"):
        model = GPT(config, dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_layer", [1, 2, 5])
def test_every_parameter_gets_its_first_value(n_layer, dtype):
    config = GPTConfig(64, 100, n_layer=n_layer, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")
    model = poisoned(config, dtype)
    model.init_weights()
    assert [name for name, p in model.named_parameters() if not p.isfinite().all()] == []
    assert model(random_ids(config, 1, 6)).isfinite().all()
    plain = GPT(config, dtype)
    plain.init_weights()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name


def test_first_values_have_their_distributions():
    config = GPTConfig(256, 1000, n_layer=4, n_head=4, n_kv_head=2, n_embd=192, window_pattern="SSSL")
    model = poisoned(config)
    model.init_weights()
    s = math.sqrt(3) / math.sqrt(192)

    def is_uniform(weight, low, high):
        span = high - low
        assert low <= weight.min() and weight.max() <= high
        if weight.numel() > 1000:  # the whole range, evenly
            assert weight.min() < low + 0.01 * span and weight.max() > high - 0.01 * span
            assert weight.mean().item() == pytest.approx((low + high) / 2, abs=0.01 * span)
            assert weight.std().item() == pytest.approx(span / math.sqrt(12), rel=0.02)
        else:
            assert weight.std() > 0.1 * span

    def is_normal(weight, std):
        assert weight.mean().abs() < 0.02 * std
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert 3.5 * std < weight.abs().max() < 6.5 * std

    with torch.no_grad():
        is_normal(model.transformer.wte.weight, 0.8)
        is_normal(model.lm_head.weight, 0.001)
        for i, block in enumerate(model.transformer.h):
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                is_uniform(linear.weight, -s, s)
            is_uniform(block.mlp.c_fc.weight, -0.4 * s, 0.4 * s)
            assert (block.attn.c_proj.weight == 0).all() and (block.mlp.c_proj.weight == 0).all()
            assert hasattr(block.attn, "ve_gate") == (i in (1, 3))
        for i in (1, 3):
            is_uniform(model.value_embeds[str(i)].weight, -s, s)
            is_uniform(model.transformer.h[i].attn.ve_gate.weight, 0, 0.02)
        is_uniform(model.smear_gate.weight, 0, 0.02)
        assert model.smear_lambda.tolist() == [0]
        assert model.backout_lambda.tolist() == pytest.approx([0.2])
        assert model.resid_lambdas.tolist() == pytest.approx([1.15 - 0.10 * i / 3 for i in range(4)])
        assert model.x0_lambdas.tolist() == pytest.approx([0.20 - 0.15 * i / 3 for i in range(4)])
        # no two matrices are the same draw
        drawn = [p.flatten()[:8] for p in model.parameters() if p.dim() == 2 and p.abs().sum() > 0]
        assert len({tuple(p.tolist()) for p in drawn}) == len(drawn)


def test_a_single_layer_has_the_lambdas_of_the_first():
    model = GPT(GPTConfig(64, 64, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L"))
    model.init_weights()
    assert model.resid_lambdas.tolist() == pytest.approx([1.15])
    assert model.x0_lambdas.tolist() == pytest.approx([0.20])


def test_first_values_are_those_of_the_seed():
    config = GPTConfig(64, 64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")
    runtime = Runtime(CPU, torch.float32)
    torch.manual_seed(7)
    one = build_model(config, runtime).state_dict()
    torch.manual_seed(8)  # the global generator has no say
    two, other = build_model(config, runtime, seed=42).state_dict(), build_model(config, runtime, seed=43).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_building_a_model_to_be_loaded_keeps_table_types():
    config = GPTConfig(64, 64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")
    model = build_model(config, Runtime(CPU, torch.bfloat16), seed=None)
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.float32


# -- the configuration


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(n_embd=100, n_head=3, n_kv_head=3), "100"),
        (dict(n_head=6, n_kv_head=4), "4 key/value"),
        (dict(n_embd=30, n_head=2, n_kv_head=2), "even"),
        (dict(n_embd=16, n_head=2, n_kv_head=2), "16"),
        (dict(window_pattern=""), "S and L"),
        (dict(window_pattern="SXL"), "SXL"),
    ],
)
def test_an_impossible_configuration_says_what_is_wrong(wrong, word):
    with pytest.raises(ValueError, match=word):
        GPTConfig(**wrong)


@pytest.mark.parametrize(
    "sequence_len, pattern, n_layer, expected",
    [
        (2048, "SSSL", 6, [512, 512, 512, 2048, 512, 2048]),
        (2048, "sl", 4, [512, 2048, 512, 2048]),
        (2048, "L", 2, [2048, 2048]),
        (2048, "S", 3, [512, 512, 2048]),
        (100, "SSSL", 2, [128, 100]),
        (516, "S", 2, [256, 516]),
        (1024, "SSSL", 1, [1024]),
    ],
)
def test_windows_of_a_pattern(sequence_len, pattern, n_layer, expected):
    config = GPTConfig(sequence_len, 64, n_layer=n_layer, window_pattern=pattern)
    assert config.windows == expected


def test_flops_and_counts_include_padding_and_gates():
    config = GPTConfig(100, 300, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")
    model = GPT(config)
    block = 64 * 64 * 2 + 64 * 32 * 2 + 2 * 64 * 256
    gate = 2 * 12  # on the last layer only
    counts = model.counts()
    assert counts["transformer_matrices"] == 2 * block + gate
    assert counts["wte"] == counts["lm_head"] == 320 * 64
    assert counts["value_embeds"] == 320 * 32
    assert counts["scalars"] == 2 + 2 + 1 + 1 + 24
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    # both windows are cut to the sequence length
    assert model.flops_per_token() == 6 * (2 * block + gate + 320 * 64) + 2 * 12 * 64 * 100
