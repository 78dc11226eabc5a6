"""Reinforcement learning: what is learned is what the model chose, in proportion to how much better it was; for any
number of samples, ranks and rows at once, killed or not. And it learns."""

import json
import shutil

import practice
import pytest
import torch
from helpers import CPU, all_ranks, byte_tokenizer, optimizer_of, random_model, rank_of, read_jsonl, small_config
from safetensors.torch import load_file
from small_runs import (
    REPOSITORY,
    Killed,
    Letters,
    assert_same_run,
    complaint,
    kill_in_step,
    lines,
    make_world,
    practise,
    rename_model,
    teach,
    torchrun,
)

from nanochat import chat, chat_eval, checkpoint, paths, results, rollouts
from nanochat.calculator import calculator
from nanochat.chat_eval import pass_at_k
from nanochat.engine import Engine, Request
from nanochat.memory import DeviceBatch
from nanochat.rollouts import Rollout, compare, entropy_and_kl, policy_loss, rows_of, sample
from nanochat.training_step import optimizer_step
from scripts import bench_rl, chat_rl
from tasks import mixtures
from tasks.common import Mixture
from tasks.tinyworld import TinyWorld

TOKENIZER = byte_tokenizer()
END = TOKENIZER.special["<|assistant_end|>"]
SAMPLING = {"max_tokens": 10, "temperature": 1.0, "top_k": 50}


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(TOKENIZER.vocab_size, 64))


def asked(*texts):
    return [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "?"}]} for text in texts]


def group_of(*rewards, prompt=(7, 8, 9), seed=0):
    """Answers of random lengths, a tool's words in the middle of each."""
    draw = torch.Generator().manual_seed(seed)
    group = []
    for _ in rewards:
        length = int(torch.randint(3, 12, (), generator=draw))
        answer = torch.randint(0, 250, (length,), generator=draw).tolist()
        chosen = [not 1 <= i < length // 2 for i in range(length)]
        group.append(Rollout([*prompt, *answer], [False] * len(prompt) + chosen))
    compare(group, list(rewards))
    return group


GROUPS = [
    group_of(1, 0, 0, 1, 1, seed=1),
    group_of(0, 0, 0, 0, 0, prompt=range(20), seed=2),
    group_of(0.2, 0.9, 0.9, 0, 0, prompt=(1,), seed=3),
]


# -- samples


def test_all_questions_together_get_the_answers_that_each_gets_alone(model):
    questions, task = asked("hello", "what is the time?", "x"), Letters()
    seeds = [100, 200, 300]
    together = sample(Engine(model, TOKENIZER, 7), task, questions, seeds, 5, **SAMPLING)
    engine = Engine(model, TOKENIZER, 1)
    for question, seed, group in zip(questions, seeds, together, strict=True):
        prompt = chat.prompt(TOKENIZER, question)
        for i, rollout in enumerate(group):
            events = list(engine.stream(Request(prompt, seed=seed + i, **SAMPLING)))
            tokens = [event.end if event.token is None else event.token for event in events]
            assert rollout.ids == prompt + tokens
            text = "".join(event.text for event in events)
            assert rollout.reward == task.reward(question, text)
    assert len({tuple(rollout.ids) for group in together for rollout in group}) == 15


def scripted(model, tokens):
    """An engine whose model chooses these tokens, one after the other."""
    engine, script = Engine(model, TOKENIZER, 1), iter(tokens)
    engine._choose = lambda rows, logits, groups: [next(script)]
    return engine


def test_the_end_mark_is_learned_and_what_a_tool_says_is_not(model):
    special = TOKENIZER.special
    call = [special["<|python_start|>"], *TOKENIZER.encode("6*7"), special["<|python_end|>"]]
    output = [special["<|output_start|>"], *TOKENIZER.encode(calculator("6*7")), special["<|output_end|>"]]
    script = [*call, *[0] * len(output), *TOKENIZER.encode("e!"), END]
    (group,) = sample(scripted(model, script), Letters(), asked("6*7?"), [0], 1, 64, 1.0, 50)
    prompt = chat.prompt(TOKENIZER, asked("6*7?")[0])
    (rollout,) = group
    assert rollout.ids == [*prompt, *call, *output, *TOKENIZER.encode("e!"), END]
    assert rollout.chosen == [False] * len(prompt) + [True] * len(call) + [False] * len(output) + [True] * 3
    assert rollout.said == "<<6*7>>[42]e!" and rollout.reward == 1 / 6
    compare([rollout, group_of(0)[0]], [1.0, 0.0])
    _, targets, _, _ = rows_of([[rollout]], TOKENIZER.bos, CPU)
    learned = [token for token in targets[0].tolist() if token >= 0]
    assert learned == [*call, *TOKENIZER.encode("e!"), END]


def test_an_answer_that_is_cut_off_has_no_end_mark(model):
    (group,) = sample(scripted(model, TOKENIZER.encode("eee!")), Letters(), asked("go"), [0], 1, 3, 1.0, 50)
    assert group[0].said == "eee" and group[0].ids[-3:] == TOKENIZER.encode("eee") and all(group[0].chosen[-3:])


def test_a_rehearsal_cuts_answers_to_the_expected_length_and_finds_something_to_learn_from(model):
    """Its model has learned nothing: it would neither end its answers nor be right."""
    questions = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "x" * (3 + i)}]}
        for i in range(8)
    ]
    engine, seeds = Engine(model, TOKENIZER, 24), list(range(0, 80, 10))
    groups = sample(engine, Letters(), questions, seeds, 3, 16, 1.0, 50, rehearse=True)
    for i, group in enumerate(groups):
        lengths = [len(rollout.ids) - len(chat.prompt(TOKENIZER, questions[i])) for rollout in group]
        assert lengths == [16, 3 + i + 1, 3 + i + 1]  # the end mark counts
        assert [rollout.reward for rollout in group] == [float(i % 4 == 0), 0, 0]
    assert rows_of(groups, TOKENIZER.bos, CPU)[0].size(0) == 6


# -- the gradient


def gradient(model, groups, device_rows=3, machine=CPU):
    """By the code of training: the step's gradients, kept from the update."""
    optimizer, kept = optimizer_of(model), {}
    optimizer.step = lambda: kept.update((n, p.grad.clone()) for n, p in model.named_parameters())
    batch = rows_of(groups, TOKENIZER.bos, machine)
    optimizer_step(policy_loss(model), optimizer, batch, DeviceBatch(device_rows, machine), machine)
    return kept


def gradient_by_hand(model, groups):
    """Minus the gradient of the sum over all answers of advantage times log-probability of the chosen tokens, over
    their number: one answer at a time, nothing skipped."""
    model.zero_grad()
    count = sum(sum(rollout.chosen) for group in groups for rollout in group)
    for group in groups:
        mean = sum(rollout.reward for rollout in group) / len(group)
        for rollout in group:
            logs = model(torch.tensor([rollout.ids[:-1]]))[0].log_softmax(-1)
            chosen = [logs[t, rollout.ids[t + 1]] for t in range(len(logs)) if rollout.chosen[t + 1]]
            (-(rollout.reward - mean) * sum(chosen) / count).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-7), name
    assert max(value.abs().max() for value in wanted.values()) > 1e-3


@pytest.mark.parametrize("device_rows", [1, 3, 8, 64])  # 10 rows are learned from
def test_the_step_is_the_policy_gradient_for_any_number_of_rows_at_once(model, device_rows):
    assert_close(gradient(model, GROUPS, device_rows), gradient_by_hand(model, GROUPS))


def test_ranks_share_the_rows_of_a_step(model, monkeypatch):
    def work(rank):
        return [tensor.clone() for tensor in rows_of(GROUPS, TOKENIZER.bos, rank_of(rank, 3))]

    shares = all_ranks(3, monkeypatch, work)
    (whole,) = [rows_of(GROUPS, TOKENIZER.bos, CPU)]
    assert [len(share[0]) for share in shares] == [4, 4, 4]  # 10 rows, and two that are empty
    assert len(whole[0]) == 10

    def contents(share):
        for idx, targets, weights, length in zip(*share, strict=True):
            if (targets >= 0).any():
                yield idx[:length].tolist(), targets[:length].tolist(), weights[:length].tolist()

    assert sorted(row for share in shares for row in contents(share)) == sorted(contents(whole))


def test_a_question_whose_answers_score_the_same_makes_no_rows():
    groups = [group_of(1, 1), group_of(0.1, 0.1, 0.1), group_of(0, 0)]
    inputs, targets, weights, lengths = rows_of(groups, TOKENIZER.bos, CPU)
    assert inputs.shape == (1, 1) and not (targets >= 0).any() and not weights.any() and lengths.tolist() == [1]
    told = rollouts.figures([*groups, group_of(1, 0)], 2.0)
    assert told["skipped_questions"] == 0.75 and told["reward"] == pytest.approx((2 + 0.3 + 0 + 1) / 9)
    assert rollouts.num_learned(groups) == 0


def test_entropy_and_divergence_are_those_of_the_whole_vocabulary(model):
    other = random_model(model.config, seed=5)
    entropy, kl = entropy_and_kl(model, other, GROUPS, CPU)
    entropies, kls = [], []
    for rollout in [group[0] for group in GROUPS]:
        idx = torch.tensor([rollout.ids[:-1]])
        with torch.no_grad():
            logs, others = (each(idx)[0].double().log_softmax(-1) for each in (model, other))
        for t, chosen in enumerate(rollout.chosen[1:]):
            if chosen:
                entropies.append(-sum(p.exp() * p for p in logs[t]))
                kls.append(sum(p.exp() * (p - q) for p, q in zip(logs[t], others[t], strict=True)))
    assert entropy == pytest.approx(float(sum(entropies) / len(entropies)), rel=1e-4)
    assert kl == pytest.approx(float(sum(kls) / len(kls)), rel=1e-4) and kl > 0.01
    assert entropy_and_kl(model, model, GROUPS, CPU)[1] == 0


# -- runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    for folder in make_world(tmp_path_factory.mktemp("world")):
        teach("d2", "--num-iterations 4")
        yield folder


@pytest.fixture(scope="module")
def practised(world):
    """Six steps of the model `pupil`."""
    copy_of_the_model("pupil")
    practise("pupil", "--num-iterations 6 --eval-every 4 --eval-examples 6 --eval-samples 3 --save-every 2")


def copy_of_the_model(tag):
    shutil.copytree(paths.checkpoint_dir("sft", "d2"), paths.checkpoint_dir("sft", tag))
    rename_model(tag, "sft")


def answers(tag):
    return read_jsonl(paths.results_dir(tag) / "chat_rl.answers.jsonl")


def test_what_is_logged(practised):
    logged = lines("pupil", "chat_rl")
    steps = [line for line in logged if "reward" in line]
    assert [line["step"] for line in steps] == list(range(6))
    assert all(0 <= line["skipped_questions"] <= 1 and line["entropy"] > 0 and line["kl"] >= 0 for line in steps)
    assert all(0 < line["sequence_length"] <= 12 for line in steps)
    assert steps[0]["kl"] == 0 and steps[-1]["kl"] > 0
    examined = [line for line in logged if "pass@1" in line]
    assert [line["step"] for line in examined] == [0, 4, 6]
    assert all(line.keys() == {"step", "pass@1", "pass@2", "pass@3"} for line in examined)
    assert all(line["pass@1"] <= line["pass@2"] <= line["pass@3"] for line in examined)
    raw = read_jsonl(paths.results_dir("pupil") / "chat_rl.jsonl")
    assert all(line["rollout/tok_per_sec"] > 0 and "train/tok_per_sec" in line for line in raw if "reward" in line)
    told = results.read("pupil", "chat_rl")
    assert told["final"]["pass@3"] == examined[-1]["pass@3"] and told["examinations"] == examined
    assert [part["step"] for part in told["course"]] == list(range(6))


def test_the_answers_can_be_read(practised):
    kept = answers("pupil")
    assert [line["step"] for line in kept] == [step for step in range(6) for _ in range(4)]
    for line in kept:
        assert line["question"].startswith("What is ") and line["expected"] == "e"
        assert sum(one["count"] for one in line["answers"]) == 4
        assert all(one["reward"] == min(one["said"].count("e"), 6) / 6 for one in line["answers"])
    mean = sum(one["reward"] * one["count"] for line in kept[:4] for one in line["answers"]) / 16
    assert mean == pytest.approx(next(line["reward"] for line in lines("pupil", "chat_rl") if "reward" in line))


def test_each_question_comes_once_an_epoch(practised):
    order = [chat_rl.question_at(number, 30, 42) for number in range(60)]
    assert sorted(order[:30]) == sorted(order[30:]) == list(range(30)) and order[:30] != order[30:]
    assert [line["question"] for line in answers("pupil")] == [f"What is {i}?" for i in order[:24]]
    assert chat_rl.question_at(7, 30, 1) != order[7]


def test_practice_that_is_killed_and_resumed_equals_one_that_was_not(practised, monkeypatch):
    flags = "--num-iterations 6 --eval-every 4 --eval-examples 6 --eval-samples 3 --save-every 2"
    copy_of_the_model("truant")
    for number, resume in ((4, ""), (3, "--resume")):  # in the steps 3 and 4
        with monkeypatch.context() as patch:
            kill_in_step(patch, number)
            with pytest.raises(Killed):
                practise("truant", f"{flags} {resume}")
    practise("truant", f"{flags} --resume-from-step 2")
    assert_same_run("truant", "pupil", "rl")
    assert answers("truant") == answers("pupil")
    told, other = (results.read(tag, "chat_rl") for tag in ("truant", "pupil"))
    assert told["examinations"] == other["examinations"]


def test_a_seed_makes_a_run_and_another_one_another(practised):
    copy_of_the_model("again")
    practise("again", "--num-iterations 2 --eval-every -1")
    assert answers("again") == answers("pupil")[:8]
    practise("again", "--num-iterations 2 --eval-every -1 --seed 1")
    assert answers("again") != answers("pupil")[:8]


def test_rates_fall_linearly_and_every_answer_has_noise_of_its_own(world, monkeypatch):
    rates, seeds = [], []
    set_rates, sample = chat_rl.MuonAdamW.set_rates, rollouts.sample
    monkeypatch.setattr(
        chat_rl.MuonAdamW, "set_rates", lambda self, *args: (rates.append(args), set_rates(self, *args))
    )
    monkeypatch.setattr(rollouts, "sample", lambda *args: (seeds.append(args[3:5]), sample(*args))[1])
    practise("d2", "--num-iterations 4 --eval-every -1")
    assert rates == [(1.0, 0.95), (0.75, 0.95), (0.5, 0.95), (0.25, 0.95)]
    drawn = [seed + i for first, count in seeds for seed in first for i in range(count)]
    assert len(drawn) == len(set(drawn)) == 4 * 4 * 4


def test_what_is_examined_is_held_out_and_saved_before(world, monkeypatch):
    examined = []

    def evaluate_task(task, *args, **more):
        examined.append((task[0]["messages"][0]["content"], checkpoint.list_steps(paths.checkpoint_dir("rl", "d2"))))
        if len(examined) == 2:
            raise ValueError("the examination fails")
        return chat_eval.evaluate_task(task, *args, **more)

    monkeypatch.setattr(chat_rl, "evaluate_task", evaluate_task)
    shutil.rmtree(paths.checkpoint_dir("rl", "d2"), ignore_errors=True)
    complaint(practise, "d2", "--num-iterations 4 --eval-every 2 --eval-examples 3 --save-every -1")
    assert examined == [("What was 0?", []), ("What was 0?", [2])]


@pytest.mark.parametrize("flags", ["--examples-per-step 1 --num-samples 2", "--examples-per-step 3 --num-samples 5"])
def test_any_number_of_samples_for_any_batch(world, flags):
    practise("d2", f"{flags} --device-batch-size 7 --num-iterations 2 --eval-every -1")
    steps = [line for line in lines("d2", "chat_rl") if "reward" in line]
    assert len(steps) == 2 and checkpoint.find("rl", "d2").name == "step_000002"


def test_a_step_without_advantages_leaves_the_model_as_it_is(world, monkeypatch):
    monkeypatch.setattr(Letters, "reward", lambda self, conversation, answer: 1.0)
    practise("d2", "--num-iterations 2 --eval-every -1")
    before, after = (load_file(checkpoint.find(stage, "d2") / "model.safetensors") for stage in ("sft", "rl"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    steps = [line for line in lines("d2", "chat_rl") if "reward" in line]
    assert [line["skipped_questions"] for line in steps] == [1, 1] and [line["train/lrm"] for line in steps] == [0, 0]


def test_rewards_teach(world):
    practise(
        "d2",
        "--num-iterations 25 --eval-every 25 --eval-examples 8 --eval-samples 8 --num-samples 8 --init-lr-frac 0.5",
    )
    told = results.read("d2", "chat_rl")
    assert told["course"][-1]["reward"] > 0.8 > 0.4 > told["course"][0]["reward"]
    assert told["examinations"][-1]["pass@1"] > 0.95


def test_in_float16_the_loss_is_scaled_and_the_run_goes_on(world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    practise("d2", "--num-iterations 3 --eval-every -1")
    meta = checkpoint.read_meta(checkpoint.find("rl", "d2"))
    assert meta["dtype"] == "float16" and meta["progress"]["loss_scale"] >= 1024 and meta["progress"]["skipped"] == 0
    before, after = (load_file(checkpoint.find(stage, "d2") / "model.safetensors") for stage in ("sft", "rl"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("questions", [5, 1])
def test_two_ranks_take_the_same_steps_as_one(world, questions):
    flags = f"--num-iterations 3 --eval-every 3 --eval-examples 1 --init-lr-frac 0.01 --examples-per-step {questions}"
    one, two = f"one{questions}", f"two{questions}"
    for tag in (one, two):
        copy_of_the_model(tag)
    practice.main(one, *flags.split())
    torchrun(str(REPOSITORY / "tests" / "practice.py"), two, *flags.split())
    assert answers(one) == answers(two)
    weights, others = (load_file(checkpoint.find("rl", tag) / "model.safetensors") for tag in (one, two))
    start = load_file(checkpoint.find("sft", one) / "model.safetensors")
    for name, value in weights.items():
        assert value.dtype == torch.float64
        assert torch.allclose(value, others[name], rtol=0, atol=1e-9), name
    assert max((weights[name] - start[name]).abs().max().item() for name in start) > 1e-4


def test_the_benchmark_compares_three_ways_to_the_same_answers(world, capsys, monkeypatch):
    monkeypatch.setattr(mixtures, "practice", lambda name: Letters())
    flags = "--task tiny --examples-per-step 3 --num-samples 4 --max-new-tokens 8 --rounds 1 --device-type cpu"
    bench_rl.main(bench_rl.parse_args(flags.split()))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["answers_that_differ"] == 0 and found["tokens"] > 20
    assert found["speedup_over"].keys() == {"by_question", "by_answer"} and min(found["tok_per_sec"].values()) > 0


# -- mistakes


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--num-samples 1", "compared"),
        ("--temperature 0", "expected more than 0"),
        ("--examples-per-step 0", "1 or more"),
        ("--seed -1", "0 or more"),
        ("--log-questions -1", "0 or more"),
        ("--task letters", "invalid choice"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit):
        chat_rl.parse_args(flags.split())
    assert said in capsys.readouterr().err


def test_without_an_sft_model_one_line_says_what_makes_one(world):
    assert "python -m scripts.chat_sft --model-tag d9" in complaint(practise, "d9")


def test_a_run_goes_on_only_with_its_own_practice(practised):
    kept = sorted(path.name for path in paths.checkpoint_dir("rl", "pupil").iterdir())
    for flags in ("--seed 3", "--num-samples 5", "--examples-per-step 2"):
        message = complaint(practise, "pupil", f"--resume --num-iterations 8 {flags}")
        assert "practice" in message and "--resume" in message
    assert sorted(path.name for path in paths.checkpoint_dir("rl", "pupil").iterdir()) == kept


def test_a_refused_resume_changes_nothing(practised):
    folder = paths.results_dir("pupil")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "--num-iterations 6" in complaint(practise, "pupil", "--resume --num-iterations 3")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# -- what is practised


def test_practice_has_verdicts_and_shares_no_question_with_what_is_held_out():
    task, held_out = mixtures.practice("tiny"), mixtures.held_out("tiny")
    questions = {conversation["messages"][0]["content"] for conversation in task}
    for conversation in [task[i] for i in range(300)]:
        said = conversation["messages"][-1]["content"][-1]["text"]
        assert task.reward(conversation, said) == 1 and task.reward(conversation, "I do not know.") == 0
    assert not questions & {held_out[i]["messages"][0]["content"] for i in range(400)}
    taught = {c["messages"][0]["content"] for c in TinyWorld("arithmetic_hard", "train", 150)}
    hard = {c["messages"][0]["content"] for c in TinyWorld("arithmetic_hard", "practice", 5000)}
    assert len(hard) > 4500 and len(hard & taught) < 5


def test_a_mixture_leaves_the_verdict_to_the_task_of_the_row():
    mixture = Mixture([Letters(3), TinyWorld("arithmetic", "practice", 3)])
    for conversation in mixture:
        letters = conversation["messages"][-1]["content"] == "e"
        assert mixture.evaluate(conversation, "eee") == letters
        assert mixture.reward(conversation, "e") == (1 / 6 if letters else 0)
        assert mixture.verdict(conversation, "eee") == ("right" if letters else "wrong")


def test_pass_at_any_k():
    records = [{"verdicts": ["right", "wrong", "wrong"]}, {"verdicts": ["wrong"] * 3}]
    assert pass_at_k(records, 3, range(1, 4)) == pytest.approx({"1": 1 / 6, "2": 1 / 3, "3": 1 / 2})
    assert list(pass_at_k(records, 3)) == ["1", "2", "3"]


def test_the_history_of_a_run_is_made_of_its_log():
    figures = dict.fromkeys(rollouts.COURSE, 0.0)
    log = [{"step": 0, "pass@1": 0.25}]
    for i in range(25):
        log.append({"step": i, **figures, "reward": float(i), "rollout/dt": 2.0, "train/dt": 1.0})
    log.append({"step": 25, "pass@1": 0.75})
    told = json.loads(json.dumps(rollouts.history(log)))
    assert [part["step"] for part in told["course"]] == [1, 4, 6, 9, 11, 14, 16, 19, 21, 24]
    assert told["course"][0]["reward"] == 0.5 and told["final"]["reward"] == 23
    assert told["final"]["pass@1"] == 0.75 and told["final"]["step"] == 25
    assert told["final"]["rollout_seconds"] == 50 and told["final"]["training_seconds"] == 25
