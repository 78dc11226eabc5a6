"""Any text data set, on the Hugging Face hub or on disk -> a corpus of shuffled shards, for base_train --corpus NAME.

    python dev/repackage.py --name fineweb-edu --hub HuggingFaceFW/fineweb-edu --config sample-10BT
    python dev/repackage.py --name mine my_texts/ more.jsonl.gz --column content

Documents are ordered by a hash of (seed, text), as in `nanochat.dataset import`: a shuffle that depends neither on the
order of the files nor on memory, drops copies, and gives each document its split for good. Scatter: source after source
is fetched, appended to buckets by the first bits of the hash, and deleted. Gather: bucket after bucket is sorted in
memory and written as shards, of which the first is for validation. A journal says what is done: kill it whenever you
like, the same command goes on from there, and the corpus is the same to the byte. Disk: all the text, uncompressed.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, pairwise
from operator import itemgetter
from pathlib import Path

import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from tqdm import tqdm

from nanochat import dataset, paths
from nanochat.corpora import HEADER, KINDS, RESERVED, clock, find_text, hashed, read_text, write_shard
from nanochat.download import DownloadError, check_disk, check_readable, fetch, hub_sources, human

MEGABYTE = 1_000_000
MOST_BUCKETS = 1 << 14  # files in one folder; fuller ones are read in several passes


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="PATH", help=f"files ({' '.join(KINDS)}) and folders of them")
    add("--name", required=True, help="of the corpus")
    add("--hub", metavar="OWNER/NAME", help="a data set on the hub (or in NANOCHAT_DATA_MIRROR), instead of paths")
    add("--config", default="default", help="of the data set on the hub")
    add("--split", default="train", help="of the data set on the hub")
    add("--column", default="text", help="column of a parquet file, or field of a line of jsonl, that holds the text")
    add("--shard-characters", type=int, default=250_000_000, help="as ClimbMix: shards of about 100 MB")
    add("--validation-fraction", type=float, default=0.01, help="of the documents; one shard at most")
    add("--seed", type=int, default=42)
    add("--memory-megabytes", type=int, default=256, help="text held at a time, beside 150 MB for the program")
    add("--max-files", type=int, help="read the first so many source files only")
    add("--keep-downloads", action="store_true", help="keep what is fetched, in the base folder's task_data")
    add("--source", help="what the manifest says of the origin (default: where the text was read)")
    add("--licence", help="what the manifest says of the licence")
    add("--out", type=Path, metavar="FOLDER", help="default: corpora/NAME in the base folder")
    add("--restart", action="store_true", help="throw away what an unfinished run of this name has done")
    add("--force", action="store_true", help="replace a corpus of this name once the new one is whole")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name) or args.name in RESERVED:
        parser.error(f"--name {args.name!r}: letters, digits, '.', '_', '-' please, and none of {', '.join(RESERVED)}")
    if bool(args.hub) == bool(args.paths):
        parser.error("give either --hub OWNER/NAME or files and folders to read")
    if min(args.shard_characters, args.memory_megabytes, args.max_files or 1) < 1:
        parser.error("--shard-characters, --memory-megabytes and --max-files are at least 1")
    if not 0 < args.validation_fraction < 1 or not -(2**63) <= args.seed < 2**63:
        parser.error("--validation-fraction lies between 0 and 1, and --seed has at most 64 bits")
    return args


def main(args):
    out = args.out or paths.corpus_dir(args.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out.with_name(f".{out.name}.lock"), timeout=0):
            repackage(args, out, out.with_name(f".{out.name}.repackage"))
    except Timeout:
        raise ValueError(f"another process is making {out} at this moment; let it finish, or stop it first") from None


def repackage(args: argparse.Namespace, out: Path, work: Path) -> None:
    """Makes the corpus `out`, if it is not there, by way of the folder `work`. Raises ValueError, DownloadError."""
    started, files = time.time(), [] if args.hub else find_text(args.paths)[: args.max_files]
    settings = settings_of(args, files)
    if is_complete(out, settings, args.force):
        print(f"{out} is complete already")
        if not (work / "corpus").exists():  # killed after the corpus had taken its place
            shutil.rmtree(work, ignore_errors=True)
        return
    journal = open_journal(work, settings, args.restart)
    source = args.source or (f"{paths.hf_endpoint()}/datasets/{args.hub}" if args.hub else settings["sources"])
    licence = args.licence or (f"see the data set's page, {source}" if args.hub else "your own text")
    print(f"licence: {licence}", flush=True)
    files = files or hub_sources(args.hub, args.config, args.split, work)[: args.max_files]
    shards, read = journal["shards"], journal["read"]
    if read:
        print(f"goes on: {read} of {len(files)} files are read, {len(shards)} shards written", flush=True)
    if read < len(files):
        scatter(args, files, work, journal)
    gather(args, work, journal)
    manifest = {"name": args.name, "source": source, "licence": licence, "settings": settings}
    paths.write_json(work / "corpus/manifest.json", manifest | {"validation": [shards[0]["file"]], "shards": shards})
    if out.exists():
        os.replace(out, work / "replaced")
    os.replace(work / "corpus", out)
    shutil.rmtree(work)
    kept = sum(entry["documents"] for entry in shards)
    left_out = f"{journal['documents'] - kept:,} copies and {journal['empty']:,} empty ones left out"
    print(f"{len(files)} files: {kept:,} documents ({left_out}) in {len(shards)} shards in {out}")
    if args.out is None:
        paths.write_result("data", args.name, started, dataset.told_of_corpus(args.name))


# -- what is done already


def settings_of(args: argparse.Namespace, files: list[Path]) -> dict:
    """All that the shards depend on. Of many files only their number and a hash of their names."""
    names = hashlib.blake2b("\n".join(map(str, files)).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    sources = [f"{args.hub}/{args.config}/{args.split}"] if args.hub else [str(path) for path in args.paths]
    flags = ("max_files", "column", "seed", "shard_characters", "validation_fraction")
    return {"sources": sources, "files": f"{len(files)}, {names}"} | {flag: getattr(args, flag) for flag in flags}


def difference(old: dict, new: dict) -> str:
    return "; ".join(f"{key} {old.get(key)!r} there, {new[key]!r} asked for" for key in new if old.get(key) != new[key])


def is_complete(out: Path, settings: dict, force: bool) -> bool:
    """Whether the corpus asked for is there. Raises ValueError where something else is in its place."""
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (out / "manifest.json").exists():
        raise ValueError(f"{out} is there and is no corpus (it has no manifest.json). Take another --name or --out.")
    there = json.loads((out / "manifest.json").read_text(encoding="utf-8")).get("settings", {})
    if there != settings and not force:
        other = f"of other settings ({difference(there, settings)})"
        raise ValueError(f"{out} is there already, {other}. Take another --name, or --force to replace it.")
    return not force


def open_journal(work: Path, settings: dict, restart: bool) -> dict:
    """What an unfinished run of these settings has done, or a new journal. Raises ValueError for other settings.

    read: source files that are wholly in the buckets; documents and empty ones in them. lengths: bytes of each bucket
    that count. shards: manifest entries of the finished ones. position: hash of the last document in them.
    """
    path = work / "journal.json"
    if path.exists() and (work / "corpus").exists() and not restart:
        journal = json.loads(path.read_text(encoding="utf-8"))
        if journal["settings"] == settings:
            return journal
        if journal["read"]:
            raise ValueError(
                f"{work} holds an unfinished run of other settings ({difference(journal['settings'], settings)}). "
                "Repeat its flags to go on, --restart to throw it away, or take another --name."
            )
    shutil.rmtree(work, ignore_errors=True)
    (work / "buckets").mkdir(parents=True)
    (work / "corpus").mkdir()
    journal = {"settings": settings, "read": 0, "documents": 0, "empty": 0, "text_bytes": 0, "lengths": []}
    journal |= {"shards": [], "position": -1}
    paths.write_json(path, journal)
    return journal


# -- scatter: sources -> buckets


def text_bytes(path: Path, column: str) -> int:
    """About how much text is in a file."""
    if path.suffix.lower() != ".parquet":
        return path.stat().st_size * (4 if path.suffix.lower() == ".gz" else 1)
    check_readable(path)
    chunks = chain.from_iterable(group["columns"] for group in pq.read_metadata(path).to_dict()["row_groups"])
    return sum(chunk["total_uncompressed_size"] for chunk in chunks if chunk["path_in_schema"] == column)


def scatter(args: argparse.Namespace, files: list[Path | str], work: Path, journal: dict) -> None:
    """Appends every document to its bucket, and journals each source, small ones together."""
    remote, memory = isinstance(files[0], str), args.memory_megabytes * MEGABYTE
    key = args.seed.to_bytes(8, "little", signed=True)
    to_delete = remote and not args.keep_downloads
    # Kept downloads lie where `download.hub_files` looks for them.
    folder = work / "downloads" if to_delete else paths.task_dir() / str(args.hub) / args.config / args.split

    def obtain(number: int) -> Path:
        return fetch(files[number], folder / f"{number:04d}.parquet") if remote else files[number]

    if not journal["lengths"]:  # the hub does not say how large its files are: all are taken to be like the first
        known = [obtain(0)] if remote else files
        journal["text_bytes"] = sum(text_bytes(path, args.column) for path in known) * len(files) // len(known)
        journal["lengths"] = [0] * min(MOST_BUCKETS, 1 + journal["text_bytes"] // (memory // 8))
        paths.write_json(work / "journal.json", journal)
    buckets = Buckets(work / "buckets", journal["lengths"], memory // 2)
    check_disk(work, max(0, journal["text_bytes"] - buckets.bytes), "the text, uncompressed,")
    meter = Meter("reading", journal["text_bytes"], buckets.bytes)
    for number in range(journal["read"], len(files)):
        path = obtain(number)
        try:
            for where, text in read_text(path, args.column):
                if text is None or not str(text).strip():
                    journal["empty"] += 1
                else:
                    journal["documents"] += 1
                    meter.bar.update(buckets.add(*hashed(where, text, key)))
        except ValueError as error:
            if to_delete:  # damaged, perhaps: the next run fetches it again
                path.unlink()
            raise ValueError(f"{error} (fetched from {files[number]})" if remote else str(error)) from error
        journal["read"] = number + 1
        if remote or buckets.bytes - buckets.saved >= memory // 2 or number + 1 == len(files):
            journal["lengths"] = buckets.save()
            paths.write_json(work / "journal.json", journal)
            meter.line(f"read {number + 1} of {len(files)} files, {journal['documents']:,} documents", buckets.bytes)
        if to_delete:
            path.unlink()
    meter.bar.close()


def append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


def to_disk(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


class Buckets:
    """Records on their way to thousands of files: held until there are `bound` bytes of them, then appended."""

    def __init__(self, folder: Path, lengths: list[int], bound: int):
        self.files = [folder / f"{index:05d}" for index in range(len(lengths))]
        self.buffers, self.lengths, self.bound = [bytearray() for _ in lengths], list(lengths), bound
        self.bytes = self.saved = self.written = sum(lengths)
        for path, length in zip(self.files, lengths, strict=True):
            if path.exists():  # what a killed run appended after its journal is read again
                os.truncate(path, min(length, path.stat().st_size))

    def add(self, digest: int, data: bytes) -> int:
        self.buffers[digest * len(self.buffers) >> 64] += HEADER.pack(digest, len(data)) + data
        self.bytes += HEADER.size + len(data)
        if self.bytes - self.written >= self.bound:
            self.flush()
        return HEADER.size + len(data)

    def flush(self) -> None:
        for index, buffer in enumerate(self.buffers):
            if buffer:
                append(self.files[index], buffer)
                self.lengths[index] += len(buffer)
                buffer.clear()
        self.written = self.bytes

    def save(self) -> list[int]:
        """All is on disk, safe from power cuts: the lengths for the journal."""
        self.flush()
        for path, length in zip(self.files, self.lengths, strict=True):
            if length:
                to_disk(path)
        self.saved = self.bytes
        return list(self.lengths)


# -- gather: buckets -> shards


def gather(args: argparse.Namespace, work: Path, journal: dict) -> None:
    """Writes the shards that are missing, each to a partial name, and journals each. Raises ValueError."""
    shards, lengths, total = journal["shards"], journal["lengths"], sum(journal["lengths"])
    # Short documents take four times their bytes while they are sorted.
    bound, limit = args.memory_megabytes * MEGABYTE // 4, int(args.validation_fraction * 2**64)
    documents = sorted_documents(work / "buckets", lengths, journal["position"], bound)
    meter = Meter("writing", total, total * (journal["position"] + 1) >> 64)

    def texts(group: Iterable[tuple[int, int, str]]) -> Iterator[str]:
        for _, journal["position"], text in group:
            yield text

    for number, group in groupby(numbered(documents, len(shards), limit, args.shard_characters), itemgetter(0)):
        name = f"shard_{number:05d}.parquet"
        partial = work / "corpus" / f"{name}.partial"
        shards.append(write_shard(partial, texts(group)) | {"file": name})
        to_disk(partial)
        os.replace(partial, work / "corpus" / name)
        paths.write_json(work / "journal.json", journal)
        meter.line(f"{name} is there, {shards[-1]['documents']:,} documents", total * journal["position"] >> 64)
        for index in range(journal["position"] * len(lengths) >> 64):
            (work / "buckets" / f"{index:05d}").unlink(missing_ok=True)
    meter.bar.close()
    if len(shards) < 2:
        found = "only one document was found" if shards else "no document has any text"
        raise ValueError(f"{found}: a corpus needs two, for training and validation. Add more text, with --restart.")


def sorted_documents(folder: Path, lengths: list[int], after: int, bound: int) -> Iterator[tuple[int, str]]:
    """(hash, text) in order of the hash from beyond `after` on, without copies; a bucket longer than `bound` bytes is
    read several times, for a part of its hashes each time."""
    for index in range((after + 1) * len(lengths) >> 64, len(lengths)):
        path, passes = folder / f"{index:05d}", -(-lengths[index] // bound)
        if passes and not (path.exists() and path.stat().st_size == lengths[index]):
            raise ValueError(f"{path} is not as the journal has it. Start again with --restart.")
        for part in range(index * passes, (index + 1) * passes):
            held = read_part(path, part, len(lengths) * passes, after)
            for digest in sorted(held):
                yield digest, held.pop(digest).decode("utf-8")


def read_part(path: Path, part: int, parts: int, after: int) -> dict[int, bytes]:
    """Hash -> text, for the hashes beyond `after` in this one of `parts` equal parts of all hashes."""
    held = {}
    with open(path, "rb") as file:
        while header := file.read(HEADER.size):
            digest, length = HEADER.unpack(header)
            if digest > after and digest * parts >> 64 == part:
                held[digest] = file.read(length)
            else:
                file.seek(length, os.SEEK_CUR)
    return held


def numbered(documents: Iterable[tuple[int, str]], shard: int, limit: int, characters: int) -> Iterator[tuple]:
    """(shard, hash, text), from a number of shard on. Shard 0 is for validation: documents whose hash lies below
    `limit`, or else the first; but never the last."""
    held = 0
    for (digest, text), following in pairwise(chain(documents, [None])):
        if held and (held >= characters or (shard == 0 and (digest >= limit or following is None))):
            shard, held = shard + 1, 0
        held += len(text)
        yield shard, digest, text


class Meter:
    """A bar on a terminal, a line a file or shard elsewhere."""

    def __init__(self, what: str, total: int, done: int):
        self.bar = tqdm(desc=what, total=total, initial=done, unit="B", unit_scale=True, disable=None)
        self.total, self.first, self.began = total, done, time.monotonic()

    def line(self, text: str, done: int) -> None:
        self.bar.update(done - self.bar.n)
        if self.bar.disable:
            rate = max(done - self.first, 1) / max(time.monotonic() - self.began, 1e-9)
            left = clock(max(0, self.total - done) / rate)
            print(f"{text}; {human(done)} of about {human(self.total)}, {human(rate)}/s, {left} left", flush=True)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, DownloadError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
