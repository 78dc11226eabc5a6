"""Train a tokenizer on the training shards of a corpus.

python -m scripts.tok_train --corpus climbmix --vocab-size 32768
"""

import argparse
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from nanochat import paths, runtime
from nanochat.dataset import iter_documents
from nanochat.results import Results
from nanochat.tokenizer import Tokenizer

VALIDATION_CHARS = 2_000_000  # read to measure bytes per token


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="climbmix", help="name of a corpus in the base folder")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens in all, the 9 special ones included")
    parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="characters to train on at most")
    parser.add_argument("--doc-cap", type=int, default=10_000, help="characters of a document at most")
    parser.add_argument("-n", "--num-files", type=int, default=-1, help="training shards to read (-1: all on disk)")
    parser.add_argument("--device-type", default="cpu", help="taken for uniformity; only the CPU works here")
    return parser.parse_args(argv)


class Counter:
    """Passes documents on and counts what went by."""

    def __init__(self, documents: Iterable[str]):
        self.documents, self.count, self.characters = documents, 0, 0

    def __iter__(self) -> Iterator[str]:
        with tqdm(desc="reading", unit="char", unit_scale=True, mininterval=2, disable=None) as bar:
            for text in self.documents:
                self.count += 1
                self.characters += len(text)
                bar.update(len(text))
                yield text


def bytes_per_token(tokenizer: Tokenizer, documents: Iterable[str]) -> float | None:
    """Over whole documents; None when there is no text."""
    size = tokens = 0
    for text in documents:
        size += len(text.encode("utf-8"))
        tokens += len(tokenizer.encode(text))
    return size / tokens if tokens else None


def main(args):
    started = time.monotonic()
    machine = runtime.start("cpu")
    name = f"{args.corpus}-{args.vocab_size}"
    results = Results("tok_train", name, machine, config=vars(args))
    try:
        limit = args.num_files if args.num_files > 0 else None
        texts = Counter(iter_documents(args.corpus, "train", args.max_chars, args.doc_cap, limit))
        tokenizer = Tokenizer.train(texts, args.vocab_size)
        ratio = bytes_per_token(tokenizer, iter_documents(args.corpus, "validation", VALIDATION_CHARS))
    except ValueError as error:  # no such corpus, too little text, impossible vocabulary
        raise SystemExit(str(error)) from None
    directory = paths.tokenizer_dir(name)
    tokenizer.save(directory)
    seconds = time.monotonic() - started
    results.finish(
        {
            "tokenizer": name,
            "fingerprint": tokenizer.fingerprint,
            "corpus": args.corpus,
            "vocab_size": tokenizer.vocab_size,
            "documents": texts.count,
            "characters": texts.characters,
            "training_seconds": seconds,
            "bytes_per_token": ratio,
        }
    )
    print(f"{texts.count:,} documents, {texts.characters:,} characters, {seconds:.1f} s")
    if ratio:
        print(f"{ratio:.3f} bytes per token on validation text")
    print(f"tokenizer of {tokenizer.vocab_size:,} tokens: {directory / 'tokenizer.json'}")


if __name__ == "__main__":
    main(parse_args())
