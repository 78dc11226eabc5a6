"""Byte-level BPE: trained by rustbpe, encoded by tiktoken, kept on disk as JSON.

Special tokens exist only by name: no text that is encoded can yield one.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

# GPT-4's split pattern, except that runs of digits are cut in twos (at a vocabulary of 32K: 0.965 bits per byte
# against 0.972 with threes).
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
FORMAT_VERSION = 1


class TokenizerError(ValueError):
    """A tokenizer that is missing, unreadable, or not the one a checkpoint was trained with."""


class Tokenizer:
    """ids 0..len(tokens)-1 are byte strings, the special tokens follow."""

    def __init__(self, pattern: str, tokens: list[bytes], special_tokens: Iterable[str] = SPECIAL_TOKENS):
        import tiktoken  # here, so that importing the library stays light

        self.pattern = pattern
        self.tokens = tokens
        self.special = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
        self.vocab_size = len(tokens) + len(self.special)
        self.bos = self.special["<|bos|>"]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._encoding = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from an iterator of documents; the last ids of `vocab_size` are the special tokens."""
        import rustbpe

        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise TokenizerError(f"a vocabulary of {vocab_size} is too small: 256 bytes + special tokens = {smallest}")
        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        by_rank = sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])
        tokens = [bytes(token) for token, _ in by_rank]
        if len(tokens) + len(SPECIAL_TOKENS) != vocab_size:
            raise TokenizerError(
                f"the text yields only {len(tokens)} tokens, {vocab_size - len(SPECIAL_TOKENS)} were asked for: "
                "train on more text or choose a smaller --vocab-size"
            )
        return cls(SPLIT_PATTERN, tokens)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        data = {
            "format_version": FORMAT_VERSION,
            "pattern": self.pattern,
            "tokens": [base64.b64encode(token).decode("ascii") for token in self.tokens],
            "special_tokens": list(self.special),
        }
        partial = directory / "tokenizer.json.partial"
        partial.write_text(json.dumps(data, indent=0), encoding="utf-8")
        partial.replace(directory / "tokenizer.json")

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        path = Path(directory) / "tokenizer.json"
        if not path.exists():
            corpus, _, vocab_size = Path(directory).name.rpartition("-")
            raise TokenizerError(
                f"no tokenizer at {path}; make one with: "
                f"python -m scripts.tok_train --corpus {corpus or 'NAME'} --vocab-size {vocab_size}"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format_version"] > FORMAT_VERSION:
                raise ValueError(f"format {data['format_version']}, this nanochat reads up to {FORMAT_VERSION}")
            tokens = [base64.b64decode(token, validate=True) for token in data["tokens"]]
            return cls(data["pattern"], tokens, data["special_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise TokenizerError(f"{path} is not a tokenizer file ({error}); train it again") from error

    @property
    def fingerprint(self) -> str:
        """Names the vocabulary: token files and checkpoints carry it."""
        digest = hashlib.sha256(self.pattern.encode())
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        for name in self.special:
            digest.update(name.encode())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ordinary ids only: text that spells a special token stays text."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str], num_threads: int = 8) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts, num_threads=num_threads)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> list[int]:
        """Bytes of each token, from its raw bytes; 0 for special tokens."""
        return [len(token) for token in self.tokens] + [0] * len(self.special)
