"""Models in and out by the command, end to end: public run -> ours -> Hugging Face folder -> ours."""

from pathlib import Path

import pytest
import torch
from helpers import CPU
from safetensors.torch import load_file

from nanochat import checkpoint, paths
from scripts import convert

PUBLIC = Path(__file__).parent / "data" / "public"


def run(*words):
    convert.main(convert.parse_args([str(word) for word in words]))


def test_the_round_trip_keeps_logits_weights_and_ids(base_dir, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip(
        "transformers", reason="the package transformers is missing: pip install -e .[hf]"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    golden = load_file(PUBLIC / "expected.safetensors")
    idx, logits = golden["idx"], golden["logits"]

    run("import", PUBLIC / "run")
    assert "base model d2, step 30, tokenizer climbmix-600" in capsys.readouterr().out
    model, tokenizer, meta = checkpoint.load_model("base", CPU, "d2")
    with torch.no_grad():
        assert (model(idx) - logits).abs().max() <= 1e-5

    folder = tmp_path / "out"
    run("export", folder, "-i", "base", "-g", "d2")
    assert "trust_remote_code=True" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        assert (theirs(idx).logits - logits).abs().max() <= 1e-5
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())  # to be shared

    run("import", folder, "--model-tag", "back")
    again, tokenizer_again, meta_again = checkpoint.load_model("base", CPU, "back")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert tokenizer_again.fingerprint == tokenizer.fingerprint and meta_again["step"] == meta["step"] == 30


@pytest.mark.parametrize(
    "words, said",
    [
        (["import", "nowhere"], "no public run under nowhere"),
        (["import", PUBLIC / "expected.json"], "no public run under"),
        (["import", PUBLIC / "run", "--model-tag", "a/b"], "named by letters, digits"),
        (["import", PUBLIC / "run", "-i", "sft"], "has no sft"),
        (["export", "out", "-i", "base", "-g", "d9"], "no base model with tag 'd9'"),
    ],
)
def test_a_mistake_gets_one_clear_line_and_leaves_nothing(base_dir, words, said):
    with pytest.raises(SystemExit, match=said) as refused:
        run(*words)
    assert "\n" not in str(refused.value)
    assert not (base_dir / "base_checkpoints").exists() or not any((base_dir / "base_checkpoints").iterdir())


def test_a_folder_of_one_model_takes_no_choice_and_an_old_export_stays(base_dir, tmp_path):
    run("import", PUBLIC / "run")
    run("export", tmp_path / "out", "-i", "base")
    with pytest.raises(SystemExit, match="holds one model"):
        run("import", tmp_path / "out", "-i", "sft")
    with pytest.raises(SystemExit, match="--force"):
        run("export", tmp_path / "out", "-i", "base")
    run("export", tmp_path / "out", "-i", "base", "--force")
    with pytest.raises(SystemExit, match="is here already"):
        run("import", PUBLIC / "run")
    assert checkpoint.list_steps(paths.checkpoint_dir("base", "d2")) == [30]
