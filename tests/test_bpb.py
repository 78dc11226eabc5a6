"""Bits per byte: by hand, for any batch and any number of ranks."""

import math
import threading

import pytest
import torch
from helpers import CPU, MERGES, byte_tokenizer, random_model, rank_of, small_config

from nanochat.bpb import bits_per_byte
from nanochat.runtime import Runtime

TOKENIZER = byte_tokenizer(MERGES)
SIZES = TOKENIZER.token_bytes()
T = 12


class Rows:
    """Fixed rows that remember which of them were read."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets, self.seen = inputs, targets, []

    def read(self, first, count):
        self.seen += range(first, first + count)
        return self.inputs[first : first + count], self.targets[first : first + count]


def some_rows(count, special=True, seed=0):
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TOKENIZER.vocab_size if special else 267, (count, T + 1), generator=noise)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=noise) < 0.2] = -1
    if special:
        targets[0, 0] = TOKENIZER.bos
    return Rows(ids[:, :-1], targets)


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(TOKENIZER.vocab_size, T))


def by_hand(model, rows, count):
    nats = size = 0.0
    for inputs, targets in zip(rows.inputs[:count], rows.targets[:count], strict=True):
        with torch.no_grad():
            logs = model(inputs.unsqueeze(0))[0].double().log_softmax(-1)
        for t, target in enumerate(targets.tolist()):
            if target >= 0 and SIZES[target] > 0:
                nats -= logs[t, target].item()
                size += SIZES[target]
    return nats / math.log(2) / size


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 50])
def test_bits_per_byte_are_those_computed_by_hand_for_any_device_batch(model, batch):
    rows = some_rows(9)
    assert bits_per_byte(model, rows, 7, batch, SIZES, CPU) == pytest.approx(by_hand(model, rows, 7), rel=1e-5)
    assert rows.seen == list(range(7))


def test_special_tokens_and_ignored_targets_count_in_neither(model):
    rows, blank = some_rows(5), some_rows(5)
    special = torch.tensor([target >= 0 and SIZES[target] == 0 for target in rows.targets.flatten().tolist()])
    assert special.any() and (rows.targets < 0).any()
    blank.targets[special.view_as(blank.targets)] = -1
    expected = bits_per_byte(model, rows, 5, 5, SIZES, CPU)
    assert bits_per_byte(model, blank, 5, 5, SIZES, CPU) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_knows_nothing_needs_the_bits_of_the_vocabulary():
    model = random_model(small_config(TOKENIZER.vocab_size, T))
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = some_rows(4, special=False)
    rows.targets[:] = torch.randint(0, 256, rows.targets.shape)  # one byte each
    expected = math.log2(TOKENIZER.vocab_size)
    assert bits_per_byte(model, rows, 4, 2, SIZES, CPU) == pytest.approx(expected, rel=1e-6)


def test_longer_tokens_cost_fewer_bits_a_byte(model):
    rows = some_rows(3, special=False)
    once = bits_per_byte(model, rows, 3, 3, SIZES, CPU)
    assert bits_per_byte(model, rows, 3, 3, [2 * size for size in SIZES], CPU) == pytest.approx(once / 2, rel=1e-9)


@pytest.mark.parametrize(("world_size", "count"), [(2, 8), (2, 7), (3, 7), (4, 3)])
def test_ranks_share_the_rows_and_agree(model, monkeypatch, world_size, count):
    barrier, parts, answers, seen = threading.Barrier(world_size, timeout=60), [None] * world_size, {}, []

    def total(self, tensor):
        parts[self.rank] = tensor.clone()
        barrier.wait()
        tensor.copy_(sum(parts))
        barrier.wait()
        return tensor

    monkeypatch.setattr(Runtime, "sum", total)

    def work(rank):
        rows = some_rows(9)
        answers[rank] = bits_per_byte(model, rows, count, 2, SIZES, rank_of(rank, world_size))
        seen.extend(rows.seen)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    alone = bits_per_byte(model, some_rows(9), count, 2, SIZES, CPU)
    assert sorted(seen) == list(range(count))
    assert len(set(answers.values())) == 1
    assert answers[0] == pytest.approx(alone, rel=1e-6)


def test_nothing_to_measure_is_said(model):
    rows = some_rows(2)
    rows.targets[:] = -1
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(model, rows, 2, 2, SIZES, CPU)


def test_measuring_leaves_no_gradients(model):
    bits_per_byte(model, some_rows(2), 2, 2, SIZES, CPU)
    assert all(parameter.grad is None for parameter in model.parameters())
