"""Examinations: the letters are read off the right logits, answers find their problems, ranks share the work."""

import itertools
import json
import threading
from types import SimpleNamespace

import pytest
import torch

from nanochat import chat, chat_eval, paths
from nanochat import runtime as rt
from nanochat.chat_eval import chatcore, evaluate_task
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT, GPTConfig
from nanochat.sandbox import run_python
from nanochat.tokenizer import Tokenizer
from tasks.common import Task, multiple_choice_conversation

RUNTIME = rt.Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["How many are there? Respond with the letter A, B, C or D. " * 20], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = GPT(GPTConfig(64, tokenizer.vocab_size, 2, 2, 1, 128, "SL"))
    model.init_weights()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


class Choices(Task):
    """Questions of very different lengths; some have letters of their own."""

    name, kind, baseline = "Choices", "categorical", 0.25

    def __init__(self, size, letters="ABCD"):
        self.size, self.letters = size, letters

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        letters = list(self.letters[: 3 + i % 2])
        return multiple_choice_conversation(
            "why " * (i * 7 % 23), letters, [f"{i}{c}" for c in letters], letters[i % 3]
        )

    def evaluate(self, conversation, answer):
        return answer == conversation["messages"][-1]["content"]


class Sums(Task):
    name = "Sums"

    def __len__(self):
        return 10

    def __getitem__(self, i):
        content = [{"type": "python", "text": f"{i}+1"}, {"type": "text", "text": f"{i + 1}"}]
        return {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": content}]}

    def evaluate(self, conversation, answer):
        return answer == str(int(conversation["messages"][0]["content"]) + 1)


class FakeEngine:
    """Answers the number i with i + 1 on odd seeds and with "no" on even ones; the newest request is served first."""

    seeds = []

    def __init__(self, model, tokenizer, max_rows=64, max_length=None, static=False):
        self.tokenizer, self.max_rows, self.waiting = tokenizer, max_rows, {}

    def submit(self, request):
        digits = [t for t in request.prompt if t not in self.tokenizer.special.values()]
        number = int(self.tokenizer.decode(digits))
        self.seeds.append(request.seed)
        answer = self.tokenizer.encode(str(number + 1) if request.seed % 2 else "no")
        tool = [self.tokenizer.special["<|python_start|>"], *digits, self.tokenizer.special["<|python_end|>"]]
        self.waiting[len(self.seeds)] = [*tool, *answer]
        return len(self.seeds)

    @property
    def busy(self):
        return bool(self.waiting)

    def step(self):
        events = []
        for id in list(self.waiting)[-self.max_rows :]:
            tokens = self.waiting[id]
            token = tokens.pop(0) if tokens else None
            events.append(
                SimpleNamespace(id=id, token=token, forced=False, finish=None if token is not None else "stop")
            )
            if token is None:
                del self.waiting[id]
        return events


@pytest.fixture
def fake_engine(monkeypatch):
    monkeypatch.setattr(chat_eval, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "seeds", [])
    return FakeEngine


def test_the_letter_is_the_likeliest_of_its_own_letters_right_after_the_prompt(model, tokenizer):
    task = Choices(20)
    _, records = evaluate_task(task, model, tokenizer, RUNTIME, batch_size=6)
    with torch.no_grad():
        for record in records:
            conversation = task[record["index"]]
            logits = model(torch.tensor([chat.prompt(tokenizer, conversation)]))[0, -1]
            scores = [logits[tokenizer.encode(letter)[0]].item() for letter in conversation["letters"]]
            assert record["answers"] == [conversation["letters"][scores.index(max(scores))]]
    assert len({record["answers"][0] for record in records}) > 1  # a model that always says A would prove nothing


def test_verdicts_make_the_accuracy(model, tokenizer):
    task = Choices(20)
    summary, records = evaluate_task(task, model, tokenizer, RUNTIME)
    right = [record["answers"] == [task[i]["messages"][1]["content"]] for i, record in enumerate(records)]
    assert [record["correct"] for record in records] == right
    assert summary["accuracy"] == sum(right) / 20
    assert (summary["problems"], summary["baseline"]) == (20, 0.25) and summary["seconds"] > 0
    assert records[3]["index"] == 3 and records[3]["prompt"] == task[3]["messages"][0]["content"]


def test_batches_change_no_answer(model, tokenizer):
    answers = [evaluate_task(Choices(20), model, tokenizer, RUNTIME, batch_size=size)[1] for size in (1, 3, 64)]
    assert answers[0] == answers[1] == answers[2]


def test_evaluation_leaves_the_model_fit_for_training(model, tokenizer):
    evaluate_task(Choices(4), model, tokenizer, RUNTIME)  # prompts beyond sequence_len make the rotary tables grow
    idx = torch.randint(0, 200, (1, 64))
    model(idx, idx).backward()


def test_a_letter_of_several_tokens_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="'Ж' is 2 tokens"):
        evaluate_task(Choices(2, "ЖABC"), model, tokenizer, RUNTIME)


def test_answers_find_their_problems_however_they_finish(fake_engine, tokenizer):
    summary, records = evaluate_task(Sums(), None, tokenizer, RUNTIME, batch_size=3)
    assert [record["index"] for record in records] == list(range(10))
    assert [record["answers"] for record in records] == [[str(i + 1) if i % 2 else "no"] for i in range(10)]
    assert summary["accuracy"] == 0.5
    assert (records[4]["prompt"], records[4]["expected"]) == ("4", "<<4+1>>5")  # a person reads the tool call too
    assert records[4]["said"] == ["<<4>>no"]


def test_the_real_engine_answers_as_one_prompt_at_a_time_does(model, tokenizer):
    task = Sums()
    _, records = evaluate_task(task, model, tokenizer, RUNTIME, batch_size=4, max_new_tokens=80)
    engine = Engine(model, tokenizer, max_rows=1, max_length=120)
    for record in records:
        (tokens,) = engine.generate([Request(chat.prompt(tokenizer, task[record["index"]]), max_tokens=80)])
        assert record["answers"] == [chat.visible_text(tokenizer, tokens)]


def test_one_right_sample_solves_a_problem(fake_engine, tokenizer):
    summary, records = evaluate_task(Sums(), None, tokenizer, RUNTIME, batch_size=3, num_samples=2, temperature=1.0)
    assert summary["accuracy"] == 1.0 and summary["problems"] == 10
    assert records[4]["answers"] == ["no", "5"] and records[4]["verdicts"] == ["wrong", "right"]
    assert summary["pass@k"] == {"1": 0.5, "2": 1.0}
    assert len(set(fake_engine.seeds)) == 20  # every sample has noise of its own


def test_pass_at_k_is_what_drawing_k_of_the_samples_solves():
    verdicts = [["right"] * right + ["wrong"] * (6 - right) for right in (0, 1, 3, 6)]
    found = chat_eval.pass_at_k([{"verdicts": each} for each in verdicts], 6)
    assert list(found) == ["1", "2", "4", "6"]
    for k, share in found.items():
        draws = [list(itertools.combinations(each, int(k))) for each in verdicts]
        assert share == pytest.approx(sum(sum("right" in d for d in of) / len(of) for of in draws) / len(verdicts))


class Programs(Sums):
    """Verdicts take a process each."""

    def verdict(self, conversation, answer):
        seen = run_python(f"print({answer!r})", timeout=20.0).stdout.strip()
        return super().verdict(conversation, seen)


def test_verdicts_that_take_processes_are_reached_beside_each_other(fake_engine, tokenizer):
    summary, records = evaluate_task(Programs(), None, tokenizer, RUNTIME, batch_size=3)
    assert [record["index"] for record in records] == list(range(10)) and summary["accuracy"] == 0.5


def test_max_problems_takes_the_first(fake_engine, tokenizer):
    summary, records = evaluate_task(Sums(), None, tokenizer, RUNTIME, max_problems=4)
    assert [record["index"] for record in records] == [0, 1, 2, 3] and summary["problems"] == 4
    assert evaluate_task(Sums(), None, tokenizer, RUNTIME, max_problems=99)[0]["problems"] == 10
    with pytest.raises(ValueError, match="at least one problem"):
        evaluate_task(Sums(), None, tokenizer, RUNTIME, max_problems=0)


@pytest.mark.parametrize("size, world_size", [(7, 2), (2, 3)])
def test_ranks_share_the_problems_and_agree(model, tokenizer, size, world_size):
    gathered, barrier, results = {}, threading.Barrier(world_size, timeout=60), {}

    def work(rank):
        def gather(value):
            gathered[rank] = value
            barrier.wait()
            return [gathered[r] for r in range(world_size)]

        device = torch.device("cpu")
        fake = SimpleNamespace(rank=rank, world_size=world_size, is_main=False, device=device, gather=gather)
        results[rank] = evaluate_task(Choices(size), model, tokenizer, fake)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    alone_summary, alone_records = evaluate_task(Choices(size), model, tokenizer, RUNTIME)
    assert sum(len(part) for part in gathered.values()) == size
    for rank in range(world_size):
        summary, records = results[rank]
        assert records == alone_records and summary["accuracy"] == alone_summary["accuracy"]


def test_chatcore_is_zero_at_chance_and_one_when_perfect():
    assert chatcore({"a": {"accuracy": 0.25, "baseline": 0.25}, "b": {"accuracy": 0.0, "baseline": 0.0}}) == 0
    assert chatcore({"a": {"accuracy": 1.0, "baseline": 0.25}, "b": {"accuracy": 1.0, "baseline": 0.0}}) == 1
    assert chatcore({"a": {"accuracy": 0.625, "baseline": 0.25}, "b": {"accuracy": 0.1, "baseline": 0.0}}) == 0.3


# --- the command


@pytest.fixture
def script(monkeypatch, tmp_path, model, tokenizer):
    """scripts.chat_eval with a model that is always found."""
    from scripts import chat_eval as script

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    meta = {"stage": "sft", "tag": "d2", "step": 7}
    monkeypatch.setattr(script, "load_model", lambda source, runtime, tag, step: (model, tokenizer, meta))
    return script


def test_command_writes_results_and_every_problem(script, fake_engine, monkeypatch, capsys):
    monkeypatch.setattr(script, "TASKS", {"Choices": lambda: Choices(5), "Sums": Sums})
    script.main(script.parse_args(["-a", "Sums|Choices", "-x", "4", "-b", "2", "--device-type", "cpu"]))
    result = json.loads((paths.results_dir("d2") / "chat_eval_sft.json").read_text())
    assert (result["source"], result["step"], result["chatcore"]) == ("sft", 7, None)
    assert list(result["tasks"]) == ["Sums", "Choices"]
    assert result["tasks"]["Sums"].keys() == {"accuracy", "problems", "available", "baseline", "seconds"}
    lines = (paths.results_dir("d2") / "chat_eval_sft.problems.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    assert [(problem["task"], problem["index"]) for problem in problems[:5]] == [
        *(("Sums", i) for i in range(4)),
        ("Choices", 0),
    ]
    assert problems[1]["answers"] == ["2"] and problems[1]["correct"] is True
    printed = capsys.readouterr().out
    assert "Sums" in printed and "0.5000" in printed and "problems.jsonl" in printed


def test_chatcore_is_reported_when_its_six_tasks_were_taken(script, monkeypatch):
    monkeypatch.setattr(script, "TASKS", {name: lambda: Choices(3) for name in script.CHATCORE_TASKS})
    script.main(script.parse_args(["-i", "rl", "--device-type", "cpu"]))
    result = json.loads((paths.results_dir("d2") / "chat_eval_rl.json").read_text())
    assert result["source"] == "rl" and result["chatcore"] == pytest.approx(chatcore(result["tasks"]))


def test_task_names_are_checked_and_tinyworld_is_all_of_its_kinds(script):
    assert script.parse_args([]).names == list(script.CHATCORE_TASKS)
    tiny = script.parse_args(["-a", "tinyworld"]).names
    assert {"facts_new_phrasing", "facts_never_asked", "arithmetic", "counting", "unknown_refused"} <= set(tiny)
    with pytest.raises(SystemExit, match="'GSM9K'.*GSM8K"):
        script.parse_args(["-a", "MMLU|GSM9K"])


@pytest.mark.parametrize("flags", [["-x", "0"], ["-n", "0"], ["-b", "0"], ["-n", "4"]])
def test_impossible_flags_are_refused(script, flags, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(flags)
    assert "expected at least 1" in capsys.readouterr().err or flags == ["-n", "4"]
