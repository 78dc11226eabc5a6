"""What the server promises: the reference's events, every answer its own, bounds, and honesty when it fails."""

import asyncio
import json
import re
import threading
import time

import pytest
import torch
from fastapi.testclient import TestClient

from nanochat import chat
from nanochat.api import Settings
from nanochat.engine import Engine, Event, Request
from nanochat.engine_worker import EngineWorker, StreamError
from nanochat.gpt import GPTConfig, build_model
from nanochat.runtime import start
from nanochat.server import UI, create_app
from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer

TOKENIZER = Tokenizer(SPLIT_PATTERN, [bytes([byte]) for byte in range(256)])  # every character beyond ASCII is split


class FakeEngine:
    """Answers each prompt with `reply(prompt text)`, a byte a token; says nothing while `open_gate` is cleared."""

    def __init__(self, reply=lambda prompt: "So: " + prompt, delay=0.0):
        self.reply, self.delay = reply, delay
        self.device = torch.device("cpu")
        self.rows, self.text, self.requests, self.cancelled = {}, {}, [], []
        self.open_gate = threading.Event()
        self.open_gate.set()

    @property
    def busy(self):
        return bool(self.rows)

    def submit(self, request):
        self.requests.append(request)
        start = max(i for i, token in enumerate(request.prompt) if token == TOKENIZER.special["<|user_start|>"])
        said = TOKENIZER.decode([token for token in request.prompt[start:] if token < 256])
        if said == "refuse me":
            raise ValueError("refused as asked")
        answer = TOKENIZER.encode(self.reply(said))
        self.text[len(self.requests)] = chat.TextStream(TOKENIZER)
        self.rows[len(self.requests)] = (answer[: request.max_tokens], len(answer) > request.max_tokens)
        return len(self.requests)

    def step(self):
        time.sleep(self.delay)
        if not self.open_gate.wait(0.01):
            return []
        events = []
        for row, (answer, cut) in list(self.rows.items()):
            token = answer.pop(0) if answer else TOKENIZER.special["<|assistant_end|>"]
            finish = None if token < 256 and (answer or not cut) else "length" if cut else "stop"
            token = None if finish == "stop" else token
            pieces = [] if token is None else self.text[row].push(token)
            events.append(Event(row, token, False, finish, pieces + (self.text[row].flush() if finish else [])))
            if finish:
                del self.rows[row]
        return events

    def cancel(self, row):
        self.cancelled.append(row)
        self.rows.pop(row, None)


class BrokenEngine(FakeEngine):
    def step(self):
        raise RuntimeError("broken on purpose")


def app_over(*engines, capacity=128, context=2000, **options):
    workers = [EngineWorker(engine, gpu, capacity) for gpu, engine in enumerate(engines)]
    return create_app(workers, TOKENIZER, context, **options)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def client(engine):
    with TestClient(app_over(engine)) as client:
        yield client


def question(text, **settings):
    return {"messages": [{"role": "user", "content": text}], **settings}


def events_of(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(block.removeprefix("data: ")) for block in response.text.split("\n\n") if block]


def answer_of(response):
    events = events_of(response)
    assert events[-1] == {"done": True}
    return "".join(event.get("token", "") for event in events)


def wait_until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("waited 5 seconds in vain")


def test_an_answer_comes_as_the_events_of_the_reference(client):
    response = client.post("/chat/completions", json=question("hi"))
    *tokens, last = events_of(response)
    assert all(set(event) == {"token", "gpu"} and event["gpu"] == 0 for event in tokens)
    assert "".join(event["token"] for event in tokens) == "So: hi" and last == {"done": True}
    assert response.text.startswith('data: {"token": "S')


def test_a_character_is_never_split_between_events(client):
    tokens = [event["token"] for event in events_of(client.post("/chat/completions", json=question("né 🙂 漢")))[:-1]]
    assert "".join(tokens) == "So: né 🙂 漢" and "�" not in "".join(tokens)


def test_a_name_of_a_special_token_in_a_message_stays_text(client, engine):
    assert answer_of(client.post("/chat/completions", json=question("<|assistant_end|>"))) == "So: <|assistant_end|>"
    assert engine.requests[0].prompt.count(TOKENIZER.special["<|assistant_end|>"]) == 0


def test_settings_reach_the_engine_and_have_defaults(engine):
    with TestClient(app_over(engine, defaults=Settings(0.3, 7, 99))) as client:
        client.post("/chat/completions", json=question("a"))
        client.post("/chat/completions", json=question("b", temperature=0, top_k=0, max_tokens=3))
    first, second = engine.requests
    assert (first.temperature, first.top_k, first.max_tokens) == (0.3, 7, 99)
    assert (second.temperature, second.top_k, second.max_tokens) == (0, 0, 3)
    assert first.seed != second.seed


def test_an_answer_cut_at_the_limit_says_so(client):
    events = events_of(client.post("/chat/completions", json=question("long", max_tokens=3)))
    assert events[-2:] == [{"finish": "length"}, {"done": True}]
    assert "".join(event.get("token", "") for event in events) == "So:"


def test_many_clients_at_once_each_get_their_own_answer():
    engines = FakeEngine(delay=0.001), FakeEngine(delay=0.001)
    answers = {}
    with TestClient(app_over(*engines)) as client:

        def ask(i):
            answers[i] = answer_of(client.post("/chat/completions", json=question(f"number {i}")))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = client.get("/stats").json()
    assert answers == {i: f"So: number {i}" for i in range(24)}
    assert all(engine.requests for engine in engines), "both replicas took part"
    assert [worker["open"] for worker in stats["workers"]] == [0, 0]
    assert sum(worker["answers"] for worker in stats["workers"]) == 24


def test_beyond_its_capacity_the_server_is_busy_and_then_takes_requests_again(engine):
    engine.open_gate.clear()
    with TestClient(app_over(engine, capacity=1)) as client:
        answers = []
        first = threading.Thread(
            target=lambda: answers.append(answer_of(client.post("/chat/completions", json=question("first"))))
        )
        first.start()
        wait_until(lambda: engine.requests)
        refused = client.post("/chat/completions", json=question("second"))
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert client.get("/health").status_code == 200, "the event loop is free while the engine is busy"
        engine.open_gate.set()
        first.join()
        assert answers == ["So: first"]
        assert answer_of(client.post("/chat/completions", json=question("third"))) == "So: third"


def test_a_disconnect_frees_the_row(engine):
    """Driven as an ASGI server would, since the test client never hangs up."""
    engine.open_gate.clear()
    app = app_over(engine)
    body = json.dumps(question("hello?")).encode()
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/chat/completions", "headers": headers, "query_string": b""}

    async def request():
        incoming = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})

        async def send(message):
            if message["type"] == "http.response.start":
                incoming.put_nowait({"type": "http.disconnect"})

        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app(scope, incoming.get, send), 5)
            await asyncio.to_thread(wait_until, lambda: engine.cancelled == [1])

    asyncio.run(request())
    assert not engine.busy


@pytest.fixture(scope="module")
def tiny_model():
    config = GPTConfig(256, TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L")
    model = build_model(config, start("cpu"), seed=1)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
        model.lm_head.weight[256:] = 0  # no special tokens: answers go on to their limit
    return model


def test_with_a_real_model_answers_in_company_are_those_given_alone(tiny_model):
    questions = [f"question {'x' * i}?" for i in range(6)]
    prompts = [chat.prompt(TOKENIZER, question(text)) for text in questions]
    alone = [Engine(tiny_model, TOKENIZER).generate([Request(prompt, max_tokens=40)])[0] for prompt in prompts]
    answers = {}
    with TestClient(app_over(Engine(tiny_model, TOKENIZER, max_rows=4), context=256)) as client:

        def ask(i):
            answers[i] = answer_of(
                client.post("/chat/completions", json=question(questions[i], temperature=0, max_tokens=40))
            )

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [answers[i] for i in range(6)] == [chat.visible_text(TOKENIZER, tokens) for tokens in alone]
    assert len(set(answers.values())) > 1


def test_a_conversation_that_is_too_long_loses_its_oldest_turns_and_says_so(tiny_model):
    turns = [{"role": role, "content": f"{role} {i} " + "x" * 40} for i in range(6) for role in ("user", "assistant")]
    messages = [*turns, *question("last")["messages"]]
    with TestClient(
        app_over(Engine(tiny_model, TOKENIZER, max_length=200), context=200, defaults=Settings(max_tokens=50))
    ) as client:
        events = events_of(client.post("/chat/completions", json={"messages": messages}))
        short = events_of(client.post("/chat/completions", json=question("last")))
    assert events[0] == {"dropped": 10} and events[-1] == {"done": True}
    assert all("dropped" not in event for event in short)


def test_closing_one_stream_of_a_real_engine_leaves_the_others_whole(tiny_model):
    prompts = [chat.prompt(TOKENIZER, question(text)) for text in ("first", "second")]
    (alone,) = Engine(tiny_model, TOKENIZER).generate([Request(prompts[1], max_tokens=30)])
    worker = EngineWorker(Engine(tiny_model, TOKENIZER))

    async def run():
        worker.start()
        first, second = (
            worker.open([Request(prompt, max_tokens=n)]) for prompt, n in zip(prompts, (200, 30), strict=True)
        )
        await anext(first.batches())
        worker.close(first)
        events = [event async for batch in second.batches() for _, event in batch]
        tokens = [event.token for event in events if event.token is not None]
        await worker.stop()
        return tokens

    assert asyncio.run(run()) == alone


def test_a_request_that_the_engine_refuses_fails_alone(client):
    assert events_of(client.post("/chat/completions", json=question("refuse me"))) == [{"error": "refused as asked"}]
    assert answer_of(client.post("/chat/completions", json=question("go on"))) == "So: go on"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_thread_dies_streams_end_and_health_fails():
    with TestClient(app_over(BrokenEngine())) as client:
        assert client.get("/health").status_code == 200
        (event,) = events_of(client.post("/chat/completions", json=question("hello")))
        assert "stopped working" in event["error"]
        assert client.get("/health").status_code == 503
        assert client.post("/chat/completions", json=question("hello")).status_code == 503


def test_shutting_down_ends_open_streams(engine):
    engine.open_gate.clear()
    worker = EngineWorker(engine)

    async def run():
        worker.start()
        stream = worker.open([Request([TOKENIZER.special["<|user_start|>"]], max_tokens=5)])
        await worker.stop()
        with pytest.raises(StreamError, match="shutting down"):
            await anext(stream.batches())

    asyncio.run(run())


@pytest.mark.parametrize(
    "body, says",
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "last message"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "last message"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (question("x" * 8001), "8000"),
        ({"messages": [{"role": "user", "content": "x"}] * 501}, "500"),
        ({"messages": [{"role": "user", "content": "x" * 8000}] * 5}, "32000"),
        (question("hi", temperature=2.1), "temperature"),
        (question("hi", temperature=-1), "temperature"),
        (question("hi", top_k=201), "top_k"),
        (question("hi", top_k=1.5), "top_k"),
        (question("hi", max_tokens=0), "max_tokens"),
        (question("hi", max_tokens=4097), "max_tokens"),
    ],
)
def test_bounds_are_kept_with_a_clear_error(client, body, says):
    response = client.post("/chat/completions", json=body)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "top_k": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_malformed_body_is_the_clients_error(client, body):
    response = client.post("/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_a_body_that_is_too_long_is_refused(client):
    response = client.post("/chat/completions", json=question("x" * 2_000_000))
    assert response.status_code == 413 and "bytes" in response.json()["error"]["message"]


def test_other_sites_cannot_make_a_browser_ask(client):
    """No CORS headers, and a request without the JSON content type (which needs a preflight) is refused."""
    body = json.dumps(question("hi"))
    for headers in ({}, {"content-type": "text/plain"}):
        response = client.post("/chat/completions", content=body, headers={"origin": "https://evil.test", **headers})
        assert response.status_code == 400
    response = client.options("/chat/completions", headers={"origin": "https://evil.test"})
    assert response.status_code == 405 and "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", ["/", "/ui/app.js", "/ui/style.css", "/health", "/stats", "/nowhere"])
def test_every_response_carries_the_strict_policy(client, path):
    response = client.get(path)
    assert response.status_code == (404 if path == "/nowhere" else 200)
    assert response.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_loads_nothing_from_elsewhere_and_never_makes_markup_of_text():
    for path in UI.iterdir():
        source = path.read_text(encoding="utf-8")
        links = set(re.findall(r"https?://[^\s'\"]+", source)) - {"http://www.w3.org/2000/svg"}
        assert not links, f"{path.name} refers to {links}"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|srcdoc", source)
    page = (UI / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", page), "inline code: the policy forbids it"
