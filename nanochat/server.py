"""The chat server: a FastAPI app over engine workers. The least busy one takes a request, and its answer goes out as it
is written or whole."""

import asyncio
import json
import os
import random
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HTTPRequest

from nanochat import api, chat
from nanochat.engine_worker import STOPPED, EngineWorker, Stream, StreamError
from nanochat.guard import Guard, KeyCheck, error_body

UI = Path(__file__).parent / "ui"
RETRY_AFTER_SECONDS = 2
READER_SECONDS = 60  # in which a reader takes something of what was sent, or its connection is given up
SHUTDOWN_SECONDS = 3  # for answers that are being written when the server is told to end
FAILED_SECONDS = 3  # in which /health says that the model failed, before the process ends


class ConversationLog:
    """Conversations as JSON lines, in a file for its owner only. A disk that is full does not end the serving."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.append_line("")

    def append(self, **record) -> None:
        try:
            self.append_line(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            print(f"a conversation could not be written to {self.path}: {error}", file=sys.stderr, flush=True)

    def append_line(self, line: str) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.fchmod(descriptor, 0o600)  # it may have been there
        with open(descriptor, "a", encoding="utf-8") as file:
            file.write(line)


class UnknownModel(Exception):
    """A request asks for a model of this name."""


async def disconnected(receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def unless_gone(work: Awaitable, receive) -> bool:
    """Do the work, or give it up when the client hangs up; whether it was done. Raises what it raises."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


class AnswerResponse(StreamingResponse):
    """Server-sent events of an answer. `close` is called however the response ends, even if it never began."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[str], close: Callable[[], None]):
        super().__init__(chunks, headers={"X-Accel-Buffering": "no"})  # nginx would hold it back
        self.close = close

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()


def _error(status: int, message: str, param: str | None = None, code: str | None = None, headers=None) -> JSONResponse:
    return JSONResponse(error_body(message, status, param, code), status, headers)


def _failure(error: StreamError) -> HTTPException:
    return HTTPException(400 if error.refused else 503, str(error))


async def _as_reference(stream: Stream, dropped: int) -> AsyncIterator[str]:
    if dropped:
        yield api.sse({"dropped": dropped})
    try:
        async for batch in stream.batches():
            for event in api.reference_events(batch, stream.worker.gpu):
                yield api.sse(event)
        yield api.sse({"done": True})
    except StreamError as error:
        yield api.sse({"error": str(error)})


async def _as_chunks(stream: Stream, completion: api.Completion) -> AsyncIterator[str]:
    opened = False
    try:
        async for batch in stream.batches():
            news = completion.add(batch)
            if not opened:
                opened = True
                for chunk in completion.opening():
                    yield api.sse(chunk)
            for new in news:
                chunk = completion.chunk(new)
                if new.tokens or new.logprobs or new.finish or chunk["choices"][0]["delta"]:
                    yield api.sse(chunk)
        if completion.asked.stream_options and completion.asked.stream_options.include_usage:
            yield api.sse(completion.last_chunk())
        yield api.sse("[DONE]")
    except StreamError as error:
        yield api.sse(error_body(str(error), 400 if error.refused else 503))


def create_app(
    workers: Sequence[EngineWorker],
    tokenizer,
    context: int,
    *,
    defaults: api.Settings | None = None,
    model_name: str = "",
    model_id: str = "nanochat",
    api_key: str = "",
    cors: Sequence[str] = (),
    host_names: tuple[str, ...] | None = None,
    log: ConversationLog | None = None,
) -> FastAPI:
    """The app over `workers`, whose threads live from its start-up to its shutdown.

    context: tokens that prompt and answer may take together in the engines; answers say how many messages of a
    conversation were dropped that does not fit. cors: origins whose pages may ask. host_names: what the server may be
    called by (None: anything).
    """
    defaults = defaults or api.Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        for worker in workers:
            worker.start()
        yield
        for worker in workers:
            await worker.stop()

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.closing = False
    # The last one added is the outermost.
    if api_key:
        app.add_middleware(KeyCheck, key=api_key)
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(Guard, names=host_names)
    app.mount("/ui", StaticFiles(directory=UI), name="ui")

    @app.exception_handler(HTTPException)
    async def on_http_error(_, error: HTTPException):
        code = {404: "not_found", 429: "rate_limit_exceeded"}.get(error.status_code)
        return _error(error.status_code, str(error.detail), code=code, headers=error.headers)

    @app.exception_handler(api.InvalidRequest)
    async def on_invalid(_, error: api.InvalidRequest):
        return _error(400, str(error), error.param)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(_, error: RequestValidationError):
        message, param = api.explain(error.errors())
        return _error(400, message, param)

    @app.exception_handler(UnknownModel)
    async def on_unknown_model(_, error: UnknownModel):
        return _error(
            404, f"there is no model {str(error)!r} here, this server has {model_id!r}", "model", "model_not_found"
        )

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page():
        return FileResponse(UI / "index.html")

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health():
        failures = [worker.failure for worker in workers if worker.failure]
        if failures or app.state.closing:
            return JSONResponse({"status": "failed", "ready": False, "error": (failures or [STOPPED])[0]}, 503)
        if not all(worker.ready for worker in workers):
            return JSONResponse({"status": "starting", "ready": False}, 503, {"Retry-After": str(RETRY_AFTER_SECONDS)})
        return {"status": "ok", "ready": True}

    @app.get("/stats")
    async def stats():
        settings = {"defaults": vars(defaults), "limits": api.LIMITS}
        by_worker = [worker.stats() for worker in workers]
        return {"model": model_name, "id": model_id, "context": context, **settings, "workers": by_worker}

    model = {"id": model_id, "object": "model", "created": int(time.time()), "owned_by": "nanochat"}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str):
        check_model(name)
        return model

    def check_model(name: str | None) -> None:
        if name not in (None, "", "nanochat", model_id):
            raise UnknownModel(name)

    async def open_stream(asked: api.ChatRequest) -> tuple[Stream, int]:
        """The stream of a request, and how many of its messages were dropped."""
        seed = random.getrandbits(31)
        try:
            requests, dropped = await asyncio.to_thread(api.engine_requests, asked, tokenizer, context, defaults, seed)
        except chat.ConversationError as error:
            raise api.InvalidRequest(f"messages: {error}", "messages") from error
        if len(requests) > max(worker.capacity for worker in workers):
            raise api.InvalidRequest(f"n: {len(requests)} answers are more than there are places", "n")
        able = [worker for worker in workers if not worker.failure]
        if not able or app.state.closing:
            raise HTTPException(503, STOPPED if app.state.closing else workers[0].failure)
        worker = max(able, key=lambda worker: worker.room)
        if len(requests) > worker.room:
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            raise HTTPException(429, "all places are taken, try again in a moment", headers)
        return worker.open(requests), dropped

    def close(stream: Stream, asked: api.ChatRequest) -> None:
        stream.worker.close(stream)
        if log and any(stream.said):
            said = zip(stream.said, stream.finish, strict=True)
            answers = [{"parts": chat.parts(pieces), "finish": finish} for pieces, finish in said]
            log.append(time=time.time(), model=model_name, messages=asked.conversation(), answers=answers)

    @app.post("/chat/completions")
    async def reference_completions(asked: api.ChatRequest):
        stream, dropped = await open_stream(asked)
        return AnswerResponse(_as_reference(stream, dropped), partial(close, stream, asked))

    @app.post("/v1/chat/completions")
    async def completions(asked: api.CompletionRequest, http: HTTPRequest):
        check_model(asked.model)
        stream, dropped = await open_stream(asked)
        completion = api.Completion(asked, len(stream.requests), tokenizer, secrets.token_hex(12), model_id, dropped)
        if asked.stream:
            return AnswerResponse(_as_chunks(stream, completion), partial(close, stream, asked))

        async def collect():
            async for batch in stream.batches():
                completion.add(batch)

        try:
            done = await unless_gone(collect(), http.receive)
        except StreamError as error:
            raise _failure(error) from error
        finally:
            close(stream, asked)
        return JSONResponse(completion.whole()) if done else Response(status_code=499)

    return app


class ChatServer(uvicorn.Server):
    """Ends when a model stopped working; when told to end, lets answers come to theirs, and tells the others. Gives up
    connections whose readers take nothing of what was sent."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, workers: Sequence[EngineWorker]):
        super().__init__(config)
        self.state, self.workers = app.state, workers
        self.failed_at: float | None = None
        self.unread: dict[asyncio.Transport, tuple[int, float]] = {}  # bytes, and since when not fewer

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        if self.failed_at is None and any(worker.failure for worker in self.workers):
            self.failed_at = now
        self.give_up_readers(now)
        failed = self.failed_at is not None and now - self.failed_at > FAILED_SECONDS
        return await super().on_tick(counter) or failed

    def give_up_readers(self, now: float) -> None:
        sizes = {transport: transport.get_write_buffer_size() for transport in self.transports()}
        before, self.unread = self.unread, {}
        for transport, size in sizes.items():
            least, since = before.get(transport, (size, now))
            if size and size >= least and now - since > READER_SECONDS:
                transport.abort()
            elif size:
                self.unread[transport] = (size, now) if size < least else (least, since)

    def transports(self) -> list[asyncio.Transport]:
        return [connection.transport for connection in list(self.server_state.connections)]

    async def shutdown(self, sockets=None) -> None:
        self.state.closing = True
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        while any(worker.load for worker in self.workers) and time.monotonic() < deadline and not self.force_exit:
            await asyncio.sleep(0.05)
        for worker in self.workers:
            await worker.stop(lambda: self.force_exit)
        if self.force_exit:  # told twice: nobody is waited for
            for transport in self.transports():
                transport.abort()
            self.force_exit = False  # uvicorn would leave without ending the app
        await super().shutdown(sockets)
