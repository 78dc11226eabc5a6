"""The only grammar of the special tokens: conversations to ids and mask, prompts, tool calls, text while it streams.

A conversation is {"messages": [{"role", "content"}]}; content is text or a list of parts {"type", "text"} of type
text, python or python_output. A leading system message is merged into the first user message.
"""

import codecs
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from nanochat.calculator import calculator
from nanochat.tokenizer import Tokenizer

PART_MARKS = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}

Piece = tuple[str, str]  # kind of part, and what of its text has become sure; an empty one begins a call or its output


class ConversationError(ValueError):
    """A conversation that is not a conversation."""


def check_messages(messages: list[dict]) -> list[dict]:
    """Merge a leading system message into the first user message; check that roles alternate, user first."""
    if messages and messages[0].get("role") == "system":
        if len(messages) < 2 or messages[1].get("role") != "user":
            raise ConversationError("a system message must be followed by a user message")
        system, user = messages[0]["content"], messages[1]["content"]
        messages = [{"role": "user", "content": f"{system}\n\n{user}"}, *messages[2:]]
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        if message.get("role") != expected:
            raise ConversationError(f"message {i + 1} has role {message.get('role')!r}; expected {expected!r}")
        if expected == "user" and not isinstance(message["content"], str):
            raise ConversationError(f"message {i + 1}: what a user says is a string")
    return messages


def render(tokenizer: Tokenizer, conversation: dict, max_tokens: int | None = None) -> tuple[list[int], list[int]]:
    """ids and mask of a whole conversation. Mask 1: what the assistant says and its end mark, tool calls with theirs;
    0: everything else, tool outputs included."""
    ids, mask = [tokenizer.bos], [0]
    for message in check_messages(conversation["messages"]):
        for tokens, learned in _render_message(tokenizer, message):
            ids += tokens
            mask += [learned] * len(tokens)
    return ids[:max_tokens], mask[:max_tokens]


def _render_message(tokenizer: Tokenizer, message: dict) -> list[tuple[list[int], int]]:
    """Pieces of (ids, whether they are learned)."""
    special, content = tokenizer.special, message["content"]
    if message["role"] == "user":
        return [([special["<|user_start|>"], *tokenizer.encode(content), special["<|user_end|>"]], 0)]
    pieces = [([special["<|assistant_start|>"]], 0)]
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        tokens = tokenizer.encode(part["text"])
        if part["type"] != "text":
            if part["type"] not in PART_MARKS:
                raise ConversationError(f"part of type {part['type']!r}; expected text, python or python_output")
            first, last = PART_MARKS[part["type"]]
            tokens = [special[first], *tokens, special[last]]
        pieces.append((tokens, int(part["type"] != "python_output")))
    return [*pieces, ([special["<|assistant_end|>"]], 1)]


def prompt(tokenizer: Tokenizer, conversation: dict) -> list[int]:
    """ids up to where the assistant speaks next; a last assistant message is dropped."""
    messages = conversation["messages"]
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise ConversationError("there is no user message to answer")
    return render(tokenizer, {"messages": messages})[0] + [tokenizer.special["<|assistant_start|>"]]


def answer_tokens(tokenizer: Tokenizer, conversation: dict) -> int:
    """How many ids its last message has, its end mark included."""
    return len(render(tokenizer, conversation)[0]) - len(prompt(tokenizer, conversation))


def prompt_within(tokenizer: Tokenizer, messages: list[dict], limit: int) -> tuple[list[int], int]:
    """prompt() without the oldest turns for which `limit` ids have no room; a system message and the last turn stay.
    Returns (ids, messages dropped); the ids are too many where those two alone are."""
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    most = max(0, (len(turns) - 1) // 2)

    def without(pairs: int) -> list[int]:
        return prompt(tokenizer, {"messages": system + turns[2 * pairs :]})

    pairs = bisect_left(range(most), True, key=lambda pairs: len(without(pairs)) <= limit)
    return without(pairs), 2 * pairs


def fit(tokenizer: Tokenizer, ids: list[int], limit: int) -> tuple[list[int], int]:
    """A prompt in at most `limit` ids: its beginning mark and its newest turns. Returns (ids, messages dropped).

    When the last turn alone is too long, its own end is kept, after its mark, and it counts as dropped too; so does
    text that has no turns.
    """
    if len(ids) <= limit:
        return ids, 0
    if limit < 3:
        raise ConversationError(f"a prompt needs room for at least 3 tokens, there are {limit}")
    user, assistant = tokenizer.special["<|user_start|>"], tokenizer.special["<|assistant_start|>"]
    turns = [i for i, id in enumerate(ids) if id == user]
    begin = ids[:1] if ids[0] == tokenizer.bos else []
    for start in turns:
        if len(begin) + len(ids) - start <= limit:
            return begin + ids[start:], sum(id in (user, assistant) for id in ids[:start])
    begin += ids[turns[-1] : turns[-1] + 1] if turns else []
    messages = sum(id in (user, assistant) for id in ids[: turns[-1] + 1]) if turns else 1
    return begin + ids[len(ids) - limit + len(begin) :], messages


class ToolUse:
    """Watches the tokens of one answer. push(token) returns the ids to force into the row next, mostly none: at
    <|python_end|> the expression is evaluated, and its output forced between its marks."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.code: list[int] | None = None

    def push(self, token: int) -> list[int]:
        special = self.tokenizer.special
        if token == special["<|python_start|>"]:
            self.code = []
        elif token == special["<|python_end|>"] and self.code is not None:
            result = calculator(self.tokenizer.decode(self.code))
            self.code = None
            if result is not None:  # an error or a refused expression forces nothing
                return [special["<|output_start|>"], *self.tokenizer.encode(result), special["<|output_end|>"]]
        elif self.code is not None:
            self.code.append(token)
        return []


class TextStream:
    """Tokens in, pieces of text out: what is shown ("text"), and what tools are asked and say. Never half a character,
    never a special token.

    stop: texts, none of them empty, of which the first to be whole ends it: `stopped` is true then, and neither that
    text nor anything after it is shown. What may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.marks = dict.fromkeys(tokenizer.special.values())  # token -> (kind, whether it begins a part)
        for kind, marks in PART_MARKS.items():
            for mark, begins in zip(marks, (True, False), strict=True):
                self.marks[tokenizer.special[mark]] = (kind, begins)
        self.decoder, self.tool_decoder = utf8_decoder(), utf8_decoder()
        self.kind = "text"
        self.stopped = False
        self.held = ""

    def push(self, token: int) -> list[Piece]:
        if token not in self.marks:
            decoder = self.decoder if self.kind == "text" else self.tool_decoder
            return self._piece(decoder.decode(self.tokenizer.decode_bytes([token])))
        if self.marks[token] is None:
            return []
        kind, begins = self.marks[token]
        pieces = self._end_tool()
        self.kind = kind if begins else "text"
        return [*pieces, (kind, "")] if begins else pieces

    def flush(self) -> list[Piece]:
        """What was held back: the beginning of a character that never ended, or of a text that would have stopped."""
        pieces = self._end_tool()
        self.kind = "text"
        shown = self._show(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return [*pieces, ("text", shown)] if shown else pieces

    def _end_tool(self) -> list[Piece]:
        return [] if self.kind == "text" else self._piece(self.tool_decoder.decode(b"", final=True))

    def _piece(self, text: str) -> list[Piece]:
        text = self._show(text) if self.kind == "text" else text
        return [(self.kind, text)] if text else []

    def _show(self, text: str) -> str:
        if not self.stop or self.stopped:
            return "" if self.stopped else text
        text = self.held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop if stop in text]
        self.stopped = bool(found)
        if self.stopped:  # by the first to be whole
            self.held = ""
            return text[: min(found)[1]]
        begun = min(len(text), max(map(len, self.stop)) - 1)
        while begun and not any(stop.startswith(text[len(text) - begun :]) for stop in self.stop):
            begun -= 1
        self.held = text[len(text) - begun :]
        return text[: len(text) - begun]


def utf8_decoder():
    return codecs.getincrementaldecoder("utf-8")(errors="replace")


def visible(pieces: Iterable[Piece]) -> str:
    """What a person sees of them."""
    return "".join(text for kind, text in pieces if kind == "text")


def parts(pieces: Iterable[Piece]) -> list[dict]:
    """Pieces joined to the parts of a message."""
    joined: list[dict] = []
    for kind, text in pieces:
        if not joined or joined[-1]["type"] != kind or not text:
            joined.append({"type": kind, "text": text})
        else:
            joined[-1]["text"] += text
    return joined


def visible_text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """What a person sees of an answer."""
    stream = TextStream(tokenizer)
    return visible([piece for token in tokens for piece in stream.push(token)] + stream.flush())


# How a part and its marks are shown to a person: a tool's call as <<48/2>>, its output as [24].
SHOWN = {"text": ("", ""), "python": ("<<", ">>"), "python_output": ("[", "]")}


def readable(content: str | list[dict]) -> str:
    """A message's content for a person, tool calls included."""
    if isinstance(content, str):
        return content
    return "".join(part["text"].join(SHOWN[part["type"]]) for part in content)


def spoken_text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """An answer as readable() shows it."""
    shown = {
        tokenizer.special[mark]: text.encode()
        for kind, marks in PART_MARKS.items()
        for mark, text in zip(marks, SHOWN[kind], strict=True)
    }
    return b"".join(shown.get(id) or tokenizer.decode_bytes([id]) for id in tokens).decode("utf-8", "replace")
