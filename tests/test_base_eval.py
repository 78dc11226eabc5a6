"""base_eval examines a checkpoint, or a foreign model called as ours is, and leaves one JSON."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import save_checkpoint

from nanochat import paths, runtime
from nanochat.corpora import write_shard
from nanochat.dataset import tokenize
from nanochat.gpt import GPTConfig, build_model
from nanochat.tokenizer import Tokenizer
from scripts import base_eval

BUNDLE = {
    "multiple_choice": [{"query": f"{i} is", "choices": ["odd", "even"], "gold": 1 - i % 2} for i in range(6)],
    "language_modeling": [{"context": f"one two {i}", "continuation": "three"} for i in range(6)],
}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A random model `d1` with its tokenizer, a corpus, and a bundle in the base folder."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = paths.corpus_dir("toy")
    folder.mkdir(parents=True)
    texts = [f"Here stands the sentence number {i}, and {i + 1} comes after it. Then come others." for i in range(90)]
    shards = [write_shard(folder / f"shard_{n:05d}.parquet", texts[n::2]) for n in range(2)]
    manifest = {"name": "toy", "source": "test", "licence": "none", "validation": ["shard_00001.parquet"]}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"shards": shards}))
    tokenizer = Tokenizer.train(texts, 320)
    tokenizer.save(paths.tokenizer_dir("toy-320"))
    tokenize("toy", tokenizer, None, num_workers=1, progress=False)

    config = GPTConfig(sequence_len=64, vocab_size=320, n_layer=1, n_head=2, n_kv_head=2, n_embd=64)
    machine = runtime.start("cpu")
    meta = {
        "stage": "base", "tag": "d1", "model_config": vars(config), "corpus": "toy",
        "shards": ["shard_00000.bin"],
        "tokenizer": {"name": "toy-320", "fingerprint": tokenizer.fingerprint},
    }  # fmt: skip
    save_checkpoint(paths.checkpoint_dir("base", "d1"), 7, build_model(config, machine), None, meta, machine)

    bundle = paths.eval_bundle_dir("eval_bundle_toy")
    (bundle / "eval_data").mkdir(parents=True)
    tasks = [
        {"label": kind, "dataset_uri": f"{kind}.jsonl", "num_fewshot": [2], "icl_task_type": kind} for kind in BUNDLE
    ]
    (bundle / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nmultiple_choice,50\nlanguage_modeling,0\n")
    for kind, rows in BUNDLE.items():
        (bundle / "eval_data" / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tokenizer


def run(*flags):
    base_eval.main(base_eval.parse_args(["--device-type", "cpu", "--split-tokens", "640", *flags]))


def result(tag):
    return json.loads((paths.results_dir(tag) / "base_eval.json").read_text())


def test_all_three_kinds_end_in_one_json(model, capsys):
    run("--bundle", "eval_bundle_toy", "--device-batch-size", "4")
    found = result("d1")
    assert found["step"] == 7
    for split in ("train", "val"):
        # untrained: every token costs about ln(vocabulary), a token being 1 to 4 bytes here
        assert math.log2(320) / 4 < found["bpb"][split] < math.log2(320) * 1.2
    assert set(found["core"]["tasks"]) == set(BUNDLE)
    assert found["core"]["bundle"] == "eval_bundle_toy"
    assert "references" not in found["core"]
    assert len(found["samples"]["prompted"]) == 7
    assert len(found["samples"]["unconditioned"]) == 8
    assert "CORE" in capsys.readouterr().out


def test_only_what_is_asked_for_is_evaluated(model):
    run("--eval", "bpb")
    assert "core" not in result("d1")
    assert "samples" not in result("d1")
    for wrong in (["--eval", "bpd"], ["--max-per-task", "0"]):
        with pytest.raises(SystemExit):
            base_eval.parse_args(wrong)


def test_a_missing_model_or_bundle_is_one_line(model):
    with pytest.raises(SystemExit, match="d99"):
        run("--model-tag", "d99")
    with pytest.raises(SystemExit, match="no evaluation bundle 'elsewhere'"):
        run("--eval", "core", "--bundle", "elsewhere")


def test_hf_path_without_transformers_is_one_line(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install 'transformers"):
        run("--hf-path", "some/model")


class ForeignBody(torch.nn.Module):
    """Says the same of every token: log2(320) bits each."""

    class config:
        vocab_size, max_position_embeddings = 320, 32

        @classmethod
        def get_text_config(cls):
            return cls

    def forward(self, input_ids, use_cache):
        assert input_ids.size(1) <= 32
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 320))


class ForeignWords:
    bos_token_id, eos_token_id = None, 319

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [self.tokenizer.encode(text) for text in texts]}


def test_a_foreign_model_is_examined_within_its_length_with_true_byte_counts(model, monkeypatch):
    foreign = base_eval.ForeignModel(ForeignBody()), base_eval.ForeignTokenizer(ForeignWords(model))
    monkeypatch.setattr(base_eval, "load_foreign", lambda path, machine: foreign)
    run("--hf-path", "some/model", "--bundle", "eval_bundle_toy", "--corpus", "toy", "--split-tokens", "100000")
    found = result("some--model")
    texts = list(base_eval.iter_documents("toy", "validation"))
    tokens, size = sum(len(model.encode(text)) for text in texts), sum(len(text.encode()) for text in texts)
    assert found["bpb"]["val"] == pytest.approx(tokens * math.log2(320) / size)
    assert found["core"]["tasks"]["language_modeling"]["accuracy"] == 0
    assert "samples" not in found
