"""An engine in a thread of its own, for programs with an event loop: the loop never decodes, and never waits.

Requests that belong together become a `Stream`; the thread steps the engine, which decodes all open rows together, and
hands the events of each step to the loop in one call.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

import torch

from nanochat.chat import Piece
from nanochat.engine import Engine, Event, Request

CRASHED = "the model stopped working, the server has to be started again (its terminal shows the error)"
STOPPED = "the server is shutting down"
STOP_SECONDS = 5  # for the step that is under way, or the first answer
UNREAD = 4  # times the capacity: requests whose answers may be there or on their way


class StreamError(Exception):
    """Why a stream ended without its answer; the message is shown to the user. refused: the request was at fault."""

    def __init__(self, message: str, refused: bool = False):
        super().__init__(message)
        self.refused = refused


class Stream:
    """The events of some requests, read on the event loop. Whoever opens it closes it with its worker, whole or not."""

    def __init__(self, worker: "EngineWorker", requests: Sequence[Request]):
        self.worker = worker
        self.requests = requests
        self.unfinished = len(requests)  # whose last event has not come; owned by the loop
        self.rows: list[int] = []  # the engine's ids for them; only the worker's thread reads and writes it
        self.said: list[list[Piece]] = [[] for _ in requests]  # what was read so far
        self.finish: list[str | None] = [None] * len(requests)
        self.inbox: asyncio.Queue[tuple[int, Event] | StreamError] = asyncio.Queue()

    async def batches(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """(request, event), all that have come since the last ones were read."""
        while None in self.finish:
            items = [await self.inbox.get()]
            while not self.inbox.empty():
                items.append(self.inbox.get_nowait())
            batch = [item for item in items if not isinstance(item, StreamError)]
            for index, event in batch:
                self.said[index] += event.pieces
                self.finish[index] = event.finish
            if batch:
                yield batch
            for item in items:
                if isinstance(item, StreamError):
                    raise item


class EngineWorker:
    """One thread that owns one engine. `start`, `open`, `close` and `stop` are called on the event loop.

    The thread sleeps on its command queue while there is nothing to decode, and looks into it between steps otherwise.
    `capacity` bounds the requests that are open at a time, waiting ones included. `first` is answered before the worker
    is ready: what is made at a first step is there for the first user.
    """

    def __init__(self, engine: Engine, gpu: int = 0, capacity: int = 128, first: Request | None = None):
        self.gpu = gpu
        self.capacity = capacity
        self.answers = 0
        self.tokens = 0
        self.ready = False
        self.failure = ""  # why it can take no more
        self.streams: set[Stream] = set()  # owned by the event loop
        self.engine = engine
        self._first = first
        self._deadline: float | None = None  # by which its thread has to end, when it is told to
        self._rows: dict[int, tuple[Stream, int]] = {}  # owned by the thread
        self._commands: queue.SimpleQueue[tuple[str, Stream | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"engine-{gpu}", daemon=True)

    @property
    def load(self) -> int:
        """Requests that wait or are answered."""
        return sum(stream.unfinished for stream in self.streams)

    @property
    def room(self) -> int:
        """Requests that it can take; answers that wait for their readers take room, too, in the end."""
        held = sum(len(stream.requests) for stream in self.streams)
        return min(self.capacity - self.load, UNREAD * self.capacity - held)

    def stats(self) -> dict:
        counts = {"answers": self.answers, "tokens": self.tokens}
        state = {"alive": not self.failure, "ready": self.ready}
        return {"gpu": self.gpu, **state, "open": self.load, "capacity": self.capacity, **counts}

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def open(self, requests: Sequence[Request]) -> Stream:
        stream = Stream(self, requests)
        self.streams.add(stream)
        self._commands.put(("submit", stream))
        return stream

    def close(self, stream: Stream) -> None:
        if stream in self.streams:
            self.streams.remove(stream)
            self._commands.put(("cancel", stream))

    async def stop(self, hurried: Callable[[], bool] = lambda: False) -> None:
        """Ends what is open; its readers hear why. A thread that does not come to its end in time, or before the caller
        is hurried, is left: it ends with the process."""
        if self._deadline is None:
            self._deadline = time.monotonic() + STOP_SECONDS
            self._commands.put(("stop", None))
        while self._thread.is_alive() and time.monotonic() < self._deadline:
            if hurried():
                self._deadline = 0.0
            await asyncio.sleep(0.01)

    def _run(self) -> None:
        ending = CRASHED
        try:
            if self.engine.device.type == "cuda":
                torch.cuda.set_device(self.engine.device)  # the current device is a matter of each thread
            if self._first:
                self.engine.generate([self._first])
            self._loop.call_soon_threadsafe(self._begin)
            while self._obey():
                self._step()
            ending = STOPPED
        finally:
            self._loop.call_soon_threadsafe(self._fail, ending)

    def _obey(self) -> bool:
        """Carry out what the loop asked for; wait for it if there is nothing else to do. False: stop."""
        while not (self.engine.busy and self._commands.empty()):
            command, stream = self._commands.get()
            if command == "stop":
                return False
            if command == "submit":
                self._submit(stream)
            else:
                self._cancel(stream)
        return True

    def _submit(self, stream: Stream) -> None:
        try:
            for index, request in enumerate(stream.requests):
                row = self.engine.submit(request)
                stream.rows.append(row)
                self._rows[row] = (stream, index)
        except ValueError as error:  # this request's fault; the others go on
            self._cancel(stream)
            self._loop.call_soon_threadsafe(stream.inbox.put_nowait, StreamError(str(error), refused=True))

    def _cancel(self, stream: Stream) -> None:
        for row in stream.rows:
            if self._rows.pop(row, None):
                self.engine.cancel(row)

    def _step(self) -> None:
        deliveries = []
        for event in self.engine.step():
            if event.id not in self._rows:
                continue
            deliveries.append((*self._rows[event.id], event))
            self.tokens += event.token is not None
            if event.finish:
                del self._rows[event.id]
                self.answers += 1
        self._loop.call_soon_threadsafe(_deliver, deliveries)

    def _begin(self) -> None:
        self.ready = True

    def _fail(self, failure: str) -> None:
        self.ready, self.failure = False, failure
        for stream in self.streams:
            stream.inbox.put_nowait(StreamError(failure))


def _deliver(deliveries: list[tuple[Stream, int, Event]]) -> None:
    for stream, index, event in deliveries:
        stream.unfinished -= event.finish is not None
        stream.inbox.put_nowait((index, event))
