"""From depth to a run: the numbers of the recipe, by hand."""

import math

import pytest

from nanochat.scaling import meta_model, model_config, plan

REFERENCE = model_config(12, 32768)
# 12 C^2 a block; a gate of 12 x heads on every other layer; the head
N12 = 12 * 12 * 768**2 + 6 * 6 * 12 + 32768 * 768
N24 = 24 * 12 * 1536**2 + 12 * 12 * 12 + 32768 * 1536


def plan_of(depth, vocab_size=32768, **settings):
    return plan(model_config(depth, vocab_size), model_config(12, vocab_size), **settings)


@pytest.mark.parametrize(
    "depth, width, heads",
    [(1, 128, 1), (2, 128, 1), (3, 256, 2), (4, 256, 2), (12, 768, 6), (20, 1280, 10), (26, 1664, 13)],
)
def test_shape_of_a_depth(depth, width, heads):
    config = model_config(depth, 32768)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_kv_head) == (depth, width, heads, heads)
    assert (config.sequence_len, config.window_pattern, config.vocab_size) == (2048, "SSSL", 32768)
    assert config.windows[0] == (512 if depth > 1 else 2048) and config.windows[-1] == 2048


def test_shape_with_other_dials():
    config = model_config(4, 1000, aspect_ratio=32, head_dim=48, sequence_len=256, window_pattern="L")
    assert (config.n_embd, config.n_head, config.sequence_len, config.window_pattern) == (144, 3, 256, "L")


def test_depth_24_ratio_8_is_the_gpt2_speedrun():
    found = plan_of(24, ratio=8)
    assert found.scaling_params == N24 == 729_810_624
    assert found.horizon == 8 * N24
    assert found.total_batch_size == 1_048_576
    assert found.num_iterations == 5_568
    assert found.tokens == 5_568 * 1_048_576
    assert found.lr_scale == pytest.approx(math.sqrt(2))
    assert found.weight_decay == pytest.approx(0.28 * math.sqrt(2) * N12 / N24)
    assert found.total_flops == pytest.approx(found.flops_per_token * found.tokens)


def test_depth_12_is_the_reference():
    found = plan_of(12)
    assert found.scaling_params == N12 == 110_100_912
    assert found.horizon == int(10.5 * N12)
    assert found.total_batch_size == 2**19
    assert found.num_iterations == int(10.5 * N12) // 2**19 == 2205
    assert found.lr_scale == 1.0 and found.weight_decay == pytest.approx(0.28)


def test_depth_4_is_too_much_for_two_cores():
    """131K tokens a batch and 55M tokens in all, with a vocabulary of 8,192: why small profiles state their own."""
    found = plan_of(4, vocab_size=8192)
    n = 4 * 12 * 256**2 + 2 * 2 * 12 + 8192 * 256
    assert found.scaling_params == n
    assert found.total_batch_size == 131_072
    assert found.horizon == int(10.5 * n) and 54e6 < found.horizon < 56e6


def test_flops_count_the_linear_layers_and_attention_within_its_windows():
    config = model_config(12, 32768)
    attention = sum(12 * 768 * window for window in [512, 512, 512, 2048] * 3)
    assert plan_of(12).flops_per_token == 6 * N12 + attention == meta_model(config).flops_per_token()


def test_the_ratio_changes_the_horizon_alone():
    """The batch goes with D / D_ref, and both grow with the ratio."""
    short, long = plan_of(20, ratio=8), plan_of(20, ratio=16)
    assert long.horizon == 2 * short.horizon
    assert (long.total_batch_size, long.lr_scale, long.weight_decay) == (
        short.total_batch_size,
        short.lr_scale,
        short.weight_decay,
    )


@pytest.mark.parametrize("horizon", [dict(num_iterations=10), dict(target_flops=1e18)])
def test_an_explicit_horizon_changes_neither_batch_nor_rates(horizon):
    free, explicit = plan_of(24, ratio=8), plan_of(24, ratio=8, **horizon)
    assert explicit.num_iterations != free.num_iterations
    for field in ("total_batch_size", "lr_scale", "weight_decay", "horizon", "scaling_params"):
        assert getattr(explicit, field) == getattr(free, field), field
    assert explicit.tokens == explicit.num_iterations * explicit.total_batch_size


def test_which_horizon_wins():
    """Iterations over FLOPs over the ratio."""
    ratio = plan_of(12)
    flops = 100.4 * ratio.flops_per_token * ratio.total_batch_size
    assert plan_of(12, target_flops=flops).num_iterations == 100
    assert plan_of(12, target_flops=1.002 * flops).num_iterations == 101  # rounded, not cut
    assert plan_of(12, target_flops=flops, num_iterations=7).num_iterations == 7
    assert plan_of(12, num_iterations=7, ratio=1).num_iterations == 7


def test_an_explicit_batch_sets_rates_decay_and_steps():
    found = plan_of(12, total_batch_size=2**17)
    assert found.total_batch_size == 2**17
    assert found.lr_scale == pytest.approx(0.5) and found.weight_decay == pytest.approx(0.14)
    assert found.num_iterations == int(10.5 * N12) // 2**17


def test_weight_decay_of_the_command_line_is_scaled():
    assert plan_of(24, weight_decay=0.1).weight_decay == pytest.approx(0.1 * math.sqrt(2) * N12 / N24)
    assert plan_of(24, weight_decay=0.0).weight_decay == 0


def test_batches_are_powers_of_two_that_grow_with_depth():
    sizes = [plan_of(depth).total_batch_size for depth in range(1, 33)]
    assert sizes == sorted(sizes)
    assert all(size & (size - 1) == 0 for size in sizes)


def test_a_horizon_below_one_batch_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="--num-iterations"):
        plan_of(2, ratio=0.01)


def test_a_plan_is_plain_data():
    found = plan_of(12).as_dict()
    assert found["num_iterations"] == 2205 and all(isinstance(value, (int, float)) for value in found.values())
