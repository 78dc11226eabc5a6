"""dev/repackage.py: whatever happens on the way, the same corpus in the end."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from test_download import Hub, parquet

from nanochat import dataset, download, paths

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "dev"))

import repackage  # noqa: E402

# Little data has many buckets, for a megabyte of memory is a kilobyte here.
SMALL = ["--memory-megabytes", "8", "--shard-characters", "3000"]


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DATA_MIRROR", raising=False)
    monkeypatch.setattr(repackage, "MEGABYTE", 1000)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them here, and no power cut


@pytest.fixture
def texts(tmp_path):
    """A folder of several kinds of file; documents `text 0 ...` to `text 299 ...`, 40 of them twice, 3 empty."""
    folder, rng = tmp_path / "texts", random.Random(1)
    (folder / "deep").mkdir(parents=True)
    text = [f"text {i} " + "ö" * rng.randrange(100) for i in range(300)]
    (folder / "a.txt").write_text(text[0], encoding="utf-8")
    (folder / "deep" / "b.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in [*text[1:100], "", None, " \n"])
    )
    lines = "\n".join(json.dumps({"text": t}) for t in text[60:200])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"id": range(100), "text": text[200:]}), folder / "d.parquet")
    return folder


def make(*flags, name="mine"):
    """The corpus folder that a run with these flags makes."""
    repackage.main(repackage.parse_args(["--name", name, *map(str, flags)]))
    return paths.corpus_dir(name)


def contents(folder):
    """Name -> bytes of the shards and what the manifest says of them."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return files | {key: manifest[key] for key in ("validation", "shards")}


def documents(name="mine"):
    return [list(dataset.iter_documents(name, split)) for split in ("train", "validation")]


def left_over():
    """Folders beside the corpora."""
    return [path.name for path in paths.corpus_dir("x").parent.iterdir() if path.is_dir() and path.name[0] == "."]


# -- the corpus


def test_every_document_comes_once_and_in_one_split(texts):
    folder = make(texts, *SMALL, "--validation-fraction", 0.2)
    train, validation = documents()
    assert validation and len(train) > 200 and len(train) + len(validation) == 300
    assert sorted(int(text.split()[1]) for text in train + validation) == list(range(300))
    assert train != sorted(train, key=lambda text: int(text.split()[1]))
    assert len(list(folder.glob("shard_*.parquet"))) > 3 and left_over() == []
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["manifest.json", *(entry["file"] for entry in dataset.load_manifest("mine")["shards"])]
    )
    assert sum(map(len, validation)) < 3000 + 110  # one shard at most


def test_the_order_depends_on_texts_and_seed_only(texts, tmp_path, monkeypatch):
    one = contents(make(texts, *SMALL))
    assert contents(make(texts, "--shard-characters", 3000, name="one-bucket")) == one
    shuffled = [texts / "d.parquet", texts / "deep", texts / "c.jsonl.gz", texts / "a.txt"]
    monkeypatch.setattr(repackage, "find_text", lambda sources: list(sources))
    shuffled[1] = texts / "deep" / "b.jsonl"
    assert contents(make(*shuffled, "--memory-megabytes", 1, "--shard-characters", 3000, name="two")) == one
    assert contents(make(*shuffled, *SMALL, "--seed", -1, name="three")) != one


def test_a_corpus_of_two_documents_has_both_splits(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "b"}\n')
    for name, fraction in (("least", 1e-9), ("most", 0.999999)):
        make(tmp_path / "a.jsonl", "--validation-fraction", fraction, name=name)
        assert [len(split) for split in documents(name)] == [1, 1]


def test_the_corpus_can_be_tokenized(texts, tokenizer):
    make(texts, *SMALL, "--licence", "mine alone", "--source", "my desk")
    files = dataset.tokenize("mine", tokenizer, num_workers=1, progress=False)
    assert files[:-1] == dataset.token_files("mine", tokenizer.fingerprint, "train")
    manifest = dataset.load_manifest("mine")
    assert (manifest["name"], manifest["source"], manifest["licence"]) == ("mine", "my desk", "mine alone")


def test_what_is_held_stays_within_the_bound(texts, monkeypatch):
    """Also when the estimate was far too low, and with a single bucket."""
    held, buffers = [], []
    read_part, flush = repackage.read_part, repackage.Buckets.flush
    monkeypatch.setattr(repackage, "read_part", lambda *a: held.append(read_part(*a)) or held[-1].copy())
    monkeypatch.setattr(
        repackage.Buckets, "flush", lambda self: buffers.append(self.bytes - self.written) or flush(self)
    )
    one = contents(make(texts, *SMALL))
    assert len(held) > 10 and max(sum(map(len, part.values())) for part in held) <= 2000
    assert len(buffers) > 5 and max(buffers) <= 4000 + 300
    held.clear()
    monkeypatch.setattr(repackage, "text_bytes", lambda path, column: 1)
    assert contents(make(texts, *SMALL, name="underestimated")) == one
    assert len(held) > 10 and max(sum(map(len, part.values())) for part in held) <= 2 * 2000


# -- killed and run again


class Killed(BaseException):
    pass


def dying(function, calls, k, after):
    """`function`, but the k-th call of all that count in `calls` dies: before it, or after it."""

    def call(*args, **kwargs):
        calls.append(function)
        if len(calls) != k:
            return function(*args, **kwargs)
        if after:
            function(*args, **kwargs)
        raise Killed

    return call


def half(path, data):
    with open(path, "ab") as file:
        file.write(data[: len(data) // 2])


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_the_same_command_makes_the_same_corpus(texts, monkeypatch, after):
    whole = contents(make(texts, *SMALL, name="whole"))
    count, points = 10**9, [0]
    while points:
        k = points.pop()
        calls = []
        with monkeypatch.context() as patch:
            for module, name in ((repackage, "append"), (repackage, "to_disk"), (paths, "write_json"), (os, "replace")):
                patch.setattr(module, name, dying(getattr(module, name), calls, k, after))
            try:
                folder = make(texts, *SMALL)
            except Killed:
                if calls[-1] is repackage.append and not after:
                    half(
                        repackage.bucket_path(next(paths.corpus_dir("x").parent.glob(".mine.rep*/buckets")), 0), b"torn"
                    )
                folder = None
        if k == 0:
            count = len(calls)
            points = sorted({*range(1, 8), *range(8, count - 30, 17), *range(count - 30, count + 1)})
        assert contents(folder or make(texts, *SMALL)) == whole, f"killed at write {k} of {count}"
        assert left_over() == []
        shutil.rmtree(paths.corpus_dir("mine"))
    assert count > 60


def test_killed_again_and_again_it_still_arrives(texts, monkeypatch):
    whole, lives = contents(make(texts, *SMALL, name="whole")), 0
    for lives in range(1, 500):  # noqa: B007
        with monkeypatch.context() as patch:
            calls = []
            for module, name in ((paths, "write_json"), (os, "replace")):
                patch.setattr(module, name, dying(getattr(module, name), calls, 4, True))
            try:
                assert contents(make(texts, *SMALL)) == whole
                break
            except Killed:
                continue
    assert 5 < lives < 499


def test_kill_9_at_random_moments(texts, monkeypatch):
    pq.write_table(pa.table({"text": [f"{i} " * 40 for i in range(60_000)]}), texts / "e.parquet", row_group_size=1000)
    flags = [texts, "--memory-megabytes", 2, "--shard-characters", 500_000]
    command = [sys.executable, "dev/repackage.py", "--name", "killed", *map(str, flags)]
    kills, rng = 0, random.Random(3)
    while True:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3 + kills % 3):  # the licence, how far it was, and then one or more steps
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (0, -9), errors.decode()
        if process.returncode == 0:
            break
        kills += 1
    assert kills > 2
    monkeypatch.setattr(repackage, "MEGABYTE", 1_000_000)
    assert contents(paths.corpus_dir("killed")) == contents(make(*flags, name="whole"))


# -- the hub


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.close()


def published(hub, *files):
    """Parquet files of me/set, config main, split train; their paths on the hub."""
    listing = "/api/datasets/me/set/parquet/main/train"
    names = [f"{listing}/{number}.parquet" for number in range(len(files))]
    hub.files |= {name: parquet(*rows) for name, rows in zip(names, files, strict=True)}
    hub.files[listing] = json.dumps(["https://huggingface.co" + name for name in names]).encode()
    return names


HUB = ("--hub", "me/set", "--config", "main")
ROWS = [[f"row {i} of file {n}" for i in range(30)] for n in range(4)]


def test_hub_data_sets_go_through_the_disk_file_by_file(hub, monkeypatch):
    published(hub, *ROWS)
    seen = []
    append = repackage.append
    downloads = paths.corpus_dir("mine").with_name(".mine.repackage") / "downloads"
    monkeypatch.setattr(repackage, "append", lambda *a: seen.append(list(downloads.glob("*.parquet"))) or append(*a))
    make(*HUB, "--max-files", 3)
    train, validation = documents()
    assert sorted(train + validation) == sorted(sum(ROWS[:3], []))
    assert {len(files) for files in seen} == {1} and left_over() == []
    manifest = dataset.load_manifest("mine")
    assert manifest["source"].endswith("/datasets/me/set") and "page" in manifest["licence"]


def test_downloads_are_kept_where_others_look_for_them(hub):
    names = published(hub, *ROWS)
    make(*HUB, "--keep-downloads")
    assert len(dataset.hub_rows("me/set", "main", "train")) == 120
    make(*HUB, "--keep-downloads", name="again")
    assert [hub.requests[name] for name in names] == [1] * 4
    assert contents(paths.corpus_dir("mine")) == contents(paths.corpus_dir("again"))


def test_a_source_that_is_done_is_not_fetched_again(hub, monkeypatch):
    names = published(hub, *ROWS)
    hub.faults[names[2]] = [(404, {})]
    with pytest.raises(download.DownloadError, match="404"):
        make(*HUB)
    hub.files[names[0].rpartition("/")[0]] = b'["gone"]'  # the listing of the beginning counts
    make(*HUB)
    assert [hub.requests[name] for name in names] == [1, 1, 2, 1]
    assert sorted(sum(documents(), [])) == sorted(sum(ROWS, []))


def test_the_mirror_is_looked_into_before_the_network(hub, tmp_path, monkeypatch):
    (tmp_path / "mirror/me/set/main").mkdir(parents=True)
    (tmp_path / "mirror/me/set/main/train.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ROWS[0]))
    monkeypatch.setenv("NANOCHAT_DATA_MIRROR", str(tmp_path / "mirror"))
    make(*HUB)
    assert sorted(sum(documents(), [])) == sorted(ROWS[0]) and not hub.requests
    assert (tmp_path / "mirror/me/set/main/train.jsonl").exists()


def test_a_fetched_file_that_cannot_be_used_is_named_and_fetched_again(hub):
    (name,) = published(hub, ROWS[0])
    good, data = hub.files[name], bytearray(hub.files[name])
    data[4:60] = bytes(56)
    hub.files[name] = bytes(data)
    with pytest.raises(ValueError, match="0000.parquet cannot be read.*fetched from http.*0.parquet"):
        make(*HUB)
    hub.files[name] = good
    make(*HUB)
    assert len(sum(documents(), [])) == 30


def test_a_full_disk_is_seen_beforehand(texts, monkeypatch):
    usage = shutil.disk_usage(texts)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(download.DownloadError, match="not enough disk space"):
        make(texts)


# -- refused


def test_an_unfinished_run_goes_on_with_its_own_flags_only(texts, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(repackage, "gather", dying(repackage.gather, [], 1, False))
        with pytest.raises(Killed):
            make(texts, *SMALL)
    for other in (["--seed", 1], ["--column", "id"], ["--shard-characters", 5], ["--max-files", 2]):
        with pytest.raises(ValueError, match="unfinished run of other settings .*asked for.*--restart.*--name"):
            make(texts, *SMALL, *other)
    with pytest.raises(ValueError, match="unfinished run of other settings .*sources"):
        make(texts / "a.txt", *SMALL)
    with pytest.raises(ValueError, match="unfinished run of other settings .*sources"):
        make(texts / "a.txt", *SMALL)
    make(texts, "--shard-characters", 3000)  # memory does not matter
    assert "goes on: 4 of 4 files" in capsys.readouterr().out
    assert len(sum(documents(), [])) == 300


def test_restart_throws_away_what_was_done(texts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(repackage, "gather", dying(repackage.gather, [], 1, False))
        with pytest.raises(Killed):
            make(texts, *SMALL)
    make(texts / "d.parquet", "--restart")
    assert len(sum(documents(), [])) == 100


def test_a_complete_corpus_is_left_alone_or_replaced_by_force(texts, capsys):
    folder = make(texts)
    before = (folder / "manifest.json").stat().st_mtime_ns
    make(texts)
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="seed 42 there, 1 asked for.*--name.*--force"):
        make(texts, "--seed", 1)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    make(texts / "d.parquet", "--force")
    assert len(sum(documents(), [])) == 100 and left_over() == []


def test_a_folder_that_is_no_corpus_is_never_replaced(texts, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is no corpus"):
        make(texts, "--out", tmp_path / "home", "--force")
    assert (tmp_path / "home" / "letter.txt").exists()
    make(texts, "--out", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "manifest.json").exists() and not paths.corpus_dir("mine").exists()


def test_two_at_a_time_are_refused(texts):
    lock = paths.corpus_dir("mine").with_name(".mine.lock")
    lock.parent.mkdir(parents=True)
    with FileLock(lock), pytest.raises(ValueError, match="another process"):
        make(texts)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"body": "other", "id": 1}',
            "a.jsonl, line 2: .*'text', got one with body, id",
        ),
        ("a.jsonl", b'{"text": "fine"}\n{"text": 5}', "a.jsonl, line 2: the text is not a string but 5"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: half of a surrogate pair"),
        ("a.parquet", b"PAR1 and nothing", "a.parquet is not a readable .parquet file"),
        ("a.parquet", parquet("fine", "too")[:-9], "a.parquet is not a readable .parquet file"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8"),
        ("a.txt", b"only one", "only one document"),
        ("a.txt", b" \n", "no document has any text"),
        ("a.pdf", b"%PDF", "none of the kinds"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        make(tmp_path / name)
    assert "\n" not in str(error.value) and not paths.corpus_dir("mine").exists()


def test_a_parquet_without_the_column_names_those_it_has(tmp_path):
    pq.write_table(pa.table({"id": [1, 2], "content": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: no column 'text', only id, content"):
        make(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, row 1: the text is not a string but 1"):
        make(tmp_path / "a.parquet", "--column", "id")
    make(tmp_path / "a.parquet", "--column", "content")
    assert sorted(sum(documents(), [])) == ["a", "b"]


def test_a_mended_file_is_all_that_is_read_again(texts, monkeypatch):
    (texts / "z.jsonl").write_text('{"text": 5}')
    with pytest.raises(ValueError, match="z.jsonl, line 1"):
        make(texts, "--memory-megabytes", 1)
    (texts / "z.jsonl").write_text('{"text": "mended"}')
    read = []
    read_text = repackage.read_text
    monkeypatch.setattr(repackage, "read_text", lambda path, column: read.append(path.name) or read_text(path, column))
    make(texts, "--memory-megabytes", 1)
    assert read == ["z.jsonl"] and len(sum(documents(), [])) == 301


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--name", "../x", "a"], "--name '../x'"),
        (["--name", "climbmix", "a"], "--name 'climbmix'"),
        (["--name", "x"], "either --hub"),
        (["--name", "x", "a", "--hub", "me/set"], "either --hub"),
        (["--name", "x", "a", "--validation-fraction", "1"], "--validation-fraction"),
        (["--name", "x", "a", "--shard-characters", "0"], "at least 1"),
    ],
)
def test_mistakes_in_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        repackage.parse_args(flags)
    assert message in capsys.readouterr().err


def test_control_c_is_one_line(texts, tmp_path):
    fifo = texts / "z.txt"
    os.mkfifo(fifo)  # reading waits here
    command = [sys.executable, "dev/repackage.py", "--name", "mine", str(texts)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with open(fifo, "w"):  # opened: it has come so far
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors == "stopped; the same command goes on from here\n", errors
