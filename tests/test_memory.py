"""What fits on a device: the estimate against what autograd really keeps, and how a step divides."""

import argparse

import pytest
import torch
from helpers import CPU, rank_of, small_config

from nanochat import memory
from nanochat.gpt import build_model
from nanochat.kv_cache import KVCache
from nanochat.memory import choose_rows, rows_that_fit, split_batch
from nanochat.runtime import Runtime
from nanochat.scaling import model_config


def kept_bytes(model, idx, targets):
    """Bytes that autograd keeps of the activations for the backward pass (not of the parameters)."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.numel() > 1000:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(idx, targets, loss_reduction="sum")
        total = sum(kept.values())  # while all of them live: no address stands for two
    del loss
    return total


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("layers", [2, 6])
def test_the_estimate_of_a_rows_activations_is_what_autograd_keeps(layers, kv_heads):
    config = small_config(512, 256, n_layer=layers, n_head=4, n_kv_head=kv_heads, n_embd=256, window_pattern="L")
    model = build_model(config, Runtime(CPU.device, CPU.dtype, attention="sdpa"))
    idx = torch.randint(0, 512, (9, 257))
    one, nine = (kept_bytes(model, idx[:n, :-1], idx[:n, 1:]) for n in (1, 9))
    estimate = memory.row_bytes(config, 256, torch.float32, compiled=False)
    assert (nine - one) / 8 == pytest.approx(estimate, rel=0.15)
    assert memory.row_bytes(config, 256, torch.float32, compiled=True) < estimate
    assert memory.row_bytes(config, 512, torch.bfloat16, compiled=False) == pytest.approx(estimate, rel=0.01)


def test_the_estimate_of_what_does_not_grow_with_rows():
    config = model_config(12, 32768)
    counts = memory.meta_model(config).counts()
    full = memory.fixed_bytes(config, 1, torch.float32) - memory.GPU_CHUNK * 12
    state = 8 * (counts["wte"] + counts["value_embeds"] + counts["lm_head"]) + 4 * counts["transformer_matrices"]
    assert full == 8 * counts["total"] + state
    shared = memory.fixed_bytes(config, 8, torch.float32) - memory.GPU_CHUNK * 12
    assert shared == 8 * counts["total"] + state // 8  # the optimizer's state is shared among ranks
    assert memory.fixed_bytes(config, 1, torch.bfloat16) < memory.fixed_bytes(config, 1, torch.float32)


def with_memory(monkeypatch, *gigabytes):
    monkeypatch.setattr(Runtime, "free_memory", lambda self: int(gigabytes[0] * 1e9))
    monkeypatch.setattr(Runtime, "gather", lambda self, value: [int(free * 1e9) for free in gigabytes])
    return Runtime(torch.device("cpu"), torch.bfloat16, world_size=len(gigabytes))


def test_rows_are_the_largest_power_of_two_that_the_smallest_device_holds(monkeypatch):
    config = model_config(12, 32768)
    found = [rows_that_fit(config, 2048, with_memory(monkeypatch, gb), True) for gb in (1, 8, 16, 24, 48, 80)]
    assert found == sorted(found) and found[0] == 1 and found[-1] >= 64
    assert all(rows & (rows - 1) == 0 for rows in found)
    pairs = [rows_that_fit(config, 2048, with_memory(monkeypatch, *pair), True) for pair in ((80, 16), (16, 16))]
    assert pairs[0] == pairs[1]
    fits = found[3]
    row, fixed = memory.row_bytes(config, 2048, torch.bfloat16, True), memory.fixed_bytes(config, 1, torch.bfloat16)
    assert fixed + fits * row <= 24e9 * memory.USABLE < fixed + 2 * fits * row


def test_answers_under_way_leave_room_to_learn_from_them(monkeypatch, capsys):
    config, found = model_config(12, 32768), []
    for gigabytes in (3, 8, 24, 80):
        monkeypatch.setattr(Runtime, "free_memory", lambda self, size=gigabytes: int(size * 1e9))
        found.append(memory.rollouts_that_fit(256, config, 500, with_memory(monkeypatch, gigabytes)))
    assert found[0] == 1 < found[1] < 256 == found[2] == found[3]
    row = KVCache.row_bytes(config, 500, torch.bfloat16)
    assert 2 * found[1] * row + memory.fixed_bytes(config, 1, torch.bfloat16) <= 8e9
    assert capsys.readouterr().out.splitlines() == [
        f"rank 0: memory for {count} answers at once, of the 256 of a step" for count in found[:2]
    ]


def test_auto_is_the_default_on_gpus_only(monkeypatch):
    config = model_config(12, 32768)
    machine = with_memory(monkeypatch, 80)
    assert choose_rows(None, config, 2048, machine, True, default=32) == 32
    assert choose_rows(7, config, 2048, machine, True, default=32) == 7
    auto = choose_rows("auto", config, 2048, machine, True, default=32)
    gpu = Runtime(torch.device("cuda"), torch.bfloat16)
    assert auto == choose_rows(None, config, 2048, gpu, True, default=32) == rows_that_fit(config, 2048, gpu, True)


@pytest.mark.parametrize("text", ["0", "-1", "3.5", "many", ""])
def test_a_number_of_rows_is_auto_or_positive(text):
    assert memory.row_count("auto") == "auto" and memory.row_count("12") == 12
    with pytest.raises(argparse.ArgumentTypeError):
        memory.row_count(text)


# -- how a step divides


@pytest.mark.parametrize(
    ("tokens", "device", "world", "expected"),
    [
        (2048, 4, 1, (32, 4)),
        (2048, 4, 8, (32, 4)),
        (2048, 64, 4, (32, 8)),
        (2048, 32, 1, (32, 32)),
        (64, 9, 1, (1, 1)),
        (96 * 64, 32, 2, (96, 32)),  # 32 and 16
        (7 * 64, 9, 1, (7, 7)),
    ],
)
def test_a_batch_in_tokens_is_split_into_rows_and_device_batches(tokens, device, world, expected):
    rows, device_batch = split_batch(tokens, 64, device, rank_of(0, world))
    assert (rows, device_batch.rows) == expected


@pytest.mark.parametrize(
    ("tokens", "world", "nearest"),
    [
        (31 * 64, 2, ["1920", "2048"]),
        (9 * 64, 4, ["512", "768"]),
        (3 * 64, 4, ["256"]),
        (2048 + 1, 1, ["2048", "2112"]),
        (63, 1, ["64"]),
    ],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(tokens, world, nearest):
    with pytest.raises(ValueError) as error:
        split_batch(tokens, 64, 4, rank_of(0, world))
    said = str(error.value).rpartition("nearest that do: ")[2].partition(";")[0]
    assert said.split(" or ") == nearest
    for batch in nearest:
        split_batch(int(batch), 64, 4, rank_of(0, world))


@pytest.mark.parametrize(
    ("rows", "ranks", "fitting"), [(16, 3, "2 or 4"), (3, 4, "3"), (12, 5, "4 or 6"), (7, 2, "1 or 7")]
)
def test_a_step_that_does_not_divide_names_the_nearest_numbers_of_ranks(rows, ranks, fitting):
    with pytest.raises(ValueError, match=f"nearest numbers of ranks: {fitting}$"):
        split_batch(rows * 64, 64, 4, rank_of(0, ranks))


@pytest.mark.parametrize("tokens", [0, -64])
def test_a_batch_of_nothing_is_a_users_mistake(tokens):
    with pytest.raises(ValueError, match="--total-batch-size"):
        split_batch(tokens, 64, 4, CPU)
