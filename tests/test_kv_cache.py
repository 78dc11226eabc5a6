"""Cached decoding is the full forward pass, however the tokens arrive."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_model import difference, random_ids
from safetensors.torch import load_file

from nanochat import kv_cache
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache, Pass

GOLDEN = Path(__file__).parent / "data" / "golden"
CPU = torch.device("cpu")


def feed(model, cache, segments):
    """One pass over [(row, ids)] -> the last states of each, (T, C)."""
    reading = Pass(cache, [(row, [int(id) for id in ids]) for row, ids in segments])
    hidden = model.hidden(reading.idx, reading)
    reading.end()
    return hidden.squeeze(1).split([len(ids) for _, ids in segments])


def feed_all(model, cache, idx):
    """idx: (B, T), the next ids of rows 0..B-1 -> (B, T, C)."""
    return torch.stack(feed(model, cache, list(enumerate(idx))))


def new_cache(model, rows, length):
    return KVCache(model.config, rows, length, model.dtype, CPU)


def test_golden_cached_decoding():
    model = GPT(GPTConfig(**json.loads((GOLDEN / "meta.json").read_text())["config"]))
    model.load_state_dict(load_file(GOLDEN / "weights.safetensors"))
    golden = load_file(GOLDEN / "io.safetensors")
    idx = golden["idx"]
    half = idx.size(1) // 2
    cache = KVCache(model.config, len(idx), idx.size(1), torch.float32, CPU)
    decoded = []
    with torch.no_grad():
        for start, end in [(0, half), *((t, t + 1) for t in range(half, idx.size(1) - 1))]:
            hidden = feed_all(model, cache, idx[:, start:end])
            decoded.append(model.logits(hidden[:, -1:]))  # entry j predicts token T/2 + j
    expected = golden["decode_logits"]
    assert difference(torch.cat(decoded, dim=1), expected) < 1e-4


CACHE_CASES = {
    "all seen": dict(n_layer=3),
    "short L": dict(sequence_len=9, n_layer=3),
    "grouped": dict(n_head=4, n_kv_head=2, n_embd=64, sequence_len=16),
    "S": dict(sequence_len=512, window_pattern="SL", n_layer=2),
}


@pytest.mark.parametrize("case", CACHE_CASES)
@pytest.mark.parametrize("chunks", ["at once", "one by one", "uneven", "prompt of one token", "two halves"])
def test_any_chunking_of_the_prompt_is_the_full_pass(case, chunks, random_model):
    model = random_model(dtype=torch.float64, **CACHE_CASES[case])
    length = 150 if case == "S" else 40
    idx = random_ids(model.config, 2, length)
    sizes = {
        "at once": [length],
        "one by one": [1] * length,
        "uneven": [7, 1, 2, 11, 1, 1, length - 23],
        "prompt of one token": [1, length - 1],
        "two halves": [length // 2, length - length // 2],
    }[chunks]
    cache = new_cache(model, 2, length)
    with torch.no_grad():
        found = torch.cat([feed_all(model, cache, chunk) for chunk in idx.split(sizes, dim=1)], dim=1)
        assert difference(found, model.hidden(idx)) < 1e-12
    assert cache.lengths.tolist() == [length, length]


@pytest.mark.parametrize("case", CACHE_CASES)
def test_rows_of_any_lengths_are_read_together(case, random_model):
    """Prompts of several lengths in one pass, their rows continued together, others read at the same time: each row as
    if it were alone."""
    model = random_model(dtype=torch.float64, **CACHE_CASES[case])
    longest = 140 if case == "S" else 30
    prompts = [1, longest, 2, 13, 13]
    idx = random_ids(model.config, len(prompts), longest + 30)
    cache = new_cache(model, len(prompts), longest + 30)
    passes = [
        dict(enumerate(prompts[:4])),  # row 4 comes later
        *[{0: 1, 1: 1, 2: 1, 3: 1}] * 3,  # one token each
        {0: 1, 1: 1, 2: 2, 4: 13, 3: 1},  # while another is read
        {0: 1, 3: 3, 1: 1, 2: 1, 4: 1},  # in any order
        {0: 5, 4: 1},  # some wait
        {0: 1, 1: 1, 3: 1, 4: 1},  # a gap
        {0: 4, 1: 4, 2: 4, 3: 4, 4: 4},
        {2: 6, 3: 6},
        *[{0: 1, 1: 1, 2: 1, 3: 1, 4: 1}] * 3,
    ]
    with torch.no_grad():
        expected = model.hidden(idx)
        for counts in passes:
            at = cache.lengths.tolist()
            found = feed(model, cache, [(row, idx[row, at[row] : at[row] + n]) for row, n in counts.items()])
            for (row, n), states in zip(counts.items(), found, strict=True):
                assert difference(states, expected[row, at[row] : at[row] + n]) < 1e-12, (row, at[row])
    assert cache.lengths.tolist() == [sum(counts.get(row, 0) for counts in passes) for row in range(len(prompts))]


def test_rows_that_share_a_call_are_neighbours_and_read_little_in_vain(random_model):
    model = random_model(sequence_len=512)

    def runs(lengths, counts):
        cache = new_cache(model, len(lengths), 20000)
        cache.lengths[:] = lengths
        reading = Pass(cache, [(row, [1] * n) for row, n in counts.items()])
        return [(run.rows.start, run.rows.stop) for run in reading.runs]

    cheap = kv_cache.CALL_BYTES["cpu"] // (
        2 * model.config.n_kv_head * model.config.head_dim * 4
    )  # positions that are read instead of a call
    assert runs([40] * 4, dict.fromkeys(range(4), 1)) == [(0, 4)]
    assert runs([40] * 4, {0: 1, 1: 1, 3: 1}) == [(0, 2), (3, 4)]  # a gap
    assert runs([0] * 4, dict.fromkeys(range(4), 9)) == [(0, 4)]  # equal prompts
    assert runs([0] * 3, {0: 9, 1: 8, 2: 8}) == [(0, 1), (1, 3)]
    assert runs([5, 5, 6], {0: 9, 1: 9, 2: 9}) == [(0, 2), (2, 3)]
    assert runs([10, 10 + cheap, 10], {0: 1, 1: 1, 2: 1}) == [(0, 3)]
    assert runs([10, 10 + 9 * cheap, 10], {0: 1, 1: 1, 2: 1}) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("keep", [0, 1, 5, 17])
def test_a_row_is_rolled_back_by_its_length(keep, random_model):
    """Editing a turn: what lies behind the new length is overwritten."""
    model = random_model(dtype=torch.float64, sequence_len=9)
    first, second = random_ids(model.config, 2, 20), random_ids(model.config, 2, 20, seed=8)
    edited = torch.cat([first[:, :keep], second[:, keep:]], dim=1)
    edited[1] = first[1]
    cache = new_cache(model, 2, 26)
    with torch.no_grad():
        feed_all(model, cache, first)
        assert cache.common_prefixes(edited[0].numpy())[0] >= keep
        cache.lengths[0] = keep
        (found,) = feed(model, cache, [(0, edited[0, keep:])])
        assert difference(found, model.hidden(edited)[0, keep:]) < 1e-12
        # the other row never noticed
        more = random_ids(model.config, 2, 3, seed=9)
        found = feed_all(model, cache, more)
        assert difference(found, model.hidden(torch.cat([edited, more], dim=1))[:, 20:]) < 1e-12


@pytest.mark.parametrize("shared", [0, 1, 9, 14])
def test_a_row_that_begins_as_another_goes_its_own_way(shared, random_model):
    model = random_model(dtype=torch.float64, sequence_len=9, n_kv_head=1)
    prompt, more = random_ids(model.config, 2, 14), random_ids(model.config, 3, 6, seed=8)
    cache = new_cache(model, 3, 20)
    with torch.no_grad():
        feed_all(model, cache, random_ids(model.config, 3, 19, seed=9))  # rows are used again
        cache.lengths[:] = 0
        feed(model, cache, [(0, prompt[0]), (1, prompt[1, :4])])
        cache.copy(0, 2, shared)
        assert cache.lengths.tolist() == [14, 4, shared]
        assert cache.common_prefixes(prompt[0].numpy())[2] >= shared
        found = feed_all(model, cache, more)
        for b, ids in enumerate([prompt[0], prompt[1, :4], prompt[0, :shared]]):
            expected = model.hidden(torch.cat([ids, more[b]]).unsqueeze(0))[0, len(ids) :]
            assert difference(found[b], expected) < 1e-12, b


def test_the_bytes_of_a_row_are_those_it_takes(random_model):
    cache = new_cache(random_model(n_kv_head=1), 3, 10)
    config = random_model(n_kv_head=1).config
    assert 3 * KVCache.row_bytes(config, 10, torch.float32) == cache.keys.nbytes + cache.values.nbytes


def test_common_prefixes_are_counted_for_every_row(random_model):
    cache = new_cache(random_model(), 4, 10)
    cache.ids[:] = [[5, 6, 7, *[0] * 7], [5, 6, 8, *[0] * 7], [1] * 10, [0] * 10]
    assert cache.common_prefixes(np.array([5, 6, 7, 9])).tolist() == [3, 2, 0, 0]
    assert cache.common_prefixes(np.array([5, 6])).tolist() == [2, 2, 0, 0]
    assert cache.common_prefixes(np.array([1] * 10)).tolist() == [0, 0, 10, 0]


def test_a_full_cache_is_an_error_and_stays_usable(random_model):
    model = random_model()
    idx = random_ids(model.config, 1, 11)
    cache = new_cache(model, 1, 10)
    with torch.no_grad():
        feed_all(model, cache, idx[:, :8])
        with pytest.raises(ValueError, match="10 positions"):
            feed_all(model, cache, idx[:, 8:11])
        assert cache.lengths == [8]
        found = feed_all(model, cache, idx[:, 8:10])  # to the last place
        assert difference(found, model.hidden(idx[:, :10])[:, 8:]) < 1e-4
        with pytest.raises(ValueError):
            feed_all(model, cache, idx[:, 10:])


def test_bfloat16_decoding_is_near_its_full_pass(random_model):
    model = random_model(dtype=torch.bfloat16, n_layer=3, n_embd=64, vocab_size=100)
    idx = random_ids(model.config, 2, 21)
    cache = new_cache(model, 2, 21)
    with torch.no_grad():
        found = torch.cat([feed_all(model, cache, part) for part in idx.split([4, 1, 16], dim=1)], dim=1)
        expected = model.hidden(idx)
    assert found.dtype == torch.bfloat16
    assert (found - expected).float().std() < 0.05 * expected.float().std()
