"""Chat with a model in the terminal: `python -m scripts.chat_cli`, or one question with `-p "Who are you?"`."""

import argparse
import contextlib
import random
import signal
import sys
from collections.abc import Iterator

MAX_TOKENS = 256
SMALL_MODEL = 50_000_000  # parameters; below, one token is too little work to share between CPU threads
HELP = """/clear  forget the conversation and begin anew
/help   this list
/quit   leave (also Ctrl-D)
Ctrl-C stops an answer, not the program."""


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat with a model in the terminal.")
    parser.add_argument("-i", "--source", choices=["base", "sft", "rl"], default="sft", help="which stage's model")
    parser.add_argument("-g", "--model-tag", default=None, help="default: the largest d<N>")
    parser.add_argument("-s", "--step", type=int, default=None, help="default: the newest")
    parser.add_argument("-p", "--prompt", default="", help="ask this, print the answer and leave")
    parser.add_argument("-t", "--temperature", type=float, default=0.6, help="0 always takes the likeliest token")
    parser.add_argument("-k", "--top-k", type=int, default=50, help="sample among the k likeliest tokens (0: all)")
    parser.add_argument("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    args = parser.parse_args(argv)
    if not 0 <= args.temperature <= 2:
        parser.error(f"--temperature is {args.temperature}, expected 0 to 2")
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

    def __init__(self, engine, tokenizer, temperature: float, top_k: int):
        self.engine = engine
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.top_k = top_k
        self.messages: list[dict] = []

    def answer(self, question: str) -> Iterator[str]:
        """Ask, and yield the answer as it comes. What was said when it ends, or is stopped, stays in the history.

        Notes on how it went (turns left out, stopped, cut off) go to stderr.
        """
        from nanochat import chat
        from nanochat.engine import Request

        messages = [*self.messages, {"role": "user", "content": question}]
        request = Request(
            prompt=chat.prompt(self.tokenizer, {"messages": messages}),
            max_tokens=MAX_TOKENS,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=random.getrandbits(31),
        )
        said, count, ending = [], 0, ""
        with interrupts_noted() as interrupts:
            for event in self.engine.stream(request):
                if event.dropped:
                    note(f"too long: the model does not see the beginning of it ({event.dropped} messages)\n")
                if event.text:
                    said.append(event.text)
                    yield event.text
                count += event.token is not None
                if event.finish == "length":
                    ending = f"cut off after {count} tokens"
                elif interrupts and not event.finish:
                    self.engine.cancel(event.id)
                    ending = "stopped"
                    break
        if said:
            self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
        if ending:
            note(ending)


def note(text: str) -> None:
    print(f"\n({text})", end="", file=sys.stderr, flush=True)


def say(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def converse(chat: Chat) -> None:
    """Read questions until /quit or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history; not on every platform)
    while True:
        try:
            question = input("\nYou: ").strip()
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")
            continue
        except EOFError:
            print()
            return
        if question == "/quit":
            return
        elif question == "/clear":
            chat.messages = []
            print("(a new conversation)")
        elif question.startswith("/"):
            print(HELP if question == "/help" else f"{question} is not a command here.\n{HELP}")
        elif question:
            print("\nnanochat: ", end="", flush=True)
            try:
                say(chat.answer(question))
            except ValueError as error:  # a question that does not fit
                print(f"({error})")


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
        chat = Chat(engine, tokenizer, args.temperature, args.top_k)
        if args.prompt:
            say(chat.answer(args.prompt))
        else:
            print(
                f"nanochat {meta['tag']} ({meta['stage']}, step {meta['step']}) on {run.device}; /help lists commands"
            )
            converse(chat)
    except (CheckpointError, TokenizerError) as error:
        raise SystemExit(str(error)) from error
    finally:
        runtime.close(run)


if __name__ == "__main__":
    main(parse_args())
