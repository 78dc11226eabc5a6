"""Corpora on disk: ClimbMix from the hub, your own text, and the token files that training reads.

    python -m nanochat.dataset -n 8                                           the first 8 shards of ClimbMix
    python -m nanochat.dataset import notes/ book.txt --name mine             your own text
    python -m nanochat.dataset tokenize --corpus climbmix --vocab-size 32768  every shard, once

A corpus is a folder of parquet shards (string column `text`) with a `manifest.json`, which lists complete shards only
and names the validation shard. Token files lie under it by the tokenizer's fingerprint: `shard_00000.bin` holds the
ids of all documents back to back, without bos; `shard_00000.idx.npy` where each begins, and the end.
"""

import argparse
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm import tqdm

from nanochat import paths
from nanochat.corpora import (
    CLIMBMIX_SHARDS,
    KINDS,
    ROW_GROUP,
    SHARD_BYTES,
    climbmix_files,
    clock,
    download_climbmix,
    import_text,
    shard_entry,
    write_shard,
)
from nanochat.download import DownloadError, hub_files, hub_rows, human, plain_file
from nanochat.tokenizer import Tokenizer

# Lent on from the rooms below, so that tasks and corpora need this room only.
__all__ = ["DownloadError", "hub_files", "hub_rows", "plain_file", "shard_entry", "write_shard"]

MAKES = {"tinyworld": "python -m nanochat.tinyworld", "climbmix": "python -m nanochat.dataset -n 8"}


# ---------------------------------------------------------------------------------------------------------------------
# reading


def load_manifest(name: str) -> dict:
    """The manifest of a corpus. Raises ValueError naming the command that makes it."""
    path = paths.corpus_dir(name) / "manifest.json"
    if not path.exists():
        raise ValueError(f"there is no corpus {name!r} in {path.parent}. Make it with: {_make(name)}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["validation"], manifest["shards"]  # noqa: B018
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is broken ({error!r}). Delete it and make it again with: {_make(name)}") from error
    return manifest


def shard_paths(name: str, split: str, limit: int | None = None) -> list[Path]:
    """Shards of "train" (all but the validation shards) or "validation" ("val") in manifest order, at most `limit`."""
    return [paths.corpus_dir(name) / entry["file"] for entry in _entries(name, split, limit)]


def iter_documents(
    name: str, split: str, max_chars: int | None = None, doc_cap: int | None = None, limit: int | None = None
) -> Iterator[str]:
    """Documents in order, each cut at `doc_cap` characters, until `max_chars` characters have been given."""
    given = 0
    for shard in shard_paths(name, split, limit):
        for texts in _batches(shard):
            for text in texts:
                text = text[:doc_cap]
                yield text
                given += len(text)
                if max_chars is not None and given >= max_chars:
                    return


def _make(name: str) -> str:
    return MAKES.get(name, f"python -m nanochat.dataset import PATH... --name {name}")


def _entries(name: str, split: str, limit: int | None = None) -> list[dict]:
    if split not in ("train", "validation", "val"):
        raise ValueError(f'the split is "train" or "validation", not {split!r}')
    manifest = load_manifest(name)
    entries = [e for e in manifest["shards"] if (e["file"] in manifest["validation"]) == (split != "train")][:limit]
    missing = [e["file"] for e in entries if not (paths.corpus_dir(name) / e["file"]).exists()]
    if missing or not entries:
        what = f"{missing[0]} is missing" if missing else f"has no {split} shard yet"
        raise ValueError(f"corpus {name!r} in {paths.corpus_dir(name)}: {what}. Make it with: {_make(name)}")
    return entries


def _batches(shard: Path) -> Iterator[list[str]]:
    """Documents of a shard, about ROW_GROUP at a time. Raises ValueError when it cannot be read."""
    try:
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(batch_size=ROW_GROUP, columns=["text"]):
                yield batch.column(0).to_pylist()
    except (pa.ArrowException, OSError, KeyError, IndexError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"{shard} cannot be read as parquet ({reason}). Delete it and run: {_make(shard.parent.name)}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# token files


@dataclass(frozen=True)
class TokenFile:
    """The ids of one shard: flat uint16 (uint32 above 65,536 tokens), and int64 offsets, one more than documents."""

    tokens: Path
    offsets: Path


def token_files(name: str, fingerprint: str, split: str, limit: int | None = None) -> list[TokenFile]:
    """Token files of a split in manifest order. Raises ValueError naming the command when one is missing or stale."""
    entries = _entries(name, split, limit)
    files = [_token_file(name, fingerprint, entry) for entry in entries]
    for entry, file in zip(entries, files, strict=True):
        if not _is_done(paths.corpus_dir(name) / entry["file"], entry["documents"], file):
            raise ValueError(
                f"{entry['file']} of corpus {name!r} has no tokens of this tokenizer ({file.tokens}). "
                f"Make them with: python -m nanochat.dataset tokenize --corpus {name} --vocab-size V"
            )
    return files


def tokenize(
    name: str,
    tokenizer: Tokenizer | Path,
    split: str | None = None,
    limit: int | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> list[TokenFile]:
    """Tokenizes what has no tokens yet, and returns all token files asked for.

    tokenizer: a Tokenizer or its directory. split None: the first `limit` training shards and validation. Several
    shards go to `num_workers` processes (None: one a core), one shard to threads. Safe beside other processes.
    """
    entries = _entries(name, split or "train", None if split in ("validation", "val") else limit)
    if split is None:
        entries += _entries(name, "validation")
    return _tokenize(name, tokenizer, entries, num_workers, progress)


def tokenize_on_arrival(
    name: str,
    tokenizer: Tokenizer | Path,
    num_files: int,
    num_workers: int | None = None,
    progress: bool = True,
    poll: float = 2.0,
    patience: float = 600.0,
) -> list[TokenFile]:
    """Tokenizes the first `num_files` ClimbMix shards and validation while another process downloads them.

    Looks every `poll` seconds. Raises ValueError when for `patience` seconds no shard came and no partial file grew.
    """
    folder, wanted = paths.corpus_dir(name), climbmix_files(num_files)
    seen, since = None, time.monotonic()
    while True:
        arrived = load_manifest(name)["shards"] if (folder / "manifest.json").exists() else []
        arrived = [entry for entry in arrived if entry["file"] in wanted and (folder / entry["file"]).exists()]
        files = _tokenize(name, tokenizer, arrived, num_workers, progress)
        if len(files) == len(wanted):
            return files
        signs = len(files), sum(path.stat().st_size for path in folder.glob("*.partial") if path.exists())
        if signs != seen:
            seen, since = signs, time.monotonic()
        elif time.monotonic() - since > patience:
            raise ValueError(
                f"{len(files)} of {len(wanted)} shards are in {folder}, and for {patience:.0f} s nothing more came. "
                f"Download them with: python -m nanochat.dataset -n {num_files}"
            )
        time.sleep(poll)


def _token_file(name: str, fingerprint: str, entry: dict) -> TokenFile:
    stem = paths.corpus_dir(name) / "tokens" / fingerprint[:16] / entry["file"].removesuffix(".parquet")
    return TokenFile(stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".idx.npy"))


def _is_done(shard: Path, documents: int, file: TokenFile) -> bool:
    """Whole, and made of this shard: as many documents, and not older than it."""
    try:
        offsets = np.load(file.offsets, mmap_mode="r", allow_pickle=False)
        size = file.tokens.stat().st_size
    except (OSError, ValueError):
        return False
    newer = file.offsets.stat().st_mtime_ns >= shard.stat().st_mtime_ns
    return newer and len(offsets) == documents + 1 and size in (2 * offsets[-1], 4 * offsets[-1])


def _tokenize(name, tokenizer, entries, num_workers, progress) -> list[TokenFile]:
    if isinstance(tokenizer, (str, Path)):
        tokenizer = Tokenizer.load(tokenizer)
    files = [_token_file(name, tokenizer.fingerprint, entry) for entry in entries]
    jobs = [(paths.corpus_dir(name) / e["file"], e["documents"], f) for e, f in zip(entries, files, strict=True)]
    jobs = [job for job in jobs if not _is_done(*job)]
    if not jobs:
        return files
    directory = files[0].tokens.parent
    _keep_tokenizer(tokenizer, directory)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = min(num_workers or cores, len(jobs))
    meter = _Meter(sum(job[1] for job in jobs), len(jobs), progress)
    if num_workers == 1:
        for shard, documents, file in jobs:
            meter.shard(shard, _tokenize_shard(shard, documents, file, tokenizer, cores, meter.batch))
        return files
    # Spawned, not forked: the parent may hold threads (arrow's, torch's) whose locks a fork would copy locked.
    with ProcessPoolExecutor(num_workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
        futures = {pool.submit(_tokenize_in_worker, *job, directory): job for job in jobs}
        try:
            for future in as_completed(futures):
                shard, documents, _ = futures[future]
                tokens = future.result()
                meter.batch(documents)
                meter.shard(shard, tokens)
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that tokenizes was killed (memory?). Try again with --num-workers 1."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return files


def _keep_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """The tokenizer beside its tokens: the workers load it from there, and one can see what made them."""
    if not (directory / "tokenizer.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            tokenizer.save(Path(folder))
            os.replace(Path(folder, "tokenizer.json"), directory / "tokenizer.json")


def _tokenize_in_worker(shard: Path, documents: int, file: TokenFile, directory: Path) -> int:
    return _tokenize_shard(shard, documents, file, Tokenizer.load(directory), 1, lambda count: None)


def _tokenize_shard(
    shard: Path,
    documents: int,
    file: TokenFile,
    tokenizer: Tokenizer,
    num_threads: int,
    report: Callable[[int], object],
) -> int:
    """One shard -> its token file, unless another process made it meanwhile. Returns the number of tokens."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    with FileLock(file.tokens.with_name(f".{file.tokens.name}.lock")):
        if _is_done(shard, documents, file):
            return int(np.load(file.offsets, mmap_mode="r")[-1])
        offsets = [0]
        partial_tokens, partial_offsets = (
            path.with_name(path.name + ".partial") for path in (file.tokens, file.offsets)
        )
        with open(partial_tokens, "wb") as out:
            for texts in _batches(shard):
                ids = tokenizer.encode_batch(texts, num_threads=num_threads)
                offsets += (offsets[-1] + np.cumsum([len(document) for document in ids])).tolist()
                np.fromiter(itertools.chain.from_iterable(ids), dtype).tofile(out)
                report(len(texts))
        if len(offsets) != documents + 1:
            raise ValueError(
                f"{shard} has {len(offsets) - 1} documents, the manifest says {documents}. "
                f"Delete the corpus folder {shard.parent} and run: {_make(shard.parent.name)}"
            )
        with open(partial_offsets, "wb") as out:
            np.save(out, np.array(offsets, np.int64))
        os.replace(partial_tokens, file.tokens)
        os.replace(partial_offsets, file.offsets)  # last: where it is, the tokens are whole
    return offsets[-1]


class _Meter:
    """Tokens a second and time left: a bar on a terminal, a line a shard elsewhere."""

    def __init__(self, documents: int, shards: int, progress: bool):
        self.bar = tqdm(
            desc="tokenizing", total=documents, unit="doc", unit_scale=True, disable=None if progress else True
        )
        self.lines = progress and self.bar.disable
        self.documents, self.shards, self.began = documents, shards, time.monotonic()
        self.done_documents = self.done_shards = self.tokens = 0

    def batch(self, documents: int) -> None:
        self.done_documents += documents
        self.bar.update(documents)

    def shard(self, shard: Path, tokens: int) -> None:
        self.done_shards += 1
        self.tokens += tokens
        seconds = time.monotonic() - self.began
        rate = human(self.tokens / max(seconds, 1e-9), "tok/s")
        self.bar.set_postfix_str(rate)
        if self.lines:
            left = clock(seconds * (self.documents / max(self.done_documents, 1) - 1))
            done = f"tokenized {shard.name}, {self.done_shards} of {self.shards}"
            print(f"{done}: {human(self.tokens, 'tokens')}, {rate}, {left} left", flush=True)
        if self.done_shards == self.shards:
            self.bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# the command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nanochat.dataset", description="Download ClimbMix; or import text, or tokenize a corpus."
    )
    parser.add_argument("-n", "--num-files", type=int, help=f"training shards to download (-1 = all {CLIMBMIX_SHARDS})")
    parser.add_argument("-w", "--num-workers", type=int, default=4, help="downloads at a time")
    commands = parser.add_subparsers(dest="command", metavar="{import,tokenize}")

    own = commands.add_parser("import", help="make a corpus of your own text")
    own.add_argument("sources", nargs="+", type=Path, metavar="PATH", help=f"files ({' '.join(KINDS)}) or folders")
    own.add_argument("--name", required=True)
    own.add_argument("--validation-fraction", type=float, default=0.02)
    own.add_argument("--seed", type=int, default=42)
    own.add_argument("--shard-characters", type=int, default=10_000_000)
    own.add_argument("--force", action="store_true", help="replace a corpus of this name")

    tokens = commands.add_parser("tokenize", help="write the token files that training reads")
    tokens.add_argument("--corpus", default="climbmix")
    tokens.add_argument("--vocab-size", type=int, default=32768)
    tokens.add_argument("-n", "--num-files", dest="limit", type=int, default=-1, help="training shards (-1 = all)")
    tokens.add_argument("-w", "--num-workers", dest="processes", type=int, help="processes (default: one a core)")
    tokens.add_argument("--wait", action="store_true", help="wait for shards that another process downloads")

    args = parser.parse_args(argv)
    if args.command is None and args.num_files is None:
        parser.error(f"say how many shards of ClimbMix to download: -n 8 (about {human(SHARD_BYTES)} each)")
    if args.num_workers < 1 or (args.command == "tokenize" and args.processes is not None and args.processes < 1):
        parser.error("--num-workers must be at least 1")
    return args


def main(args: argparse.Namespace) -> None:
    started = time.time()
    if args.command is None:
        if download_climbmix(args.num_files, args.num_workers):
            paths.write_result("data", "climbmix", started, told_of_corpus("climbmix"))
    elif args.command == "import":
        import_text(
            args.sources, args.name, args.validation_fraction, args.seed, args.shard_characters, force=args.force
        )
        paths.write_result("data", args.name, started, told_of_corpus(args.name))
    else:
        if args.wait and args.corpus == "climbmix":
            files = tokenize_on_arrival(args.corpus, _tokenizer_of(args), args.limit, args.processes)
        else:
            limit = None if args.limit == -1 else args.limit
            files = tokenize(args.corpus, _tokenizer_of(args), limit=limit, num_workers=args.processes)
            print(f"{len(files)} token files in {files[0].tokens.parent}")
        if any(file.tokens.stat().st_mtime > started for file in files):  # not all of them were there
            paths.write_result("tokenize", f"{args.corpus}-{args.vocab_size}", started, {"corpus": args.corpus})


def told_of_corpus(name: str) -> dict:
    """What a report says of a corpus: its manifest, in short."""
    manifest = json.loads((paths.corpus_dir(name) / "manifest.json").read_text(encoding="utf-8"))
    documents = sum(entry["documents"] for entry in manifest["shards"])
    told = {"shards": len(manifest["shards"]), "documents": documents}
    return {"corpus": name, "source": manifest["source"], "licence": manifest["licence"], **told}


def _tokenizer_of(args: argparse.Namespace) -> Path:
    directory = paths.tokenizer_dir(f"{args.corpus}-{args.vocab_size}")
    if not (directory / "tokenizer.json").exists():
        raise ValueError(
            f"there is no tokenizer in {directory}. Train it with: "
            f"python -m scripts.tok_train --corpus {args.corpus} --vocab-size {args.vocab_size}"
        )
    return directory


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, DownloadError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
