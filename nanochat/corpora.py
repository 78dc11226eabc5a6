"""How corpora come into being: ClimbMix is downloaded, your own text is imported. `dataset.py` reads them."""

import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm import tqdm

from nanochat import paths
from nanochat.download import check_disk, fetch, human, is_readable, jsonl_rows, mirror_path, take

ROW_GROUP = 1000  # documents
LONGEST_GROUP = 32_000_000  # characters: books fill a row group, and memory, sooner


def write_shard(path: Path, documents: Iterable[str]) -> dict:
    """Writes one parquet shard and returns its manifest entry."""
    count, documents = 0, iter(documents)
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), compression="zstd") as writer:
        while texts := list(itertools.islice(_up_to(documents, LONGEST_GROUP), ROW_GROUP)):
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}), row_group_size=ROW_GROUP)
            count += len(texts)
    return shard_entry(path, count)


def shard_entry(path: Path, documents: int | None = None) -> dict:
    """What the manifest says of a shard; documents are counted where they are not given."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    documents = pq.read_metadata(path).num_rows if documents is None else documents
    return {"file": path.name, "documents": documents, "bytes": path.stat().st_size, "sha256": sha256.hexdigest()}


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


# ---------------------------------------------------------------------------------------------------------------------
# ClimbMix

CLIMBMIX_PAGE = "datasets/karpathy/climbmix-400b-shuffle"
CLIMBMIX_SHARDS = 6543
CLIMBMIX_VALIDATION = "shard_06542.parquet"
CLIMBMIX_LICENCE = "non-commercial use (CC BY-NC 4.0) as published by NVIDIA; see the data set's page"
SHARD_BYTES = 100_000_000  # about


def climbmix_files(num_files: int) -> list[str]:
    """Names of the validation shard and the first `num_files` training shards (-1: all)."""
    if num_files < -1:
        raise ValueError(f"--num-files is a number of shards, or -1 for all {CLIMBMIX_SHARDS}; got {num_files}")
    train = CLIMBMIX_SHARDS - 1 if num_files == -1 else min(num_files, CLIMBMIX_SHARDS - 1)
    return [CLIMBMIX_VALIDATION] + [f"shard_{index:05d}.parquet" for index in range(train)]


def download_climbmix(num_files: int, num_workers: int = 4, first_wait: float = 1.0) -> int:
    """Fetches the shards that are missing, and returns how many; the manifest lists each once it is whole. Raises
    DownloadError."""
    names = climbmix_files(num_files)
    folder = paths.corpus_dir("climbmix")
    page = f"{paths.hf_endpoint()}/{CLIMBMIX_PAGE}"
    print(f"ClimbMix: NVIDIA publishes it for non-commercial use (CC BY-NC 4.0); see the data set's page, {page}")
    whole = _register({}, page)
    missing = [name for name in names if name not in whole]
    elsewhere = [name for name in missing if not (folder / name).exists() and not mirror_path(f"climbmix/{name}")]
    needed = max(0, SHARD_BYTES * len(elsewhere) - sum(p.stat().st_size for p in folder.glob("*.partial")))
    free = check_disk(folder, needed, f"{len(elsewhere)} shards of about {human(SHARD_BYTES)}")
    there = f"{len(names) - len(missing)} of {len(names)} shards are there"
    print(f"{there}; {human(needed)} to fetch, {human(free)} free in {folder}")

    stop, began = threading.Event(), time.monotonic()
    bar = tqdm(desc="ClimbMix", total=SHARD_BYTES * len(elsewhere), unit="B", unit_scale=True, disable=None)

    def one(name: str) -> dict:
        path, source = folder / name, mirror_path(f"climbmix/{name}")
        if path.exists() and not is_readable(path):  # put here by hand, or damaged since
            path.unlink()
        if source:
            return shard_entry(take(source, path))
        url = f"{page}/resolve/main/{name}"
        return shard_entry(fetch(url, path, bar=bar, estimate=SHARD_BYTES, first_wait=first_wait, stop=stop))

    with bar, ThreadPoolExecutor(num_workers) as pool:
        try:
            for done, future in enumerate(as_completed([pool.submit(one, name) for name in missing]), 1):
                entry = future.result()
                _register({entry["file"]: entry}, page)
                if bar.disable:
                    seconds = time.monotonic() - began
                    left = clock(seconds / done * (len(missing) - done))
                    size = human(entry["bytes"])
                    print(f"{entry['file']} is there ({size}), {done} of {len(missing)}, {left} left", flush=True)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(f"ClimbMix: {len(names)} shards in {folder}")
    return len(missing)


def _register(entries: dict[str, dict], source: str) -> set[str]:
    """Adds complete shards to ClimbMix's manifest, drops those that went away; returns the names of what stays."""
    folder = paths.corpus_dir("climbmix")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".manifest.json.lock"):
        known = {}
        if (folder / "manifest.json").exists():
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            known = {entry["file"]: entry for entry in manifest["shards"]}
        for name, entry in known.items():
            path = folder / name
            if path.exists() and path.stat().st_size != entry["bytes"] and name not in entries:
                path.unlink()
            if path.exists():
                entries.setdefault(name, entry)
        shards = [entries[name] for name in sorted(entries)]
        manifest = {"name": "climbmix", "source": source, "licence": CLIMBMIX_LICENCE}
        paths.write_json(folder / "manifest.json", manifest | {"validation": [CLIMBMIX_VALIDATION], "shards": shards})
    return set(entries)


# ---------------------------------------------------------------------------------------------------------------------
# your own text

KINDS = (".txt", ".md", ".jsonl", ".parquet", ".txt.gz", ".md.gz", ".jsonl.gz")
RESERVED = ("climbmix", "tinyworld")
LONGEST_PIECE = 20_000  # characters: a longer .txt file is cut at blank lines
LONGEST_MARKDOWN = 1_000_000
BUCKET_BYTES = 64_000_000
HEADER = struct.Struct("<QQ")  # of a record in a bucket: hash, bytes


def import_text(
    sources: list[Path],
    name: str,
    validation_fraction: float = 0.02,
    seed: int = 42,
    shard_characters: int = 10_000_000,
    force: bool = False,
) -> dict:
    """Makes a corpus of text files and folders of them, and returns its manifest. Raises ValueError.

    Documents are ordered by a hash of (seed, text): a shuffle that depends neither on the order of the files nor on
    memory, brings copies side by side, so that one is kept, and gives each document its split once and for all.
    First all goes to disk, in buckets by the first bits of the hash; then bucket after bucket is sorted in memory.
    """
    folder = paths.corpus_dir(name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in RESERVED:
        raise ValueError(
            f"--name {name!r}: letters, digits, '.', '_' and '-' please, and none of {', '.join(RESERVED)}"
        )
    if not 0 < validation_fraction < 1:
        raise ValueError(f"--validation-fraction lies between 0 and 1, got {validation_fraction}")
    if folder.exists() and not force:
        raise ValueError(
            f"corpus {name!r} is there already in {folder}. Take another --name, or --force to replace it."
        )
    files = find_text(sources)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        building = folder.with_name(f".{name}.partial")
        shutil.rmtree(building, ignore_errors=True)  # of an import that was killed
        building.mkdir()
        try:
            read = _scatter(files, building, seed)
            manifest = {"name": name, "source": [str(source) for source in sources], "licence": "your own text"}
            manifest |= _gather(building, validation_fraction, shard_characters)
            paths.write_json(building / "manifest.json", manifest)
            if folder.exists():
                os.replace(folder, building / "replaced")
            os.replace(building, folder)
            shutil.rmtree(folder / "replaced", ignore_errors=True)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    kept = sum(entry["documents"] for entry in manifest["shards"])
    print(f"{len(files)} files, {read} documents, {read - kept} of them copies: {kept} documents in {folder}")
    return manifest


def find_text(sources: list[Path]) -> list[Path]:
    """The files to import: those named, and all of the KINDS in the folders named."""
    files = []
    for source in map(Path, sources):
        if source.is_dir():
            for folder, subfolders, names in os.walk(source):
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
                files += [Path(folder, n) for n in names if n.lower().endswith(KINDS) and not n.startswith(".")]
        elif not source.exists():
            raise ValueError(f"{source} is not there")
        elif source.name.lower().endswith(KINDS):
            files.append(source)
        else:
            raise ValueError(f"{source} is none of the kinds that can be imported: {' '.join(KINDS)}")
    if not files:
        raise ValueError(f"no text found in {', '.join(map(str, sources))}: looked for {' '.join(KINDS)}")
    return sorted(set(files))


def read_text(path: Path, column: str = "text") -> Iterator[tuple[str, str]]:
    """(where, document) pairs of one file. Raises ValueError naming the file, and the row where there are rows."""
    kind = path.name.lower().removesuffix(".gz")
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        if kind.endswith(".parquet"):
            # As a stream: pre_buffer (the default) would hold the column of a whole file, of 2 GB on the hub, and a
            # thousand books at a time are a gigabyte.
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                if column not in file.schema_arrow.names:
                    raise ValueError(f"{path}: no column {column!r}, only {', '.join(file.schema_arrow.names)}")
                batches = file.iter_batches(batch_size=100, columns=[column])
                texts = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
                for row, text in enumerate(texts, 1):
                    yield f"{path}, row {row}", text
        elif kind.endswith(".jsonl"):
            for number, row in jsonl_rows(path, opener):
                if not isinstance(row, dict) or column not in row:
                    got = f"one with {', '.join(row) or 'none'}" if isinstance(row, dict) else str(row)[:60]
                    raise ValueError(f"{path}, line {number}: expected an object with a field {column!r}, got {got}")
                yield f"{path}, line {number}", row[column]
        else:
            with opener(path, "rt", encoding="utf-8-sig") as file:
                for piece in _pieces(file, LONGEST_MARKDOWN if kind.endswith(".md") else LONGEST_PIECE):
                    yield str(path), piece
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.object[error.start]:#04x}). Convert it with iconv."
        ) from error
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}") from error


def _pieces(file, longest: int) -> Iterator[str]:
    """The whole file if it has at most `longest` characters, else pieces that end at blank lines where they can."""
    rest = ""
    while True:
        rest += file.read(longest + 1 - len(rest))
        if len(rest) <= longest:
            yield rest
            return
        cut = rest.rfind("\n\n", 1, longest) + 1 or rest.rfind("\n", 1, longest) + 1 or longest
        yield rest[:cut]
        rest = rest[cut:].lstrip("\n")


def _scatter(files: list[Path], folder: Path, seed: int) -> int:
    """Every document into `folder/bucket_<first bits of its hash>`; returns how many there were."""
    total = sum(path.stat().st_size * (1 if path.suffix.lower() in (".txt", ".md", ".jsonl") else 4) for path in files)
    check_disk(folder, total, "the import (twice the text while it runs)")
    count = min(128, 1 + total // BUCKET_BYTES)
    buckets = [open(folder / f"bucket_{index:03d}", "wb") for index in range(count)]
    documents, key = 0, seed.to_bytes(8, "little", signed=True)
    try:
        for path in tqdm(files, desc="reading", unit="file", disable=None):
            for where, text in read_text(path):
                digest, data = hashed(where, text, key)
                if text.strip():
                    buckets[digest * count >> 64].write(HEADER.pack(digest, len(data)) + data)
                    documents += 1
    finally:
        for bucket in buckets:
            bucket.close()
    return documents


def hashed(where: str, text: str, key: bytes) -> tuple[int, bytes]:
    """(keyed hash, UTF-8) of a document. Raises ValueError for what is no text."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: the text is not a string but {text!r:.60}")
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half of a surrogate pair, which is no Unicode text") from error
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "big"), data


def _gather(folder: Path, validation_fraction: float, shard_characters: int) -> dict:
    """Buckets -> shards: training shards from 0 on, one validation shard after them."""
    entries, validation = [], folder / "validation.parquet"
    labelled = _labelled(_sorted_documents(folder), int(validation_fraction * 2**64))
    for held_out, group in itertools.groupby(labelled, key=lambda pair: pair[0]):
        texts = (text for _, text in group)
        if held_out:
            entry = write_shard(validation, texts)
            continue
        while (text := next(texts, None)) is not None:
            path = folder / f"shard_{len(entries):05d}.parquet"
            entries.append(write_shard(path, _up_to(itertools.chain([text], texts), shard_characters)))
    if not entries:
        raise ValueError("nothing to import: no document has any text")
    name = f"shard_{len(entries):05d}.parquet"
    os.replace(validation, folder / name)
    return {"validation": [name], "shards": [*entries, entry | {"file": name}]}


def _labelled(documents: Iterator[tuple[int, str]], limit: int) -> Iterator[tuple[bool, str]]:
    """(for validation?, text): a document whose hash lies below `limit`, and the first; but never the last."""
    first, waiting = next(documents, None), next(documents, None)
    if first is None:
        return
    if waiting is None:
        raise ValueError("only one document to import: a corpus needs two different ones, for training and validation")
    yield True, first[1]
    for following in documents:
        yield waiting[0] < limit, waiting[1]
        waiting = following
    yield False, waiting[1]


def _sorted_documents(folder: Path) -> Iterator[tuple[int, str]]:
    """(hash, text) in order of the hash, copies left out; each bucket is removed once it is read."""
    for path in sorted(folder.glob("bucket_*")):
        data, records, position = path.read_bytes(), {}, 0
        path.unlink()
        while position < len(data):
            digest, length = HEADER.unpack_from(data, position)
            position += HEADER.size + length
            records[digest] = (position - length, position)
        for digest in sorted(records):
            start, end = records[digest]
            yield digest, data[start:end].decode("utf-8")


def _up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return
