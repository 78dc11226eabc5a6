"""Packing: rows are full, begin with bos, and are a pure function of their number."""

import os
import threading

import numpy as np
import pytest
import torch
from helpers import CPU, byte_tokenizer, rank_of, write_token_files
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import batches, chat
from nanochat.batches import ConversationRows, TextRows, best_fit, read_steps, render_conversations
from nanochat.runtime import Runtime

BOS = 0
anyone = settings(deadline=None, max_examples=200)
lengths_strategy = st.lists(st.integers(1, 30), max_size=60)


# -- best fit


def slow_best_fit(lengths, capacity, crop, buffer=None):
    """The same by looking at every waiting document."""
    incoming, waiting, rows, row, space = list(enumerate(lengths)), [], [], [], capacity
    while True:
        while incoming and (buffer is None or len(waiting) < buffer):
            waiting.append(incoming.pop(0))
        if not waiting:
            return rows + [row] if row else rows
        fitting = [item for item in waiting if item[1] <= space]
        if fitting:
            chosen = max(fitting, key=lambda item: item[1])  # the first of the largest
        elif crop:
            chosen = min(waiting, key=lambda item: min(item[1], capacity + 1))
        else:
            rows, row, space = rows + [row], [], capacity
            continue
        waiting.remove(chosen)
        row.append((chosen[0], min(chosen[1], space)))
        space -= row[-1][1]
        if space == 0:
            rows, row, space = rows + [row], [], capacity


@anyone
@given(lengths_strategy, st.integers(1, 30), st.sampled_from([None, 1, 3, 10]))
def test_cropped_rows_are_exactly_full_but_for_the_last(lengths, capacity, buffer):
    rows = best_fit(lengths, capacity, crop=True, buffer=buffer)
    sizes = [sum(take for _, take in row) for row in rows]
    assert all(size == capacity for size in sizes[:-1])
    assert all(0 < size <= capacity for size in sizes[-1:])
    used = [document for row in rows for document, _ in row]
    assert sorted(used) == list(range(len(lengths)))  # each once: what is cropped loses only its tail
    cropped = [
        (i, j) for i, row in enumerate(rows) for j, (document, take) in enumerate(row) if take < lengths[document]
    ]
    assert all(j == len(rows[i]) - 1 for i, j in cropped)  # only what ends a row is cut
    assert all(0 < take <= lengths[document] for row in rows for document, take in row)
    assert rows == slow_best_fit(lengths, capacity, True, buffer)


@anyone
@given(lengths_strategy, st.integers(0, 10), st.sampled_from([None, 1, 3, 10]))
def test_without_crop_every_document_appears_whole_and_once(lengths, more, buffer):
    capacity = max(lengths, default=1) + more
    rows = best_fit(lengths, capacity, crop=False, buffer=buffer)
    assert sorted(pair for row in rows for pair in row) == list(enumerate(lengths))
    assert all(row and sum(take for _, take in row) <= capacity for row in rows)
    assert rows == slow_best_fit(lengths, capacity, False, buffer)


def test_the_largest_that_fits_is_taken_and_the_shortest_is_cropped():
    assert best_fit([3, 6, 5, 4], 10, crop=True) == [[(1, 6), (3, 4)], [(2, 5), (0, 3)]]
    assert best_fit([7, 9, 8], 10, crop=True) == [[(1, 9), (0, 1)], [(2, 8)]]
    assert best_fit([25, 22], 10, crop=True) == [[(0, 10)], [(1, 10)]]


# -- text


def some_documents(count, seed=0, longest=40):
    """Document i begins with the id 100 + i and counts up from 50,000."""
    rng = np.random.default_rng(seed)
    return [[100 + i, *range(50_000, 50_000 + int(rng.integers(0, longest)))] for i in range(count)]


def split_row(row):
    """The pieces of a row, without their bos."""
    assert row[0] == BOS
    places = [i for i, token in enumerate(row) if token == BOS]
    return [row[i + 1 : j].tolist() for i, j in zip(places, [*places[1:], len(row)], strict=True)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(batches, "BLOCK_DOCUMENTS", 16)


@pytest.fixture
def files(tmp_path, small_blocks):
    documents = some_documents(150)
    return [write_token_files(tmp_path, documents[:90], "a"), write_token_files(tmp_path, documents[90:], "b")]


def rows_of(files, T=31, seed=42, vocab_size=60_000):
    return TextRows(files, T, BOS, vocab_size, seed)


def test_every_row_is_full_begins_with_bos_and_holds_beginnings_of_documents(files):
    documents, rows = some_documents(150), rows_of(files)
    for r in range(rows.num_rows):
        row = rows.row(r)
        assert row.shape == (32,)
        for piece in split_row(row):  # a crop may leave nothing of a document but its bos
            assert not piece or piece == documents[piece[0] - 100][: len(piece)]


def test_a_document_is_used_once_but_where_a_block_is_filled_up(files):
    rows = rows_of(files)
    seen = [piece[0] - 100 for r in range(rows.num_rows) for piece in split_row(rows.row(r)) if piece]
    again = len(seen) - len(set(seen))
    assert again <= 2 * len(rows.blocks)  # a short last row takes one or two of the block's first
    assert len(set(seen)) > 0.9 * 150
    for document in {d for d in seen if seen.count(d) > 1}:
        place = document if document < 90 else document - 90
        assert place % 16 < 16 / 2


def test_a_row_is_a_pure_function_of_its_number(files):
    rows = rows_of(files)
    total = 3 * rows.num_rows
    straight = [rows.row(r) for r in range(total)]
    for r in np.random.default_rng(1).permutation(total)[:60].tolist():
        assert np.array_equal(rows_of(files).row(r), straight[r])
        assert np.array_equal(rows.row(r), straight[r])


def test_the_rows_do_not_depend_on_a_cached_plan(files):
    first = [rows_of(files).row(r) for r in range(20)]
    plans = list(files[0].tokens.parent.glob("*.npz"))
    assert len(plans) == 2
    for plan in plans:
        plan.unlink()
    assert all(np.array_equal(rows_of(files).row(r), first[r]) for r in range(20))


def test_epochs_visit_every_row_once_in_another_order_of_blocks(files):
    rows = rows_of(files)
    n = rows.num_rows
    epochs = [[tuple(rows.row(e * n + r).tolist()) for r in range(n)] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3
    on_disk = rows_of(files, seed=None)
    straight = [tuple(on_disk.row(r).tolist()) for r in range(n)]
    ends = np.cumsum(on_disk.blocks[:, 2])
    blocks = {tuple(straight[end - count : end]) for end, count in zip(ends, on_disk.blocks[:, 2], strict=True)}
    for epoch in epochs:  # within a block the order stays
        at = 0
        while at < n:
            block = next(block for block in blocks if tuple(epoch[at : at + len(block)]) == block)
            at += len(block)
    assert straight == [tuple(on_disk.row(n + r).tolist()) for r in range(n)]


def test_another_seed_is_another_order(files):
    assert any(not np.array_equal(rows_of(files).row(r), rows_of(files, seed=7).row(r)) for r in range(10))


def test_targets_are_the_inputs_moved_by_one(files):
    rows = rows_of(files)
    inputs, targets = rows.read(5, 3)
    assert inputs.shape == targets.shape == (3, 31)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(torch.cat([inputs[1], targets[1, -1:]]), torch.from_numpy(rows.row(6)))


def test_large_vocabularies_lie_in_four_bytes(tmp_path):
    documents = [[70_000 + i, 65_536, 1] for i in range(20)]
    file = write_token_files(tmp_path, documents, dtype=np.uint32)
    rows = TextRows([file], 7, BOS, 80_000, None)
    assert {piece[0] for r in range(rows.num_rows) for piece in split_row(rows.row(r))} == set(range(70_000, 70_020))


@pytest.mark.parametrize("vocab_size", [65_536, 60_000])
def test_the_largest_two_byte_id_survives(tmp_path, vocab_size):
    file = write_token_files(tmp_path, [[65_535, 7]])
    assert TextRows([file], 2, BOS, vocab_size, None).row(0).tolist() == [BOS, 65_535, 7]


@pytest.mark.parametrize("documents", [[[5]], [[]], [[5, 6], []], [[5, 6, 7]]])
def test_a_tiny_corpus_still_fills_rows(tmp_path, documents):
    rows = TextRows([write_token_files(tmp_path, documents + [[9]])], 15, BOS, 300, 42)
    for r in range(3 * rows.num_rows):
        assert all(piece in [*documents, [9]] or piece == [5, 6, 7][: len(piece)] for piece in split_row(rows.row(r)))
        assert len(rows.row(r)) == 16


def test_one_short_document_is_a_corpus(tmp_path):
    rows = TextRows([write_token_files(tmp_path, [[5, 6]])], 7, BOS, 300, 42)
    assert [rows.row(r).tolist() for r in range(2)] == [[0, 5, 6, 0, 5, 6, 0, 5]] * 2


def test_a_plan_older_than_its_tokens_is_made_anew(tmp_path):
    file = write_token_files(tmp_path, some_documents(50))
    rows_of([file])
    plan = next(tmp_path.glob("*.npz"))
    write_token_files(tmp_path, [[7, 8, 9]])
    stamp = plan.stat().st_mtime_ns + 1_000_000_000
    os.utime(file.offsets, ns=(stamp, stamp))
    assert split_row(rows_of([file]).row(0))[0] == [7, 8, 9]


def test_each_row_length_has_its_own_plan(tmp_path):
    file = write_token_files(tmp_path, some_documents(50))
    assert rows_of([file], T=31).row(0).shape == (32,)
    assert rows_of([file], T=15).row(0).shape == (16,)
    assert rows_of([file], T=31).row(0).shape == (32,)


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_plan_is_made_anew_or_named(tmp_path, damage):
    file = write_token_files(tmp_path, some_documents(50))
    expected = rows_of([file]).row(3)
    plan = next(tmp_path.glob("*.npz"))
    plan.write_bytes(plan.read_bytes()[:200] if damage is None else damage)
    try:
        row = rows_of([file]).row(3)
    except ValueError as error:
        assert plan.name in str(error)
        return
    assert np.array_equal(row, expected)


# -- steps


def steps_of(rows, first_step, count, rows_per_step, world_size):
    """What the ranks see of some steps, put together."""
    readers = [read_steps(rows, first_step, rows_per_step, rank_of(rank, world_size)) for rank in range(world_size)]
    steps = []
    for _ in range(count):
        shares = [next(reader) for reader in readers]
        assert all(share[0].size(0) == rows_per_step // world_size for share in shares)
        steps.append(tuple(torch.cat([share[i] for share in shares]) for i in range(2)))
    for reader in readers:
        reader.close()
    return steps


def assert_same_steps(one, other):
    assert len(one) == len(other)
    for (inputs, targets), (other_inputs, other_targets) in zip(one, other, strict=True):
        assert torch.equal(inputs, other_inputs) and torch.equal(targets, other_targets)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_rows_of_a_step_are_the_same_for_any_number_of_ranks(files, world_size):
    alone = steps_of(rows_of(files), 0, 8, 8, 1)
    assert_same_steps(steps_of(rows_of(files), 0, 8, 8, world_size), alone)
    assert_same_steps(alone[:1], [rows_of(files).read(0, 8)])


def test_going_on_at_a_step_gives_the_rows_of_that_step(files):
    assert_same_steps(steps_of(rows_of(files), 5, 6, 8, 2), steps_of(rows_of(files), 0, 11, 8, 1)[5:])


# -- conversations

TOKENIZER = byte_tokenizer()


def conversation(user, assistant):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def made(rendered, T):
    ids = np.concatenate([np.array(ids) for ids, _ in rendered])
    mask = np.concatenate([np.array(mask, dtype=bool) for _, mask in rendered])
    return ConversationRows(ids, mask, np.cumsum([0, *(len(ids) for ids, _ in rendered)]), T, 99)


def test_a_row_of_conversations_is_padded_with_bos_and_nothing_is_learned_there():
    rows = made([([1, 2, 3, 4], [0, 1, 1, 0]), ([5, 6], [0, 1])], T=8)
    inputs, targets = rows.read(0, 1)
    assert inputs.tolist() == [[1, 2, 3, 4, 5, 6, 99, 99]]
    assert targets.tolist() == [[2, 3, -1, -1, 6, -1, -1, -1]]


def test_conversations_that_fill_a_row_exactly_are_whole():
    rows = made([([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]), ([6, 7, 8], [0, 1, 1]), ([9, 10], [0, 1])], T=4)
    inputs, targets = rows.read(0, 2)
    assert inputs.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert targets.tolist() == [[-1, 3, 4, 5], [7, 8, -1, 10]]
    assert rows.num_rows == 2


def test_a_conversation_longer_than_a_row_is_an_error_here():
    with pytest.raises(ValueError, match="6.*5"):
        made([([1] * 6, [1] * 6)], T=4)


def test_no_conversations_at_all_are_an_error():
    empty = np.zeros(0, dtype=np.int64)
    with pytest.raises(ValueError, match="no conversations"):
        ConversationRows(empty, empty, np.zeros(1, dtype=np.int64), 4, 99)


def test_rows_of_conversations_begin_again_after_the_last():
    rows = made([([i, i, i], [0, 1, 1]) for i in range(1, 8)], T=2)
    inputs, _ = rows.read(0, 16)
    assert torch.equal(inputs[:7], inputs[7:14])


def test_rows_of_conversations_are_the_same_for_any_number_of_ranks():
    rng = np.random.default_rng(0)
    rows = made([([i] * n, [1] * n) for i, n in enumerate(rng.integers(2, 20, 100).tolist())], T=31)
    alone = steps_of(rows, 2, 5, 8, 1)
    assert_same_steps(steps_of(rows, 2, 5, 8, 4), alone)


def test_conversations_longer_than_the_row_are_cut_and_the_epoch_ends(tmp_path):
    talks = [conversation("q" * n, "a" * m) for n, m in [(3, 4), (100, 5), (2, 100), (11, 1), (10, 1), (1, 1)]]
    T = 15
    rows = render_conversations(talks, TOKENIZER, T, CPU, tmp_path)
    assert 0 < rows.num_rows <= len(talks)
    rendered = [chat.render(TOKENIZER, talk, T + 1) for talk in talks]
    inputs, targets = rows.read(0, rows.num_rows)
    assert inputs.shape == (rows.num_rows, T)
    assert int((targets >= 0).sum()) == sum(sum(mask) for _, mask in rendered)
    found = sorted(conversation for row in rows.rows for conversation, _ in row)
    assert found == list(range(len(talks)))


def test_ranks_that_render_their_shares_read_the_same_rows(tmp_path, monkeypatch):
    talks = [conversation("q" * (i % 7), "a" * (i % 30)) for i in range(41)]
    alone = render_conversations(talks, TOKENIZER, 31, CPU, tmp_path)
    assert not list(tmp_path.iterdir())
    world_size, values, rows = 3, [None] * 3, [None] * 3
    barrier = threading.Barrier(world_size, timeout=60)

    def gather(self, value):
        values[self.rank] = value
        barrier.wait()
        return list(values)

    monkeypatch.setattr(Runtime, "barrier", lambda self: barrier.wait())
    monkeypatch.setattr(Runtime, "gather", gather)

    def work(rank):
        rows[rank] = render_conversations(talks, TOKENIZER, 31, rank_of(rank, world_size), tmp_path / "scratch")

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = alone.read(0, alone.num_rows)
    for mine in rows:
        assert_same_steps([mine.read(0, mine.num_rows)], [expected])


def test_what_is_learned_is_what_the_assistant_says(tmp_path):
    talks = [conversation(f"question {i}", f"answer {i}") for i in range(30)]
    rows = render_conversations(talks, TOKENIZER, 63, CPU, tmp_path)
    inputs, targets = rows.read(0, rows.num_rows)
    learned = [token for row in targets.tolist() for token in row if token >= 0]
    text = TOKENIZER.decode(learned)
    assert sorted(text.split("<|assistant_end|>")[:-1]) == sorted(f"answer {i}" for i in range(30))
    moved = torch.cat([inputs[:, 1:], torch.full((rows.num_rows, 1), -1)], dim=1)
    inner = (targets >= 0)[:, :-1]
    assert torch.equal(targets[:, :-1][inner], moved[:, :-1][inner])
