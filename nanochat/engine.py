"""Generation: many requests at once, each with its own prompt, length and sampling; they join and leave at any step.

Active requests lie in rows 0..n-1 of one cache. A step prefills what waits and fits, then feeds every active row one
token: the one it sampled, or one that a tool forced. The noise of a sample is a function of (seed, position), so a
request draws the same text alone and in company.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nanochat import chat
from nanochat.chat import ToolUse
from nanochat.gpt import GPT, KVCache
from nanochat.tokenizer import Tokenizer

PREFILL_TOKENS = 8192  # prompt tokens, padding included, that one step takes in at most


@dataclass
class Request:
    """prompt: ids. temperature 0 is argmax; top_k 0 or None and top_p 1 leave all tokens in. max_tokens counts forced
    tokens too."""

    prompt: list[int]
    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = 50
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Event:
    """A token of request `id`, or its end: finish is "stop" (the model ended its turn) or "length"."""

    id: int
    token: int | None
    forced: bool = False
    finish: str | None = None


class Row:
    """One request under way."""

    def __init__(self, id: int, request: Request, tokenizer: Tokenizer):
        self.id, self.request = id, request
        self.tools = ToolUse(tokenizer)
        self.forced: deque[int] = deque()
        self.count = 0  # tokens emitted
        self.token = -1  # the newest of them, not yet fed


class Engine:
    """One thread owns it. max_rows: requests decoded together; max_length: prompt and answer (default: the model's
    sequence length)."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, max_rows: int = 64, max_length: int | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.max_length = max_rows, max_length or model.config.sequence_len
        self.ends = {tokenizer.special["<|assistant_end|>"], tokenizer.bos}
        self.device = model.lm_head.weight.device
        self.cache: KVCache | None = None
        self.rows: list[Row] = []
        self.waiting: deque[Row] = deque()
        self.next_id = 0

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.waiting)

    def submit(self, request: Request) -> int:
        """Queue a request; its id is in the events that step() returns."""
        if not request.prompt:
            raise ValueError("the prompt is empty")
        if len(request.prompt) >= self.max_length:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens, there is room for {self.max_length - 1}: "
                "shorten it with chat.fit_prompt"
            )
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}; expected 1 or more")
        self.next_id += 1
        self.waiting.append(Row(self.next_id, request, self.tokenizer))
        return self.next_id

    def cancel(self, id: int) -> None:
        """Drop a request, waiting or active; nothing more is heard of it."""
        self.waiting = deque(row for row in self.waiting if row.id != id)
        for i, row in enumerate(self.rows):
            if row.id == id:
                self._remove(i)
                break

    @torch.no_grad()  # not inference_mode: rotary tables that grow here must still serve training
    def step(self) -> list[Event]:
        """Let the waiting in, and move every active request one token on."""
        if self.cache is None:
            self.cache = self._make_cache()
        events: list[Event] = []
        active = len(self.rows)
        if active:
            idx = torch.tensor([[row.token] for row in self.rows], device=self.device)
            events += self._emit(0, self._forward(slice(0, active), idx))
        logits = self._prefill(active)
        if logits is not None:
            events += self._emit(active, logits)
        for i in reversed(range(len(self.rows))):
            if self.rows[i].request is None:
                self._remove(i)
        return events

    def generate(self, requests: list[Request]) -> list[list[int]]:
        """All answers, in the order of the requests: sampled and forced ids, without the end mark. Blocks."""
        order = {self.submit(request): i for i, request in enumerate(requests)}
        answers: list[list[int]] = [[] for _ in requests]
        while self.busy:
            for event in self.step():
                if event.token is not None and event.id in order:
                    answers[order[event.id]].append(event.token)
        return answers

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of one request as they come; leaving the loop early frees its row."""
        id = self.submit(request)
        finished = False
        try:
            while not finished:
                for event in self.step():
                    if event.id == id:
                        finished = event.finish is not None
                        yield event
        finally:
            if not finished:
                self.cancel(id)

    def _make_cache(self) -> KVCache:
        """As many rows as were asked for, or as fit into most of the GPU's free memory: further requests wait."""
        config, dtype = self.model.config, self.model.dtype
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            fitting = int(0.7 * free) // KVCache.row_bytes(config, self.max_length, dtype)
            self.max_rows = max(1, min(self.max_rows, fitting))
        return KVCache(config, self.max_rows, self.max_length, dtype, self.device)

    def _forward(self, rows: slice, idx: torch.Tensor, counts: list[int] | None = None) -> torch.Tensor:
        """Feed idx (B, T) to some rows; the logits (B, vocab_size) after the last token of each."""
        self.cache.begin(rows, idx.size(1))
        x = self.model.hidden(idx, self.cache)
        self.cache.advance(idx, counts)
        last = torch.tensor(counts, device=self.device) - 1 if counts else -1
        return self.model.logits(x[torch.arange(idx.size(0), device=self.device), last])

    def _prefill(self, first: int) -> torch.Tensor | None:
        """Admit waiting requests into the rows from `first` on, as many as fit; one pass for all their prompts. Equal
        prompts side by side (samples of one question) are computed once and copied."""
        prompts: list[list[int]] = []
        sources: list[int] = []
        while self.waiting and first + len(sources) < self.max_rows:
            prompt = self.waiting[0].request.prompt
            if not prompts or prompt != prompts[-1]:
                if prompts and max(map(len, [*prompts, prompt])) * (len(prompts) + 1) > PREFILL_TOKENS:
                    break
                prompts.append(prompt)
            sources.append(len(prompts) - 1)
            self.rows.append(self.waiting.popleft())
        if not sources:
            return None
        length = max(map(len, prompts))
        idx = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in prompts], device=self.device)
        self.cache.lengths[first : first + len(sources)] = [0] * len(sources)
        logits = self._forward(slice(first, first + len(prompts)), idx, [len(prompt) for prompt in prompts])
        for row in reversed(range(len(sources))):  # sources[row] <= row: from the end, nothing is overwritten too early
            if sources[row] != row:
                self.cache.copy_row(first + sources[row], first + row)
        return logits[torch.tensor(sources, device=self.device)]

    def _emit(self, first: int, logits: torch.Tensor) -> list[Event]:
        """The next token of each row from `first` on, and what follows from it."""
        rows = self.rows[first : first + logits.size(0)]
        events = []
        for i, (row, token) in enumerate(zip(rows, sample(logits, rows), strict=True)):
            forced = bool(row.forced)
            if forced:
                token = row.forced.popleft()
            elif token in self.ends:
                events.append(Event(row.id, None, finish="stop"))
                row.request = None
                continue
            row.token = token
            row.count += 1
            if not forced:
                row.forced.extend(row.tools.push(token))
            full = row.count >= row.request.max_tokens or self.cache.lengths[first + i] >= self.max_length
            events.append(Event(row.id, token, forced, "length" if full else None))
            if full:
                row.request = None
        return events

    def _remove(self, i: int) -> None:
        """Take row i out; the last row moves into its place, so that the active ones stay side by side."""
        last = len(self.rows) - 1
        if i != last:
            self.cache.copy_row(last, i)
            self.rows[i] = self.rows[last]
        self.rows.pop()


def ask(model: GPT, tokenizer: Tokenizer, question: str, max_tokens: int = 256, temperature: float = 0.0) -> str:
    """One question, one answer: the visible text."""
    prompt = chat.prompt(tokenizer, {"messages": [{"role": "user", "content": question}]})
    engine = Engine(model, tokenizer, max_rows=1, max_length=len(prompt) + max_tokens)
    return chat.visible_text(tokenizer, engine.generate([Request(prompt, max_tokens, temperature)])[0])


def sample(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    """One token for each row of logits (B, V): top-k, then temperature, softmax, top-p, and the inverse of the
    cumulative distribution at the row's uniform number."""
    tokens = logits.argmax(dim=-1).tolist()
    drawn = [i for i, row in enumerate(rows) if row.request.temperature > 0 and not row.forced]
    if not drawn:
        return tokens
    requests = [rows[i].request for i in drawn]
    vocab_size = logits.size(-1)
    counts = [min(request.top_k or vocab_size, vocab_size) for request in requests]
    values, ids = logits[drawn].topk(max(counts), dim=-1)  # sorted, likeliest first

    def column(numbers):
        return torch.tensor(numbers, dtype=torch.float32, device=logits.device).unsqueeze(1)

    rank = torch.arange(values.size(1), device=logits.device)
    values = values.masked_fill(rank >= column(counts), float("-inf"))
    probs = torch.softmax(values / column([request.temperature for request in requests]), dim=-1)
    before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill((before >= column([request.top_p for request in requests])) & (rank > 0), 0.0)
    cumulative = probs.cumsum(dim=-1)
    noise = column([uniform(rows[i].request.seed, rows[i].count) for i in drawn])
    choice = (cumulative <= noise * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    choice = torch.minimum(choice, (probs > 0).sum(dim=-1, keepdim=True) - 1)
    for i, token in zip(drawn, ids.gather(1, choice).squeeze(1).tolist(), strict=True):
        tokens[i] = token
    return tokens


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a request's seed and a position (the SplitMix64 finalizer)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & mask
    for _ in range(2):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return (z >> 11) / (1 << 53)
