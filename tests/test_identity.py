"""Conversations about who the model is: true to their description, silent on what it does not say."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "dev"))

import identity_wordings  # noqa: E402
import make_identity  # noqa: E402

from tasks import customjson, mixtures  # noqa: E402

MINE = """
# a model of one's own
Name: Grünfink
what it is: a tiny chat model | a chat model
Made by: Zoë & Co. KG
when made: 2027
size: 6 million parameters
source code: https://example.org/g
can: play chess; tell jokes
memory: no
favorite color: {green} 🌿
hobbies: chess and tea
"""


@pytest.fixture
def make(tmp_path):
    """make(description, flags) -> the conversations, as lists of (question, answer)."""

    def run(description=MINE, *flags, name="made.jsonl"):
        about = tmp_path / "me.txt"
        about.write_text(description, encoding="utf-8")
        make_identity.main(["--about", str(about), "--output", str(tmp_path / name), "--force", *flags])
        return [pairs(talk["messages"]) for talk in customjson.CustomJSON(tmp_path / name)]

    return run


def pairs(messages):
    said = [message["content"] for message in messages]
    return list(zip(said[::2], said[1::2], strict=True))


def answers_to(talks, *parts):
    """The answers to the questions that hold all of these."""
    return [answer for talk in talks for asked, answer in talk if all(part in asked.lower() for part in parts)]


def test_the_same_seed_gives_the_same_file(make, tmp_path):
    make(MINE, "--count=50", name="one.jsonl")
    command = [sys.executable, "dev/make_identity.py", "--about", tmp_path / "me.txt", "--count=50"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run([*command, "--output", tmp_path / "two.jsonl"], cwd=ROOT, env=env, check=True, capture_output=True)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    make(MINE, "--count=50", "--seed=1", name="three.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() != (tmp_path / "three.jsonl").read_bytes()


def test_as_many_as_asked_for_of_one_to_four_turns_none_twice(make):
    talks = make(MINE, "--count=600")
    assert len(talks) == len({str(talk) for talk in talks}) == 600
    assert {len(talk) for talk in talks} == {1, 2, 3, 4}
    said = [text for talk in talks for pair in talk for text in pair]
    assert all(said) and not [text for text in said if re.search(r"\{(?!green)|\s{2}|^\s|\s$|\|", text)]


def test_templates_that_run_out_give_fewer_and_say_so(make, monkeypatch, capsys):
    few = [[{"role": "user", "content": str(n)}, {"role": "assistant", "content": "I."}] for n in range(3)]
    monkeypatch.setattr(make_identity, "conversation", lambda topics, about, rng: rng.choice(few))
    assert len(make(MINE, "--count=9")) == 3
    assert "ran out: 3 different conversations of 9" in capsys.readouterr().out


def test_it_says_what_the_description_says_and_nothing_of_the_built_in_one(make):
    talks = make()
    said = "\n".join(answer for talk in talks for _, answer in talk)
    for sentence in (
        *("I am Grünfink", "I am Grünfink, a tiny chat model", "I was made by Zoë & Co. KG", "I was made in 2027"),
        *("I have 6 million parameters", "I can play chess", "my code at https://example.org/g"),
        *("My favorite color is {green} 🌿.", "My hobbies are chess and tea."),
    ):
        assert sentence in said, sentence
    assert set(answers_to(talks, "remember me tomorrow")) == {"No."}
    built_in = make_identity.read_description(None)
    everything = said + "\n".join(asked for talk in talks for asked, _ in talk)
    assert not [value for values in built_in.values() for value in values if value.lower() in everything.lower()]


def test_the_built_in_description_is_what_show_prints(make, capsys):
    make_identity.main(["--show"])
    shown = capsys.readouterr().out
    assert any("I was made by the person who ran the speedrun" in answer for talk in make(shown) for _, answer in talk)


def test_false_premises_are_denied(make):
    talks = make()
    for name in (*identity_wordings.OTHERS, *identity_wordings.COMPANIES):
        asked_for_it = re.compile(rf"\b{name}\b", re.IGNORECASE)
        found = [answer for talk in talks for asked, answer in talk if asked_for_it.search(asked)]
        assert found and all(re.search(r"\b(No|not)\b", answer) for answer in found), name
    said = "\n".join(answer for talk in talks for _, answer in talk)
    assert not re.search(rf"I am ({'|'.join(identity_wordings.OTHERS)})", said)


def test_what_the_description_names_is_no_false_premise(make):
    talks = make("name: Claude the Second\nmaker: two people at Google")
    assert not answers_to(talks, "is your name claude?") and not answers_to(talks, "did google make")
    assert answers_to(talks, "did ibm make")


def test_keys_that_are_left_out_make_no_claims(make):
    talks = make("name: Ann")
    declines = re.compile("do not know|never told|Nobody told|cannot say")
    said = [answer for talk in talks for _, answer in talk if not declines.search(answer)]
    assert not [one for one in said if re.search(r"^My (?!name)|made|\bI (was|can|cannot|have|speak)\b|license", one)]
    for question in ("who made you", "made by openai", "how many parameters", "can i see your code"):
        declined = answers_to(talks, question)
        assert declined and all(map(declines.search, declined))


@pytest.mark.parametrize(
    "text, place, word",
    [
        (b"name: A\n\nfoo\n", ", line 3: ", "'foo'"),
        (b"name: A\nmaker:\n", ", line 2: ", "a value after 'maker:'"),
        (b"name: A\ncreator: B\nmaker: C\n", ", line 3: ", "on line 2"),
        (b"# x\nname: \xff\n", ", line 2: ", "UTF-8"),
        (b'[{"role": "user", "content": "Hi"}]\n', ", line 1: ", "--identity"),
        (b"maker: B\n", ": ", "name: ..."),
        (None, ": ", "No such file"),
    ],
)
def test_a_bad_description_is_one_line_with_file_and_line(tmp_path, text, place, word):
    about = tmp_path / "me.txt"
    if text is not None:
        about.write_bytes(text)
    with pytest.raises(SystemExit) as stop:
        make_identity.main(["--about", str(about), "--output", str(tmp_path / "made.jsonl")])
    message = str(stop.value)
    assert message.startswith(f"{about}{place}") and word in message and "\n" not in message
    assert not (tmp_path / "made.jsonl").exists()


def test_without_flags_it_lies_where_the_mixture_looks_and_is_kept(base_dir, capsys):
    make_identity.main(["--count=5"])
    file = base_dir / "task_data" / "identity_conversations.jsonl"
    before = file.read_bytes()
    assert len(customjson.identity()) == 5 and f"5 conversations in {file}" in capsys.readouterr().out
    make_identity.main(["--count=7"])
    assert file.read_bytes() == before and len(capsys.readouterr().out.splitlines()) == 1
    make_identity.main(["--count=7", "--force"])
    assert len(customjson.identity()) == 7
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_description_of_ones_own_replaces_the_tiny_worlds(make, tmp_path):
    make(MINE, "--count=5")
    own, plain = mixtures.training("tiny", str(tmp_path / "made.jsonl")), mixtures.training("tiny")
    assert [task.name for task in plain.tasks] == list(mixtures.TINY)
    assert [task.name for task in own.tasks] == ["made" if kind == "identity" else kind for kind in mixtures.TINY]
    assert len(own) == len(plain) - mixtures.TINY["identity"] + 5


# -- an endpoint


class Server:
    """An OpenAI-compatible server that gives the `replies`: text, or a status."""

    def __init__(self):
        self.replies, self.requests = [], []

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.requests.append((handler.path, handler.headers["Authorization"], body))
        reply = self.replies.pop(0) if self.replies else 500
        handler.send_response(reply if isinstance(reply, int) else 200)
        handler.end_headers()
        handler.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())


@pytest.fixture
def server(monkeypatch):
    there = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            there.answer(self)

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(make_identity, "WAITS", (0, 0))
    there.url = f"http://127.0.0.1:{http.server_address[1]}"
    yield there
    http.shutdown()
    http.server_close()


HERE = "I am\u2028Grünfink."  # JSON leaves this end of a line as it is


def talk(question, answer=HERE):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_an_endpoint_writes_them_and_what_is_wrong_is_rejected_and_counted(make, server, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    wrong = [talk("x", "I am ChatGPT, you know."), talk("y", "\ud800"), talk("z", " "), talk("v")[:1], "w", 5]
    server.replies += [
        429,
        f"<think>[hm]</think>Here:\n```json\n{json.dumps([talk('a'), *wrong, talk('b')])}\n```",
        "no",
        json.dumps(talk("c")),
        json.dumps([talk("a"), talk("d"), talk("e")]),
    ]
    talks = make(MINE, "--count=4", f"--endpoint={server.url}/", "--model=m")
    assert talks == [[(question, HERE)] for question in "abcd"]
    assert "7 were rejected" in capsys.readouterr().out
    path, key, body = server.requests[0]
    assert path == "/v1/chat/completions" and key == "Bearer sesame" and body["model"] == "m"
    assert "maker: Zoë & Co. KG" in body["messages"][0]["content"]


@pytest.mark.parametrize("then", [[500] * 3, [401], ["garbage"] * 5, [json.dumps(talk("a"))] * 5])
def test_an_endpoint_that_fails_is_one_line_and_the_same_line_goes_on(make, server, then, tmp_path):
    flags = ("--count=2", f"--endpoint={server.url}/v1", "--model=m")
    server.replies += [json.dumps([talk("a")]), *then]
    with pytest.raises(SystemExit) as stop:
        make(MINE, *flags)
    assert "1 conversations are kept" in str(stop.value) and "\n" not in str(stop.value)
    assert len(server.requests) == 1 + len(then)  # none too few, none too many
    assert not (tmp_path / "made.jsonl").exists()
    (partial,) = tmp_path.glob("*.partial")
    partial.write_bytes(partial.read_bytes() + b'[{"role": "us')  # killed while it wrote
    server.replies += [json.dumps([talk("b")])]
    assert make(MINE, *flags) == [[("a", HERE)], [("b", HERE)]]
    assert not partial.exists()


def test_an_endpoint_that_is_not_there_is_one_line(make, server):
    with pytest.raises(SystemExit) as stop:
        make(MINE, "--endpoint=http://127.0.0.1:9", "--model=m")
    assert str(stop.value).startswith("http://127.0.0.1:9/v1/chat/completions: ConnectionError")
    assert "\n" not in str(stop.value)
