"""Corpora: import of one's own text, reading, token files."""

import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import corpora, dataset, paths
from nanochat.corpora import import_text, write_shard
from nanochat.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


@pytest.fixture
def texts(tmp_path):
    """A folder with every kind of file; the documents are `text 0` ... `text 59`, some of them twice."""
    folder = tmp_path / "texts"
    (folder / "deep" / "er").mkdir(parents=True)
    text = [f"text {i}" for i in range(60)]
    (folder / "a.txt").write_text(text[0], encoding="utf-8")
    (folder / "deep" / "b.md").write_bytes(b"\xef\xbb\xbf" + text[1].encode())
    (folder / "deep" / "c.txt.gz").write_bytes(gzip.compress(text[2].encode()))
    lines = "\n\n".join(json.dumps({"text": t, "id": 1}) for t in text[3:20])
    (folder / "deep" / "er" / "d.jsonl").write_text(lines, encoding="utf-8")
    (folder / "e.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": t}) for t in text[15:40]).encode()))
    pq.write_table(pa.table({"id": range(20), "text": text[40:]}), folder / "f.parquet")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    (folder / ".hidden.txt").write_text("hidden", encoding="utf-8")
    return folder


def documents(name, split):
    return list(dataset.iter_documents(name, split))


def make_corpus(name="little", train=((0, 5), (5, 9)), validation=(9, 12)):
    """Shards of `document <i> ...` for the ranges given; the last shard is validation."""
    folder = paths.corpus_dir(name)
    folder.mkdir(parents=True)
    shards = []
    for number, span in enumerate([*train, validation]):
        text = [f"document {i}, über {i * i} Dinge <|bos|>" for i in range(*span)]
        shards.append(write_shard(folder / f"shard_{number:05d}.parquet", text))
    manifest = {"name": name, "source": "test", "licence": "none", "validation": [shards[-1]["file"]], "shards": shards}
    paths.write_json(folder / "manifest.json", manifest)
    return folder


# -- import


def test_every_kind_of_file_is_imported_once_and_split(texts):
    manifest = import_text([texts], "mine", validation_fraction=0.2, shard_characters=100)
    train, validation = documents("mine", "train"), documents("mine", "validation")
    assert sorted(train + validation) == sorted(f"text {i}" for i in range(60))
    assert validation and not set(train) & set(validation)
    assert len(manifest["shards"]) > 3 and manifest["validation"] == [manifest["shards"][-1]["file"]]
    assert train != sorted(train)
    names = sorted(path.name for path in paths.corpus_dir("mine").iterdir())
    assert names == ["manifest.json", *(entry["file"] for entry in manifest["shards"])]
    for entry in manifest["shards"]:
        again = corpora.shard_entry(paths.corpus_dir("mine") / entry["file"])
        assert again == entry


def test_an_import_depends_on_texts_and_seed_only(texts, monkeypatch):
    one = import_text([texts], "one")["shards"]
    monkeypatch.setattr(corpora, "BUCKET_BYTES", 200)  # many buckets instead of one
    files = sorted(corpora.find_text([texts]), reverse=True)
    assert import_text(files, "two")["shards"] == one
    assert import_text([texts], "three", seed=1)["shards"] != one


def test_there_is_always_a_document_on_either_side(tmp_path):
    for name, fraction in (("least", 1e-9), ("most", 0.999999)):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "b"}\n', encoding="utf-8")
        import_text([tmp_path / f"{name}.jsonl"], name, validation_fraction=fraction)
        assert len(documents(name, "train")) == len(documents(name, "validation")) == 1


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"{i} " + "word " * (i % 50) for i in range(1000)] + ["x".join(map(str, range(10_000)))]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    import_text([tmp_path / "book.txt"], "book")
    pieces = documents("book", "train") + documents("book", "validation")
    assert max(map(len, pieces)) <= corpora.LONGEST_PIECE
    words = sorted(word for piece in pieces for word in piece.split() if "x" not in word)
    assert words == sorted(word for paragraph in paragraphs[:-1] for word in paragraph.split())
    assert sum(piece.count("x") for piece in pieces) == 9_999


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n{"txt": "other"}', "a.jsonl, line 2: expected an object with a field 'text'"),
        ("a.jsonl", b'{"text": 5}', "a.jsonl, line 1: the text is not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: half of a surrogate pair"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read"),
        ("a.txt.gz", b"no gzip", "a.txt.gz cannot be read"),
        ("a.txt.gz", gzip.compress(b"text" * 99)[:-9], "a.txt.gz cannot be read"),
        ("a.pdf", b"%PDF", "a.pdf is none of the kinds"),
        ("a.txt", b"only one", "only one document"),
        ("a.txt", b" \n\n ", "no document has any text"),
    ],
)
def test_what_cannot_be_imported_is_named_and_leaves_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        import_text([tmp_path / name], "mine")
    assert not paths.corpus_dir("mine").exists()
    assert not [path for path in paths.corpus_dir("mine").parent.glob(".mine*") if path.is_dir()]


def test_a_parquet_without_text_or_with_holes_is_named(tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: no column 'text', only body"):
        import_text([tmp_path / "a.parquet"], "mine")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, row 2: the text is not a string"):
        import_text([tmp_path / "a.parquet"], "mine")


def test_empty_folders_missing_paths_and_bad_names_are_refused(tmp_path, texts):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text found"):
        import_text([tmp_path / "empty"], "mine")
    with pytest.raises(ValueError, match="is not there"):
        import_text([tmp_path / "nowhere"], "mine")
    for name in ("../mine", "", "tinyworld"):
        with pytest.raises(ValueError, match="--name"):
            import_text([texts], name)
    with pytest.raises(ValueError, match="--validation-fraction"):
        import_text([texts], "mine", validation_fraction=0)


def test_a_corpus_is_replaced_only_by_force(texts):
    import_text([texts], "mine")
    with pytest.raises(ValueError, match="--force"):
        import_text([texts / "f.parquet"], "mine")
    import_text([texts / "f.parquet"], "mine", force=True)
    assert len(documents("mine", "train") + documents("mine", "validation")) == 20


# -- reading


def test_documents_come_in_order_cut_and_counted():
    make_corpus()
    assert [text.split(",")[0] for text in documents("little", "train")] == [f"document {i}" for i in range(9)]
    assert [path.name for path in dataset.shard_paths("little", "train", limit=1)] == ["shard_00000.parquet"]
    assert [path.name for path in dataset.shard_paths("little", "val")] == ["shard_00002.parquet"]
    assert list(dataset.iter_documents("little", "train", max_chars=25, doc_cap=10)) == [
        "document 0",
        "document 1",
        "document 2",
    ]
    with pytest.raises(ValueError, match="'test'"):
        dataset.shard_paths("little", "test")


@pytest.mark.parametrize(
    "name, command",
    [
        ("tinyworld", "python -m nanochat.tinyworld"),
        ("climbmix", "python -m nanochat.dataset -n 8"),
        ("mine", "python -m nanochat.dataset import PATH... --name mine"),
    ],
)
def test_a_missing_corpus_names_the_command_that_makes_it(name, command):
    with pytest.raises(ValueError, match="no corpus") as error:
        dataset.load_manifest(name)
    assert str(error.value).endswith(command)


def test_unreadable_shards_and_manifests_are_named():
    folder = make_corpus()
    (folder / "shard_00001.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="shard_00001.parquet cannot be read.*Delete it and run: python -m"):
        documents("little", "train")
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="manifest.json is broken"):
        dataset.load_manifest("little")


# -- tokens


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["document after document, and again " * 5, "über alle Dinge, 1 2 3"], 256 + 9 + 20)


def decoded(file, tokenizer):
    offsets = np.load(file.offsets)
    ids = np.fromfile(file.tokens, np.uint16)
    assert offsets.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(ids)
    return [tokenizer.decode(ids[start:end].tolist()) for start, end in zip(offsets, offsets[1:], strict=False)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_tokens_decode_to_the_documents(tokenizer, tmp_path, num_workers):
    make_corpus()
    tokenizer.save(tmp_path / "tokenizer")
    files = dataset.tokenize("little", tmp_path / "tokenizer", num_workers=num_workers)
    train = dataset.token_files("little", tokenizer.fingerprint, "train")
    assert files == train + dataset.token_files("little", tokenizer.fingerprint, "validation")
    assert [text for file in train for text in decoded(file, tokenizer)] == documents("little", "train")
    assert decoded(files[-1], tokenizer) == documents("little", "validation")
    names = {path.name for path in files[0].tokens.parent.iterdir() if not path.name.startswith(".")}
    assert names == {p.name for f in files for p in (f.tokens, f.offsets)} | {"tokenizer.json"}


class Counting:
    """A tokenizer that counts the texts it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode_batch(self, texts, num_threads=8):
        self.texts += len(texts)
        return self.tokenizer.encode_batch(texts, num_threads=num_threads)


def test_each_shard_is_tokenized_once(tokenizer):
    folder = make_corpus()
    counting = Counting(tokenizer)
    dataset.tokenize("little", counting, num_workers=1, limit=1)
    assert counting.texts == 5 + 3
    files = dataset.tokenize("little", counting, num_workers=1)
    assert counting.texts == 12
    # What does not fit its shard is made again: cut short, or of an older shard.
    with open(files[0].tokens, "r+b") as file:
        file.truncate(10)
    dataset.tokenize("little", counting, num_workers=1)
    assert counting.texts == 12 + 5
    later = files[1].offsets.stat().st_mtime_ns + 10**9
    os.utime(folder / "shard_00001.parquet", ns=(later, later))
    with pytest.raises(ValueError, match="dataset tokenize --corpus little"):
        dataset.token_files("little", tokenizer.fingerprint, "train")
    dataset.tokenize("little", counting, num_workers=1)
    assert counting.texts == 17 + 4


def test_partial_token_files_are_ignored(tokenizer):
    make_corpus()
    (entry,) = dataset.load_manifest("little")["shards"][:1]
    file = dataset._token_file("little", tokenizer.fingerprint, entry)
    file.tokens.parent.mkdir(parents=True)
    file.tokens.with_name(file.tokens.name + ".partial").write_bytes(b"half of it")
    file.tokens.write_bytes(b"no offsets: it was interrupted between the two")
    with pytest.raises(ValueError, match="shard_00000.parquet.*no tokens"):
        dataset.token_files("little", tokenizer.fingerprint, "train")
    files = dataset.tokenize("little", tokenizer, split="train", num_workers=1)
    assert decoded(files[0], tokenizer) == documents("little", "train")[:5]


def test_tokens_of_another_number_of_documents_do_not_count(tokenizer):
    folder = make_corpus()
    dataset.tokenize("little", tokenizer, num_workers=1)
    manifest = dataset.load_manifest("little")
    manifest["shards"][0]["documents"] = 4
    paths.write_json(folder / "manifest.json", manifest)
    with pytest.raises(ValueError, match="shard_00000.parquet.*no tokens"):
        dataset.token_files("little", tokenizer.fingerprint, "train")
    with pytest.raises(ValueError, match="has 5 documents, the manifest says 4"):
        dataset.tokenize("little", tokenizer, num_workers=1)


def test_a_broken_shard_is_named_by_the_process_that_reads_it(tokenizer):
    folder = make_corpus()
    (folder / "shard_00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="shard_00001.parquet cannot be read"):
        dataset.tokenize("little", tokenizer, num_workers=2)


def test_shards_are_tokenized_as_they_arrive(tokenizer, monkeypatch):
    make_corpus("ready")
    ready, folder = paths.corpus_dir("ready"), paths.corpus_dir("climbmix")
    manifest = dataset.load_manifest("ready")
    monkeypatch.setattr(corpora, "CLIMBMIX_SHARDS", 3)
    monkeypatch.setattr(corpora, "CLIMBMIX_VALIDATION", "shard_00002.parquet")

    def arrive(count):
        folder.mkdir(parents=True, exist_ok=True)
        for entry in manifest["shards"][-count:]:
            (folder / entry["file"]).write_bytes((ready / entry["file"]).read_bytes())
        paths.write_json(folder / "manifest.json", manifest | {"shards": manifest["shards"][-count:]})

    with pytest.raises(ValueError, match="0 of 3 shards.*python -m nanochat.dataset -n 2"):
        dataset.tokenize_on_arrival("climbmix", tokenizer, 2, poll=0.01, patience=0.05)
    arrive(2)
    threading.Timer(0.3, arrive, (3,)).start()
    files = dataset.tokenize_on_arrival("climbmix", tokenizer, 2, num_workers=1, poll=0.02)
    assert [file.tokens.name for file in files] == [f"shard_0000{i}.bin" for i in range(3)]


# -- the command


def test_the_command_imports_and_tokenizes(tokenizer, texts):
    tokenizer.save(paths.tokenizer_dir("mine-285"))
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "nanochat.dataset"]
    run = {"cwd": root, "capture_output": True, "text": True}
    done = subprocess.run([*command, "import", str(texts), "--name", "mine", "--shard-characters", "150"], **run)
    assert done.returncode == 0 and "65 documents, 5 of them copies" in done.stdout, done.stderr
    done = subprocess.run([*command, "tokenize", "--corpus", "mine", "--vocab-size", "285", "-w", "2"], **run)
    assert done.returncode == 0 and "tok/s" in done.stdout and "token files in" in done.stdout, done.stderr
    assert decoded(dataset.token_files("mine", tokenizer.fingerprint, "train")[0], tokenizer)
    done = subprocess.run([*command, "tokenize", "--corpus", "mine", "--vocab-size", "999"], **run)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("--corpus mine --vocab-size 999")
    assert "Traceback" not in done.stderr


def test_the_command_asks_how_many_shards():
    with pytest.raises(SystemExit):
        dataset.parse_args([])
    args = dataset.parse_args(["-n", "-1", "-w", "2"])
    assert (args.num_files, args.num_workers, args.command) == (-1, 2, None)
    assert dataset.parse_args(["tokenize", "-n", "3"]).limit == 3
