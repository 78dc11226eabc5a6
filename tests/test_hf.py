"""A Hugging Face model, here GPT-2 small with random weights and a tokenizer of its own, examined by the same code."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_base_eval import model, result, run  # noqa: F401  the fixture makes corpus and bundle

from nanochat import core_eval, paths
from nanochat.core_bundle import load_bundle, read_rows
from nanochat.dataset import iter_documents
from nanochat.runtime import Runtime
from scripts import base_eval

transformers = pytest.importorskip("transformers", reason="the package transformers is missing: pip install -e .[hf]")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    words = ByteLevelBPETokenizer()
    words.train_from_iterator(["Here stands the sentence number one, and others come after it."] * 9, 400)
    words.add_special_tokens(["<|endoftext|>"])
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words._tokenizer, bos_token=end, eos_token=end
    ).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(folder)
    return folder


def test_gpt2_is_examined_with_its_own_tokenizer(model, gpt2):  # noqa: F811
    run("--hf-path", str(gpt2), "--bundle", "eval_bundle_toy", "--corpus", "toy", "--split-tokens", "500")
    found = result(str(gpt2).strip("/").replace("/", "--"))

    body = transformers.AutoModelForCausalLM.from_pretrained(gpt2).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    bos = tokenizer.bos_token_id

    @torch.no_grad()
    def losses(ids):
        logits = body(torch.tensor([ids])).logits[0]
        return F.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:]), reduction="none"), logits.argmax(-1)

    nats = size = tokens = 0
    for text in iter_documents("toy", "validation"):
        ids = tokenizer(text)["input_ids"]
        nats, size, tokens = nats + float(losses([bos, *ids])[0].sum()), size + len(text.encode()), tokens + len(ids)
        if tokens >= 500:
            break
    assert found["bpb"]["val"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)

    for task in load_bundle(paths.eval_bundle_dir("eval_bundle_toy")):
        rows, hits = read_rows(task), 0
        for i, row in enumerate(rows):
            prompts = core_eval.render(task, row, core_eval.shots_of(rows, i, task.shots))
            spans = core_eval.spans(task, [[bos, *tokenizer(text)["input_ids"]] for text in prompts])
            scores = [losses(span.ids) for span in spans]
            if task.kind == "language_modeling":
                ((_, best),) = scores
                (span,) = spans
                hits += best[span.start - 1 : span.end - 1].tolist() == span.ids[span.start : span.end]
            else:
                means = [float(each[span.start - 1 :].mean()) for (each, _), span in zip(scores, spans, strict=True)]
                hits += core_eval.first_lowest(means) == row["gold"]
        assert found["core"]["tasks"][task.label]["accuracy"] == pytest.approx(hits / len(rows))
    assert re.fullmatch(r"[\w.-]+", found["model"]) and json.dumps(found)


def test_rotary_positions_stay_exact_in_bfloat16(gpt2, tmp_path):
    shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=400)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(gpt2).save_pretrained(tmp_path)
    foreign, _ = base_eval.load_foreign(str(tmp_path), Runtime(torch.device("cpu"), torch.bfloat16))
    assert foreign.model.dtype == torch.bfloat16
    assert foreign.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_without_a_corpus_the_rest_is_examined_and_a_line_says_so(model, gpt2, capsys):  # noqa: F811
    run("--hf-path", str(gpt2), "--bundle", "eval_bundle_toy")
    found = result(str(gpt2).strip("/").replace("/", "--"))
    assert "bpb" not in found and "core" in found
    assert "name one of your own with --corpus" in capsys.readouterr().out


def test_a_tokenizer_without_marks_is_an_error():
    with pytest.raises(ValueError, match="neither a beginning nor an end mark"):
        base_eval.ForeignTokenizer(SimpleNamespace(bos_token_id=None, eos_token_id=None))


def test_a_path_without_a_model_is_one_line(model, tmp_path):  # noqa: F811
    with pytest.raises(SystemExit, match="no model could be loaded"):
        run("--hf-path", str(tmp_path))
