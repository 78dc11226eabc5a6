"""What the terminal chat promises: only the answer with -p, a history that fits, and a Ctrl-C that stops answers.
And what `chat_web` does before and after it serves."""

import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import torch
from helpers import random_model, save_checkpoint, small_config

from nanochat import paths, terminal
from nanochat.engine import Engine, Event
from nanochat.gpt import GPTConfig, build_model
from nanochat.runtime import start
from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer
from scripts import chat_cli, chat_web

ROOT = Path(__file__).parents[1]
TOKENIZER = Tokenizer(SPLIT_PATTERN, [bytes([byte]) for byte in range(256)])


class FakeEngine:
    """Answers "one two three"; `on_token` is called with the number of tokens said before each one."""

    max_length = 10_000

    def __init__(self, answer="one two three", on_token=lambda count: None):
        self.answer, self.on_token = answer, on_token
        self.requests, self.cancelled = [], []

    def submit(self, request):
        self.requests.append(request)
        self.left = TOKENIZER.encode(self.answer)
        self.count = 0
        return len(self.requests)

    def step(self):
        self.on_token(self.count)
        chances = {"logprob": -0.1, "likeliest": [(65, -0.1), (10, -3.0)]}
        if not self.left:
            return [Event(1, None, False, "stop", end=TOKENIZER.special["<|assistant_end|>"], **chances)]
        self.count += 1
        token, finish = self.left.pop(0), "length" if self.count == self.requests[-1].max_tokens else None
        return [Event(1, token, False, finish, pieces=[("text", TOKENIZER.decode([token]))], **chances)]

    def cancel(self, row):
        self.cancelled.append(row)


def chat_with(engine, **options):
    return chat_cli.Chat(engine, TOKENIZER, temperature=0.6, top_k=50, **options)


def type_lines(monkeypatch, *lines):
    """Make input() return these lines, raise those that are exceptions, and end with Ctrl-D."""
    waiting = [*lines, EOFError()]

    def fake_input(prompt=""):
        line = waiting.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", fake_input)


def text_of(ids):
    return TOKENIZER.decode(ids)


def test_the_history_is_part_of_the_next_prompt_until_it_is_cleared(monkeypatch, capsys):
    engine = FakeEngine()
    type_lines(monkeypatch, "first question", "second question", "/clear", "third question")
    chat_cli.converse(chat_with(engine))
    second, third = (text_of(request.prompt) for request in engine.requests[1:])
    assert "first question" in second and "one two three" in second and "second question" in second
    assert "question" not in third.replace("third question", "")
    assert capsys.readouterr().out.count("nanochat: one two three\n") == 3


def test_quit_leaves_and_unknown_commands_are_not_sent_to_the_model(monkeypatch, capsys):
    engine = FakeEngine()
    type_lines(monkeypatch, "", "/help", "/nonsense", "/quit", "never asked")
    chat_cli.converse(chat_with(engine))
    assert not engine.requests
    out = capsys.readouterr().out
    assert "/clear" in out and "/nonsense is not a command" in out


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch, capsys):
    def interrupt(count):
        if count == 7 and len(engine.requests) == 1:
            signal.raise_signal(signal.SIGINT)

    engine = FakeEngine(on_token=interrupt)
    type_lines(monkeypatch, "first question", "second question")
    before = signal.getsignal(signal.SIGINT)
    chat_cli.converse(chat_with(engine))
    assert engine.cancelled == [1]
    assert "one two " in text_of(engine.requests[1].prompt) and "three" not in text_of(engine.requests[1].prompt)
    captured = capsys.readouterr()
    assert "stopped" in captured.err and "one two three" in captured.out
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_noticed_while_a_question_is_read(monkeypatch, capsys):
    model = random_model(small_config(TOKENIZER.vocab_size, sequence_len=1024))
    engine = Engine(model, TOKENIZER, max_rows=1)
    monkeypatch.setattr("nanochat.engine.PREFILL", {"cpu": (16, 16)})
    step, steps = engine.step, []

    def interrupted_step():
        steps.append(step())
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return steps[-1]

    engine.step = interrupted_step
    chat = chat_with(engine)
    chat_cli.say(chat.answer("x" * 600))
    assert steps == [[], []] and chat.messages() == [] and not engine.busy
    assert "stopped" in capsys.readouterr().err


def test_answers_are_taken_back_and_asked_for_again(monkeypatch, capsys):
    engine = FakeEngine()
    type_lines(monkeypatch, "/retry", "first", "second", "/retry", "/undo", "/system be kind", "third")
    chat = chat_with(engine)
    chat_cli.converse(chat)
    prompts = [text_of(request.prompt) for request in engine.requests]
    assert prompts[1] == prompts[2] and "second" in prompts[1]
    assert "second" not in prompts[3] and "be kind\n\nfirst" in prompts[3] and "third" in prompts[3]
    assert engine.requests[1].seed != engine.requests[2].seed
    assert [question for question, _ in chat.turns] == ["first", "third"]
    assert "nothing was asked yet" in capsys.readouterr().out


def test_an_answer_that_says_nothing_is_no_part_of_the_history_and_takes_none_away(monkeypatch, capsys):
    engine = FakeEngine()
    submit, answers = engine.submit, iter(["one", "", "", "two", ""])

    def submit_next(request):
        engine.answer = next(answers)
        return submit(request)

    engine.submit = submit_next
    type_lines(monkeypatch, "A", "B", "/retry", "/retry", "/retry", "/undo", "/undo", "/undo")
    chat = chat_with(engine)
    chat_cli.converse(chat)
    asked = [text_of(request.prompt) for request in engine.requests]
    assert all("B" in prompt for prompt in asked[1:]) and len(set(asked[1:])) == 1
    out = capsys.readouterr().out
    assert "the answer before stays" in out and out.count("taken back: B") == out.count("taken back: A") == 1
    assert chat.turns == []


def test_sampling_is_set_by_commands_and_nonsense_changes_nothing(monkeypatch, capsys):
    engine = FakeEngine()
    type_lines(monkeypatch, "/temperature 1.5", "/topk 7", "/temperature 9", "/temperature x", "/topk -1", "hi")
    chat_cli.converse(chat_with(engine))
    assert (engine.requests[0].temperature, engine.requests[0].top_k) == (1.5, 7)
    assert capsys.readouterr().out.count("expected a") == 3


def test_the_last_answer_is_shown_token_by_token(monkeypatch, capsys):
    type_lines(monkeypatch, "/tokens", "hi", "/tokens")
    chat_cli.converse(chat_with(FakeEngine(answer="A ")))
    out = capsys.readouterr().out
    assert "no answer yet" in out
    lines = [line.split() for line in out.splitlines() if " %" in line]
    assert [line[2] for line in lines] == ["A", "·", "<|assistant_end|>"]
    assert lines[0] == ["90", "%", "A", "⏎", "5.0", "%"], "what it might have been"


def test_a_line_that_ends_with_a_backslash_goes_on(monkeypatch):
    engine = FakeEngine()
    type_lines(monkeypatch, "first\\", "second")
    chat_cli.converse(chat_with(engine))
    assert "first\nsecond" in text_of(engine.requests[0].prompt)


def test_what_a_model_writes_cannot_command_the_terminal(capsys):
    chat_cli.say(chat_with(FakeEngine(answer="a\x1b]0;title\x07\r\nb\tc")).answer("hi"))
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07\\x0d\nb\tc\n"
    assert terminal.plain("\x9b2J é🙂") == "\\x9b2J é🙂"


def test_calls_of_tools_are_shown_in_colour_and_left_out_without(capsys):
    pieces = [
        ("text", "It is "),
        ("python", ""),
        ("python", "2+"),
        ("python", "3"),
        ("python_output", ""),
        ("python_output", "5"),
    ]
    chat_cli.say(iter([*pieces, ("text", " 5.")]))
    assert capsys.readouterr().out == "It is  5.\n"
    chat_cli.say(iter([*pieces, ("text", " 5.")]), colour=True)
    assert re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out) == "It is <<2+3>>[5] 5.\n"


def test_ctrl_c_at_the_prompt_does_not_leave(monkeypatch, capsys):
    engine = FakeEngine()
    type_lines(monkeypatch, KeyboardInterrupt(), "a question")
    chat_cli.converse(chat_with(engine))
    assert len(engine.requests) == 1


def test_a_long_history_keeps_its_beginning_mark_and_newest_turns_and_says_so(monkeypatch, capsys):
    engine = Engine(random_model(small_config(TOKENIZER.vocab_size)), TOKENIZER, max_rows=1, max_length=300)
    engine.ends = set()
    random.seed(1)  # of the noise, which chooses the beginning mark now and then
    type_lines(monkeypatch, *(f"question {i} " + "x" * 60 for i in range(4)))
    chat_cli.converse(chat_with(engine))
    prompt = engine.cache.ids[0, :150].tolist()
    assert prompt[0] == TOKENIZER.bos and prompt.count(TOKENIZER.bos) == 1
    assert "question 3" in text_of(prompt) and "question 0" not in text_of(prompt)
    said = capsys.readouterr()
    assert "too long" in said.err and "cut off after" in said.err


def test_an_answer_that_is_cut_off_says_so(capsys):
    chat_cli.say(chat_with(FakeEngine(answer="x" * 1000)).answer("hi"))
    captured = capsys.readouterr()
    assert captured.out == "x" * chat_cli.MAX_TOKENS + "\n" and "cut off after 256 tokens" in captured.err


@pytest.fixture
def tiny_model(tmp_path, monkeypatch):
    """A model of random weights on disk, found as any trained one is."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runtime = start("cpu")
    config = GPTConfig(64, TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L")
    model = build_model(config, runtime, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    TOKENIZER.save(paths.tokenizer_dir("letters-265"))
    meta = {
        "stage": "sft",
        "tag": "d2",
        "model_config": vars(config),
        "tokenizer": {"name": "letters-265", "fingerprint": TOKENIZER.fingerprint},
    }
    save_checkpoint(paths.checkpoint_dir("sft", "d2"), 5, model, None, meta, runtime)
    return tmp_path


def test_one_question_prints_the_answer_and_nothing_else(tiny_model, capsys):
    arguments = ["-p", "Who are you?", "--device-type", "cpu", "-t", "0"]
    chat_cli.main(chat_cli.parse_args(arguments))
    answer = capsys.readouterr().out
    assert "nanochat" not in answer and "Who are you" not in answer
    command = [sys.executable, "-m", "scripts.chat_cli", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert (result.returncode, result.stdout) == (0, answer)


def test_a_pipe_that_is_closed_ends_it_quietly(tiny_model):
    command = f"{sys.executable} -m scripts.chat_cli -p - --device-type cpu -t 0 | head -c 1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, input=b"Who are you?", capture_output=True, timeout=120)
    assert len(result.stdout) == 1 and b"Traceback" not in result.stderr and b"BrokenPipe" not in result.stderr


def test_without_a_model_it_names_the_command_that_makes_one(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match="scripts.chat_sft"):
        chat_cli.main(chat_cli.parse_args(["--device-type", "cpu"]))


@pytest.mark.parametrize("arguments", [["-t", "3"], ["-t", "nan"], ["-k", "-1"], ["-i", "gpt4"]])
def test_impossible_settings_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        chat_cli.parse_args(arguments)
    assert "usage" in capsys.readouterr().err


def test_help_and_wrong_flags_do_not_wait_for_torch():
    code = (
        "import sys, scripts.chat_cli, scripts.chat_web; sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_chat_web_serves_the_model_and_ends_on_ctrl_c(tiny_model):
    command = [sys.executable, "-m", "scripts.chat_web", "--port", "0", "--device-type", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8") as server:
        try:
            opening = [server.stdout.readline() for _ in range(2)]
            assert "d2 · sft · step 5" in opening[0]
            url = opening[1].split()[1]
            session = requests.Session()
            session.trust_env = False  # no proxy between here and here
            while not session.get(f"{url}/health", timeout=30).json()["ready"]:
                time.sleep(0.05)
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
            answer = session.post(f"{url}/chat/completions", json=body, timeout=30)
            assert answer.text.endswith('data: {"done": true}\n\n')
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0


def test_chat_web_says_at_once_that_a_port_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1:{port}"):
            chat_web.main(chat_web.parse_args(["-p", port]))


def test_chat_web_has_one_replica_without_several_gpus():
    assert chat_web.replica_devices(torch.device("cpu"), 1) == [torch.device("cpu")]
    with pytest.raises(SystemExit, match="--num-gpus 2"):
        chat_web.replica_devices(torch.device("cpu"), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["-n", "0"], ["-t", "3"], ["-k", "201"], ["-m", "4097"], ["-p", "70000"], ["--api-key", " k"]),
        *(["--cors", origin] for origin in ("http://", "http://[x", "https://a b", "example.com", "https://a/b", "*")),
    ],
)
def test_chat_web_refuses_settings_out_of_bounds(arguments, capsys):
    with pytest.raises(SystemExit):
        chat_web.parse_args(arguments)
    assert "expected" in capsys.readouterr().err
