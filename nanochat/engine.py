"""Generation: many requests at once, each with its own prompt, length and sampling; they join and leave at any step.

A request gets a row of the cache and keeps it to its end. Each step feeds every row that is writing the token it chose
last, or one that a tool forces on it, and reads some more of the prompts that came since: so long ones hold nobody up.
What a row holds stays when its request is done: a prompt that begins as any row does is read from there on.
"""

import math
from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from operator import index

import numpy as np
import torch

from nanochat import chat
from nanochat.chat import Piece, TextStream, ToolUse, visible
from nanochat.decoding import Decoder, cast_again, inference_copy
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache, Pass
from nanochat.runtime import free_memory, keep_freed_memory
from nanochat.sampling import Draw, grouped, log_probabilities, sample
from nanochat.tokenizer import Tokenizer

# Tokens of prompts that a step reads at most, when nobody writes and when someone waits for the next token.
PREFILL = {"cpu": (512, 128), "mps": (512, 128), "cuda": (8192, 2048)}
WORTH_COPYING = 16  # tokens that two rows begin with
CACHE_SHARE = 0.7  # of the memory that is free


@dataclass
class Request:
    """prompt: ids. temperature 0 is argmax; top_k 0 or None and top_p 1 leave all tokens in. max_tokens counts forced
    tokens too. stop: texts that end the answer and are not shown. logprobs: of the chosen token and of so many of the
    likeliest, none by default. prefix: ids that the answer begins with; the events tell of what comes after them, but
    the text is that of all."""

    prompt: list[int]
    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = 50
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prefix: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Event:
    """A token of request `id`, or its end: finish is "stop", by the end mark or a stop text, "length", or "error", when
    a step failed for all.

    pieces: what has become sure of the text, never half a character; text: the visible part. end: the mark with which
    the model ended its turn; it is no token of the answer. likeliest: (id, log-probability) of as many tokens as were
    asked for, the likeliest first. kind: of the part that the token belongs to ("text", or a tool's). The first event
    has the tokens of the prompt, and the messages `dropped` of it, for which there was no room.
    """

    id: int
    token: int | None
    forced: bool = False
    finish: str | None = None
    pieces: list[Piece] = field(default_factory=list)
    end: int | None = None
    logprob: float | None = None
    likeliest: list[tuple[int, float]] | None = None
    kind: str = "text"
    prompt_tokens: int = 0
    dropped: int = 0

    @property
    def text(self) -> str:
        return visible(self.pieces)


class Row:
    """One request under way."""

    def __init__(self, id: int, request: Request, tokenizer: Tokenizer, max_length: int):
        self.id, self.request = id, request
        room = room_for_prompt(max_length, request.max_tokens)
        prompt, self.dropped = chat.fit(tokenizer, request.prompt, room)
        left = max_length - len(prompt) - len(request.prefix)
        if left < 1:
            raise ValueError(
                f"the answer begins with {len(request.prefix)} tokens, after the prompt there is room for "
                f"{max_length - len(prompt)} of {max_length}, and one must be left"
            )
        self.prompt_tokens, self.prompt = len(prompt), prompt + request.prefix
        self.tools, self.text = ToolUse(tokenizer), TextStream(tokenizer, request.stop)
        self.forced: deque[int] = deque()
        self.begun: list[Piece] = []  # what the prefix says
        for id in request.prefix:
            self.begun += self.say(id, bool(self.forced) and id == self.forced[0])
        self.count = len(request.prefix)  # tokens of the answer
        self.limit = self.count + min(request.max_tokens, left)
        self.place: int | None = None  # its row of the cache
        self.next: list[int] = []  # what the next pass feeds it

    def say(self, token: int, forced: bool) -> list[Piece]:
        """Go on by a token of the answer, the first of the forced ones if it is one."""
        if forced:
            self.forced.popleft()
        else:
            self.forced = deque(self.tools.push(token))
        return self.text.push(token)


class Engine:
    """One thread owns it.

    max_rows: requests under way together, fewer where memory is short; max_length: prompt and answer (default: the
    model's sequence length). static: the decoder of fixed shapes (decoding.available); compiles: its blocks.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        max_rows: int = 64,
        max_length: int | None = None,
        static: bool = False,
        compiles: bool = False,
    ):
        self.tokenizer = tokenizer
        self.max_rows, self.max_length = max_rows, model.config.sequence_len if max_length is None else max_length
        if self.max_rows < 1 or self.max_length < 5:
            raise ValueError(f"{max_rows} rows of {self.max_length} tokens; expected 1 or more, of 5 or more")
        self.device = model.lm_head.weight.device
        self.static, self.compiles = static, compiles
        self.model = inference_copy(model)
        self.ends = {tokenizer.special["<|assistant_end|>"], tokenizer.bos}
        self.cache: KVCache | None = None  # made at the first step
        self.decoder: Decoder | None = None
        self.waiting: dict[int, Row] = {}
        self.reading: deque[Row] = deque()
        self.writing: list[Row] = []
        self.free: dict[int, None] = {}  # places, the longest unused first
        self.opened: dict[int, deque[Event]] = {}  # the events of streams that were not fetched yet
        self.unheard: list[Event] = []  # those of other requests
        self.next_id = 0

    @property
    def busy(self) -> bool:
        """Whether there is something to do, or to hear from step()."""
        return bool(self._working or self.unheard)

    @property
    def _working(self) -> bool:
        return bool(self.waiting or self.reading or self.writing)

    def submit(self, request: Request) -> int:
        """Queue a request; its id is in the events that step() returns. A prompt that leaves no room for the answer,
        or for half of the context, loses its oldest turns."""
        request = checked(request, self.model.config.vocab_size)
        self.next_id += 1
        self.waiting[self.next_id] = Row(self.next_id, request, self.tokenizer, self.max_length)
        return self.next_id

    def cancel(self, id: int) -> None:
        """Drop a request, waiting or active; nothing more is heard of it, and its row is free."""
        self.waiting.pop(id, None)
        for row in [*self.reading, *self.writing]:
            if row.id == id:
                self._release(row)
        self.unheard = [event for event in self.unheard if event.id != id]
        self.opened.pop(id, None)

    def step(self) -> list[Event]:
        """Let the waiting in, read on in their prompts, and move every active request one token on. The events of all
        but the streams, those too that came up while a stream was read.

        When it fails, whatever was under way is dropped, and the engine can be used again.
        """
        self._step()
        events, self.unheard = self.unheard, []
        return events

    def generate(self, requests: list[Request]) -> list[list[int]]:
        """All answers, in the order of the requests: sampled and forced ids, without the end mark, up to the token that
        made a stop text whole. Blocks. What was dropped of a prompt is told by stream() and step()."""
        ids: list[int] = []
        try:
            for request in requests:
                ids.append(self._open(request))
            return [[event.token for event in self._events(id) if event.token is not None] for id in ids]
        finally:
            for id in ids:
                self._close(id)

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of one request as they come; leaving the loop early frees its row."""
        id = self._open(request)
        try:
            yield from self._events(id)
        finally:
            self._close(id)

    def refresh(self, model: GPT) -> None:
        """Go on with the weights of `model`, which has learned more: nothing that was read before counts."""
        if self.busy:
            raise RuntimeError("the model cannot change while requests are under way")
        cast_again(model, self.model)
        if self.cache is not None:  # as if it were new: what comes out depends on the places of rows in its last bits
            self.cache.lengths[:] = 0
            self.free = dict.fromkeys(range(self.max_rows))

    # -- streams

    def _open(self, request: Request) -> int:
        id = self.submit(request)
        self.opened[id] = deque()
        return id

    def _events(self, id: int) -> Iterator[Event]:
        finished = False
        while not finished and id in self.opened:  # where it is not, it was cancelled
            if self.opened[id]:
                event = self.opened[id].popleft()
                finished = event.finish is not None
                yield event
            elif self._working:
                self._step()
            else:  # its last event was lost by an interrupt
                return

    def _close(self, id: int) -> None:
        self.opened.pop(id, None)
        self.cancel(id)

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            self.opened.get(event.id, self.unheard).append(event)

    # -- places

    def _make_cache(self) -> None:
        """As many rows as were asked for, or as fit into most of the memory: further requests wait."""
        config, dtype = self.model.config, self.model.dtype
        fitting = int(CACHE_SHARE * free_memory(self.device)) // KVCache.row_bytes(config, self.max_length, dtype)
        self.max_rows = max(1, min(self.max_rows, fitting))
        self.free = dict.fromkeys(range(self.max_rows))
        self.cache = KVCache(config, self.max_rows, self.max_length, dtype, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.static:
            self.decoder = Decoder(self.model, self.cache, self.compiles)

    def _admit(self) -> None:
        """Give the free places to the waiting, in their order. Whose prompt begins as one that is being read just now
        waits until that can be copied."""
        for row in list(islice(self.waiting.values(), len(self.free) + self.max_rows)):
            if not self.free:
                break
            prompt = np.array(row.prompt)
            shared = self.cache.common_prefixes(prompt)
            stored = np.minimum(shared, self.cache.lengths)
            soon = max((min(shared[other.place], len(other.prompt)) for other in self.reading), default=0)
            if soon < stored.max() + WORTH_COPYING:
                self._take_place(row, prompt, np.minimum(stored, len(prompt) - 1))
                self.reading.append(row)
                del self.waiting[row.id]

    def _take_place(self, row: Row, prompt: np.ndarray, stored: np.ndarray) -> None:
        """stored: how much of the prompt each place has. The last token is read in any case: what follows it is not
        stored."""
        free = np.zeros(self.max_rows, dtype=bool)
        free[list(self.free)] = True
        best, oldest = int((2 * stored + free).argmax()), next(iter(self.free))
        goes_on = free[best] and 2 * stored[best] >= self.cache.lengths[best]  # else what it holds is worth keeping
        row.place = best if goes_on else oldest
        if stored[best] >= stored[row.place] + WORTH_COPYING:
            self.cache.copy(best, row.place, int(stored[best]))
        else:
            self.cache.lengths[row.place] = stored[row.place]
        self.cache.ids[row.place, : len(prompt)] = prompt
        del self.free[row.place]

    def _release(self, row: Row) -> None:
        (self.writing if row in self.writing else self.reading).remove(row)
        self.free[row.place] = None

    # -- steps

    @torch.no_grad()  # not inference_mode: the weights may be those of a model in training
    def _step(self) -> None:
        if self.cache is None:
            self._make_cache()
        try:
            writing, reading = list(self.writing), self._read_on()
            for rows, static in [(writing, True), (reading, False)] if self.static else [(writing + reading, False)]:
                if rows:
                    self._tell(self._advance(rows, static))
        except BaseException:  # an interrupt, too: rows that went on by half would go on with another's words
            dropped = {row.id for row in [*self.reading, *self.writing]}
            self.waiting = {id: row for id, row in self.waiting.items() if id not in dropped}
            self.reading, self.writing, self.free = deque(), [], dict.fromkeys(range(self.max_rows))
            self.cache.lengths[:] = 0
            self._tell([Event(id, None, finish="error") for id in sorted(dropped)])
            raise

    def _read_on(self) -> list[Row]:
        """Whose prompts are read in this step, and what of them. Who is not done goes to the end."""
        self._admit()
        room, rows = PREFILL[self.device.type][bool(self.writing)], []
        for row in self.reading:
            done = self.cache.lengths[row.place]
            row.next = row.prompt[done : done + room]
            room -= len(row.next)
            if row.next:
                rows.append(row)
        self.reading.rotate(-len(rows))
        return rows

    def _advance(self, rows: list[Row], static: bool) -> list[Event]:
        """Feed each row what it has next. Those that have all of their prompt choose a token."""
        lengths = self.cache.lengths
        chooses = [lengths[row.place] + len(row.next) >= len(row.prompt) for row in rows]
        choosing = [row for row, does in zip(rows, chooses, strict=True) if does]
        draws = [self._draw(i, row) for i, row in enumerate(choosing) if row.request.temperature > 0 and not row.forced]
        groups = grouped(draws, self.model.config.vocab_size, self.device)
        if static:
            logits = self.decoder([row.place for row in rows], [row.next[0] for row in rows])
        else:
            reading = Pass(self.cache, [(row.place, row.next) for row in rows])
            last = torch.from_numpy(reading.stops[chooses] - 1).to(self.device)  # before the pass, not to wait for it
            x = self.model.hidden(reading.idx, reading)
            reading.end()
            logits = self.model.logits(x[last, 0]) if choosing else None
        return self._write(choosing, logits, groups) if choosing else []

    def _draw(self, i: int, row: Row) -> Draw:
        request = row.request
        return Draw(i, request.temperature, request.top_k or 0, request.top_p, request.seed, row.count)

    def _choose(self, rows: list[Row], logits: torch.Tensor, groups: list) -> list[int]:
        return sample(logits, groups).tolist()

    def _write(self, rows: list[Row], logits: torch.Tensor, groups: list) -> list[Event]:
        """The next token of each row, logits (n, V), and what follows from it."""
        forced = [bool(row.forced) for row in rows]
        tokens = [
            row.forced[0] if row.forced else token
            for row, token in zip(rows, self._choose(rows, logits, groups), strict=True)
        ]
        events = [self._event(*of_row) for of_row in zip(rows, tokens, forced, strict=True)]
        asked = [i for i, row in enumerate(rows) if row.request.logprobs is not None]
        if asked:
            most = max(rows[i].request.logprobs for i in asked)
            found = log_probabilities(logits[asked], [tokens[i] for i in asked], most)
            for i, (logprob, likeliest) in zip(asked, found, strict=True):
                events[i].logprob, events[i].likeliest = logprob, likeliest[: rows[i].request.logprobs]
        return events

    def _event(self, row: Row, token: int, forced: bool) -> Event:
        first = row.count == len(row.request.prefix)
        if first:
            insort(self.writing, row, key=lambda row: row.place)  # neighbours are read together
            self.reading.remove(row)
        event = Event(row.id, token, forced)
        if token in self.ends and not forced:
            event.token, event.end, event.finish = None, token, "stop"
        else:
            row.count += 1
            row.next = [token]
            event.pieces, event.kind = row.say(token, forced), row.text.kind
            if row.text.stopped:
                event.finish = "stop"
            elif row.count >= row.limit:
                event.finish = "length"
        if first:
            event.prompt_tokens, event.dropped = row.prompt_tokens, row.dropped
            event.pieces = row.begun + event.pieces
        if event.finish:
            event.pieces += row.text.flush()
            self._release(row)
        return event


def room_for_prompt(max_length: int, max_tokens: int) -> int:
    """Tokens that a prompt may have, so that the answer has its own, or half of the context."""
    return max_length - min(max_tokens, max_length // 2)


def checked(request: Request, vocab_size: int) -> Request:
    """The request in plain numbers and lists of its own; ValueError with what is wrong in it."""
    whole = {"max_tokens": request.max_tokens, "top_k": request.top_k or 0, "seed": request.seed}
    temperature, top_p = request.temperature, request.top_p
    if not all(isinstance(value, (int, float, np.number)) for value in (temperature, top_p)):
        raise ValueError(f"temperature is {temperature!r} and top_p {top_p!r}; expected numbers")
    try:
        whole = {name: index(value) for name, value in whole.items()}
        prompt, prefix = ([index(id) for id in ids] for ids in (request.prompt, request.prefix))
        logprobs = None if request.logprobs is None else index(request.logprobs)
    except TypeError as error:
        raise ValueError(f"prompt, prefix, max_tokens, top_k, seed and logprobs are whole numbers: {error}") from error
    if not prompt:
        raise ValueError("the prompt is empty")
    for name, value, low, high in (
        ("a token of the prompt", min(prompt + prefix), 0, vocab_size - 1),
        ("a token of the prompt", max(prompt + prefix), 0, vocab_size - 1),
        ("max_tokens", whole["max_tokens"], 1, math.inf),
        ("temperature", temperature, 0, 1e30),
        ("top_k", whole["top_k"], 0, math.inf),
        ("top_p", top_p, 0, 1),
        ("logprobs", logprobs or 0, 0, vocab_size),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; expected {low} {'or more' if high == math.inf else f'to {high}'}")
    stop = (request.stop,) if isinstance(request.stop, str) else request.stop
    if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop is {request.stop!r}; expected texts, none of them empty")
    settings = {"temperature": float(temperature), "top_p": float(top_p), "stop": tuple(stop), "logprobs": logprobs}
    return Request(prompt, prefix=prefix, **settings, **whole)


def ask(model: GPT, tokenizer: Tokenizer, question: str, max_tokens: int = 256, temperature: float = 0.0) -> str:
    """One question, one answer: the visible text."""
    prompt = chat.prompt(tokenizer, {"messages": [{"role": "user", "content": question}]})
    engine = Engine(model, tokenizer, max_rows=1, max_length=len(prompt) + max_tokens)
    return "".join(event.text for event in engine.stream(Request(prompt, max_tokens, temperature)))
