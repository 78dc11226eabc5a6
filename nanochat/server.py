"""The chat server: a FastAPI app over engine workers. The least busy one takes a request, and its answer goes out as
server-sent events."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field, model_validator
from starlette.exceptions import HTTPException

from nanochat import chat
from nanochat.engine import Request
from nanochat.engine_worker import EngineWorker, Stream, StreamError

UI = Path(__file__).parent / "ui"
MAX_MESSAGES = 500
MAX_MESSAGE_CHARACTERS = 8_000
MAX_CONVERSATION_CHARACTERS = 32_000
MAX_BODY_BYTES = 1 << 20  # 32,000 characters take at most 384 KB as JSON, all of them escaped
RETRY_AFTER_SECONDS = 2
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=MAX_MESSAGE_CHARACTERS)


class ChatRequest(BaseModel):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=200)
    max_tokens: int | None = Field(None, ge=1, le=4096)

    @model_validator(mode="after")
    def check_conversation(self) -> "ChatRequest":
        characters = sum(len(message.content) for message in self.messages)
        if characters > MAX_CONVERSATION_CHARACTERS:
            raise ValueError(f"{characters} characters in all, at most {MAX_CONVERSATION_CHARACTERS} are taken")
        if self.messages[-1].role != "user" or not self.messages[-1].content.strip():
            raise ValueError("the last message must be the user's and must not be empty")
        return self


class Guard:
    """Around the whole app: bounds the body of each request, and puts the security headers on each response."""

    def __init__(self, app):
        self.app = app
        self.headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        received = 0

        async def bounded_receive():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, f"the request is longer than {MAX_BODY_BYTES} bytes")
            return message

        async def guarded_send(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self.headers]}
            await send(message)

        await self.app(scope, bounded_receive, guarded_send)


class AnswerResponse(StreamingResponse):
    """Server-sent events of one answer. The row is freed however the response ends, even if it never began."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, chunks: AsyncIterator[str]):
        super().__init__(chunks)
        self.stream = stream

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.stream.worker.close(self.stream)


def _data(**fields) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


async def _answer(stream: Stream) -> AsyncIterator[str]:
    """The answer as the reference's events, and three more: messages `dropped`, `finish` at the limit, and `error`."""
    try:
        async for event in stream:
            if event.dropped:
                yield _data(dropped=event.dropped)
            if event.text:
                yield _data(token=event.text, gpu=stream.worker.gpu)
            if event.finish == "length":
                yield _data(finish="length")
        yield _data(done=True)
    except StreamError as error:
        yield _data(error=str(error))


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status, headers)


def create_app(
    workers: Sequence[EngineWorker],
    tokenizer,
    context: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    max_tokens: int = 512,
    model_name: str = "",
) -> FastAPI:
    """The app over `workers`, whose threads live from its start-up to its shutdown.

    `context` is the number of tokens that prompt and answer may take together in the engines; an event says how many
    messages of a conversation were dropped that does not fit. The sampling settings are what a request gets that does
    not say otherwise.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        for worker in workers:
            worker.start()
        yield
        for worker in workers:
            await worker.stop()

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard)
    app.mount("/ui", StaticFiles(directory=UI), name="ui")

    @app.exception_handler(HTTPException)
    async def on_http_error(_, error: HTTPException):
        return _error(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(_, error: RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return _error(400, f"{place}: {first['msg']}" if place else first["msg"])

    @app.get("/")
    async def page():
        return FileResponse(UI / "index.html")

    @app.get("/health")
    async def health():
        failures = [worker.failure for worker in workers if not worker.alive]
        if failures:
            return JSONResponse({"status": "failed", "ready": False, "error": failures[0]}, 503)
        return {"status": "ok", "ready": True}

    @app.get("/stats")
    async def stats():
        return {"model": model_name, "context": context, "workers": [worker.stats() for worker in workers]}

    @app.post("/chat/completions")
    async def completions(request: ChatRequest):
        messages = [message.model_dump() for message in request.messages]
        try:
            ids = await asyncio.to_thread(chat.prompt, tokenizer, {"messages": messages})
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        alive = [worker for worker in workers if worker.alive]
        if not alive:
            raise HTTPException(503, workers[0].failure)
        worker = min(alive, key=lambda worker: len(worker.streams))
        if len(worker.streams) >= worker.capacity:
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            raise HTTPException(429, "all places are taken, try again in a moment", headers)
        stream = worker.open(
            Request(
                prompt=ids,
                max_tokens=max_tokens if request.max_tokens is None else request.max_tokens,
                temperature=temperature if request.temperature is None else request.temperature,
                top_k=top_k if request.top_k is None else request.top_k,
                seed=random.getrandbits(31),
            )
        )
        return AnswerResponse(stream, _answer(stream))

    return app
