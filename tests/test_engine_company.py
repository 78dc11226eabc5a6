"""Many requests at once: they join, leave and share what they begin with, and none notices the others."""

import os
import random

import numpy as np
import pytest
import torch
from helpers import MERGES, byte_tokenizer, random_model, small_config
from test_engine import Script, call, output, run_all, slow_greedy, tokens_fed

from nanochat import engine
from nanochat.decoding import Decoder, cast_again, inference_copy
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache, Pass

TOKENIZER = byte_tokenizer(MERGES)
END = TOKENIZER.special["<|assistant_end|>"]
T = 256


@pytest.fixture(scope="module")
def model():
    """Windows of 128, so that rows of up to 256 outgrow them."""
    return random_model(small_config(TOKENIZER.vocab_size, T, n_layer=3, window_pattern="SSL"))


def slow(model, prompt, max_tokens):
    return slow_greedy(model, prompt, max_tokens, T)


def some_prompt(draw, known, longest):
    """Anything; or what is known already, edited, cut or continued."""
    prompt = [TOKENIZER.bos, *draw.choices(range(256), k=draw.choice([0, 5, 30, longest]))]
    if known and draw.random() < 0.5:
        begin = draw.choice(known)
        prompt = begin[: draw.randint(1, len(begin))] + draw.choices(range(256), k=draw.randint(0, 40))
    return prompt[:longest]


@pytest.mark.parametrize("static", [False, True])
def test_two_hundred_requests_that_join_and_leave_at_random_get_what_the_uncached_model_says(
    model, monkeypatch, static
):
    monkeypatch.setattr(engine, "PREFILL", {"cpu": (48, 48)})  # most prompts are read in several steps
    draw = random.Random(static)
    machine = Engine(model, TOKENIZER, max_rows=6, static=static)
    requests, answers, cancelled, known = {}, {}, set(), []
    while len(requests) < 200 or machine.busy:
        while len(requests) < 200 and len(machine.waiting) < 3 and draw.random() < 0.6:
            request = Request(some_prompt(draw, known, 180), max_tokens=draw.randint(1, 25))
            requests[machine.submit(request)] = request
            known.append(request.prompt)
        if requests and draw.random() < 0.05:
            cancelled.add(draw.choice(list(requests)))
            machine.cancel(max(cancelled))
        for event in machine.step():
            tokens, finish = answers.setdefault(event.id, ([], None))
            assert finish is None, "an event after the last"
            answers[event.id] = (tokens + [event.token] * (event.token is not None), event.finish)
        assert len(machine.writing) + len(machine.reading) + len(machine.free) == 6
        places = [row.place for row in machine.writing]
        assert places == sorted(places)  # neighbours are read together
    assert len(machine.free) == 6 and not machine.opened
    for id, request in requests.items():
        tokens, finish = answers.get(id, ([], None))
        expected, ending = slow(model, request.prompt, request.max_tokens)
        if finish is None:
            assert id in cancelled
            assert tokens == expected[: len(tokens)]
        else:
            assert (tokens, finish) == (expected, ending)


# -- reading


def test_a_long_prompt_holds_up_neither_those_that_write_nor_those_that_come_later(model, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL", {"cpu": (16, 16)})
    monkeypatch.setattr(Engine, "_choose", lambda self, rows, logits, groups: [7] * len(rows))
    machine = Engine(model, TOKENIZER, max_rows=4)
    writer = machine.submit(Request([1, 2], max_tokens=100))
    machine.step()
    long = machine.submit(Request([9] * 160, max_tokens=2))
    machine.step()
    late = [machine.submit(Request([n, n], max_tokens=1)) for n in (3, 4)]
    steps = []
    while not steps or long not in steps[-1]:
        steps.append({event.id for event in machine.step()})
    assert all(writer in ids for ids in steps)
    assert len(steps) == 10  # 160 tokens, 16 of them before, and 4 that went to the others
    assert all(any(id in ids for ids in steps[:2]) for id in late)


def test_prompts_are_read_in_smaller_pieces_while_someone_writes(model, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL", {"cpu": (50, 10)})
    machine, fed = Engine(model, TOKENIZER, max_rows=3), tokens_fed(monkeypatch)
    machine.ends = set()
    machine.submit(Request([1] * 60, max_tokens=5))
    machine.submit(Request([2] * 30, max_tokens=5))
    for _ in range(5):
        machine.step()
    # 50; the other 10 and all 30; the first two tokens written; then a newcomer
    assert fed[:3] == [50, 40, 2]
    machine.submit(Request([3] * 30, max_tokens=5))
    fed.clear()
    machine.step()
    assert fed == [2 + 10]


def test_the_next_turn_an_edited_turn_and_a_regeneration_read_only_what_is_new(model, monkeypatch):
    machine, fed = Engine(model, TOKENIZER, max_rows=1), tokens_fed(monkeypatch)
    machine.ends = set()

    def reads(prompt):
        fed.clear()
        (answer,) = machine.generate([Request(prompt, max_tokens=10)])
        count, fresh = fed[0], Engine(model, TOKENIZER, max_rows=1)
        fresh.ends = set()
        assert [answer] == fresh.generate([Request(prompt, max_tokens=10)])
        return count, answer

    prompt = [TOKENIZER.bos, *range(60)]
    count, answer = reads(prompt)
    assert count == 61
    following = [*prompt, *answer, 5, 6, 7]
    assert reads(following)[0] == 1 + 3  # the last token of an answer was never fed
    assert reads(following)[0] == 1  # what comes after the last token is not kept
    edited = [*following[:40], 200, *following[41:]]
    assert reads(edited)[0] == len(edited) - 40
    assert reads([TOKENIZER.bos, 250, 251])[0] == 2


def test_conversations_with_a_common_beginning_read_it_once(model, monkeypatch):
    fed = tokens_fed(monkeypatch)
    system = [TOKENIZER.bos, *range(100)]
    requests = [Request([*system, n, n, n], max_tokens=4) for n in range(200, 206)]
    expected = [slow(model, request.prompt, 4)[0] for request in requests]
    machine = Engine(model, TOKENIZER, max_rows=8)
    fed.clear()
    assert machine.generate(requests) == expected
    assert fed[:2] == [len(system) + 3, 5 * 3 + 1]
    # their rows are still there, and a further one takes it from any of them
    fed.clear()
    assert machine.generate([Request([*system, 1, 2], max_tokens=4)])[0] == slow(model, [*system, 1, 2], 4)[0]
    assert fed[0] == 2


def test_a_row_that_others_may_go_on_from_is_not_taken_while_there_are_older_ones(model, monkeypatch):
    """Two people with one system prompt must not throw each other's conversation out."""
    system, fed = [TOKENIZER.bos, *range(40)], tokens_fed(monkeypatch)
    machine = Engine(model, TOKENIZER, max_rows=2)
    first, second = [*system, *[201] * 60], [*system, *[202] * 60]
    for prompt in (first, second, [*first, 1, 2], [*second, 1, 2], [*first, 1, 2, 3]):
        fed.clear()
        machine.generate([Request(prompt, max_tokens=1)])
    assert fed == [1]


def test_who_waits_for_another_to_read_goes_on_when_that_one_leaves(model, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL", {"cpu": (16, 16)})
    prompt = [TOKENIZER.bos, *range(100)]
    machine = Engine(model, TOKENIZER, max_rows=4)
    first, second = (machine.submit(Request(prompt, max_tokens=5)) for _ in range(2))
    machine.step()
    assert [row.id for row in machine.reading] == [first] and list(machine.waiting) == [second]
    machine.cancel(first)
    assert run_all(machine) == {second: slow(model, prompt, 5)}


def test_requests_wait_their_turn_where_memory_is_short(model, monkeypatch):
    row = KVCache.row_bytes(model.config, T, torch.float32)
    monkeypatch.setattr(engine, "free_memory", lambda device: 3.5 * row / engine.CACHE_SHARE)
    requests = [Request([TOKENIZER.bos, n], max_tokens=6) for n in range(8)]
    machine = Engine(model, TOKENIZER, max_rows=64)
    assert machine.generate(requests) == [slow(model, request.prompt, 6)[0] for request in requests]
    assert machine.max_rows == 3
    monkeypatch.setattr(engine, "free_memory", lambda device: 0)
    machine = Engine(model, TOKENIZER, static=True)
    assert machine.generate(requests[:2]) == [slow(model, request.prompt, 6)[0] for request in requests[:2]]
    assert machine.max_rows == 1


def test_one_question_many_times_holds_up_no_other(model, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL", {"cpu": (16, 16)})
    machine = Engine(model, TOKENIZER, max_rows=4)
    prompt = [TOKENIZER.bos, *range(120)]
    for seed in range(7):
        machine.submit(Request(prompt, max_tokens=2, temperature=1.0, seed=seed))
    short = machine.submit(Request([TOKENIZER.bos, 5], max_tokens=2))
    heard = [{event.id for event in machine.step()} for _ in range(3)]
    assert short in heard[1] and {row.id for row in machine.reading} == {1}
    assert set(run_all(machine)) == set(range(1, 8))


# -- leaving


@pytest.mark.parametrize("steps", [0, 1, 3, 9])
def test_cancelling_frees_the_row_at_once_whatever_it_does(model, monkeypatch, steps):
    monkeypatch.setattr(engine, "PREFILL", {"cpu": (16, 16)})
    machine = Engine(model, TOKENIZER, max_rows=2)
    machine.ends = set()
    other, id = (machine.submit(Request([n] * 60, max_tokens=50)) for n in (1, 2))
    for _ in range(steps):
        machine.step()
    machine.cancel(id)
    late = machine.submit(Request([5, 6], max_tokens=2))
    machine.step()
    assert {row.id for row in [*machine.reading, *machine.writing]} == {other, late}
    answers = run_all(machine)
    assert id not in answers and answers[other][1] == "length" and len(machine.free) == 2


def test_streams_and_lists_side_by_side_lose_nothing(model):
    machine = Engine(model, TOKENIZER, max_rows=2)
    prompts = [[TOKENIZER.bos, *range(n)] for n in (9, 4, 30, 12)]
    expected = [slow(model, prompt, 12)[0] for prompt in prompts]
    first, second = (machine.stream(Request(prompt, max_tokens=12)) for prompt in prompts[:2])
    begun = [next(first), next(second), next(first)]
    assert machine.generate([Request(prompt, max_tokens=12) for prompt in prompts[2:]]) == expected[2:]
    events = [[begun[0], begun[2], *first], [begun[1], *second]]
    assert [[event.token for event in part if event.token is not None] for part in events] == expected[:2]
    assert not machine.opened


def test_a_stream_whose_request_was_cancelled_ends_at_once(model):
    machine = Engine(model, TOKENIZER, max_rows=2)
    machine.ends = set()
    stream, other = (machine.stream(Request([n], max_tokens=50)) for n in (1, 2))
    id = next(stream).id
    next(other)
    next(other)  # an event of the first one lies ready
    machine.cancel(id)
    assert list(stream) == [] and machine.writing[0].count == 2


def test_what_comes_up_while_a_stream_is_read_is_heard_at_the_next_step(model):
    machine = Engine(model, TOKENIZER, max_rows=3)
    prompts = [[TOKENIZER.bos, *range(n)] for n in (9, 4, 12)]
    ids = [machine.submit(Request(prompt, max_tokens=9)) for prompt in prompts[:2]]
    assert machine.generate([Request(prompts[2], max_tokens=9)]) == [slow(model, prompts[2], 9)[0]]
    assert machine.busy and not machine.writing  # nothing is left to do, but not all was heard
    answers = {}
    for event in machine.step():
        answers.setdefault(event.id, []).append(event.token)
    for id, prompt in zip(ids, prompts[:2], strict=True):
        assert [token for token in answers[id] if token is not None] == slow(model, prompt, 9)[0]
    assert machine.step() == []
    gone = machine.submit(Request(prompts[0], max_tokens=9))
    machine.generate([Request(prompts[2], max_tokens=9)])
    machine.cancel(gone)
    assert machine.step() == []


def test_what_a_caller_does_to_a_prompt_after_asking_changes_nothing(model):
    prompt = [TOKENIZER.bos, *range(40)]
    expected = slow(model, list(prompt), 9)[0]
    machine, said = Engine(model, TOKENIZER, max_rows=1), []
    for event in machine.stream(Request(prompt, max_tokens=9)):
        if event.token is not None:
            said.append(event.token)
            prompt += [event.token, 7]
    assert said == expected
    array = np.array([TOKENIZER.bos, *range(40)])
    answers = machine.generate([Request(array, max_tokens=9, seed=np.int64(3)), Request(tuple(array), max_tokens=9)])
    assert answers == [expected, expected]


def fail(*args):
    raise ZeroDivisionError


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where, how", [("_choose", fail), ("_event", fail), ("_draw", fail), ("_choose", interrupt)])
def test_a_step_that_fails_drops_what_was_under_way_and_mixes_nothing(model, monkeypatch, where, how):
    machine = Engine(model, TOKENIZER, max_rows=2)
    prompts = [[TOKENIZER.bos, *range(n)] for n in (30, 20, 25)]
    requests = [Request(prompt, max_tokens=9, temperature=1.0, seed=n) for n, prompt in enumerate(prompts)]
    stream = machine.stream(requests[0])
    next(stream)
    id, waiting = machine.submit(requests[1]), machine.submit(requests[2])
    with monkeypatch.context() as patch:
        patch.setattr(Engine, where, how)
        with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
            machine.step()
    assert not machine.reading and not machine.writing and list(machine.waiting) == [waiting]
    assert [event.finish for event in stream] == ["error"]
    events = machine.step()
    assert [(event.id, event.finish) for event in events[:1]] == [(id, "error")] and events[1].id == waiting
    answers = machine.generate(requests)
    assert answers == Engine(model, TOKENIZER, max_rows=2).generate(requests)


def test_a_soak_leaves_nothing_behind(model, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL", {"cpu": (64, 64)})
    draw, machine = random.Random(5), Engine(model, TOKENIZER, max_rows=8)
    waiting, known, finished = set(), [], 0
    for number in range(600):
        request = Request(
            some_prompt(draw, known[-20:], 60),
            max_tokens=draw.randint(1, 12),
            temperature=draw.choice([0, 0.7, 1]),
            top_k=draw.choice([None, 0, 1, 40]),
            top_p=draw.choice([1, 0.9]),
            seed=number,
            stop=draw.choice([(), ("a",), ("he", "lo")]),
            logprobs=draw.choice([None, None, 3]),
        )
        waiting.add(machine.submit(request))
        known.append(request.prompt)
        if draw.random() < 0.2:
            gone = draw.choice(sorted(waiting))
            machine.cancel(gone)
            waiting.remove(gone)
        while len(waiting) > 16:
            for event in machine.step():
                assert event.id in waiting
                if event.finish:
                    waiting.remove(event.id)
                    finished += 1
    answers = run_all(machine)
    assert all(finish for _, finish in answers.values()) and set(answers) >= waiting
    assert finished + len(answers) > 400
    assert sorted(machine.free) == list(range(8))
    assert not (machine.waiting or machine.reading or machine.writing or machine.opened)


# -- text, stops, log-probabilities


def scripted(monkeypatch, *texts):
    """An engine whose answers are written down; requests for them."""
    prompts = [[TOKENIZER.bos, n] for n in range(len(texts))]
    script = Script([(prompt, [*tokens, END]) for prompt, tokens in zip(prompts, texts, strict=True)])
    monkeypatch.setattr(Engine, "_choose", script.choose)
    return prompts


def said(events):
    return "".join(event.text for event in events), events[-1].finish


def test_the_text_of_an_answer_is_whole_characters_and_no_tools(model, monkeypatch):
    text = "né 🙂 漢 the end"
    tokens = [*TOKENIZER.encode(text), *call("1+1"), *TOKENIZER.encode(" ok")]
    (prompt,) = scripted(monkeypatch, tokens)
    events = list(Engine(model, TOKENIZER).stream(Request(prompt)))
    assert said(events) == (text + " ok", "stop")
    assert "🙂" in [event.text for event in events] and "�" not in said(events)[0]
    assert [event.token for event in events[:-1]] == [
        *TOKENIZER.encode(text), *call("1+1"), *output("2"), *TOKENIZER.encode(" ok")
    ]  # fmt: skip
    assert events[-1].end == END


def test_half_a_character_at_the_limit_is_shown_as_such(model, monkeypatch):
    (prompt,) = scripted(monkeypatch, [*TOKENIZER.encode("a🙂")])
    assert said(list(Engine(model, TOKENIZER).stream(Request(prompt, max_tokens=3)))) == ("a�", "length")


@pytest.mark.parametrize(
    "stop, shown, finish",
    [
        (("two",), "one ", "stop"),
        (("three", "o t"), "one tw", "stop"),
        (("e", "one"), "", "stop"),
        (("three four",), "one two three", "stop"),  # it never came: what was held back is shown
        ((" three",), "one two", "stop"),
        (("xyz",), "one two three", "stop"),
    ],
)
def test_an_answer_stops_where_a_stop_text_begins(model, monkeypatch, stop, shown, finish):
    prompt, other = scripted(monkeypatch, TOKENIZER.encode("one two three"), TOKENIZER.encode("one two three"))
    machine, events = Engine(model, TOKENIZER, max_rows=2), []
    ids = [machine.submit(Request(prompt, stop=stop)), machine.submit(Request(other))]
    run_all(machine, events)
    mine, others = ([event for event in events if event.id == id] for id in ids)
    assert said(mine) == (shown, finish)
    if shown != "one two three":  # it ends with the token that makes the text whole, and writes nothing more
        before, whole = (TOKENIZER.decode([event.token for event in part]) for part in (mine[:-1], mine))
        assert [any(text in heard for text in stop) for heard in (before, whole)] == [False, True]
    assert said(others) == ("one two three", "stop")


def test_one_stop_text_needs_no_list(model, monkeypatch):
    (prompt,) = scripted(monkeypatch, TOKENIZER.encode("the END of it, END"))
    assert said(list(Engine(model, TOKENIZER).stream(Request(prompt, stop="END")))) == ("the ", "stop")


def test_a_stop_text_in_a_tools_output_is_not_seen(model, monkeypatch):
    (prompt,) = scripted(monkeypatch, [*call("41+1"), *TOKENIZER.encode("is it")])
    assert said(list(Engine(model, TOKENIZER).stream(Request(prompt, stop=("42", "41"))))) == ("is it", "stop")


@pytest.mark.parametrize("static", [False, True])
def test_log_probabilities_are_those_of_the_uncached_model(model, static):
    draw = random.Random(1)
    prompts = [[TOKENIZER.bos, *draw.choices(range(256), k=n)] for n in (3, 40, 11)]
    requests = [
        Request(prompts[2], max_tokens=8),
        Request(prompts[1], max_tokens=8, temperature=1.0, top_k=5, seed=3, logprobs=0),
        Request(prompts[0], max_tokens=8, logprobs=3),
    ]
    machine, events = Engine(model, TOKENIZER, static=static), []
    machine.ends = set()
    ids = [machine.submit(request) for request in requests]
    run_all(machine, events)
    for id, request in zip(ids, requests, strict=True):
        mine = [event for event in events if event.id == id]
        with torch.no_grad():
            whole = model(torch.tensor([request.prompt + [event.token for event in mine]]))[0]
        logs = whole[len(request.prompt) - 1 : -1].log_softmax(-1)
        for event, expected in zip(mine, logs, strict=True):
            if request.logprobs is None:
                assert event.logprob is None and event.likeliest is None
                continue
            assert event.logprob == pytest.approx(float(expected[event.token]), abs=1e-4)
            values, tokens = expected.topk(request.logprobs)
            assert [token for token, _ in event.likeliest] == tokens.tolist()
            assert [value for _, value in event.likeliest] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_forced_token_and_an_end_mark_have_a_log_probability_too(model, monkeypatch):
    (prompt,) = scripted(monkeypatch, call("2+2"))
    events = list(Engine(model, TOKENIZER).stream(Request(prompt, logprobs=1)))
    assert [event.token for event in events if event.forced] == output("4")
    assert events[-1].end == END and all(event.logprob < 0 and len(event.likeliest) == 1 for event in events)


# -- weights


def test_weights_are_cast_once_and_again_when_the_model_has_learned(model):
    copied = inference_copy(model).named_parameters()
    assert all(parameter.data_ptr() == model.get_parameter(name).data_ptr() for name, parameter in copied)
    rounded = GPT(model.config, torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    machine = Engine(rounded, TOKENIZER, max_rows=2)
    matrices = [p for p in machine.model.parameters() if p.dim() > 1]
    assert all(p.dtype == torch.bfloat16 for p in matrices)
    prompt = [TOKENIZER.bos, *range(30)]
    (before,) = machine.generate([Request(prompt, max_tokens=12)])
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    machine.refresh(rounded)
    (after,) = machine.generate([Request(prompt, max_tokens=12)])
    assert before != after == Engine(rounded, TOKENIZER, max_rows=2).generate([Request(prompt, max_tokens=12)])[0]
    machine.submit(Request(prompt, max_tokens=12))
    machine.step()
    machine.submit(Request(prompt[:9], max_tokens=2))
    while machine.busy:
        machine.step()
    assert list(machine.free) == [1, 0]
    machine.refresh(rounded)
    assert list(machine.free) == [0, 1]  # what comes next is as in a new engine
    machine.submit(Request(prompt, max_tokens=12))
    with pytest.raises(RuntimeError, match="under way"):
        machine.refresh(rounded)


def test_casting_again_keeps_the_memory_where_it_is(model):
    rounded = GPT(model.config, torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    copy = inference_copy(rounded)
    places = [parameter.data_ptr() for parameter in copy.parameters()]
    with torch.no_grad():
        rounded.lm_head.weight.mul_(2)
    cast_again(rounded, copy)
    assert [parameter.data_ptr() for parameter in copy.parameters()] == places
    assert torch.equal(copy.lm_head.weight, rounded.lm_head.weight.bfloat16())


# -- fixed shapes


@torch.no_grad()
def test_steps_of_fixed_shapes_are_the_full_pass_for_any_number_of_rows(model):
    idx = torch.randint(0, 256, (11, 200), generator=torch.Generator().manual_seed(0))
    expected = model.hidden(idx)
    cache = KVCache(model.config, 11, 200, torch.float32, torch.device("cpu"))
    begun = [1, 150, 3, 40, 128, 129, 130, 2, 90, 7, 60]
    for row, length in enumerate(begun):
        reading = Pass(cache, [(row, idx[row, :length].tolist())])
        model.hidden(reading.idx, reading)
        reading.end()
    decoder = Decoder(model, cache)
    for rows in ([0], [1, 5], list(range(11)), [10, 3, 7], list(range(8)), [4], list(range(9)), [9, 1, 7, 2, 3]):
        lengths = [int(cache.lengths[row]) for row in rows]
        found = decoder(rows, [int(idx[row, length]) for row, length in zip(rows, lengths, strict=True)])
        right = model.logits(torch.stack([expected[row, n] for row, n in zip(rows, lengths, strict=True)]))
        assert torch.allclose(found, right, atol=1e-4)
    assert sorted(decoder.recorded) == [1, 2, 4, 8, 11]
    cache.lengths[2] = 200
    with pytest.raises(ValueError, match="200 positions"):
        decoder([2], [1])


def test_compiled_steps_say_the_same_and_compile_once_for_each_kind_of_layer_and_size(model, monkeypatch):
    from nanochat import compilation

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: real(function, backend="aot_eager", **how))
    compilation._compile.cache_clear()
    requests = [Request([TOKENIZER.bos, *range(n)], max_tokens=20) for n in (150, 3, 60)]
    before = compilation.times_compiled()
    answers = Engine(model, TOKENIZER, max_rows=3, static=True, compiles=True).generate(requests)
    compilation._compile.cache_clear()
    assert answers == Engine(model, TOKENIZER, max_rows=3).generate(requests)
    kinds = 3  # windows and value embeddings: S with, S without, L with
    assert 0 < compilation.times_compiled() - before <= 2 * kinds


# -- what mutations of the code survived


def test_who_is_read_in_this_step_goes_behind_those_that_were_not(model, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL", {"cpu": (16, 16)})
    machine = Engine(model, TOKENIZER, max_rows=3)
    machine.ends = set()
    ids = [machine.submit(Request([n] * size, max_tokens=9)) for n, size in ((1, 4), (2, 100), (3, 4))]
    machine.step()
    assert ids[2] in {event.id for event in machine.step()}


def test_nothing_is_read_from_rows_that_a_failing_step_may_have_spoiled(model, monkeypatch):
    def broken(self, source, target, length):
        self.keys[:, target] = 9
        raise KeyboardInterrupt

    one, other = [TOKENIZER.bos, *range(40)], [TOKENIZER.bos, *range(100, 140)]
    machine = Engine(model, TOKENIZER, max_rows=2)
    requests = [Request(prompt, max_tokens=9) for prompt in (other, one, [*one[:20], 200])]
    expected = machine.generate(requests[:2])
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "copy", broken)
        with pytest.raises(KeyboardInterrupt):
            machine.generate(requests[2:])
    assert not machine.busy and len(machine.free) == 2
    assert machine.generate(requests[:1]) == expected[:1]


def test_only_matrices_are_cast(model):
    rounded = GPT(model.config, torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    assert all((p.dtype == torch.bfloat16) == (p.dim() > 1) for p in inference_copy(rounded).parameters())


def test_one_question_may_take_all_of_its_tokens(model, monkeypatch):
    monkeypatch.setattr(Engine, "_choose", lambda self, rows, logits, groups: [97] * len(rows))
    for n in (1, 3, 300):
        assert engine.ask(model, TOKENIZER, "Who are you?", max_tokens=n) == "a" * n


def test_the_memory_of_a_cache_is_its_process_own():
    cache = KVCache(small_config(TOKENIZER.vocab_size, 8), 1, 8, torch.float32, torch.device("cpu"))
    if not (child := os.fork()):
        cache.keys[:] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert not cache.keys.any()
