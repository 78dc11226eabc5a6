"""Generation: the same tokens alone and in company, cached and not; tools write into their row; rows come and go."""

import random

import pytest
import torch
from helpers import MERGES, byte_tokenizer, random_model, small_config

from nanochat import chat, engine, samples
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.sampling import Draw, arrival, grouped, key, sample, signed

TOKENIZER = byte_tokenizer(MERGES)
SPECIAL = TOKENIZER.special
PYTHON, PYTHON_END, OUTPUT, OUTPUT_END, END = (
    SPECIAL[f"<|{name}|>"] for name in ("python_start", "python_end", "output_start", "output_end", "assistant_end")
)
T = 64


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(TOKENIZER.vocab_size, T))


def prompts(count, seed=0, longest=20):
    draw = random.Random(seed)
    return [[TOKENIZER.bos, *draw.choices(range(256), k=draw.randint(0, longest))] for _ in range(count)]


@torch.no_grad()
def slow_greedy(model, prompt, max_tokens, max_length=T):
    """The whole row through the model for every token: (tokens, finish)."""
    tools, ids, said, forced = chat.ToolUse(TOKENIZER), list(prompt), [], []
    while len(said) < max_tokens:
        if len(ids) > max_length:
            return said, "length"
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if forced:
            token = forced.pop(0)
        elif token in (END, TOKENIZER.bos):
            return said, "stop"
        else:
            forced += tools.push(token)
        said.append(token)
        ids.append(token)
    return said, "length"


def run_all(machine, events=None):
    """Step until nothing is left: id -> (tokens, finish)."""
    answers = {}
    while machine.busy:
        for event in machine.step():
            tokens, finish = answers.setdefault(event.id, ([], None))
            assert finish is None, "an event after the last"
            if event.token is not None:
                tokens.append(event.token)
            answers[event.id] = (tokens, event.finish)
            if events is not None:
                events.append(event)
    return answers


# -- the same as the slow way


def test_greedy_answers_equal_the_uncached_forward_pass(model):
    requests = [Request(prompt, max_tokens=30) for prompt in prompts(7)]
    expected = [slow_greedy(model, request.prompt, 30)[0] for request in requests]
    assert Engine(model, TOKENIZER).generate(requests) == expected
    assert len({tuple(tokens) for tokens in expected}) == 7


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_join_and_leave_at_any_step_do_not_disturb_each_other(model, seed):
    draw = random.Random(seed)
    machine = Engine(model, TOKENIZER, max_rows=3)
    pending = [Request(prompt, max_tokens=draw.randint(1, 40)) for prompt in prompts(9, seed)]
    expected, answers, cancelled = {}, {}, set()
    while pending or machine.busy:
        while pending and draw.random() < 0.5:
            request = pending.pop()
            expected[machine.submit(request)] = slow_greedy(model, request.prompt, request.max_tokens)
        if expected and draw.random() < 0.1:
            cancelled.add(draw.choice(sorted(expected)))
            for id in cancelled:
                machine.cancel(id)
        for event in machine.step():
            tokens, _ = answers.setdefault(event.id, ([], None))
            if event.token is not None:
                tokens.append(event.token)
            answers[event.id] = (tokens, event.finish)
    for id, answer in expected.items():
        if id in cancelled:
            tokens = answers.get(id, ([], None))[0]
            assert tokens == answer[0][: len(tokens)]
        else:
            assert answers[id] == answer


def test_windows_shorter_than_the_row_are_seen_the_same_way():
    model = random_model(small_config(TOKENIZER.vocab_size, 256, n_layer=3, window_pattern="SSL"))
    assert min(model.config.windows) == 128
    long = [[TOKENIZER.bos, *range(n)] for n in (150, 125, 3)]
    expected = [slow_greedy(model, prompt, 12, 256)[0] for prompt in long]
    assert Engine(model, TOKENIZER).generate([Request(prompt, max_tokens=12) for prompt in long]) == expected


def sampled(prompt, seed, **changes):
    return Request(prompt, **(dict(max_tokens=20, temperature=1.0, top_k=0, top_p=1.0, seed=seed) | changes))


@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.9, "temperature": 0.6}])
def test_a_request_draws_the_same_text_alone_and_in_company(model, changes):
    mine = [sampled(prompt, 7 * i, **changes) for i, prompt in enumerate(prompts(3))]
    alone = [Engine(model, TOKENIZER).generate([request])[0] for request in mine]
    others = [sampled(prompt, 99 + i, top_k=3 + i) for i, prompt in enumerate(prompts(5, seed=5))]
    greedy = [Request(prompt, max_tokens=9) for prompt in prompts(2, seed=6)]
    together = [others[0], mine[0], greedy[0], mine[1], *others[1:], mine[2], greedy[1]]
    answers = Engine(model, TOKENIZER, max_rows=4).generate(together)
    assert [answers[1], answers[3], answers[8]] == alone
    assert Engine(model, TOKENIZER).generate(mine) == alone


def test_top_k_of_one_is_greedy(model):
    greedy = [Request(prompt, max_tokens=15) for prompt in prompts(4)]
    one = [sampled(prompt, 3, top_k=1, max_tokens=15) for prompt in prompts(4)]
    assert Engine(model, TOKENIZER).generate(one) == Engine(model, TOKENIZER).generate(greedy)


def tokens_fed(monkeypatch):
    """The number of tokens of each pass that follows."""
    fed, hidden = [], GPT.hidden

    def counted(self, idx, *args):
        fed.append(idx.numel())
        return hidden(self, idx, *args)

    monkeypatch.setattr(GPT, "hidden", counted)
    return fed


def test_samples_of_one_prompt_share_its_prefill_and_differ(model, monkeypatch):
    prompt = prompts(1)[0] + [*range(20)]
    alone = [Engine(model, TOKENIZER).generate([sampled(prompt, seed)])[0] for seed in range(6)]
    assert len({tuple(tokens) for tokens in alone}) == 6
    other = prompts(1, seed=9)[0]
    requests = [sampled(prompt, seed) for seed in range(6)] + [sampled(other, 0)] + [sampled(prompt, 2)]
    machine, fed = Engine(model, TOKENIZER), tokens_fed(monkeypatch)
    answers = machine.generate(requests)
    assert answers[:6] == alone and answers[7] == alone[2]
    assert answers[6] == Engine(model, TOKENIZER).generate([requests[6]])[0]
    # the first reads it all, the others its last token, beside the other prompt and all that is written
    assert sum(fed[:2]) == len(prompt) + len(other) + 6 + 1 + 1


def test_the_samples_of_a_training_run_take_no_larger_cache_than_they_need(model, monkeypatch):
    """A full cache of 64 rows is 19 GB at depth 24, beside a model in training."""
    made = []

    class Noted(KVCache):
        def __init__(self, config, *args):
            super().__init__(config, *args)
            made.append(args[:2])

    monkeypatch.setattr(engine, "KVCache", Noted)
    model = random_model(small_config(TOKENIZER.vocab_size, 1024))
    samples.prompted(model, TOKENIZER)
    ((rows, length),) = made
    longest = max(len(TOKENIZER.encode(prompt)) for prompt in samples.PROMPTS)
    assert rows <= len(samples.PROMPTS) and length <= 1 + longest + samples.PROMPT_TOKENS


def test_more_prompts_than_one_pass_takes_are_all_answered(model, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL", {"cpu": (40, 40)})
    requests = [Request(prompt, max_tokens=8) for prompt in prompts(9, longest=30)]
    expected = [slow_greedy(model, request.prompt, 8)[0] for request in requests]
    assert Engine(model, TOKENIZER).generate(requests) == expected


# -- sampling


def drawn(logits, count, temperature=1.0, top_k=0, top_p=1.0):
    draws = [Draw(i, temperature, top_k, top_p, seed=i, position=0) for i in range(count)]
    return sample(logits.expand(count, -1), grouped(draws, logits.size(1), torch.device("cpu")))


def test_samples_follow_the_models_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5]])
    for temperature in (1.0, 0.5, 2.0):
        share = drawn(logits, 8000, temperature=temperature).bincount(minlength=5) / 8000
        assert torch.allclose(share, torch.softmax(logits[0] / temperature, 0), atol=0.025)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log().unsqueeze(0)
    assert set(drawn(logits, 500, top_k=2).tolist()) == {1, 3}
    assert set(drawn(logits, 500, top_p=0.69).tolist()) == {1, 3}
    assert set(drawn(logits, 500, top_p=0.71).tolist()) == {1, 3, 4}
    assert set(drawn(logits, 500, top_p=0.01).tolist()) == {1}
    assert set(drawn(logits, 500, top_k=3, top_p=0.5).tolist()) == {1, 3}  # of 0.4, 0.3, 0.15, renormalized
    share = drawn(logits, 8000, top_k=2).bincount(minlength=5) / 8000
    assert torch.allclose(share, torch.tensor([0, 4 / 7, 0, 3 / 7, 0]), atol=0.025)


@pytest.mark.parametrize("changes", [{"top_p": 0.0}, {"top_k": 10**6}, {"temperature": 1e-6}, {"temperature": 1e-300}])
def test_extreme_settings_still_draw_a_token(changes):
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    tokens = set(drawn(logits, 200, **changes).tolist())
    assert tokens == ({0, 1, 2} if changes == {"top_k": 10**6} else {1})


def test_the_noise_of_a_draw_is_a_function_of_seed_position_and_token_and_exponentially_distributed():
    keys = torch.tensor([[signed(key(seed, position))] for seed in range(-9, 60) for position in range(60)])
    assert keys.unique().numel() == keys.numel() and keys.min() < 0 < keys.max()
    noise = arrival(keys, torch.arange(50).unsqueeze(0)).double()
    assert torch.equal(noise[7, 3:5], arrival(keys[7:8], torch.tensor([[3, 4]]))[0].double())
    uniform = 1 - (-noise).exp()
    shares = torch.histc(uniform, 16, 0, 1) / uniform.numel()
    assert (shares - 1 / 16).abs().max() < 0.004
    assert 0.5 < noise.min() * noise.numel() < 5  # fine enough near 0, where races are won
    by = uniform.view(69, 60, 50)  # seed, position, token
    for one, other in (
        (by[1:], by[:-1]),
        (by[:, 1:], by[:, :-1]),
        (by[:, :, 1:], by[:, :, :-1]),
        (by[1:, :-1], by[:-1, 1:]),
    ):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.012
    assert len({key(seed, position) for seed in (-1, 0, 2**63) for position in (0, 1, 10**9)}) == 9


@pytest.mark.parametrize("top_k", [None, 0, 5])
def test_every_token_of_an_answer_is_drawn_anew(top_k):
    """A model to which all tokens are the same: its answers have them all, or as many as top-k leaves in."""
    model = random_model(small_config(TOKENIZER.vocab_size))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    machine = Engine(model, TOKENIZER, max_length=500)
    machine.ends = set()
    (answer,) = machine.generate([Request([1], max_tokens=400, temperature=1.0, top_k=top_k)])
    assert len(set(answer)) > 150 if not top_k else len(set(answer)) == 5


@pytest.mark.parametrize("changes", [{}, {"top_k": 50}, {"top_p": 0.9}])
def test_rounding_turns_next_to_no_draw(changes):
    """A whole vocabulary, in which the order of sums moves every logit a little: by the inverse of the cumulative
    distribution one draw in some hundred is another then."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 32768, generator=generator)
    other = logits + 3e-6 * torch.randn(logits.shape, generator=generator)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | changes
    different = 0
    for position in range(50):
        groups = grouped(
            [Draw(i, seed=i, position=position, **settings) for i in range(20)], 32768, torch.device("cpu")
        )
        different += int((sample(logits, groups) != sample(other, groups)).sum())
    assert different <= 1


# -- tools: what the model "samples" is written down here


class Script:
    """prompt -> what is sampled, in place of Engine._choose. Keeps the logits that each token would be drawn from."""

    def __init__(self, texts):
        self.texts = {tuple(prompt): list(tokens) for prompt, tokens in texts}
        self.logits = {}

    def choose(self, rows, logits, groups):
        tokens = []
        for row, values in zip(rows, logits, strict=True):
            self.logits.setdefault(row.id, []).append(values)
            tokens.append(0 if row.forced else self.texts[tuple(row.request.prompt)].pop(0))
        return tokens


def call(code):
    return [PYTHON, *TOKENIZER.encode(code), PYTHON_END]


def output(text):
    return [OUTPUT, *TOKENIZER.encode(text), OUTPUT_END]


def test_the_output_of_a_tool_is_forced_into_its_row_only(model, monkeypatch):
    a, b, c = [[TOKENIZER.bos, n] for n in (1, 2, 3)]
    script = Script(
        [
            (a, [10, *call("2+3"), 11, END]),
            (b, [20, 21, 22, 23, 24, 25, *call("'aab'.count('a')"), 26, TOKENIZER.bos]),
            (c, [*call("6*7"), *call("1/0"), 30, END]),
        ]
    )
    monkeypatch.setattr(Engine, "_choose", script.choose)
    machine, events = Engine(model, TOKENIZER), []
    ids = [machine.submit(Request(prompt, max_tokens=60)) for prompt in (a, b, c)]
    answers = run_all(machine, events)
    expected = [
        [10, *call("2+3"), *output("5"), 11],
        [20, 21, 22, 23, 24, 25, *call("'aab'.count('a')"), *output("2"), 26],
        [*call("6*7"), *output("42"), *call("1/0"), 30],
    ]
    assert [answers[id] for id in ids] == [(tokens, "stop") for tokens in expected]
    for id, text in zip(ids, ("5", "2", "42"), strict=True):
        assert [event.token for event in events if event.id == id and event.forced] == output(text)
    with torch.no_grad():  # forced and sampled tokens went through the cache as if the row had been fed whole
        for id, prompt, tokens in zip(ids, (a, b, c), expected, strict=True):
            whole = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 :]
            assert torch.allclose(torch.stack(script.logits[id]), whole, atol=1e-4)


def test_forced_tokens_count_towards_the_limit(model, monkeypatch):
    code = call("1+1")
    for limit in range(1, 9):
        monkeypatch.setattr(Engine, "_choose", Script([([1], [*code, 9, 9, 9, 9])]).choose)
        machine = Engine(model, TOKENIZER)
        machine.submit(Request([1], max_tokens=limit))
        assert run_all(machine) == {1: ([*code, *output("2"), 9, 9, 9][:limit], "length")}


def test_an_end_mark_that_is_sampled_where_a_token_is_forced_does_not_end_the_row(model, monkeypatch):
    script = Script([([1], [*call("1+1"), 9, END])])
    monkeypatch.setattr(
        Engine,
        "_choose",
        lambda self, rows, logits, groups: [
            END if row.forced else script.choose([row], logits[:1], groups)[0] for row in rows
        ],
    )
    assert Engine(model, TOKENIZER).generate([Request([1])]) == [[*call("1+1"), *output("2"), 9]]


# -- ends


@pytest.mark.parametrize("end", [END, TOKENIZER.bos])
def test_a_row_ends_at_its_end_mark_which_is_no_token_of_it(model, monkeypatch, end):
    monkeypatch.setattr(Engine, "_choose", Script([([1], [7, 8, end])]).choose)
    machine, events = Engine(model, TOKENIZER), []
    machine.submit(Request([1], max_tokens=10))
    run_all(machine, events)
    assert [(event.token, event.forced, event.finish) for event in events] == [
        (7, False, None),
        (8, False, None),
        (None, False, "stop"),
    ]


def test_other_marks_do_not_end_a_row(model, monkeypatch):
    others = [SPECIAL["<|user_start|>"], SPECIAL["<|user_end|>"], SPECIAL["<|assistant_start|>"]]
    monkeypatch.setattr(Engine, "_choose", Script([([1], [*others, END])]).choose)
    assert Engine(model, TOKENIZER).generate([Request([1])]) == [others]


def test_a_full_row_ends_with_length(model, monkeypatch):
    monkeypatch.setattr(Engine, "_choose", lambda self, rows, logits, groups: [7] * len(rows))
    for length in (1, 30, T // 2):
        machine = Engine(model, TOKENIZER)
        machine.submit(Request([5] * length, max_tokens=1000))
        (answer,) = run_all(machine).values()
        assert answer == ([7] * (T - length), "length")


def test_a_row_may_be_longer_than_the_models_sequence(model):
    prompt = [TOKENIZER.bos, *range(100, 180)]
    machine = Engine(model, TOKENIZER, max_length=120)
    assert machine.generate([Request(prompt, max_tokens=20)]) == [slow_greedy(model, prompt, 20, 120)[0]]


@pytest.mark.parametrize("length, kept", [(60, 60), (61, 60), (5 * T, 60)])
def test_a_prompt_without_room_for_an_answer_keeps_its_beginning_and_its_newest_tokens_and_says_so(model, length, kept):
    draw = random.Random(length)
    prompt = [TOKENIZER.bos, *draw.choices(range(256), k=length - 1)]
    machine, events = Engine(model, TOKENIZER), []
    machine.submit(Request(prompt, max_tokens=4))
    machine.submit(Request([5], max_tokens=4))
    answers = run_all(machine, events)
    shorter = [TOKENIZER.bos, *prompt[length - kept + 1 :]]
    assert answers[1] == slow_greedy(model, shorter, 4)
    assert [event.dropped for event in events if event.id == 1] == [int(kept < length), *[0] * 3][: len(answers[1][0])]
    assert not any(event.dropped for event in events if event.id == 2)


def test_a_conversation_without_room_keeps_its_newest_turns(model):
    turns = [{"role": role, "content": f"{role} says {i} things"} for i in range(3) for role in ("user", "assistant")]
    messages = [*turns, {"role": "user", "content": "last"}]
    whole = chat.prompt(TOKENIZER, {"messages": messages})
    assert len(whole) > T
    (event, *_) = Engine(model, TOKENIZER).stream(Request(whole, max_tokens=10))
    assert event.dropped == 4
    alone = chat.prompt(TOKENIZER, {"messages": messages[4:]})
    assert event.token == slow_greedy(model, alone, 1)[0][0]


WRONG = [
    ({"prompt": []}, "empty"),
    ({"prompt": [5, -1]}, "token of the prompt is -1"),
    ({"prompt": [5, 10**6]}, "token of the prompt is 1000000"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_p": 1.1}, "top_p is 1.1"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"logprobs": 10**6}, "logprobs is 1000000"),
    ({"stop": ("a", "")}, "none of them empty"),
    ({"stop": (b"x",)}, "expected texts"),
    ({"stop": (5,)}, "expected texts"),
    ({"top_k": 5.0}, "whole numbers"),
    ({"seed": None}, "whole numbers"),
    ({"temperature": None}, "temperature is None"),
    ({"top_p": "warm"}, "top_p 'warm'"),
    ({"stop": None}, "expected texts"),
    ({"max_tokens": -1}, "expected 1 or more"),
    ({"seed": 1.5}, "whole numbers"),
    ({"logprobs": 2.5}, "whole numbers"),
    ({"prompt": [5.7]}, "whole numbers"),
    ({"max_tokens": "9"}, "whole numbers"),
]


@pytest.mark.parametrize("changes, complaint", WRONG)
def test_a_wrong_request_is_refused_and_the_engine_goes_on(model, changes, complaint):
    machine = Engine(model, TOKENIZER)
    with pytest.raises(ValueError, match=complaint):
        machine.submit(Request(**{"prompt": [5], **changes}))
    with pytest.raises(ValueError, match=complaint):
        machine.generate([Request([5]), Request(**{"prompt": [5], **changes})])
    assert not machine.busy
    assert len(machine.generate([Request([5], max_tokens=1)])[0]) <= 1


# -- rows


def test_requests_wait_for_a_row_in_their_order(model, monkeypatch):
    monkeypatch.setattr(Engine, "_choose", lambda self, rows, logits, groups: [7] * len(rows))
    machine, events = Engine(model, TOKENIZER, max_rows=2), []
    ids = [machine.submit(Request([n + 1], max_tokens=3)) for n in range(5)]
    run_all(machine, events)
    firsts = list(dict.fromkeys(event.id for event in events))
    assert firsts == ids
    by_step = [event.id for event in events]
    assert max(by_step.index(id) for id in ids[:2]) < min(by_step.index(id) for id in ids[2:])
    assert [sum(event.id == id for event in events) for id in ids] == [3] * 5


def test_a_step_moves_every_active_request_one_token_on(model, monkeypatch):
    monkeypatch.setattr(Engine, "_choose", lambda self, rows, logits, groups: [7] * len(rows))
    machine = Engine(model, TOKENIZER, max_rows=4)
    first = machine.submit(Request([1], max_tokens=4))
    assert [event.id for event in machine.step()] == [first]
    second = machine.submit(Request([2, 3], max_tokens=2))
    assert [event.id for event in machine.step()] == [first, second]
    assert sorted((event.id, event.finish) for event in machine.step()) == [(first, None), (second, "length")]
    assert [(event.id, event.finish) for event in machine.step()] == [(first, "length")]
    assert not machine.busy and machine.step() == []


def test_cancelling_frees_the_row_and_silences_the_request(model, monkeypatch):
    monkeypatch.setattr(Engine, "_choose", lambda self, rows, logits, groups: [7] * len(rows))
    machine = Engine(model, TOKENIZER, max_rows=2)
    a, b, c, d = (machine.submit(Request([n], max_tokens=5)) for n in (1, 2, 3, 4))
    assert {event.id for event in machine.step()} == {a, b}
    machine.cancel(a)  # active
    machine.cancel(d)  # waiting
    machine.cancel(12345)  # nobody
    assert {event.id for event in machine.step()} == {b, c}
    answers = run_all(machine)
    assert set(answers) == {b, c}
    assert answers[c] == ([7] * 4, "length")
    machine.cancel(b)
    assert not machine.busy


def test_leaving_a_stream_early_frees_its_row(model, monkeypatch):
    monkeypatch.setattr(Engine, "_choose", lambda self, rows, logits, groups: [7] * len(rows))
    machine = Engine(model, TOKENIZER, max_rows=1)
    stream = machine.stream(Request([1], max_tokens=50))
    assert next(stream).token == 7
    assert machine.busy
    stream.close()
    assert not machine.busy
    assert [event.token for event in machine.stream(Request([2], max_tokens=2))] == [7, 7]


def test_a_stream_tells_the_events_of_its_request_and_then_ends(model):
    prompt = prompts(1)[0]
    expected, finish = slow_greedy(model, prompt, 12)
    events = list(Engine(model, TOKENIZER).stream(Request(prompt, max_tokens=12)))
    assert [event.token for event in events if event.token is not None] == expected
    assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish == finish


def test_one_question_one_answer_as_the_readme_has_it(model):
    prompt = chat.prompt(TOKENIZER, {"messages": [{"role": "user", "content": "Who are you?"}]})
    expected = chat.visible_text(TOKENIZER, slow_greedy(model, prompt, 20, 100)[0])
    assert engine.ask(model, TOKENIZER, "Who are you?", max_tokens=20) == expected


def test_generating_nothing_gives_nothing(model):
    assert Engine(model, TOKENIZER).generate([]) == []


def test_the_model_can_be_trained_after_it_has_generated():
    model = random_model(small_config(TOKENIZER.vocab_size, 16))
    Engine(model, TOKENIZER, max_length=100).generate([Request([1] * 60, max_tokens=30)])
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# -- going on from the beginning of an answer


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 5, "top_k": 40, "logprobs": 2}])
def test_from_any_of_its_beginnings_an_answer_is_the_same(model, static, settings):
    prompt = [TOKENIZER.bos, *b"go on"]
    machine = Engine(model, TOKENIZER, static=static)
    whole = list(machine.stream(Request(prompt, max_tokens=24, **settings)))
    tokens = [event.token for event in whole if event.token is not None]
    assert len(tokens) > 10
    for cut in range(len(tokens)):
        request = Request(prompt, max_tokens=24 - cut, prefix=tokens[:cut], **settings)
        rest = list(machine.stream(request))
        assert [event.token for event in rest] == [event.token for event in whole[cut:]]
        assert [event.finish for event in rest] == [event.finish for event in whole[cut:]]
        assert "".join(event.text for event in rest) == "".join(event.text for event in whole)


def test_a_call_that_ends_the_beginning_is_carried_out_and_another_result_is_taken_as_it_is(model):
    prompt, call = [TOKENIZER.bos, *b"sum"], [PYTHON, *TOKENIZER.encode("6*7"), PYTHON_END]
    machine = Engine(model, TOKENIZER)
    events = list(machine.stream(Request(prompt, max_tokens=5, prefix=call)))
    output = [OUTPUT, *TOKENIZER.encode("42"), OUTPUT_END]
    assert [event.token for event in events if event.forced] == output == [e.token for e in events[: len(output)]]
    said = [{"type": "python", "text": "6*7"}, {"type": "python_output", "text": ""}]
    assert chat.parts(events[0].pieces) == said
    events = list(machine.stream(Request(prompt, max_tokens=5, prefix=[*call, *output[:-2]])))
    assert [event.token for event in events if event.forced] == output[-2:]
    events = list(machine.stream(Request(prompt, max_tokens=5, prefix=[*call, OUTPUT, *b"9"])))
    assert not any(event.forced for event in events), "the model goes on from a result that is not the tool's"


def test_a_beginning_must_leave_room_for_a_token(model):
    machine, prompt = Engine(model, TOKENIZER), [TOKENIZER.bos, *b"hi"]
    (event,) = machine.stream(Request(prompt, max_tokens=4, prefix=list(b"x" * (T - 4))))
    assert event.finish in ("length", "stop") and event.dropped == 0 and event.prompt_tokens == 3
    with pytest.raises(ValueError, match="room for 61 of 64, and one must be left"):
        machine.submit(Request(prompt, prefix=list(b"x" * (T - 3))))
    with pytest.raises(ValueError, match="a token of the prompt is"):
        machine.submit(Request(prompt, prefix=[TOKENIZER.vocab_size]))
    long = list(machine.stream(Request([TOKENIZER.bos] * 200, max_tokens=40, prefix=list(b"abc"))))
    assert long[0].dropped and long[0].prompt_tokens == T // 2 and len(long) <= T // 2 - 3
