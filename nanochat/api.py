"""What clients say to the server and hear from it: OpenAI's chat completions, and the events of the reference.

Beyond OpenAI's fields there are, in requests, `top_k`, `microscope` (send the tokens, each with so many alternatives),
`answer_ids` (what the answer begins with); in answers, `parts` where a tool was used, `tokens` for the microscope, and
`dropped`, the number of messages that there was no room for.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nanochat import chat
from nanochat.engine import Event, Request, room_for_prompt
from nanochat.tokenizer import Tokenizer

MAX_MESSAGES = 500
MAX_MESSAGE_CHARACTERS = 8_000
MAX_CONVERSATION_CHARACTERS = 32_000
MAX_TOKENS = 4096
MAX_CHOICES = 16
LEAST_LOGPROB = -9999.0  # JSON has no infinity
LIMITS = {
    "messages": MAX_MESSAGES,
    "message_characters": MAX_MESSAGE_CHARACTERS,
    "conversation_characters": MAX_CONVERSATION_CHARACTERS,
    "max_tokens": MAX_TOKENS,
}
# Fields of OpenAI's that change the answer and are not known here, and the values of them that change nothing.
UNSUPPORTED = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}


class InvalidRequest(ValueError):
    """param: the field that is at fault."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


def explain(errors: Sequence[dict]) -> tuple[str, str | None]:
    """What pydantic found wrong, for a person, and the field that is at fault."""
    worst = max(errors, key=lambda error: len(error["loc"]))  # of what could be several things, the likeliest meant
    if worst["type"] == "json_invalid":
        return f"the body is no JSON: {worst.get('ctx', {}).get('error', worst['msg'])}", None
    cause = worst.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequest):
        return f"{cause.param}: {cause}", cause.param
    if worst["loc"] == ("body",) and cause is None:
        return "the body must be a JSON object, sent as Content-Type: application/json", None
    fields = [part for part in worst["loc"][1:] if isinstance(part, int) or (part.isidentifier() and part != "str")]
    place = ".".join(map(str, fields))
    return (f"{place}: {worst['msg']}", place) if place else (worst["msg"], None)


# -- what is asked


def whole_characters(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no encoding has."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair is no text")
    return text


Text = Annotated[str, AfterValidator(whole_characters)]
StopText = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(whole_characters)]


class Part(BaseModel):
    """Of a message: text, or what a tool was asked and said."""

    type: Literal["text", "python", "python_output"]
    text: Text


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    @model_validator(mode="before")
    @classmethod
    def say_what_is_not_taken(cls, data: Any) -> Any:
        content = data.get("content") if isinstance(data, dict) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in ("text", "python", "python_output"):
                raise InvalidRequest("content that is not text is not supported", "messages")
        if isinstance(data, dict) and (data.get("tool_calls") or data.get("function_call")):
            raise InvalidRequest("messages with tool calls are not supported", "messages")
        return data

    @model_validator(mode="after")
    def check_content(self) -> "Message":
        if self.role != "assistant" and any(part["type"] != "text" for part in self.parts()):
            raise InvalidRequest("only the assistant's messages have calls of tools", "messages")
        if self.characters() > MAX_MESSAGE_CHARACTERS:
            message = f"a message has {self.characters()} characters, at most {MAX_MESSAGE_CHARACTERS} are taken"
            raise InvalidRequest(message, "messages")
        return self

    def parts(self) -> list[dict]:
        if isinstance(self.content, str):
            return [{"type": "text", "text": self.content}]
        return [part.model_dump() for part in self.content]

    def characters(self) -> int:
        return sum(len(part["text"]) for part in self.parts())


class ChatRequest(BaseModel):
    """What both dialects take. Strict: true is no number, and "5" is none."""

    model_config = ConfigDict(strict=True)

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=200, description="0: all")
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)

    @model_validator(mode="after")
    def check_conversation(self) -> "ChatRequest":
        characters = sum(message.characters() for message in self.messages)
        if characters > MAX_CONVERSATION_CHARACTERS:
            message = f"{characters} characters in all, at most {MAX_CONVERSATION_CHARACTERS} are taken"
            raise InvalidRequest(message, "messages")
        last = self.messages[-1]
        if last.role != "user" or not any(part["text"].strip() for part in last.parts()):
            raise InvalidRequest("the last message must be the user's and must not be empty", "messages")
        return self

    def conversation(self) -> list[dict]:
        """The messages as chat.py knows them: neighbours of one role are one message, and what the system says later
        than at the beginning is said by the user."""
        merged: list[dict] = []
        for message in self.messages:
            system = message.role in ("system", "developer")
            role = message.role if not system else "user" if any(m["role"] != "system" for m in merged) else "system"
            content = message.parts() if role == "assistant" else "\n".join(part["text"] for part in message.parts())
            if not merged or merged[-1]["role"] != role:
                merged.append({"role": role, "content": content})
            elif role == "assistant":
                merged[-1]["content"] += content
            else:
                merged[-1]["content"] += f"\n\n{content}"
        return merged


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class CompletionRequest(ChatRequest):
    """POST /v1/chat/completions."""

    model: Text | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    microscope: int | None = Field(None, ge=0, le=20, description="tokens, with so many alternatives to each")
    answer_ids: list[int] | None = Field(None, max_length=MAX_TOKENS, description="what the answer begins with")

    @model_validator(mode="before")
    @classmethod
    def refuse_what_is_not_supported(cls, data: Any) -> Any:
        for name, harmless in UNSUPPORTED.items():
            if isinstance(data, dict) and name in data and data[name] not in harmless:
                raise InvalidRequest(f"{name} is not supported here", name)
        return data

    @model_validator(mode="after")
    def check_logprobs(self) -> "CompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.answer_ids and (self.n or 1) > 1:
            raise InvalidRequest("answer_ids goes with one answer", "answer_ids")
        return self


@dataclass
class Settings:
    """What a request gets that does not say otherwise."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512


def engine_requests(
    asked: ChatRequest, tokenizer: Tokenizer, context: int, defaults: Settings, seed: int
) -> tuple[list[Request], int]:
    """The request for each choice, and how many messages were dropped since `context` has no room for them.

    seed: what is drawn by where the request has none.
    """
    full = asked if isinstance(asked, CompletionRequest) else CompletionRequest.model_construct(**dict(asked))
    prefix = full.answer_ids or []
    check_prefix(tokenizer, prefix)
    max_tokens = full.max_completion_tokens or full.max_tokens or defaults.max_tokens
    room = room_for_prompt(context, max_tokens)
    ids, dropped = chat.prompt_within(tokenizer, asked.conversation(), room)
    left = context - min(len(ids), room)
    if len(prefix) >= left:
        raise InvalidRequest(f"the answer begins with {len(prefix)} tokens, there is room for {left}", "answer_ids")
    asked_for = [full.microscope, (full.top_logprobs or 0) if full.logprobs else None]
    request = Request(
        prompt=ids,
        max_tokens=max_tokens,
        temperature=defaults.temperature if asked.temperature is None else asked.temperature,
        top_k=defaults.top_k if asked.top_k is None else asked.top_k,
        top_p=1.0 if full.top_p is None else full.top_p,
        stop=(full.stop,) if isinstance(full.stop, str) else tuple(full.stop or ()),
        logprobs=max((number for number in asked_for if number is not None), default=None),
        prefix=prefix,
    )
    seed = seed if full.seed is None else full.seed
    return [replace(request, seed=seed + i) for i in range(full.n or 1)], dropped


def check_prefix(tokenizer: Tokenizer, ids: list[int]) -> None:
    """An answer has no marks but those of tools: nobody puts words into another's mouth by it."""
    of_tools = {tokenizer.special[mark] for marks in chat.PART_MARKS.values() for mark in marks}
    forbidden = set(tokenizer.special.values()) - of_tools
    if not all(0 <= id < tokenizer.vocab_size and id not in forbidden for id in ids):
        raise InvalidRequest("expected ids of the vocabulary, no marks but those of tools among them", "answer_ids")


# -- what is answered


def token_text(tokenizer: Tokenizer, id: int, names: dict[int, str]) -> str:
    """A token for a person's eyes; bytes that are no whole characters as \\x.."""
    return names.get(id) or tokenizer.decode_bytes([id]).decode("utf-8", "backslashreplace")


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


@dataclass
class Choice:
    """One answer: all of it, or what is new of it. calls: in what is new, what grew of the parts that are tools', each
    with the number of its part among them."""

    index: int
    pieces: list[chat.Piece] = field(default_factory=list)
    calls: list[dict] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)
    tokens: list[dict] = field(default_factory=list)
    count: int = 0
    finish: str | None = None


class Completion:
    """The answers to one request of OpenAI's dialect, whole or in chunks."""

    def __init__(self, asked: CompletionRequest, choices: int, tokenizer: Tokenizer, id: str, model: str, dropped: int):
        self.asked, self.tokenizer, self.dropped = asked, tokenizer, dropped
        self.names = {id: name for name, id in tokenizer.special.items()}
        self.head = {"id": f"chatcmpl-{id}", "created": int(time.time()), "model": model}
        self.choices = [Choice(i) for i in range(choices)]
        self.calls = [-1] * choices  # the number of the last part that is a tool's
        self.prompt_tokens = 0

    def add(self, batch: list[tuple[int, Event]]) -> list[Choice]:
        """Take in what came; returns what is new: for each answer, a choice for each run of text or of calls."""
        news: list[Choice] = []
        for index, event in batch:
            whole = self.choices[index]
            self.prompt_tokens = max(self.prompt_tokens, event.prompt_tokens)
            self.dropped += event.dropped if index == 0 else 0  # the same for all
            new = Choice(index, count=int(event.token is not None), finish=event.finish)
            if self.asked.logprobs and self._is_text(event):
                new.logprobs.append(self._logprob(event))
            if self.asked.microscope is not None:
                new.tokens.append(self._token(event))
            for kind, text in event.pieces:
                if new.pieces and (kind == "text") != (new.pieces[-1][0] == "text"):
                    news.append(Choice(index, new.pieces, new.calls))
                    new.pieces, new.calls = [], []
                new.pieces.append((kind, text))
                if kind != "text":
                    self.calls[index] += not text  # an empty piece begins a part
                    new.calls.append({"index": self.calls[index], "type": kind, "text": text})
            news.append(new)
            whole.pieces += event.pieces
            whole.logprobs += new.logprobs
            whole.tokens += new.tokens
            whole.count += new.count
            whole.finish = new.finish
        return joined(news)

    def opening(self) -> list[dict]:
        """The first chunks, when something has come of the answers."""
        return [self._chunk(Choice(choice.index), {"role": "assistant", "content": ""}) for choice in self.choices]

    def chunk(self, new: Choice) -> dict:
        if new.calls:
            return self._chunk(new, {"parts": new.calls})
        text = chat.visible(new.pieces)
        return self._chunk(new, {"content": text} if text else {})

    def last_chunk(self) -> dict:
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()}

    def whole(self) -> dict:
        choices = []
        for choice in self.choices:
            message = {"role": "assistant", "content": chat.visible(choice.pieces), "refusal": None}
            if any(kind != "text" for kind, _ in choice.pieces):
                message["parts"] = chat.parts(choice.pieces)
            choices.append({**self._choice(choice), "message": message})
        return self._with_dropped({**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage()})

    def usage(self) -> dict:
        asked, said = self.prompt_tokens, sum(choice.count for choice in self.choices)
        return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}

    def _chunk(self, choice: Choice, delta: dict) -> dict:
        chunk = {**self.head, "object": "chat.completion.chunk"}
        chunk["choices"] = [{**self._choice(choice), "delta": delta}]
        if self.asked.stream_options and self.asked.stream_options.include_usage:
            chunk["usage"] = None
        return self._with_dropped(chunk) if delta.get("role") else chunk

    def _with_dropped(self, answer: dict) -> dict:
        return {**answer, "dropped": self.dropped} if self.dropped else answer

    def _choice(self, choice: Choice) -> dict:
        logprobs = {"content": choice.logprobs, "refusal": None} if self.asked.logprobs else None
        fields = {"index": choice.index, "finish_reason": choice.finish, "logprobs": logprobs}
        return {**fields, "tokens": choice.tokens} if self.asked.microscope is not None else fields

    def _is_text(self, event: Event) -> bool:
        return event.token is not None and event.token not in self.names and event.kind == "text" and not event.forced

    def _logprob(self, event: Event) -> dict:
        def entry(id, logprob):
            raw = self.tokenizer.decode_bytes([id])
            return {"token": token_text(self.tokenizer, id, self.names), "logprob": finite(logprob), "bytes": list(raw)}

        likeliest = event.likeliest[: self.asked.top_logprobs or 0]
        return {**entry(event.token, event.logprob), "top_logprobs": [entry(*pair) for pair in likeliest]}

    def _token(self, event: Event) -> dict:
        """A token, or the mark that ended the answer, for the microscope."""

        def entry(id, logprob):
            text = token_text(self.tokenizer, id, self.names)
            return {"id": id, "text": text, "special": id in self.names, "logprob": finite(logprob)}

        id = event.end if event.token is None else event.token
        likeliest = [entry(*pair) for pair in event.likeliest[: self.asked.microscope]]
        return {**entry(id, event.logprob), "forced": event.forced, "likeliest": likeliest}


def joined(news: list[Choice]) -> list[Choice]:
    """Neighbours of one answer as one, unless text stands beside calls: a chunk has the one or the other."""
    runs: list[Choice] = []
    for new in news:
        last = runs[-1] if runs else None
        mixed = last and bool(last.calls) != bool(new.calls) and last.pieces and new.pieces
        if last is None or last.index != new.index or mixed:
            runs.append(new)
        else:
            for name in ("pieces", "calls", "logprobs", "tokens"):
                getattr(last, name).extend(getattr(new, name))
            last.count, last.finish = last.count + new.count, new.finish
    return runs


def reference_events(batch: list[tuple[int, Event]], gpu: int) -> list[dict]:
    """The reference's events, and two more: messages `dropped`, and `finish` at the limit."""
    events = []
    dropped, text = sum(event.dropped for _, event in batch), "".join(event.text for _, event in batch)
    if dropped:
        events.append({"dropped": dropped})
    if text:
        events.append({"token": text, "gpu": gpu})
    if batch[-1][1].finish == "length":
        events.append({"finish": "length"})
    return events


def sse(value: dict | str) -> str:
    """One server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"
