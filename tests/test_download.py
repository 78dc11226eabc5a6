"""Downloads against a hub on this machine that cuts, refuses, ignores and lies."""

import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import corpora, dataset, download
from nanochat.download import DownloadError, fetch, hub_files, hub_rows, plain_file

Usage = namedtuple("Usage", "total used free")


class Hub:
    """files: path -> bytes. faults: path -> what goes wrong at each request in turn (None = nothing)."""

    def __init__(self):
        self.files, self.faults, self.requests, self.ranges, self.etag = {}, {}, Counter(), [], '"one"'
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, request):
        with self.lock:
            self.requests[request.path] += 1
            self.ranges.append(request.headers.get("Range"))
            faults = self.faults.get(request.path)
            fault = faults.pop(0) if faults else None
        data = self.files.get(request.path)
        if data is None:
            return request.send_error(404)
        if isinstance(fault, tuple):  # status, headers
            request.send_response(fault[0])
            for key, value in fault[1].items():
                request.send_header(key, value)
            request.send_header("Content-Length", "0")
            return request.end_headers()
        if fault == "slow":
            time.sleep(0.3)
        first = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        changed = request.headers.get("If-Range", self.etag) != self.etag
        if wanted and fault != "no range" and not changed:
            first = int(wanted[1])
            if first >= len(data):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(data)}")
                request.send_header("Content-Length", "0")
                return request.end_headers()
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        else:
            request.send_response(200)
        request.send_header("ETag", self.etag)
        body = data[first:]
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if fault == "broken":
            body = bytes(len(body))
        request.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    monkeypatch.delenv("NANOCHAT_DATA_MIRROR", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.close()


class Stop(threading.Event):
    """Waits for nothing, and remembers how long it should have waited."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def wait(self, timeout=None):
        self.waits.append(timeout)


def parquet(*texts) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": list(texts)}), sink)
    return sink.getvalue().to_pybytes()


DATA = bytes(range(256)) * 4096


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_file_arrives_whole_and_is_not_asked_for_again(hub, tmp_path):
    hub.files["/a.bin"] = DATA
    for _ in range(2):
        assert fetch(hub.url + "/a.bin", tmp_path / "new" / "a.bin").read_bytes() == DATA
    assert hub.requests["/a.bin"] == 1
    assert left_behind(tmp_path / "new") == ["a.bin"]


def test_a_download_that_is_cut_off_goes_on_where_it_stopped(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 2)  # in a row without progress: each of these makes some
    hub.files["/a.bin"] = DATA
    hub.faults["/a.bin"] = ["cut", "cut"]
    stop = Stop()
    assert fetch(hub.url + "/a.bin", tmp_path / "a.bin", stop=stop).read_bytes() == DATA
    assert hub.ranges == [None, f"bytes={len(DATA) // 2}-", f"bytes={len(DATA) * 3 // 4}-"]
    assert len(stop.waits) == 2


def test_the_partial_file_of_an_earlier_run_is_used(hub, tmp_path):
    hub.files["/a.bin"] = DATA
    (tmp_path / "a.bin.partial").write_bytes(DATA[:1000])
    assert fetch(hub.url + "/a.bin", tmp_path / "a.bin").read_bytes() == DATA
    assert hub.ranges == ["bytes=1000-"]


def test_a_partial_file_that_is_already_whole_is_accepted(hub, tmp_path):
    hub.files["/a.bin"] = DATA
    (tmp_path / "a.bin.partial").write_bytes(DATA)
    assert fetch(hub.url + "/a.bin", tmp_path / "a.bin").read_bytes() == DATA
    assert hub.requests["/a.bin"] == 1


def test_a_partial_file_longer_than_the_file_is_thrown_away(hub, tmp_path):
    hub.files["/a.bin"] = DATA
    (tmp_path / "a.bin.partial").write_bytes(DATA + b"more")
    assert fetch(hub.url + "/a.bin", tmp_path / "a.bin", stop=Stop()).read_bytes() == DATA


def test_a_server_that_ignores_range_is_read_from_the_beginning(hub, tmp_path):
    hub.files["/a.bin"] = DATA
    hub.faults["/a.bin"] = ["no range"]
    (tmp_path / "a.bin.partial").write_bytes(b"x" * 1000)
    assert fetch(hub.url + "/a.bin", tmp_path / "a.bin").read_bytes() == DATA


def test_halves_of_two_versions_are_never_joined(hub, tmp_path):
    hub.files["/a.bin"] = b"x" * len(DATA)
    hub.faults["/a.bin"] = ["cut"] + [(500, {})] * 6
    with pytest.raises(DownloadError):
        fetch(hub.url + "/a.bin", tmp_path / "a.bin", stop=Stop())
    hub.files["/a.bin"], hub.etag, hub.faults = DATA, '"two"', {}
    assert fetch(hub.url + "/a.bin", tmp_path / "a.bin").read_bytes() == DATA
    assert left_behind(tmp_path) == ["a.bin"]


def test_the_server_says_when_to_come_back(hub, tmp_path):
    hub.files["/a.bin"] = DATA
    hub.faults["/a.bin"] = [(429, {"Retry-After": "7"}), (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})]
    stop = Stop()
    fetch(hub.url + "/a.bin", tmp_path / "a.bin", stop=stop)
    assert stop.waits == [7, 0]


def test_waits_double_and_end_in_one_line(hub, tmp_path):
    hub.files["/a.bin"] = DATA
    hub.faults["/a.bin"] = [(500, {})] * 6
    stop = Stop()
    with pytest.raises(DownloadError, match="500") as error:
        fetch(hub.url + "/a.bin", tmp_path / "a.bin", stop=stop)
    assert stop.waits == [1, 2, 4, 8, 16]
    assert "\n" not in str(error.value)


def test_a_missing_file_is_not_asked_for_twice(hub, tmp_path):
    with pytest.raises(DownloadError, match="a.bin.*404"):
        fetch(hub.url + "/a.bin", tmp_path / "a.bin")
    assert hub.requests["/a.bin"] == 1


@pytest.mark.parametrize("always", [True, False])
def test_broken_parquet_is_never_kept(hub, tmp_path, always):
    hub.files["/a.parquet"] = parquet("one", "two")
    hub.faults["/a.parquet"] = ["broken"] * (6 if always else 1)
    if always:
        with pytest.raises(DownloadError, match="broken"):
            fetch(hub.url + "/a.parquet", tmp_path / "a.parquet", stop=Stop())
        assert left_behind(tmp_path) == []
    else:
        assert pq.read_table(fetch(hub.url + "/a.parquet", tmp_path / "a.parquet", stop=Stop())).num_rows == 2


def test_threads_and_processes_that_want_the_same_file_fetch_it_once(hub, tmp_path):
    hub.files["/a.bin"] = DATA
    hub.faults["/a.bin"] = ["slow"]
    code = "import sys; from nanochat.download import fetch; fetch(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", code, hub.url + "/a.bin", str(tmp_path / "a.bin")]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    threads = [threading.Thread(target=fetch, args=(hub.url + "/a.bin", tmp_path / "a.bin")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert process.wait() == 0
    assert hub.requests["/a.bin"] == 1 and (tmp_path / "a.bin").read_bytes() == DATA


def test_no_network_is_one_line(hub, tmp_path):
    hub.close()
    stop = Stop()
    with pytest.raises(DownloadError, match="cannot be reached.*NANOCHAT_DATA_MIRROR") as error:
        fetch(hub.url + "/a.bin", tmp_path / "a.bin", stop=stop)
    assert "\n" not in str(error.value) and len(stop.waits) == 2


def test_an_address_without_a_scheme_is_one_line(tmp_path):
    with pytest.raises(DownloadError, match="cannot be asked for"):
        fetch("huggingface.co/a.bin", tmp_path / "a.bin")


def test_a_full_disk_is_seen_beforehand(hub, tmp_path, monkeypatch):
    hub.files["/a.bin"] = DATA
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: Usage(10**12, 0, 1000))
    with pytest.raises(DownloadError, match="needs 1.0 MB.*1.0 kB free"):
        fetch(hub.url + "/a.bin", tmp_path / "a.bin")
    assert left_behind(tmp_path) in ([], ["a.bin.partial.etag"])
    with pytest.raises(DownloadError, match="9 shards of about 100.0 MB needs 900.0 MB"):
        corpora.download_climbmix(8)


# -- hub data sets and plain files


def listing(hub, *rows_of_files):
    urls = []
    for number, rows in enumerate(rows_of_files):
        hub.files[f"/api/datasets/me/set/parquet/main/test/{number}.parquet"] = parquet(*rows)
        urls.append(f"https://huggingface.co/api/datasets/me/set/parquet/main/test/{number}.parquet")
    hub.files["/api/datasets/me/set/parquet/main/test"] = json.dumps(urls).encode()


def test_hub_data_sets_are_listed_fetched_and_then_need_no_network(hub, tmp_path):
    listing(hub, ["a", "b"], ["c"])
    assert [row["text"] for row in hub_rows("me/set", "main", "test")] == ["a", "b", "c"]
    assert [path.name for path in hub_files("me/set", "main", "test")] == ["0000.parquet", "0001.parquet"]
    hub.close()
    assert len(hub_rows("me/set", "main", "test")) == 3


def test_an_unknown_data_set_says_which(hub):
    with pytest.raises(DownloadError, match="datasets/me/other/parquet/main/test.*404"):
        hub_files("me/other", "main", "test")


def test_a_listing_of_nothing_is_an_error(hub, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    hub.files["/api/datasets/me/set/parquet/main/test"] = b"[]"
    with pytest.raises(DownloadError, match="expected a list of parquet addresses"):
        hub_files("me/set", "main", "test")


def test_a_hub_file_damaged_on_disk_is_named(hub):
    listing(hub, ["a"])
    (path,) = hub_files("me/set", "main", "test")
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="0000.parquet.*Delete the file"):
        hub_rows("me/set", "main", "test")


def test_the_mirror_is_looked_into_before_the_network(hub, tmp_path, monkeypatch):
    mirror = tmp_path / "mirror"
    monkeypatch.setenv("NANOCHAT_DATA_MIRROR", str(mirror))
    with pytest.raises(DownloadError, match="not a folder"):
        plain_file(hub.url + "/words.txt", "words.txt")
    (mirror / "me/set/main").mkdir(parents=True)
    (mirror / "me/set/main/test.jsonl").write_text('{"text": "here"}\n\n{"text": "too"}\n', encoding="utf-8")
    (mirror / "me/set/main/test_hard.jsonl").write_text('{"text": "not asked for"}\n', encoding="utf-8")
    (mirror / "me/set/main/train-00001-of-00002.parquet").write_bytes(parquet("two"))
    (mirror / "me/set/main/train-00000-of-00002.parquet").write_bytes(parquet("one"))
    (mirror / "words.txt").write_text("word", encoding="utf-8")
    assert hub_rows("me/set", "main", "test") == [{"text": "here"}, {"text": "too"}]
    assert hub_rows("me/set", "main", "train") == [{"text": "one"}, {"text": "two"}]
    assert plain_file(hub.url + "/words.txt", "words.txt").read_text(encoding="utf-8") == "word"
    assert not hub.requests
    hub.files["/other.txt"] = b"other"
    assert plain_file(hub.url + "/other.txt", "other.txt").read_bytes() == b"other"


def test_a_broken_line_of_jsonl_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match="a.jsonl, line 2: not JSON"):
        list(download.jsonl_rows(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2: not UTF-8"):
        list(download.jsonl_rows(tmp_path / "a.jsonl"))


# -- ClimbMix


def climbmix(hub, monkeypatch, shards=4):
    monkeypatch.setattr(corpora, "CLIMBMIX_SHARDS", shards)
    monkeypatch.setattr(corpora, "CLIMBMIX_VALIDATION", f"shard_{shards - 1:05d}.parquet")
    for index in range(shards):
        path = f"/{corpora.CLIMBMIX_PAGE}/resolve/main/shard_{index:05d}.parquet"
        hub.files[path] = parquet(f"text {index}", f"more {index}")


def test_climbmix_comes_with_its_validation_shard_and_licence(hub, monkeypatch, capsys):
    climbmix(hub, monkeypatch)
    corpora.download_climbmix(2, num_workers=2)
    out = capsys.readouterr().out
    assert "CC BY-NC" in out.splitlines()[0] and "shard_00001.parquet is there" in out
    manifest = dataset.load_manifest("climbmix")
    assert manifest["validation"] == ["shard_00003.parquet"]
    assert [e["file"] for e in manifest["shards"]] == [f"shard_0000{i}.parquet" for i in (0, 1, 3)]
    assert all(e["documents"] == 2 and len(e["sha256"]) == 64 for e in manifest["shards"])
    assert list(dataset.iter_documents("climbmix", "validation")) == ["text 3", "more 3"]
    asked = sum(hub.requests.values())
    corpora.download_climbmix(2)
    assert sum(hub.requests.values()) == asked
    corpora.download_climbmix(-1)
    assert [path.name for path in dataset.shard_paths("climbmix", "train")] == [
        f"shard_0000{i}.parquet" for i in range(3)
    ]


def test_climbmix_mends_shards_that_were_lost_or_damaged(hub, monkeypatch, tmp_path):
    climbmix(hub, monkeypatch)
    corpora.download_climbmix(2)
    first, second = dataset.shard_paths("climbmix", "train")
    first.unlink()
    second.write_bytes(b"short")
    with pytest.raises(ValueError, match="shard_00000.parquet is missing.*nanochat.dataset -n"):
        dataset.shard_paths("climbmix", "train")
    corpora.download_climbmix(2)
    assert len(list(dataset.iter_documents("climbmix", "train"))) == 4


def test_climbmix_stops_in_one_line_and_keeps_what_is_whole(hub, monkeypatch):
    climbmix(hub, monkeypatch)
    del hub.files[f"/{corpora.CLIMBMIX_PAGE}/resolve/main/shard_00001.parquet"]
    with pytest.raises(DownloadError, match="shard_00001.parquet.*404"):
        corpora.download_climbmix(2, num_workers=1)
    assert [e["file"] for e in dataset.load_manifest("climbmix")["shards"]] == [
        "shard_00000.parquet",
        "shard_00003.parquet",
    ]


def test_climbmix_is_taken_from_the_mirror_as_far_as_it_goes(hub, monkeypatch, tmp_path):
    climbmix(hub, monkeypatch)
    monkeypatch.setenv("NANOCHAT_DATA_MIRROR", str(tmp_path / "mirror"))
    (tmp_path / "mirror/climbmix").mkdir(parents=True)
    (tmp_path / "mirror/climbmix/shard_00000.parquet").write_bytes(parquet("from the mirror"))
    corpora.download_climbmix(1)
    assert list(dataset.iter_documents("climbmix", "train")) == ["from the mirror"]
    assert sum(hub.requests.values()) == 1


def test_the_command_without_network_ends_in_one_line(hub, tmp_path):
    hub.close()
    command = [sys.executable, "-m", "nanochat.dataset", "-n", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot be reached" in done.stderr.strip().splitlines()[-1]
