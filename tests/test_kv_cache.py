"""Cached decoding is the full forward pass, however the tokens arrive."""

import json
from pathlib import Path

import pytest
import torch
from reference_model import difference, random_ids
from safetensors.torch import load_file

from nanochat.gpt import GPT, GPTConfig, KVCache

GOLDEN = Path(__file__).parent / "data" / "golden"
CPU = torch.device("cpu")


def feed(model, cache, idx, counts=None, rows=None):
    """One pass of the cache's protocol -> the last states (B, T, C)."""
    cache.begin(rows or slice(0, len(idx)), idx.size(1))
    hidden = model.hidden(idx, cache)
    cache.advance(idx, counts)
    return hidden


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
            hidden = feed(model, cache, idx[:, start:end])
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
        found = torch.cat([feed(model, cache, chunk) for chunk in idx.split(sizes, dim=1)], dim=1)
        assert difference(found, model.hidden(idx)) < 1e-12
    assert cache.lengths == [length, length]


@pytest.mark.parametrize("case", CACHE_CASES)
def test_rows_of_any_lengths_decode_together(case, random_model):
    """Prompts padded to one length, and their rows continued together: each row as if it were alone."""
    model = random_model(dtype=torch.float64, **CACHE_CASES[case])
    longest = 140 if case == "S" else 30
    prompts, steps = [1, longest, 2, 13], 9
    idx = random_ids(model.config, len(prompts), longest + 2 * steps)
    cache = new_cache(model, len(prompts), longest + 2 * steps)
    with torch.no_grad():
        expected = model.hidden(idx)
        padded = torch.stack(
            [torch.where(torch.arange(longest) < n, row[:longest], 5) for n, row in zip(prompts, idx, strict=True)]
        )
        found = feed(model, cache, padded, counts=prompts)
        assert cache.lengths == prompts
        for b, n in enumerate(prompts):
            assert difference(found[b, :n], expected[b, :n]) < 1e-12
        # one token a row, then uneven chunks, then one token again
        counts_of_passes = [[1] * 4] * 3 + [[1, 3, 2, 3], [3, 1, 1, 2]] + [[1] * 4] * 3
        for counts in counts_of_passes:
            width, at = max(counts), list(cache.lengths)
            chunk = torch.stack([idx[b, n : n + width] for b, n in enumerate(at)])
            for b, n in enumerate(counts):
                chunk[b, n:] = 7  # padding
            found = feed(model, cache, chunk, counts)
            for b, n in enumerate(counts):
                assert difference(found[b, :n], expected[b, at[b] : at[b] + n]) < 1e-12, (b, at[b])


def test_some_rows_move_on_while_others_wait(random_model):
    model = random_model(dtype=torch.float64, sequence_len=9)
    idx = random_ids(model.config, 4, 30)
    cache = new_cache(model, 4, 30)
    with torch.no_grad():
        expected = model.hidden(idx)
        feed(model, cache, idx[:, :10])
        found = feed(model, cache, idx[1:3, 10:14], rows=slice(1, 3))
        assert difference(found, expected[1:3, 10:14]) < 1e-12
        assert cache.lengths == [10, 14, 14, 10]
        mixed = torch.stack([idx[0, 10:11], idx[1, 14:15], idx[2, 14:15], idx[3, 10:11]])
        found = feed(model, cache, mixed)
        assert difference(found[0], expected[0, 10:11]) < 1e-12
        assert difference(found[1], expected[1, 14:15]) < 1e-12
        assert difference(found[3], expected[3, 10:11]) < 1e-12


@pytest.mark.parametrize("keep", [0, 1, 5, 17])
def test_a_row_is_rolled_back_by_its_length_and_previous_id(keep, random_model):
    """Editing a turn: what lies behind the new length is overwritten; smear needs the id before it set again."""
    model = random_model(dtype=torch.float64, sequence_len=9)
    first, second = random_ids(model.config, 2, 20), random_ids(model.config, 2, 20, seed=8)
    edited = torch.cat([first[:, :keep], second[:, keep:]], dim=1)
    edited[1] = first[1]
    cache = new_cache(model, 2, 26)
    with torch.no_grad():
        feed(model, cache, first)
        cache.lengths[0] = keep
        if keep:
            cache.all_previous_ids[0] = first[0, keep - 1]
        found = feed(model, cache, edited[:1, keep:], rows=slice(0, 1))
        assert difference(found, model.hidden(edited)[:1, keep:]) < 1e-12
        # the other row never noticed
        more = random_ids(model.config, 2, 3, seed=9)
        found = feed(model, cache, more)
        assert difference(found, model.hidden(torch.cat([edited, more], dim=1))[:, 20:]) < 1e-12


def test_a_copied_row_goes_its_own_way(random_model):
    model = random_model(dtype=torch.float64, sequence_len=9, n_kv_head=1)
    prompt, more = random_ids(model.config, 2, 14), random_ids(model.config, 3, 6, seed=8)
    cache = new_cache(model, 3, 20)
    with torch.no_grad():
        feed(model, cache, random_ids(model.config, 3, 19, seed=9))  # rows are used again
        cache.lengths = [0, 0, 0]
        feed(model, cache, prompt, counts=[14, 4])
        cache.copy_row(0, 2)
        assert cache.lengths == [14, 4, 14]
        found = feed(model, cache, more)
        for b, ids in enumerate([prompt[0], prompt[1, :4], prompt[0]]):
            expected = model.hidden(torch.cat([ids, more[b]]).unsqueeze(0))[:, len(ids) :]
            assert difference(found[b : b + 1], expected) < 1e-12, b


def test_a_full_cache_is_an_error_and_stays_usable(random_model):
    model = random_model()
    idx = random_ids(model.config, 1, 11)
    cache = new_cache(model, 1, 10)
    with torch.no_grad():
        feed(model, cache, idx[:, :8])
        with pytest.raises(ValueError, match="10 positions"):
            feed(model, cache, idx[:, 8:11])
        assert cache.lengths == [8]
        found = feed(model, cache, idx[:, 8:10])  # to the last place
        assert difference(found, model.hidden(idx[:, :10])[:, 8:]) < 1e-4
        with pytest.raises(ValueError):
            feed(model, cache, idx[:, 10:])


def test_bfloat16_decoding_is_near_its_full_pass(random_model):
    model = random_model(dtype=torch.bfloat16, n_layer=3, n_embd=64, vocab_size=100)
    idx = random_ids(model.config, 2, 21)
    cache = new_cache(model, 2, 21)
    with torch.no_grad():
        found = torch.cat([feed(model, cache, part) for part in idx.split([4, 1, 16], dim=1)], dim=1)
        expected = model.hidden(idx)
    assert found.dtype == torch.bfloat16
    assert (found - expected).float().std() < 0.05 * expected.float().std()
