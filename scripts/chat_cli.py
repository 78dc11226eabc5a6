"""Chat with a model in the terminal: `python -m scripts.chat_cli`, or one question with `-p "Who are you?"`."""

import argparse
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator

MAX_TOKENS = 256
SMALL_MODEL = 50_000_000  # parameters; below, one token is too little work to share between CPU threads
ALTERNATIVES = 4  # that /tokens shows
HELP = """/clear            forget the conversation and begin anew
/retry            another answer to the last question
/undo             take the last question and its answer back
/system TEXT      what the model is told before the conversation
/temperature X    0 to 2; 0 always takes the likeliest token
/topk N           sample among the N likeliest tokens (0: all)
/tokens           the last answer token by token: how likely each was, and what else it might have been
/help             this list
/quit             leave (also Ctrl-D)
A line that ends with \\ goes on in the next. Ctrl-C stops an answer, not the program."""


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat with a model in the terminal.")
    parser.add_argument("-i", "--source", choices=["base", "sft", "rl"], default="sft", help="which stage's model")
    parser.add_argument("-g", "--model-tag", default=None, help="default: the largest d<N>")
    parser.add_argument("-s", "--step", type=int, default=None, help="default: the newest")
    parser.add_argument("-p", "--prompt", default="", help="ask this, print the answer and leave (-: what stdin says)")
    parser.add_argument("-t", "--temperature", type=float, default=0.6, help="0 always takes the likeliest token")
    parser.add_argument("-k", "--top-k", type=int, default=50, help="sample among the k likeliest tokens (0: all)")
    parser.add_argument("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    args = parser.parse_args(argv)
    if not 0 <= args.temperature <= 2:
        parser.error(f"--temperature is {args.temperature}, expected 0 to 2")
    if args.prompt == "-":
        args.prompt = sys.stdin.read()
    if args.prompt and not args.prompt.strip():
        parser.error("--prompt is empty")
    if args.top_k < 0:
        parser.error(f"--top-k is {args.top_k}, expected 0 (all) or more")
    return args


@contextlib.contextmanager
def interrupts_noted() -> Iterator[list]:
    """Within, Ctrl-C only fills the list it yields: the engine is never interrupted in the middle of a step."""
    noted: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, previous)


class Chat:
    """A conversation with a model: the turns so far, and how the next answer is sampled."""

    def __init__(self, engine, tokenizer, temperature: float, top_k: int, colour: bool = False):
        self.engine = engine
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.top_k = top_k
        self.colour = colour
        self.system = ""
        self.turns: list[tuple[str, list[dict]]] = []  # question, parts of the answer; none where nothing was said
        self.events: list = []  # of the last answer

    def messages(self) -> list[dict]:
        """What was said so far. A question that nothing was said to is not part of it."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        for question, parts in self.turns:
            if parts:
                said += [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]
        return said

    def answer(self, question: str) -> Iterator[tuple[str, str]]:
        """Ask, and yield the answer as it comes, in pieces (kind of part, text). What was said when it ends, or is
        stopped, stays in the history.

        Notes on how it went (turns left out, stopped, cut off) go to stderr.
        """
        from nanochat import chat
        from nanochat.engine import Request, room_for_prompt

        messages = [*self.messages(), {"role": "user", "content": question}]
        room = room_for_prompt(self.engine.max_length, MAX_TOKENS)
        prompt, dropped = chat.prompt_within(self.tokenizer, messages, room)
        settings = {"temperature": self.temperature, "top_k": self.top_k, "seed": random.getrandbits(31)}
        id = self.engine.submit(Request(prompt, MAX_TOKENS, logprobs=ALTERNATIVES, **settings))
        said, count, began, ending = [], 0, 0.0, ""
        self.events = []
        with interrupts_noted() as interrupts:
            while not ending:
                for event in self.engine.step():
                    if event.dropped or (dropped and not began):
                        unseen = dropped + event.dropped
                        note(f"too long: the model does not see the beginning of it ({unseen} messages)\n")
                    began = began or time.perf_counter()
                    self.events.append(event)
                    said += event.pieces
                    yield from event.pieces
                    count += event.token is not None
                    ending = event.finish or ""
                if interrupts and not ending:
                    self.engine.cancel(id)
                    ending = "stopped"
        self.turns.append((question, chat.parts(said)))
        if ending != "stop":
            note("stopped" if ending == "stopped" else f"cut off after {count} tokens")
        elif self.colour and count > 1:
            note(f"{count} tokens, {(count - 1) / (time.perf_counter() - began):.0f} tokens/s", dim=True)


def note(text: str, dim: bool = False) -> None:
    text = f"\n({text})"
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, end="", file=sys.stderr, flush=True)


def say(pieces: Iterator[tuple[str, str]], colour: bool = False) -> None:
    """What is said, and in colour what the tools were asked and said, too."""
    from nanochat.chat import SHOWN
    from nanochat.terminal import paint, plain

    open_part = ""
    for kind, text in pieces:
        if open_part and (kind != open_part or not text):
            print(paint(SHOWN[open_part][1], "dim", on=colour), end="")
            open_part = ""
        if kind != "text" and colour:
            if not open_part:
                print(paint(SHOWN[kind][0], "dim", on=colour), end="")
            open_part = kind
            print(paint(plain(text), "dim", on=colour), end="", flush=True)
        elif kind == "text":
            print(plain(text), end="", flush=True)
    print(paint(SHOWN[open_part][1], "dim", on=colour) if open_part else "", flush=True)


def print_tokens(chat: Chat) -> None:
    """The last answer, a line a token."""
    from nanochat.terminal import paint, percent, token

    names = {id: name for name, id in chat.tokenizer.special.items()}

    def shown(id):
        text = names.get(id) or chat.tokenizer.decode_bytes([id]).decode("utf-8", "backslashreplace")
        return token(text)

    if not chat.events:
        print("(there is no answer yet)")
    for event in chat.events:
        id = event.end if event.token is None else event.token
        if id is None:
            continue
        others = [f"{shown(other)} {percent(logprob)}" for other, logprob in event.likeliest if other != id]
        style = (
            "cyan" if event.forced else "green" if event.logprob > -0.7 else "yellow" if event.logprob > -3 else "red"
        )
        line = paint(f"{shown(id):16}", style, on=chat.colour)
        rest = "put in by the tool" if event.forced else "   ".join(others)
        print(f"{percent(event.logprob):>7}  {line}  {paint(rest, 'dim', on=chat.colour)}")


def read_question() -> str:
    """A line, or several that end with a backslash."""
    lines = [input("\nYou: ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("...  "))
    return "\n".join(lines).strip()


def number(text: str, low: float, high: float, kind=float):
    """The number that was typed after a command, or None after saying what was expected."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        print(f"(expected a {'whole ' if kind is int else ''}number from {low} to {high})")
        return None
    return value


def obey(chat: Chat, command: str) -> bool:
    """Carry out what was typed after a slash. False: leave."""
    from nanochat.terminal import plain

    word, _, rest = command.partition(" ")
    rest = rest.strip()
    if word == "/quit":
        return False
    if word == "/clear":
        chat.turns, chat.events = [], []
        print("(a new conversation)")
    elif word in ("/retry", "/undo") and not chat.turns:
        print("(nothing was asked yet)")
    elif word == "/retry":
        question, parts = chat.turns.pop()
        kept = len(chat.turns)
        respond(chat, question)
        if parts and not any(new for _, new in chat.turns[kept:]):
            chat.turns[kept:] = [(question, parts)]
            print("(the answer before stays)")
    elif word == "/undo":
        chat.events = []
        print(f"(taken back: {plain(chat.turns.pop()[0])})")
    elif word == "/system":
        chat.system = rest
        print("(the system prompt is set)" if rest else "(there is no system prompt)")
    elif word == "/temperature":
        value = number(rest, 0, 2) if rest else chat.temperature
        chat.temperature = chat.temperature if value is None else value
        print(f"(temperature {chat.temperature})")
    elif word == "/topk":
        value = number(rest, 0, 1_000_000, int) if rest else chat.top_k
        chat.top_k = chat.top_k if value is None else value
        print(f"(top-k {chat.top_k})")
    elif word == "/tokens":
        print_tokens(chat)
    else:
        print(HELP if word == "/help" else f"{word} is not a command here.\n{HELP}")
    return True


def respond(chat: Chat, question: str) -> None:
    print("\nnanochat: ", end="", flush=True)
    try:
        say(chat.answer(question), chat.colour)
    except ValueError as error:  # a question that does not fit
        print(f"({error})")


def converse(chat: Chat) -> None:
    """Read questions until /quit or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history; not on every platform)
    while True:
        try:
            question = read_question()
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")
            continue
        except EOFError:
            print()
            return
        if question.startswith("/"):
            if not obey(chat, question):
                return
        elif question:
            respond(chat, question)


def main(args: argparse.Namespace) -> None:
    # Here, so that --help and wrong flags do not wait for torch.
    import torch

    from nanochat import decoding, runtime
    from nanochat.checkpoint import CheckpointError, load_model
    from nanochat.engine import Engine
    from nanochat.tokenizer import TokenizerError

    run = runtime.start(args.device_type)
    try:
        model, tokenizer, meta = load_model(args.source, run, args.model_tag, args.step)
        if run.device.type == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL_MODEL:
            torch.set_num_threads(1)  # 5 ms a token instead of 60 on two cores that others use, too (11M parameters)
        engine = Engine(model, tokenizer, max_rows=1, static=decoding.available(run))
        del model  # the engine's copy is smaller on GPUs
        chat = Chat(engine, tokenizer, args.temperature, args.top_k, runtime.colours(sys.stdout))
        if args.prompt:
            say(chat.answer(args.prompt))
        else:
            print(
                f"nanochat {meta['tag']} ({meta['stage']}, step {meta['step']}) on {run.device}; /help lists commands"
            )
            converse(chat)
    except (CheckpointError, TokenizerError) as error:
        raise SystemExit(str(error)) from error
    except BrokenPipeError:  # whoever read the answer has what it wanted (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at the end
    finally:
        runtime.close(run)


if __name__ == "__main__":
    main(parse_args())
