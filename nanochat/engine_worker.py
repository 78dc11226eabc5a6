"""An engine in a thread of its own, for programs with an event loop: the loop never decodes, and never waits.

A request becomes a `Stream`; the thread steps the engine, which decodes all open rows together, and hands the events of
each step to the loop in one call.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator

import torch

from nanochat.engine import Engine, Event, Request


class StreamError(Exception):
    """Why a stream ended without its answer; the message is shown to the user."""


class Stream:
    """The events of one request, read on the event loop. Whoever opens it closes it with its worker, whole or not."""

    def __init__(self, worker: "EngineWorker", request: Request):
        self.worker = worker
        self.request = request
        self.row: int | None = None  # the engine's id for it; only the worker's thread reads and writes it
        self.inbox: asyncio.Queue[Event | StreamError] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Event]:
        finished = False
        while not finished:
            item = await self.inbox.get()
            if isinstance(item, StreamError):
                raise item
            yield item
            finished = item.finish is not None


class EngineWorker:
    """One thread that owns one engine. `start`, `open`, `close` and `stop` are called on the event loop.

    The thread sleeps on its command queue while there is nothing to decode, and looks into it between steps otherwise.
    `capacity` bounds the streams that are open at a time, waiting ones included.
    """

    def __init__(self, engine: Engine, gpu: int = 0, capacity: int = 128):
        self.gpu = gpu
        self.capacity = capacity
        self.answers = 0
        self.tokens = 0
        self.failure = "not started"
        self.streams: set[Stream] = set()  # owned by the event loop
        self._engine = engine
        self._rows: dict[int, Stream] = {}  # owned by the thread
        self._commands: queue.SimpleQueue[tuple[str, Stream | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"engine-{gpu}", daemon=True)

    @property
    def alive(self) -> bool:
        return not self.failure

    def stats(self) -> dict:
        counts = {"answers": self.answers, "tokens": self.tokens}
        return {"gpu": self.gpu, "alive": self.alive, "open": len(self.streams), "capacity": self.capacity, **counts}

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.failure = ""
        self._thread.start()

    def open(self, request: Request) -> Stream:
        stream = Stream(self, request)
        self.streams.add(stream)
        self._commands.put(("submit", stream))
        return stream

    def close(self, stream: Stream) -> None:
        if stream in self.streams:
            self.streams.remove(stream)
            self._commands.put(("cancel", stream))

    async def stop(self) -> None:
        self._commands.put(("stop", None))
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        ending = "the model stopped working, the server has to be started again (its terminal shows the error)"
        try:
            if self._engine.device.type == "cuda":
                torch.cuda.set_device(self._engine.device)  # the current device is a matter of each thread
            while self._obey():
                self._step()
            ending = "the server is shutting down"
        finally:
            self._loop.call_soon_threadsafe(self._fail, ending)

    def _obey(self) -> bool:
        """Carry out what the loop asked for; wait for it if there is nothing else to do. False: stop."""
        while not (self._engine.busy and self._commands.empty()):
            command, stream = self._commands.get()
            if command == "stop":
                return False
            if command == "submit":
                try:
                    stream.row = self._engine.submit(stream.request)
                except ValueError as error:  # this request's fault; the others go on
                    self._loop.call_soon_threadsafe(stream.inbox.put_nowait, StreamError(str(error)))
                else:
                    self._rows[stream.row] = stream
            elif self._rows.pop(stream.row, None):
                self._engine.cancel(stream.row)
        return True

    def _step(self) -> None:
        deliveries = []
        for event in self._engine.step():
            if event.id not in self._rows:
                continue
            deliveries.append((self._rows[event.id], event))
            self.tokens += event.token is not None
            if event.finish:
                del self._rows[event.id]
                self.answers += 1
        self._loop.call_soon_threadsafe(_deliver, deliveries)

    def _fail(self, failure: str) -> None:
        self.failure = failure
        for stream in self.streams:
            stream.inbox.put_nowait(StreamError(failure))


def _deliver(deliveries: list[tuple[Stream, Event]]) -> None:
    for stream, event in deliveries:
        stream.inbox.put_nowait(event)
