"""Files from elsewhere: a local mirror first, then HTTP with resume, retries and checks; hub data sets for the tasks.

A file is fetched once per machine: processes that want the same one wait for each other at a lock beside it. It
carries the name `<name>.partial` until it is whole and readable, so a file under its own name is always complete.
"""

import json
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow
import pyarrow.parquet as pq
import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

from nanochat import paths

ATTEMPTS = 6  # in a row without a new byte
ATTEMPTS_UNCONNECTED = 3  # when the host was never reached: the user waits for this message
LONGEST_WAIT = 300.0  # seconds; the hub's rate limit counts in windows of five minutes
HUB = "https://huggingface.co"
AGAIN = "Delete the file; it is fetched again at the next run (one in your mirror: correct it)."


class DownloadError(RuntimeError):
    """A file that could not be had; the message is one line, and says what to do."""


class _TryAgain(Exception):
    """A passing failure: `wait` is what the server asked for in seconds, `connected` says whether it answered."""

    def __init__(self, reason: str, wait: float | None = None, connected: bool = True):
        super().__init__(reason)
        self.wait = wait
        self.connected = connected


def human(number: float, unit: str = "B") -> str:
    """12_345_678 -> '12.3 MB'."""
    for prefix in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.{0 if not prefix else 1}f} {prefix}{unit}"
        number /= 1000
    return f"{number:.1f} T{unit}"


def check_disk(folder: Path, needed: int, what: str) -> int:
    """Free bytes of the disk that holds `folder`; raises DownloadError when `needed` bytes do not fit."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"not enough disk space: {what} needs {human(needed)}, {folder} has {human(free)} free. "
            "Free some space, ask for less, or set NANOCHAT_BASE_DIR to a folder on a larger disk."
        )
    return free


def check_readable(path: Path, like: str | None = None) -> None:
    """Raises ValueError when a parquet, zip or JSON file (by the suffix of `like`) is broken."""
    suffix = Path(like or path).suffix
    try:
        if suffix == ".parquet":
            pq.ParquetFile(path).close()
        elif suffix == ".zip":
            zipfile.ZipFile(path).close()
        elif suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (pyarrow.ArrowException, zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable {suffix} file ({_first_line(error)})") from error


def is_readable(path: Path) -> bool:
    try:
        check_readable(path)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# one file over HTTP


def fetch(
    url: str,
    destination: Path,
    validate: Callable[[Path], None] | None = None,
    *,
    bar: tqdm | None = None,
    estimate: int = 0,
    first_wait: float = 1.0,
    stop: threading.Event | None = None,
) -> Path:
    """Fetches `url` to `destination` unless it is there already, and returns `destination`.

    validate(path) raises ValueError for a file not worth keeping; it comes on top of the check by suffix. Waits
    between attempts double from `first_wait` seconds, unless the server says Retry-After. `bar` is shared by several
    files, of which this one was counted with `estimate` bytes; without it the file has a bar of its own. `stop` ends
    the attempt early (what has arrived is kept). Raises DownloadError.
    """
    destination = Path(destination)
    if destination.exists():
        return destination
    stop = stop or threading.Event()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _locked(destination, stop):
        if destination.exists():  # another process had the lock and fetched it
            return destination
        own = tqdm(desc=destination.name, unit="B", unit_scale=True, total=0, disable=None) if bar is None else None
        share = _Share(bar if bar is not None else own, estimate)
        try:
            _fetch_patiently(url, destination, validate, share, first_wait, stop)
        except OSError as error:
            raise DownloadError(f"{destination} could not be written: {error}") from error
        finally:
            if own is not None:
                own.close()
    return destination


def _fetch_patiently(url, destination, validate, share, first_wait, stop) -> None:
    partial = destination.with_name(destination.name + ".partial")
    most, failures, connected = 0, 0, False
    while True:
        try:
            _request(url, partial, share, stop)
            try:
                check_readable(partial, destination.name)
                if validate is not None:
                    validate(partial)
            except ValueError as error:
                _forget(partial)
                raise _TryAgain(f"what arrived is broken: {error}") from error
            _etag_file(partial).unlink(missing_ok=True)
            os.replace(partial, destination)
            return
        except _TryAgain as error:
            connected = connected or error.connected
            size = partial.stat().st_size if partial.exists() else 0
            failures = 1 if size > most else failures + 1
            most = max(most, size)
            if failures >= (ATTEMPTS if connected else ATTEMPTS_UNCONNECTED):
                raise DownloadError(_gave_up(url, error, connected)) from error
            wait = min(error.wait if error.wait is not None else first_wait * 2 ** (failures - 1), LONGEST_WAIT)
            tqdm.write(f"{destination.name}: {error}; trying again in {wait:.0f} s")
            stop.wait(wait)


def _request(url: str, partial: Path, share: "_Share", stop: threading.Event) -> None:
    """One request, which leaves the whole file in `partial`, or raises _TryAgain or DownloadError."""
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity", "User-Agent": "nanochat"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if _etag_file(partial).exists():  # without it, halves of two versions of a file could be joined
            headers["If-Range"] = _etag_file(partial).read_text(encoding="ascii")
    connected = False
    try:
        if stop.is_set():
            raise DownloadError(f"{url}: stopped")
        with requests.get(url, headers=headers, stream=True, timeout=(10, 30)) as response:
            connected = True
            if response.status_code == 416 and _range(response)[1] == have:
                return  # it was whole already
            have, size = _accept(response, url, partial, have)
            share.set(have, size)
            with open(partial, "ab" if have else "wb") as file:
                for chunk in response.iter_content(1 << 16):
                    file.write(chunk)
                    have += len(chunk)
                    share.set(have, size)
                    if stop.is_set():
                        raise DownloadError(f"{url}: stopped")
            if size is not None and have != size:
                raise _TryAgain(f"cut off after {have} of {size} bytes")
    except requests.exceptions.SSLError as error:
        raise DownloadError(
            f"{urlsplit(url).netloc}: its certificate was not accepted. If your network has a certificate of its own, "
            f"name its file in REQUESTS_CA_BUNDLE. ({_first_line(error)})"
        ) from error
    except requests.exceptions.ProxyError as error:
        raise _TryAgain("the proxy does not let us through", connected=connected) from error
    except requests.exceptions.Timeout as error:
        raise _TryAgain("no answer in time", connected=connected) from error
    except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
        raise _TryAgain("the connection broke" if connected else "no connection", connected=connected) from error
    except requests.exceptions.RequestException as error:
        raise DownloadError(f"{url} cannot be asked for: {_first_line(error)}") from error


def _accept(response: requests.Response, url: str, partial: Path, have: int) -> tuple[int, int | None]:
    """Judges the head of an answer: (bytes in `partial` that it continues, bytes of the whole file if known)."""
    status = response.status_code
    if status in (408, 425, 429) or status >= 500:
        raise _TryAgain(f"the server says {status} {response.reason}", wait=_retry_after(response))
    if status == 416 or (status == 206 and _range(response)[0] != have):
        _forget(partial)
        raise _TryAgain("the part on disk does not fit the server's file; starting over", wait=0)
    if status in (401, 403):
        raise DownloadError(f"{url} is not public ({status} {response.reason}); fetch it by hand into a mirror folder.")
    if status not in (200, 206):
        raise DownloadError(f"{url} cannot be had: the server says {status} {response.reason}.")
    if status == 200:  # the server ignores Range, or its file has changed
        have = 0
        etag = response.headers.get("ETag", "")
        if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag):
            _etag_file(partial).write_text(etag, encoding="ascii")
        else:
            _etag_file(partial).unlink(missing_ok=True)
    length = response.headers.get("Content-Length")
    if length is None or response.headers.get("Content-Encoding", "identity") != "identity":
        return have, None
    check_disk(partial.parent, int(length), partial.name.removesuffix(".partial"))
    return have, have + int(length)


def _range(response: requests.Response) -> tuple[int | None, int | None]:
    """(first byte, size of the file) of a Content-Range header."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    first, size = match.groups() if match else (None, None)
    return int(first) if first else None, int(size) if size and size != "*" else None


def _retry_after(response: requests.Response) -> float | None:
    """Seconds that the server asks us to wait; the header holds seconds or a date."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())


def _gave_up(url: str, error: Exception, connected: bool) -> str:
    host = urlsplit(url).netloc
    if connected:
        return f"{url}: {error}. Given up; run the same command again to go on from here."
    return (
        f"{host} cannot be reached ({error}). Check the network and the proxy (HTTPS_PROXY), set HF_ENDPOINT to a host "
        "that you reach, or put the files into a folder and name it in NANOCHAT_DATA_MIRROR."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _etag_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".etag")


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _etag_file(partial).unlink(missing_ok=True)


@contextmanager
def _locked(destination: Path, stop: threading.Event) -> Iterator[None]:
    lock = FileLock(destination.with_name(f".{destination.name}.lock"), thread_local=False)
    told = False
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            if stop.is_set():
                raise DownloadError(f"{destination.name}: stopped") from None
            if not told:
                tqdm.write(f"{destination.name}: another process is fetching it; waiting")
                told = True
    try:
        yield
    finally:
        lock.release()


class _Share:
    """The part of one file in a bar that several share: absolute numbers in, differences out."""

    def __init__(self, bar: tqdm, estimate: int):
        self.bar, self.done, self.size = bar, 0, estimate

    def set(self, done: int, size: int | None) -> None:
        with self.bar.get_lock():
            if size is not None and size != self.size:
                self.bar.total = (self.bar.total or 0) + size - self.size
                self.size = size
            self.bar.update(done - self.done)
            self.done = done


# ---------------------------------------------------------------------------------------------------------------------
# the mirror, hub data sets, plain files


def mirror_path(relative: str) -> Path | None:
    """The file or folder of that name under NANOCHAT_DATA_MIRROR, if there is one."""
    mirror = paths.data_mirror()
    if mirror is None:
        return None
    if not mirror.is_dir():
        raise DownloadError(f"NANOCHAT_DATA_MIRROR names {mirror}, which is not a folder. Correct or unset it.")
    return mirror / relative if (mirror / relative).exists() else None


def take(source: Path, destination: Path) -> Path:
    """Links (or on another disk copies) a readable file of the mirror to `destination`."""
    check_readable(source)
    if destination.exists():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _locked(destination, threading.Event()):
        if not destination.exists():
            partial = destination.with_name(destination.name + ".partial")
            _forget(partial)
            try:
                os.link(source.resolve(), partial)
            except OSError:  # another disk, or one without links: the same bytes, at the price of space
                check_disk(destination.parent, source.stat().st_size, destination.name)
                shutil.copyfile(source, partial)
            os.replace(partial, destination)
    return destination


def plain_file(url: str, name: str) -> Path:
    """A single file: `<mirror>/<name>`, else fetched once into the task folder. Raises DownloadError."""
    return mirror_path(name) or fetch(url, paths.task_dir() / name)


def hub_files(repo: str, config: str, split: str) -> list[Path]:
    """The parquet files (in a mirror: or jsonl) of one split of a data set on the hub, fetched once.

    Mirror: `<mirror>/<repo>/<config>/<split>.parquet`, or in pieces `<split>-00000-of-00002.parquet`; else .jsonl.
    Raises DownloadError.
    """
    folder = paths.task_dir() / repo / config / split
    sources = enumerate(hub_sources(repo, config, split, folder))
    return [s if isinstance(s, Path) else fetch(s, folder / f"{number:04d}.parquet") for number, s in sources]


def hub_sources(repo: str, config: str, split: str, folder: Path) -> list[Path | str]:
    """Files of a mirror, or else addresses of parquet files on the hub, whose listing is kept in `folder`. Raises
    DownloadError."""
    mirror = mirror_path(f"{repo}/{config}")
    for suffix in (".parquet", ".jsonl") if mirror else ():
        piece = re.compile(re.escape(split) + r"([-_.]?\d.*)?" + re.escape(suffix))
        files = sorted(path for path in mirror.iterdir() if piece.fullmatch(path.name))
        if files:
            return files
    url = f"{paths.hf_endpoint()}/api/datasets/{repo}/parquet/{config}/{split}"
    urls = json.loads(fetch(url, folder / "listing.json", _check_listing).read_text(encoding="utf-8"))
    # A mirror of the hub may list the hub's own addresses; the user asked for the mirror.
    return [paths.hf_endpoint() + url.removeprefix(HUB) if url.startswith(HUB + "/") else url for url in urls]


def _check_listing(path: Path) -> None:
    urls = json.loads(path.read_text(encoding="utf-8"))
    if not (isinstance(urls, list) and urls and all(isinstance(url, str) for url in urls)):
        raise ValueError(f"expected a list of parquet addresses, got {str(urls)[:80]}")


def hub_rows(repo: str, config: str, split: str, check: Callable[[dict], str | None] = lambda row: None) -> list[dict]:
    """All rows of one split. `check` says what is wrong with a row, or nothing. Raises DownloadError, or ValueError
    that names the file and the row."""
    rows = []
    for path in hub_files(repo, config, split):
        unit, numbered = ("line", jsonl_rows(path)) if path.suffix == ".jsonl" else ("row", _parquet_rows(path))
        for number, row in numbered:
            problem = check(row)
            if problem:
                raise ValueError(f"{path}, {unit} {number}: {problem}. {AGAIN}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: expected at least one row. {AGAIN}")
    return rows


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        yield from enumerate(pq.read_table(path).to_pylist(), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({_first_line(error)}). {AGAIN}") from error


def jsonl_rows(path: Path, opener: Callable = open) -> Iterator[tuple[int, dict | list]]:
    """(line number, value) of each line that is not blank. Raises ValueError naming file and line."""
    with opener(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from error
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            yield number, value
