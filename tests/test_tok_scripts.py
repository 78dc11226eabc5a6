"""tok_train writes a tokenizer that tok_eval can judge, with or without the public encodings."""

import json
import random
import subprocess

import pytest

from nanochat import paths
from nanochat.corpora import write_shard
from nanochat.tokenizer import Tokenizer
from scripts import tok_eval, tok_train


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A corpus `toy` of one training and one validation shard."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    rng, folder = random.Random(0), paths.corpus_dir("toy")
    folder.mkdir(parents=True)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(300)]
    shards = []
    for number in range(2):
        texts = [" ".join(rng.choices(words, k=120)) + "." for _ in range(60)]
        shards.append(write_shard(folder / f"shard_{number:05d}.parquet", texts))
    manifest = {
        "name": "toy",
        "source": "test",
        "licence": "none",
        "validation": ["shard_00001.parquet"],
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def stage(name):
    return json.loads((paths.results_dir("toy-400") / f"{name}.json").read_text())


def test_a_tokenizer_is_trained_and_its_compression_compared(corpus, monkeypatch, capsys):
    tok_train.main(tok_train.parse_args(["--corpus", "toy", "--vocab-size", "400", "--max-chars", "20000"]))
    tokenizer = Tokenizer.load(paths.tokenizer_dir("toy-400"))
    trained = stage("tok_train")
    assert trained["vocab_size"] == tokenizer.vocab_size == 400
    assert 20000 <= trained["characters"] < 22000  # ends with the document in which the limit is reached
    assert trained["bytes_per_token"] > 1.2
    assert capsys.readouterr().out.splitlines()[-1].endswith("tokenizer.json")

    monkeypatch.setattr(tok_eval, "public_encoders", lambda: {"gpt2": lambda text: list(text.encode())})
    tok_eval.main(tok_eval.parse_args(["--corpus", "toy", "--vocab-size", "400"]))
    judged = stage("tok_eval")
    assert set(judged["texts"]) == {"news", "code", "mathematics", "science", "korean", "train", "validation"}
    for row in judged["texts"].values():
        assert row["tokens"]["gpt2"] == row["bytes"] >= row["tokens"]["ours"]


def test_without_the_public_encodings_the_evaluation_says_so_and_goes_on(corpus, monkeypatch, capsys):
    def never_answers(command, timeout, **kwargs):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(tok_eval.subprocess, "run", never_answers)
    assert tok_eval.public_encoders() == {}
    offline = subprocess.CompletedProcess([], 1, "", "Traceback\n...\nConnectionError: no route")
    monkeypatch.setattr(tok_eval.subprocess, "run", lambda *args, **kwargs: offline)
    assert tok_eval.public_encoders() == {}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "ConnectionError" in said[1]


def test_a_missing_corpus_or_tokenizer_is_one_line_with_the_command_that_makes_it(corpus):
    with pytest.raises(SystemExit, match="python -m"):
        tok_train.main(tok_train.parse_args(["--corpus", "elsewhere"]))
    with pytest.raises(SystemExit, match=r"python -m scripts\.tok_train --corpus toy --vocab-size 999"):
        tok_eval.main(tok_eval.parse_args(["--corpus", "toy", "--vocab-size", "999"]))
