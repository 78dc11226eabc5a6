"""How fast text becomes rows: tokens a second of tokenizing (one core), of packing, of reading rows back; the share of
tokens that packing crops. Packing is compared with a linear scan over a buffer of documents that wait, in one run. The
last line is JSON.

python -m scripts.bench_data
python -m scripts.bench_data --data climbmix --vocab-size 32768
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from nanochat import batches, paths
from nanochat.dataset import TokenFile, iter_documents
from nanochat.tinyworld_documents import documents
from nanochat.tokenizer import Tokenizer

ROUNDS = 3


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="tinyworld", metavar="tinyworld|CORPUS", help="generated text, or a corpus on disk")
    add("--vocab-size", type=int, default=4096, help="with the corpus, names the tokenizer")
    add("--megabytes", type=float, default=4.0, help="of text")
    add("--max-seq-len", type=int, default=2048, help="tokens in a row")
    add("--documents", type=int, default=20000, help="to pack, their lengths drawn from those of the text")
    add("--buffer", type=int, default=1000, help="documents that wait in the linear scan")
    return parser.parse_args(argv)


def main(args):
    if args.data == "tinyworld":
        texts = list(documents(1, int(args.megabytes * 1e6)))
        tokenizer = Tokenizer.train(texts, args.vocab_size)
    else:
        texts = list(iter_documents(args.data, "train", int(args.megabytes * 1e6)))
        tokenizer = Tokenizer.load(paths.tokenizer_dir(f"{args.data}-{args.vocab_size}"))
    tokenize_seconds, ids = timed(lambda: [tokenizer.encode(text) for text in texts])
    counts = np.array([len(tokens) for tokens in ids])
    lengths = (np.random.default_rng(0).choice(counts, args.documents) + 1).tolist()
    capacity, total = args.max_seq_len + 1, sum(lengths)
    fit_seconds, rows = timed(lambda: batches.best_fit(lengths, capacity, crop=True, buffer=args.buffer))
    scan_seconds, scanned = timed(lambda: linear_scan(lengths, capacity, args.buffer))
    if rows != scanned:
        raise SystemExit("best fit by buckets and by scanning differ: run the tests (bash runs/test.sh)")
    plan_seconds, plan = timed(lambda: batches.pack_blocks(np.array(lengths) - 1, args.max_seq_len))
    numbers = {
        "pack_tok_per_sec": round(total / fit_seconds),
        "pack_over_scan": round(scan_seconds / fit_seconds, 1),
        "scan_tok_per_sec": round(total / scan_seconds),
        "plan_tok_per_sec": round(total / plan_seconds),
        "cropped_share": round(1 - kept_once(plan) / total, 4),
        "cropped_share_of_scan": round(1 - sum(take for row in rows for _, take in row) / total, 4),
        "tokenize_tok_per_sec_core": round(counts.sum() / tokenize_seconds),
        "tokenize_mb_per_sec_core": round(sum(map(len, texts)) / tokenize_seconds / 1e6, 2),
        "read_tok_per_sec": round(reading_rate(ids, counts, tokenizer, args.max_seq_len)),
        "mean_tokens": round(total / len(lengths), 1),
    }
    print(json.dumps(numbers | vars(args)))


def timed(work):
    """The median of several runs in seconds, and what the last one gave."""
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), result


def linear_scan(lengths: list[int], capacity: int, buffer: int) -> list[list[tuple[int, int]]]:
    """batches.best_fit as one would write it first: every choice looks at every document that waits. Documents longer
    than a row count as equally long."""
    incoming, waiting = iter(enumerate(lengths)), []
    rows, row, space = [], [], capacity
    while True:
        waiting += itertools.islice(incoming, buffer - len(waiting))
        if not waiting:
            return rows + [row] * bool(row)
        best = shortest = 0
        for i, (_, length) in enumerate(waiting):
            if length <= space and (waiting[best][1] > space or length > waiting[best][1]):
                best = i
            if min(length, capacity + 1) < min(waiting[shortest][1], capacity + 1):
                shortest = i
        document, length = waiting.pop(best if waiting[best][1] <= space else shortest)
        row.append((document, min(length, space)))
        space -= min(length, space)
        if space == 0:
            rows.append(row)
            row, space = [], capacity


def kept_once(plan) -> int:
    """Tokens of the plan's pieces, those that fill up a block's last row with its first documents not counted again."""
    documents, takes = plan[:2]
    longest = np.zeros(documents.max() + 1, dtype=np.int64)
    np.maximum.at(longest, documents, takes)
    return int(longest.sum())


def reading_rate(ids, counts, tokenizer, sequence_len: int) -> float:
    """Tokens a second of rows read back from a token file, as training reads them."""
    with tempfile.TemporaryDirectory() as folder:
        file = TokenFile(Path(folder) / "text.bin", Path(folder) / "text.idx.npy")
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        np.concatenate([np.array(tokens, dtype=dtype) for tokens in ids]).tofile(file.tokens)
        np.save(file.offsets, np.concatenate([[0], np.cumsum(counts)]))
        rows = batches.TextRows([file], sequence_len, tokenizer.bos, tokenizer.vocab_size)
        count = min(rows.num_rows, 256)
        seconds, _ = timed(lambda: rows.read(0, count))
        return count * sequence_len / seconds


if __name__ == "__main__":
    main(parse_args())
